"""The curves of training: of stage 03, and the loss of any stage that trains; what `health` found is marked in them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from ttl_utils import paper
from ttl_utils.figures import (
    LIGHT,
    OURS,
    PUBLISHED,
    draw,
    draws,
    label,
    legend_below_axes,
    log_scale,
    percent,
    subplots,
    thousands,
)
from ttl_utils.figures_findings import draw_findings
from ttl_utils.health import Finding, findings
from ttl_utils.progress import in_notebook

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ttl_utils.run import Run

TOKENS_PER_STEP = 8192  # the paper's (table 3)
# figure 1(a) shows running means over 50,000 steps; the smaller of its runs has 458,000
WINDOW, PAPER_STEPS = 50_000, 458_000
# what a record may hold beside the loss; a panel is drawn where a run has it (the device's: footnote 8)
PANELS = {
    "learning_rate": "Learning rate",
    "loss_std": "Deviation of the loss between steps",
    "tokens_per_second": "Tokens per second",
    "share_of_peak": "Share of the device's peak",
    "data_share": "Time spent waiting for data",
    "energy_kwh": "Energy so far (kWh)",
    "gpu_memory_gib": "GPU memory (GiB)",
    "gpu_power_w": "GPU power (W)",
    "gpu_temperature_c": "GPU temperature (°C)",
}


class LiveCurve:
    """The loss while a run goes on: one figure that updates in place, at most every `every_s` seconds.

    `vocab_size` and `warmup_steps` are for what `health` finds in it.
    """

    def __init__(self, title: str, vocab_size: int | None = None, warmup_steps: int = 0, every_s: float = 5.0):
        self.title, self.vocab_size, self.warmup_steps, self.every_s = title, vocab_size, warmup_steps, every_s
        self.handle: Any = None
        self.next_show = 0.0

    def __call__(self, records: list[dict]) -> None:
        # evaluations and trouble are drawn at once: they are few, and the last one ends the run
        ordinary = records[-1].keys().isdisjoint(("validation_loss", "not_finite", "stalled_s"))
        if not in_notebook() or (ordinary and time.monotonic() < self.next_show):
            return
        from IPython.display import display

        started = time.monotonic()
        data = with_findings(records, findings(records, self.vocab_size, self.warmup_steps))
        figure = loss_curve(data, label(self.title))
        plt.close(figure)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        drawn = time.monotonic()
        # training waits while it is drawn: one percent of its time at most
        self.next_show = drawn + max(self.every_s, 100 * (drawn - started))


def with_findings(records: list[dict], found: list[Finding]) -> pd.DataFrame:
    """The records as `loss_curve` draws them, each finding a row of its own after the record it was found in."""
    marks = [{"step": one.step, "tokens": one.tokens, "finding": one.kind, "evidence": one.evidence} for one in found]
    table = pd.DataFrame([*records, *marks]).sort_values("step", kind="stable")
    names = dict.fromkeys([*table, "loss", "validation_loss", "finding"])
    return table.reindex(columns=list(names))


def loss_curve(data: pd.DataFrame, title: str) -> Figure:
    """Training and validation loss over tokens seen; findings are marked. `data`: of `with_findings`."""
    figure, axes = subplots()
    _draw_loss(axes, data)
    axes.set(title=title, xlabel=label("tokens seen"), ylabel=label("loss (nats per token)"))
    return figure


def loss(run: Run, records: list[dict], vocab_size: int | None = None) -> Figure:
    """Our loss, with the published points that lie in its range, and the published curves beside it (figure 1(a))."""
    found = findings(records, vocab_size, run.params.pretraining.warmup_steps)
    return draw(run, "03_loss", with_findings(records, found).assign(run=run.name))


@draws("03_loss")
def _loss(data: pd.DataFrame) -> Figure:
    figure, (left, right) = subplots(2)
    _draw_published(left, "loss", "{}, published", data.tokens.max())
    _draw_loss(left, data)
    left.set(title=label("Ours ({})", str(data.run.iloc[0])))
    smoothed = paper.table("train_loss_smoothed")
    for size, style in PUBLISHED.items():
        curve = smoothed[smoothed["size"] == size]
        name = label("{}, training", size)
        right.plot(curve.step * TOKENS_PER_STEP, curve.loss, alpha=0.7, label=name, **{**style, "marker": None})
    _draw_published(right, "loss", "{}, evaluation")
    right.set(title=label("Published (figure 1(a) and logs; another vocabulary)"))
    right.xaxis.set_major_formatter(thousands)
    right.legend()
    for axes in (left, right):
        axes.set(xlabel=label("tokens seen"), ylabel=label("loss (nats per token)"))
    return figure


def perplexity(run: Run, records: list[dict]) -> Figure:
    """Perplexity of held-out text over tokens seen, ours and the published one."""
    return draw(run, "03_perplexity", _finite(pd.DataFrame(records), "perplexity").assign(run=run.name))


@draws("03_perplexity")
def _perplexity(data: pd.DataFrame) -> Figure:
    figure, (left, right) = subplots(2, height=2.8)
    left.plot(data.tokens, data.perplexity, "o-", color=OURS, label=label("held-out text"))
    _draw_published(left, "perplexity", "{}, published", data.tokens.max())
    left.set(title=label("Ours ({})", str(data.run.iloc[0])))
    _draw_published(right, "perplexity", "{}, evaluation")
    right.set(title=label("Published (logs; another vocabulary)"))
    for axes in (left, right):
        axes.set(xlabel=label("tokens seen"), ylabel=label("perplexity (log scale)"))
        log_scale(axes)
        axes.xaxis.set_major_formatter(thousands)
        axes.legend()
    return figure


def speed(run: Run, records: list[dict]) -> Figure:
    """Learning rate, throughput, energy and what the device's meters say, each over tokens seen where it is known."""
    rows = pd.DataFrame(records)
    known = [name for name in PANELS if len(_finite(rows, name))]
    return draw(run, "03_speed", rows[["step", "tokens", *known]].dropna(how="all", subset=known))


