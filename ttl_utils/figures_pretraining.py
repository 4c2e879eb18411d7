"""The curves of training: of stage 03, and the loss of stage 05; what `health` found is marked in them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogFormatter
from matplotlib.transforms import ScaledTranslation

from ttl_utils import paper
from ttl_utils.figures import LIGHT, OURS, PAPER, PAPER_2, log_scale, save, subplots, thousands
from ttl_utils.health import Finding, findings
from ttl_utils.progress import in_notebook

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ttl_utils.run import Run

PAPER_COLOURS = {"160m": PAPER_2, "460m": PAPER}
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
# of the findings, by kind in the order of their coming
MARKERS, COLOURS = "Xv^sDP*d", ("#b2182b", "#6a51a3", "#1b7837", "#b35806", "#01665e", "#c51b7d", "#4d4d4d", "#8c6d31")


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
        figure = loss_curve(records, self.title, findings(records, self.vocab_size, self.warmup_steps))
        plt.close(figure)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        drawn = time.monotonic()
        # training waits while it is drawn: one percent of its time at most
        self.next_show = drawn + max(self.every_s, 100 * (drawn - started))


def loss_curve(records: list[dict], title: str, found: list[Finding]) -> Figure:
    """Training and validation loss over tokens seen; findings are marked."""
    figure, axes = subplots()
    _draw_loss(axes, records, found)
    axes.set(title=title, xlabel="tokens seen", ylabel="loss (nats per token)")
    return figure


def loss(run: Run, records: list[dict], vocab_size: int | None = None) -> Figure:
    """Our loss, with the published points that lie in its range, and the published curves beside it (figure 1(a))."""
    found = findings(records, vocab_size, run.params.pretraining.warmup_steps)
    figure, (left, right) = subplots(2)
    _draw_published(left, "loss", "published", records[-1]["tokens"])
    _draw_loss(left, records, found)
    left.set(title=f"Ours ({run.name})", xlabel="tokens seen", ylabel="loss (nats per token)")
    smoothed = paper.table("train_loss_smoothed")
    for size, colour in PAPER_COLOURS.items():
        curve = smoothed[smoothed["size"] == size]
        label = f"{size}, training"
        right.plot(curve.step * TOKENS_PER_STEP, curve.loss, color=colour, lw=1.2, alpha=0.7, label=label)
    _draw_published(right, "loss", "evaluation")
    right.set(title="Published (figure 1(a) and logs; another vocabulary)", xlabel="tokens seen")
    right.xaxis.set_major_formatter(thousands)
    right.legend()
    return save(figure, run, "03_loss", _with_findings(records, found))


def perplexity(run: Run, records: list[dict]) -> Figure:
    """Perplexity of held-out text over tokens seen, ours and the published one."""
    figure, (left, right) = subplots(2, height=2.8)
    held_out = _finite(records, "perplexity")
    left.plot(held_out.tokens, held_out.perplexity, "o-", color=OURS, ms=4, lw=1.4, label="held-out text")
    _draw_published(left, "perplexity", "published", records[-1]["tokens"])
    left.set(title=f"Ours ({run.name})", ylabel="perplexity (log scale)")
    _draw_published(right, "perplexity", "evaluation")
    right.set(title="Published (logs; another vocabulary)")
    for axes in (left, right):
        axes.set(xlabel="tokens seen")
        log_scale(axes)
        axes.xaxis.set_major_formatter(thousands)
        axes.legend()
    return save(figure, run, "03_perplexity", held_out)


def speed(run: Run, records: list[dict]) -> Figure:
    """Learning rate, throughput, energy and what the device's meters say, each over tokens seen where it is known."""
    known = {name: rows for name in PANELS if len(rows := _finite(records, name))}
    lines = max(1, -(-len(known) // 3))
    figure, grid = plt.subplots(lines, 3, figsize=(9.6, 0.4 + 2.2 * lines), squeeze=False)
    for axes, (name, rows) in zip(grid.flat, known.items(), strict=False):
        # a small run's energy in watt-hours
        factor = 1000 if name == "energy_kwh" and rows[name].max() < 0.1 else 1
        title = PANELS[name] if factor == 1 else "Energy so far (Wh)"
        axes.plot(rows.tokens, factor * rows[name], color=OURS, lw=1.2)
        axes.set(title=title, xlabel="tokens seen", ylim=(0, 1.1 * factor * rows[name].max() or None))
        axes.xaxis.set_major_formatter(thousands)
        if "share" in name:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        elif name == "tokens_per_second":
            axes.yaxis.set_major_formatter(thousands)
    for axes in grid.flat[len(known) :]:
        axes.remove()
    rows = pd.DataFrame(records)
    return save(figure, run, "03_speed", rows[["step", "tokens", *known]].dropna(how="all", subset=list(known)))


def chat_curve(run: Run, records: list[dict], vocab_size: int | None = None) -> Figure:
    found = findings(records, vocab_size, run.params.chat.warmup_steps)
    figure = loss_curve(records, "Chat fine-tuning: loss on the answers", found)
    return save(figure, run, "05_chat_loss", _with_findings(records, found))


def scale_loss(axes: Axes, first: float, highest: float) -> None:
    """A logarithmic axis where the loss explodes: beyond twice what it began with."""
    if highest > 2 * first:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))


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


