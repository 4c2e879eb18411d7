"""Curves of training: smoothing as in figure 1, findings as marks, panels for what is known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from ttl_utils import figures_pretraining as fp
from ttl_utils.health import Finding

LAST = 100_000


def rows(count: int = 50, tokens: int = LAST, **more: float) -> list[dict]:
    """A loss that falls from 8 to 3."""
    records = [{"step": 0, "tokens": 0, "validation_loss": 8.0, "perplexity": math.exp(8), "energy_kwh": 0.0}]
    for number in range(1, count + 1):
        seen, loss = tokens * number // count, 3 + 5 * math.exp(-8 * number / count)
        records.append({"step": 10 * number, "tokens": seen, "loss": loss, "learning_rate": 1e-3, **more})
        records[-1] |= {"tokens_per_second": 1000.0, "energy_kwh": number * 1e-4}
    return records + [{**records[0], "step": 10 * count, "tokens": tokens, "validation_loss": 3.2, "perplexity": 24.5}]


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    warm = SimpleNamespace(warmup_steps=10)
    return SimpleNamespace(name="mine", figures=tmp_path, params=SimpleNamespace(pretraining=warm, chat=warm))


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, not written as pictures, which takes longest."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def curve(records: list[dict], found: list[Finding] = ()) -> Figure:
    return fp.loss_curve(fp.with_findings(records, found), "x")


def found(*kinds: tuple[str, int]) -> list[Finding]:
    return [Finding(kind, step, step * LAST // 500, "evidence") for kind, step in kinds]


def labels(axes: plt.Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# smoothing

increasing = st.lists(st.integers(1, 1000), min_size=1, max_size=40).map(lambda gaps: np.cumsum(gaps))
losses = st.floats(0.1, 20)


def test_the_window_is_figure_1_s_or_that_share_of_a_shorter_run() -> None:
    assert [fp.smoothing_window(steps) for steps in (458_000, 1_200_000, 229_000)] == [50_000, 50_000, 25_000]
    assert [fp.smoothing_window(steps) for steps in (1000, 2, 1)] == [109, 1, 1]


@given(increasing, losses, st.integers(1, 5000))
def test_a_constant_stays_constant(steps: np.ndarray, level: float, window: int) -> None:
    assert fp.smoothed(steps, [level] * len(steps), window) == pytest.approx(level)


@given(st.data(), increasing, st.integers(1, 5000))
def test_a_mean_lies_between_the_least_and_the_most(data: st.DataObject, steps: np.ndarray, window: int) -> None:
    values = data.draw(st.lists(losses, min_size=len(steps), max_size=len(steps)))
    smoothed = fp.smoothed(steps, values, window)
    assert len(smoothed) == len(steps)
    assert (smoothed >= min(values) - 1e-9).all() and (smoothed <= max(values) + 1e-9).all()


@given(st.lists(losses, min_size=2, max_size=30), st.integers(1, 100), st.integers(0, 10**6))
def test_a_window_of_one_record_changes_nothing_wherever_a_run_begins(values: list, window: int, start: int) -> None:
    steps = 10 * np.arange(1, len(values) + 1)
    assert fp.smoothed(steps, values, min(window, 10)) == pytest.approx(values)
    assert fp.smoothed(start + steps, values, window) == pytest.approx(fp.smoothed(steps, values, window), rel=1e-6)


def test_the_window_is_centred_and_cut_at_the_ends() -> None:
    values = np.array([9.0, 1, 4, 7, 2, 8, 5])
    steps = 10 * np.arange(1, 8)
    three = fp.smoothed(steps, values, 30)
    assert three[1:-1] == pytest.approx([values[n - 1 : n + 2].mean() for n in range(1, 6)])
    # what there is of the window: half of it and the middle
    assert (three[0], three[-1]) == pytest.approx((5.0, 6.5))
    # a window that cuts a record takes that part of it
    assert fp.smoothed(steps, values, 20)[3] == pytest.approx((4 / 2 + 7 + 2 / 2) / 2)
    # centred: a straight line stays where it is, and nothing moves to the right
    line = np.arange(7.0)
    assert fp.smoothed(steps, line, 30)[1:-1] == pytest.approx(line[1:-1])
    assert fp.smoothed(steps, line[::-1], 50) == pytest.approx(fp.smoothed(steps, line, 50)[::-1])


def test_records_count_by_the_steps_they_stand_for() -> None:
    # 10 steps of 1, then a record of 2 steps, as at a run's end
    assert fp.smoothed([10, 20, 22], [1.0, 1.0, 7.0], 100)[-1] == pytest.approx((20 * 1 + 2 * 7) / 22)


def test_few_records_are_smoothed_too() -> None:
    assert fp.smoothed([], [], 5).tolist() == [] and fp.smoothed([7], [2.5], 5).tolist() == [2.5]


# the figures


def test_the_loss_is_saved_with_its_data_and_the_findings(run: SimpleNamespace) -> None:
    records = [*rows(), {"step": 505, "tokens": LAST + 1000, "not_finite": "loss", "energy_kwh": 1.0}]
    fp.loss(run, records, vocab_size=4096)
    assert {path.name for path in run.figures.iterdir()} == {f"03_loss.{kind}" for kind in ("png", "svg", "pdf", "csv")}
    data = pd.read_csv(run.figures / "03_loss.csv")
    assert len(data) == len(records) + 1 and data.loss.notna().sum() == 50
    last = data.iloc[-1]
    assert (last.finding, last.step, last.evidence) == ("not_finite", 505, "loss")


@pytest.mark.parametrize(("tokens", "published"), [(2_000_000, 0), (900_000_000, 2), (10_000_000_000, 16)])
def test_published_points_are_shown_where_ours_reach(
    run: SimpleNamespace, unsaved: None, tokens: int, published: int
) -> None:
    for figure, column in (
        (fp.loss(run, rows(tokens=tokens)), "loss"),
        (fp.perplexity(run, rows(tokens=tokens)), "perplexity"),
    ):
        left, right = figure.axes
        points = [line for line in left.lines if line.get_label().endswith("published")]
        assert sum(len(line.get_xdata()) for line in points) == published, column
        # and all of them beside it
        assert sum(len(line.get_xdata()) for line in right.lines if "evaluation" in line.get_label()) == 16


def test_panels_are_drawn_for_what_the_records_have(run: SimpleNamespace, unsaved: None) -> None:
    shown = [axes.get_title(loc="left") for axes in fp.speed(run, rows()).axes]
    assert shown == ["Learning rate", "Tokens per second", "Energy so far (Wh)"]
    # null: an unknown device
    assert len(fp.speed(run, rows(share_of_peak=None)).axes) == 3
    meters = {"share_of_peak": 0.4, "gpu_memory_gib": 3.0, "gpu_power_w": 250.0, "gpu_temperature_c": 60.0}
    shown = [axes.get_title(loc="left") for axes in fp.speed(run, rows(**meters, data_share=0.0)).axes]
    assert len(shown) == 8 and shown[-3:] == ["GPU memory (GiB)", "GPU power (W)", "GPU temperature (°C)"]
    data = pd.read_csv(run.figures / "03_speed.csv")
    assert {"step", "tokens", *meters} <= set(data) and data.gpu_power_w.dropna().tolist() == [250.0] * 50


def test_the_scale_is_logarithmic_where_the_loss_explodes() -> None:
    assert curve(rows()).axes[0].get_yscale() == "linear"
    records = rows()
    records[30]["loss"] = 900.0
    assert curve(records).axes[0].get_yscale() == "log"
    # what is no number is not drawn
    records[30]["loss"] = math.inf
    records[31]["loss"] = math.nan
    (training, _) = curve(records).axes[0].lines
    assert len(training.get_xdata()) == 48
    plt.close("all")


@pytest.mark.parametrize("records", [rows()[:1], rows()[1:2], [{"step": 0, "tokens": 0, "stalled_s": 99.0}]])
def test_short_and_odd_records_are_drawn(run: SimpleNamespace, unsaved: None, records: list) -> None:
    marks = found(("stalled", 0), ("not_finite", 0))
    curve(records, marks).draw_without_rendering()
    fp.loss(run, records)
    plt.close("all")
    assert pd.read_csv(run.figures / "03_loss.csv").step.tolist()[0] == records[0]["step"]


# findings


def test_a_finding_is_a_mark_on_the_curve_with_its_step_and_a_name_in_the_legend() -> None:
    marks = found(("loss_spike", 100), ("divergence", 300))
    figure = curve(rows(), marks)
    axes = figure.axes[0]
    assert labels(axes) == ["training", "validation", "loss spike", "divergence"]
    training, _, first, second = axes.lines
    for line, one in ((first, marks[0]), (second, marks[1])):
        (place,), (height,) = line.get_data()
        assert place == one.tokens and height == np.interp(place, *training.get_data())
    assert first.get_marker() != second.get_marker() and first.get_color() != second.get_color()
    assert [text.get_text() for text in axes.texts] == ["step 100", "step 300"]
    plt.close(figure)


def test_many_findings_stay_readable() -> None:
    rng = np.random.default_rng(0)
    kinds = ("loss_spike", "loss_spread", "divergence", "stalled", "low_utilisation", "slow_data", "perplexity_rise")
    marks = found(*((kinds[n % 5], int(step)) for n, step in enumerate(rng.integers(1, 500, 150))))
    marks += found(("slow_data", 250), ("perplexity_rise", 250))
    for log in (False, True):
        records = rows()
        records[25]["loss"] = 1e4 if log else records[25]["loss"]
        figure = curve(records, marks)
        figure.canvas.draw()
        axes = figure.axes[0]
        # every finding is in the legend, counted
        counted = [f"{kind.replace('_', ' ')} (30)" for kind in kinds[:5]]
        assert sorted(labels(axes)[2:]) == sorted([*counted, "slow data", "perplexity rise"])
        boxes = [Text.get_window_extent(text).shrunk(0.98, 0.98) for text in axes.texts]
        # the first of a kind has its label, and no label covers another, the curve or the legend
        assert len(boxes) >= 7 and [text.get_text() for text in axes.texts].count("step 250") == 2
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])
            assert not box.overlaps(axes.get_legend().get_window_extent())
        highest = max(axes.transData.transform((0, record["loss"]))[1] for record in records if "loss" in record)
        assert min(box.y0 for box in boxes) >= highest
        assert max(box.y1 for box in boxes) <= axes.get_window_extent().y1 + 1
        # symbols of a kind keep their distance, those of other kinds at one step stand above each other
        width = axes.get_window_extent().width
        places = [(line.get_color(), *line.get_transform().transform(line.get_xydata()[0])) for line in axes.lines[2:]]
        for number, (colour, x, y) in enumerate(places):
            for other, x_there, y_there in places[:number]:
                assert colour != other or abs(x - x_there) >= 0.024 * width * 0.9
                assert abs(x - x_there) > 1 or abs(y - y_there) >= 5
        plt.close(figure)


# live


class Display:
    """Stands in for a notebook's display: what was shown, and how often it was updated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.shown, self.updated, self.clock = [], [], 1000.0
        monkeypatch.setattr(fp, "in_notebook", lambda: True)
        monkeypatch.setattr(fp.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(IPython.display, "display", self.display)

    def display(self, figure: Figure, display_id: bool) -> Display:
        self.shown.append(figure)
        return self

    def update(self, figure: Figure) -> None:
        self.updated.append(figure)


def test_a_live_curve_updates_in_place_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    plt.close("all")
    display, live, records = Display(monkeypatch), fp.LiveCurve("x", 4096, 10), rows()
    for end in range(2, 12):
        live(records[:end])
    assert (len(display.shown), len(display.updated)) == (1, 0)
    display.clock += 6
    live(records[:13])
    assert (len(display.shown), len(display.updated)) == (1, 1)
    # an evaluation, a stall and a stop are shown at once, with their mark
    for more in ({"validation_loss": 4.0}, {"stalled_s": 60.0}, {"not_finite": "loss"}):
        records = [*records[:13], {"step": 125, "tokens": records[12]["tokens"] + 1, **more}]
        live(records)
    assert len(display.updated) == 4
    assert [labels(figure.axes[0])[2:] for figure in display.updated[1:]] == [[], ["stalled"], ["not finite"]]
    assert not plt.get_fignums()


def test_a_live_curve_draws_nothing_outside_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp, "loss_curve", None)
    fp.LiveCurve("x")(rows())