@draws("03_speed")
def _speed(data: pd.DataFrame) -> Figure:
    known = {name: rows for name in PANELS if len(rows := _finite(data, name))}
    figure, panels = subplots(len(known), height=2.4, beside=3)
    for axes, (name, rows) in zip(panels, known.items(), strict=True):
        # a small run's energy in watt-hours
        factor = 1000 if name == "energy_kwh" and rows[name].max() < 0.1 else 1
        title = label(PANELS[name] if factor == 1 else "Energy so far (Wh)")
        axes.plot(rows.tokens, factor * rows[name], color=OURS, lw=1.2)
        axes.set(title=title, xlabel=label("tokens seen"), ylim=(0, 1.1 * factor * rows[name].max() or None))
        axes.xaxis.set_major_formatter(thousands)
        if "share" in name:
            axes.yaxis.set_major_formatter(percent)
        elif name == "tokens_per_second":
            axes.yaxis.set_major_formatter(thousands)
    return figure


def scale_loss(axes: Axes, first: float, highest: float) -> None:
    """A logarithmic axis where the loss explodes: beyond twice what it began with."""
    if highest > 2 * first:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(thousands)
        axes.yaxis.set_minor_formatter(NullFormatter())


def smoothing_window(max_steps: int) -> int:
    """Steps that a centred mean is taken over: figure 1(a)'s, or the same share of a shorter run."""
    return min(WINDOW, max(1, round(max_steps * WINDOW / PAPER_STEPS)))


def smoothed(steps: Sequence[int], losses: Sequence[float], window: int) -> np.ndarray:
    """Centred mean over `window` steps, at each of `steps`; at the ends over the part of the window that there is.

    `losses` are means over the steps since the one before, and count by how many those are.
    """
    steps, losses = np.asarray(steps, float), np.asarray(losses, float)
    if len(steps) < 2:
        return losses
    # a run that goes on from another does not begin at step 0
    edges = np.concatenate([[max(0.0, 2 * steps[0] - steps[1])], steps])
    summed = np.concatenate([[0.0], np.cumsum(np.diff(edges) * losses)])
    middle = (edges[:-1] + edges[1:]) / 2
    low, high = np.maximum(middle - window / 2, edges[0]), np.minimum(middle + window / 2, edges[-1])
    return (np.interp(high, edges, summed) - np.interp(low, edges, summed)) / (high - low)


def _finite(data: pd.DataFrame, name: str) -> pd.DataFrame:
    """step, tokens and `name` of the rows that hold it as a finite number."""
    rows = data.reindex(columns=["step", "tokens", name])
    return rows[np.isfinite(rows[name].astype(float))]


def _draw_loss(axes: Axes, data: pd.DataFrame) -> None:
    trained, held_out = _finite(data, "loss"), _finite(data, "validation_loss")
    axes.plot(trained.tokens, trained.loss, color=LIGHT, label=label("training"))
    axes.plot(held_out.tokens, held_out.validation_loss, "o-", color=OURS, label=label("validation"))
    axes.xaxis.set_major_formatter(thousands)
    curve = trained if len(trained) else held_out.rename(columns={"validation_loss": "loss"})
    if len(curve):
        scale_loss(axes, curve.loss.iloc[0], curve.loss.max())
    found = data[data.finding.notna()]
    if len(curve) and len(found):
        draw_findings(axes, found, curve)
        # their labels stand where the legend would
        legend_below_axes(axes)
    else:
        axes.legend()


def _draw_published(axes: Axes, column: str, word: str, last: float = np.inf) -> None:
    """The paper's evaluations of both sizes, up to `last` tokens."""
    logged = paper.table("evaluation_log")
    for size, style in PUBLISHED.items():
        points = logged[(logged["size"] == size) & (logged.tokens <= last)]
        if len(points):
            axes.plot(points.tokens, points[column], label=label(word, size), **{**style, "ls": ""})