def _finite(records: list[dict], name: str) -> pd.DataFrame:
    """step, tokens and `name` of the records that hold it as a finite number."""
    rows = pd.DataFrame(records).reindex(columns=["step", "tokens", name])
    return rows[np.isfinite(rows[name].astype(float))]


def _with_findings(records: list[dict], found: list[Finding]) -> pd.DataFrame:
    """The records, each finding a row of its own after the record it was found in."""
    marks = [{"step": one.step, "tokens": one.tokens, "finding": one.kind, "evidence": one.evidence} for one in found]
    return pd.DataFrame([*records, *marks]).sort_values("step", kind="stable")


def _draw_loss(axes: Axes, records: list[dict], found: list[Finding]) -> None:
    trained, held_out = _finite(records, "loss"), _finite(records, "validation_loss")
    axes.plot(trained.tokens, trained.loss, color=LIGHT, lw=1.2, label="training")
    axes.plot(held_out.tokens, held_out.validation_loss, "o-", color=OURS, ms=4, lw=1.4, label="validation")
    axes.xaxis.set_major_formatter(thousands)
    curve = trained if len(trained) else held_out.rename(columns={"validation_loss": "loss"})
    if len(curve):
        scale_loss(axes, curve.loss.iloc[0], curve.loss.max())
    if len(curve) and found:
        _draw_findings(axes, found, curve)
        # their labels stand where the legend would
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=3, borderaxespad=0)
    else:
        axes.legend()


def _draw_published(axes: Axes, column: str, word: str, last: float = np.inf) -> None:
    """The paper's evaluations of both sizes, up to `last` tokens."""
    logged = paper.table("evaluation_log")
    for size, colour in PAPER_COLOURS.items():
        points = logged[(logged["size"] == size) & (logged.tokens <= last)]
        if len(points):
            axes.plot(points.tokens, points[column], "o", color=colour, ms=4, label=f"{size}, {word}")


def _draw_findings(axes: Axes, found: list[Finding], curve: pd.DataFrame) -> None:
    """A symbol on the curve for each finding, and its step in a line above.

    Findings of a kind that would cover each other share a symbol, those of other kinds stand above each other, and a
    label that has no room is left out.
    """
    left, right = axes.get_xlim()
    kinds = {kind: [one for one in found if one.kind == kind] for kind in dict.fromkeys(one.kind for one in found)}
    symbols, taken = [], []
    for (kind, mine), marker, colour in zip(kinds.items(), cycle(MARKERS), cycle(COLOURS), strict=False):
        label = kind.replace("_", " ") + (f" ({len(mine)})" if len(mine) > 1 else "")
        for number, group in enumerate(_groups(sorted(mine, key=lambda one: one.tokens), 0.025 * (right - left))):
            place = group[0].tokens
            level = _free_level(taken, place, place + 0.015 * (right - left))
            height = float(np.interp(place, curve.tokens, curve.loss))
            axes.plot(
                [place],
                [height],
                marker,
                color=colour,
                ms=6,
                mec="white",
                mew=0.6,
                ls="",
                zorder=5,
                label=None if number else label,
                transform=axes.transData + ScaledTranslation(0, level * 7 / 72, axes.figure.dpi_scale_trans),
            )
            symbols.append((number > 0, place, height, _steps(group), colour))
    # the first of each kind before the others, where there is not room for all
    _draw_labels(axes, sorted(symbols))


def _groups(found: list[Finding], width: float) -> list[list[Finding]]:
    """Neighbours that begin within `width` tokens of a group's first."""
    groups: list[list[Finding]] = []
    for one in found:
        if groups and one.tokens - groups[-1][0].tokens < width:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _free_level(taken: list[list[tuple[float, float]]], start: float, end: float) -> int:
    """The first level on which nothing lies between `start` and `end`, which are then taken there."""
    fits = (all(end < other[0] or other[1] < start for other in level) for level in taken)
    level = next((number for number, free in enumerate(fits) if free), len(taken))
    if level == len(taken):
        taken.append([])
    taken[level].append((start, end))
    return level


def _steps(group: list[Finding]) -> str:
    first, last = group[0].step, group[-1].step
    return f"step {first:,}" if first == last else f"{first:,}–{last:,}"


def _draw_labels(axes: Axes, symbols: list[tuple], lines: int = 3, height: float = 0.07) -> None:
    """Labels in lines above the curve, each tied to its symbol by a thin line."""
    left, right = axes.get_xlim()
    character = 5.0 / (axes.get_position().width * axes.figure.get_figwidth() * 72)
    taken, placed = [], []
    for _, place, loss_there, text, colour in symbols:
        half = character * (len(text) + 1) / 2
        middle = min(max((place - left) / (right - left), half), 1 - half)
        line = _free_level(taken, middle - half, middle + half)
        if line < lines:
            placed.append((place, loss_there, text, colour, middle, line))
    # room for the lines in use, above what is drawn
    used = 1 + max(line for *_, line in placed)
    low, high = (axes.transScale.transform((1, edge))[1] for edge in axes.get_ylim())
    top = low + (high - low) / (1 - height * used)
    axes.set_ylim(top=axes.transScale.inverted().transform((1, top))[1])
    for place, loss_there, text, colour, middle, line in placed:
        axes.annotate(
            text,
            (place, loss_there),
            (middle, 1 - height * (used - line - 0.5)),
            textcoords="axes fraction",
            color=colour,
            fontsize=7.5,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkB": 3},
        )
