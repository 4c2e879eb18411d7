"""Every figure: drawn from its saved data alone, in two languages, for a column and a page; faults of the data."""

from __future__ import annotations

import ast
import csv
import itertools
import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import ttl_utils
from tests.figure_samples import records, samples
from ttl_utils import figures, figures_chat, figures_pretraining, filters, health, redraw  # noqa: F401
from ttl_utils.commands import main
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.privacy import KINDS

SAMPLES = samples()
PACKAGE = Path(ttl_utils.__file__).parent
figures.load_all()


def texts(figure: Figure) -> list[Text]:
    """What stands in it to be read; ticks beyond the axes are kept by matplotlib, and hidden."""
    found = []
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            found.append(text)
    hidden = {
        label
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not low <= tick.get_loc() <= high
        for label in (tick.label1, tick.label2)
    }
    hidden |= {
        tick.label2
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
    }
    return [text for text in found if text not in hidden]


def words(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in texts(figure)]


@pytest.fixture
def only_svg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kinds of file take thrice as long."""
    save = Figure.savefig

    def quick(self: Figure, file, format: str, **more) -> None:
        # the first picture lays the figure out
        self.draw_without_rendering() if format == "png" else None
        save(self, file, format=format, **more) if format == "svg" else file.write(b"picture")

    monkeypatch.setattr(Figure, "savefig", quick)


def test_every_figure_has_a_sample() -> None:
    assert set(SAMPLES) == set(figures.DRAWN), "add its data to tests/figure_samples.py"


@pytest.mark.parametrize("name", ["06_energy", "04_scores"])
def test_the_saved_data_draw_the_same_figure_to_the_byte(name: str, tmp_path: Path, only_svg: None) -> None:
    # what a file does not hold, as an index, cannot matter
    data = SAMPLES[name].set_axis(range(100, 100 + len(SAMPLES[name])))
    figure = figures.draw_in(tmp_path, name, data)
    assert not plt.get_fignums()
    _, pictures = figures.drawn(name, redraw.read_data(tmp_path / f"{name}.csv"))
    assert pictures["svg"] == (tmp_path / f"{name}.svg").read_bytes()
    assert words(figure)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_saved_data_are_those_that_are_drawn(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(figures, "drawn", lambda name, data: seen.append(data) or (None, {}))
    figures.draw_in(tmp_path, name, SAMPLES[name].set_axis(range(100, 100 + len(SAMPLES[name]))))
    saved = tmp_path / f"{name}.csv"
    assert redraw.read_data(saved).equals(seen[0]) and len(seen[0]) == len(SAMPLES[name])
    # and are saved as the same file again
    assert redraw.read_data(saved).to_csv(index=False) == saved.read_text()


@pytest.mark.parametrize("name", SAMPLES)
def test_in_portuguese_for_a_column_everything_is_translated_and_readable(name: str) -> None:
    with figures.style_of("pt", "column"):
        figure = figures.DRAWN[name](SAMPLES[name])
        figures._finish(figure)
        figure.draw_without_rendering()
        plt.close(figure)
        shown = texts(figure)
        english = {row[0] for row in csv.reader((PACKAGE / "labels_pt.csv").open()) if row[0] != row[1]}
        for text in words(figure):
            assert text not in english
            # a decimal point, not one of thousands, of a parameter's value or of a device's name
            assert not re.search(r"(?<![\d=.])\d+\.\d{1,2}(?!\d)", text), text
        assert figure.get_figwidth() == pytest.approx(8.6 / 2.54)
        for text in shown:
            assert text.get_fontsize() >= 7, text
            # of the words, without an arrow
            box = Text.get_window_extent(text)
            assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, text
            assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, text
        for one, other in itertools.combinations(shown, 2):
            box, there = Text.get_window_extent(one), Text.get_window_extent(other)
            overlap = min(box.x1, there.x1) - max(box.x0, there.x0), min(box.y1, there.y1) - max(box.y0, there.y0)
            # within a point or so of each other is no overlap to the eye
            assert min(overlap) < 2, (one, other)
        for axes in figure.axes:
            bars = [bar.get_window_extent() for bar in axes.patches if bar.get_width() and bar.get_height()]
            for text in axes.get_legend().get_texts() if axes.get_legend() else ():
                assert not any(text.get_window_extent().overlaps(bar) for bar in bars), text


@pytest.mark.parametrize("name", ["03_loss", "04_perplexity", "03_search", "01_flow"])
def test_on_a_page_panels_stand_beside_each_other(name: str, only_svg: None) -> None:
    count = {"01_flow": 1}.get(name, 2)
    for width, beside in (("page", count), ("column", 1)):
        with figures.style_of("en", width):
            figure, _ = figures.drawn(name, SAMPLES[name])
        assert figure.get_figwidth() == pytest.approx(figures.WIDTHS[width] / 2.54)
        assert len({round(axes.get_position().x0, 2) for axes in figure.axes}) == beside
        # a bar's label may be as wide as it likes, a title not
        for axes in figure.axes:
            assert axes._left_title.get_window_extent().x1 <= figure.bbox.width + 1
            assert len(axes.get_xticks()) >= 2


def test_four_files_of_the_asked_size(tmp_path: Path) -> None:
    figures.draw_in(tmp_path, "06_forecast", SAMPLES["06_forecast"])
    assert {path.name for path in tmp_path.iterdir()} == {
        f"06_forecast.{kind}" for kind in ("png", "svg", "pdf", "csv")
    }
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    figures.draw_in(tmp_path, "06_forecast", SAMPLES["06_forecast"])
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(redraw.redraw(tmp_path, "pt", "column")) == 3
    with Image.open(tmp_path / "pt-column" / "06_forecast.png") as picture:
        assert picture.width == pytest.approx(8.6 / 2.54 * 300, abs=1)
    assert (tmp_path / "pt-column" / "06_forecast.pdf").read_bytes().startswith(b"%PDF")
    # only there: what the notebook made stands as it was
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


# labels and numbers


def test_every_label_in_the_code_has_its_portuguese() -> None:
    with figures.style_of("pt"):
        for path in sorted(PACKAGE.glob("figures*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "label"
                if called and isinstance(node.args[0], ast.Constant):
                    assert figures.label(node.args[0].value), node.args[0].value
        for word in (*figures_pretraining.PANELS.values(), *filters.REASONS, *(f"personal data ({k})" for k in KINDS)):
            assert figures.label_of_data(word)
        source = Path(health.__file__).read_text(encoding="utf-8")
        for kind in set(re.findall(r'_judge\(\s*"(\w+)"|_hold\(\s*"(\w+)"', source)):
            assert figures.label(next(filter(None, kind)).replace("_", " "))


def test_labels_are_told_once_with_the_same_places() -> None:
    rows = list(csv.DictReader((PACKAGE / "labels_pt.csv").open(encoding="utf-8")))
    assert len({row["english"] for row in rows}) == len(rows)
    for row in rows:
        assert row["portuguese"].strip() and row["english"].count("{}") == row["portuguese"].count("{}"), row


def test_a_label_without_portuguese_is_an_error_that_names_it() -> None:
    assert figures.label("no such {}", "word") == "no such word"
    with figures.style_of("pt"), pytest.raises(TTLError, match="'no such {}'.*labels_pt.csv"):
        figures.label("no such {}", "word")
    assert figures.label("tokens seen") == "tokens seen"


def test_numbers_of_both_languages() -> None:
    ticks = (0, 0.5, 999, 1000, 1500, 1_500_000, 10_000_000_000, -2000)
    assert [figures.thousands(value, 0) for value in ticks] == ["0", "0.5", "999", "1k", "1.5k", "1.5M", "10B", "-2k"]
    with figures.style_of("pt"):
        asked = ["0", "0,5", "999", "1 mil", "1,5 mil", "1,5 mi", "10 bi", "-2 mil"]
        assert [figures.thousands(value, 0) for value in ticks] == asked
        assert (figures.percent(0.125, 0), figures.whole(7400, 0)) == ("12,5%", "7.400")
        assert figures.label_of_data("step 1,200 of 2,000") == "passo 1.200 de 2.000"
        assert figures.label_of_data("duplicate 5-grams") == "5-gramas repetidos"


@given(st.floats(-1e9, 1e9))
def test_a_portuguese_number_is_the_english_one_with_other_signs(value: float) -> None:
    english = figures.number(value, ",.2f")
    with figures.style_of("pt"):
        portuguese = figures.number(value, ",.2f")
    assert portuguese.replace(".", "").replace(",", ".") == english.replace(",", "")


def test_a_style_ends_with_its_block_also_after_an_error() -> None:
    before = dict(plt.rcParams)
    with pytest.raises(ValueError), figures.style_of("pt", "column"):
        assert plt.rcParams["font.size"] == 7
        raise ValueError
    assert dict(plt.rcParams) == before and figures.number(0.5) == "0.5"


# colours


def seen(colour: str, matrix: np.ndarray) -> np.ndarray:
    """CIE Lab of a colour as seen with a colour vision that the matrix (linear RGB) describes."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(matrix @ linear, 0, 1) / [0.9505, 1, 1.089], 0.0089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado et al. 2009, severity 1
VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_lines_differ_for_every_colour_vision(vision: str) -> None:
    matrix = np.array(VISION[vision])
    for one, other in itertools.combinations(figures.COLOURS[:6], 2):
        assert np.linalg.norm(seen(one, matrix) - seen(other, matrix)) > 11, (one, other)
    # ours and the paper's, which stand beside each other most, at a glance
    assert np.linalg.norm(seen(figures.OURS, matrix) - seen(figures.PAPER, matrix)) > 40


def test_lines_differ_without_any_colour() -> None:
    assert len({line["marker"] for line in figures.LINES}) == len(figures.LINES) == 8
    for one, other in itertools.pairwise(figures.LINES):
        assert one["ls"] != other["ls"]


@pytest.mark.parametrize("name", ["01_toxicity", "04_checkpoints", "curves", "03_loss", "03_perplexity"])
def test_lines_of_a_panel_differ_in_grey(name: str, only_svg: None) -> None:
    figure, _ = figures.drawn(name, SAMPLES[name])
    for axes in figure.axes:
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        looks = {(line.get_linestyle(), line.get_marker()) for line in lines}
        assert len(looks) == len(lines), [line.get_label() for line in lines]


# drawn anew, and what may be wrong


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_svg: None) -> Path:
    """The figures' folder of a run with two figures' data."""
    monkeypatch.setenv("TTL_OUTPUTS", str(tmp_path))
    folder = tmp_path / "reference" / "nano" / "figures"
    folder.mkdir(parents=True)
    for name in ("03_perplexity", "04_scores"):
        SAMPLES[name].to_csv(folder / f"{name}.csv", index=False)
    return folder


def made(run: Path) -> list[str]:
    return sorted(path.name for path in run.rglob("*") if path.suffix != ".csv")


def test_a_run_is_drawn_anew_from_its_data_alone(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["figures", "reference/nano", "--language", "pt", "--width", "page"]) == 0
    assert f"2 figures as PNG, SVG and PDF in {run / 'pt-page'}" in capsys.readouterr().out
    assert len(made(run)) == 7
    assert "perplexidade" in (run / "pt-page" / "03_perplexity.svg").read_text()
    # again over the same: nothing more
    assert main(["figures", "reference/nano", "--language", "pt", "--width", "page"]) == 0
    assert len(made(run)) == 7


DAMAGE = {
    "cut in a line": lambda text: text[:-9].encode(),
    "cut in a number": lambda text: text[:-3].encode(),
    "cut after a field": lambda text: (text + "trust,68.1\n").encode(),
    "no text": lambda text: b"\xff\xfe\x00",
    "empty": lambda text: b"",
    "an open quote": lambda text: text.replace("some_task", '"some_task').encode(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_not_read(run: Path, damage: str) -> None:
    path = run / "04_scores.csv"
    path.write_bytes(DAMAGE[damage](path.read_text()))
    with pytest.raises(DamagedFile, match=r"04_scores\.csv is damaged"):
        redraw.read_data(path)


def test_all_damaged_data_are_named_together_and_nothing_is_written(run: Path, capsys: pytest.CaptureFixture) -> None:
    SAMPLES["06_forecast"].to_csv(run / "06_forecast.csv", index=False)
    for name, change in (("04_scores", ("29.17", "much")), ("03_perplexity", ("perplexity", "bewilderment"))):
        path = run / f"{name}.csv"
        path.write_text(path.read_text().replace(*change))
    (run / "06_forecast.csv").write_text("share\n0.")
    assert main(["figures", "reference/nano"]) == 1
    told = capsys.readouterr().err
    assert all(str(run / f"{name}.csv") in told for name in ("03_perplexity", "04_scores", "06_forecast"))
    assert "a line of it was cut" in told and "Traceback" not in told
    assert made(run) == [] and not plt.get_fignums()


def test_data_of_no_known_figure_are_named(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "09_mine.csv").write_text("a,b\n1,2\n")
    assert main(["figures", "reference/nano"]) == 1
    assert "data of no figure known here: 09_mine.csv" in capsys.readouterr().err and made(run) == []


def test_no_run_and_no_figures(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["figures", "nano"]) == 1
    assert "there is no run 'nano'" in (told := capsys.readouterr().err) and "reference/nano" in told
    for path in run.glob("*.csv"):
        path.unlink()
    assert main(["figures", "reference/nano"]) == 1
    assert f"{run} has no figure's data" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(redraw, "write_bytes", full)
    with pytest.raises(OSError):
        redraw.redraw(run, "en", "column")
    assert made(run) == []


# what is not a number, and words that look like missing values


def test_words_that_look_like_missing_values_stay_words(tmp_path: Path, only_svg: None) -> None:
    rows = SAMPLES["04_scores"].assign(task=["NA", "null"])
    assert {"NA", "null"} <= set(words(figures.draw_in(tmp_path, "04_scores", rows)))
    assert redraw.read_data(tmp_path / "04_scores.csv").task.tolist() == ["NA", "null"]


def test_a_run_without_an_evaluation_or_a_finite_loss_is_drawn(tmp_path: Path, only_svg: None) -> None:
    odd = [{**row, "loss": math.inf} for row in records()[1:3]]
    run = type("Run", (), {"name": "7", "figures": tmp_path})
    run.params = type("P", (), {"pretraining": type("W", (), {"warmup_steps": 0})})
    assert "Ours (7)" in words(figures_pretraining.loss(run, odd))
    figures_pretraining.perplexity(run, records())
    assert "Ours (7)" in words(figures.drawn("03_perplexity", redraw.read_data(tmp_path / "03_perplexity.csv"))[0])


# every row has a word that is none of a number, so that its column stays one of words
words_of_data = st.text("aé,\"' NA\n0.", min_size=1).map(lambda text: f"x{text}")


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), words_of_data), min_size=1, max_size=5))
def test_any_table_comes_back_as_it_was_drawn(rows: list) -> None:
    frame = pd.DataFrame(rows, columns=["number", "word"])
    read = figures.read_table(frame.to_csv(index=False, lineterminator="\n"))
    assert read.word.tolist() == frame.word.tolist()
    np.testing.assert_allclose(read.number, frame.number, rtol=1e-14)
