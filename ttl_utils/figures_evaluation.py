"""The figures of stage 04: perplexity, scores beside constant answers, scores over training, and speed."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ttl_utils import paper
from ttl_utils.figures import (
    LIGHT,
    LINES,
    OURS,
    PAPER,
    bar_labels,
    draw,
    draws,
    label,
    legend_below,
    log_scale,
    subplots,
    thousands,
    wrapped,
)
from ttl_utils.figures_pretraining import TOKENS_PER_STEP

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

    from ttl_utils.run import Run


def perplexity(run: Run, rows: list[dict], texts: dict[str, dict]) -> Figure:
    """Perplexity over checkpoints, and the model's bits per byte of each text (a source, or other text)."""
    known = [
        {"text": name, "bits_per_byte": values["bits_per_byte"]}
        for name, values in texts.items()
        if values.get("bits_per_byte") is not None
    ]
    table = pd.DataFrame([*rows, *known])
    return draw(run, "04_perplexity", table.reindex(columns=list(dict.fromkeys([*table, "text", "bits_per_byte"]))))


@draws("04_perplexity")
def _perplexity(data: pd.DataFrame) -> Figure:
    """`data`: a row for each checkpoint, and for each text, which has a name in `text`."""
    bits = data[data.text.notna()].sort_values("bits_per_byte")
    rows = data[data.text.isna()]
    figure, axes = subplots(2 if len(rows) else 1)
    left, right = axes if len(rows) else (None, axes)
    if left is not None:
        left.plot(rows.tokens, rows.perplexity, "o-", color=OURS)
        title = label("Held-out text, every checkpoint")
        left.set(title=title, xlabel=label("tokens seen"), ylabel=label("perplexity (log scale)"))
        log_scale(left)
        left.xaxis.set_major_formatter(thousands)
    bars = right.barh([wrapped(str(name)) for name in bits.text], bits.bits_per_byte, color=OURS)
    bar_labels(right, bars, ".2f")
    right.margins(x=0.12)
    right.set(title=label("The model, by text"), xlabel=label("bits per byte (fewer is better)"))
    return figure


def scores(run: Run, rows: pd.DataFrame) -> Figure:
    return draw(run, "04_scores", rows)


@draws("04_scores")
def _scores(rows: pd.DataFrame) -> Figure:
    """Each score beside what a constant answer gets; whiskers are one standard error."""
    figure, axes = subplots(height=0.9 + 0.6 * len(rows))
    both = label("ours"), label("constant answer, else chance")
    tuned = ", fine-tuned"
    names = [label("{}, fine-tuned", task[: -len(tuned)]) if task.endswith(tuned) else task for task in rows.task]
    bars = _pairs(axes, names, (rows.score, rows.constant), both, "#d0d0d0", rows.stderr)
    bar_labels(axes, bars, ".1f")
    # a correlation may be negative
    low = min(0.0, float(rows.score.min()) - 5)
    axes.set(title=label("Scores beside a constant answer"), xlim=(low, 100))
    axes.set_xlabel(label("score (%); whiskers: one standard error"))
    legend_below(figure, 2)
    return figure


def over_checkpoints(run: Run, rows: list[dict]) -> Figure:
    """Figure 2: scores over training, with a band of one standard error, beside the published curve of ARC."""
    columns = ["task", "step", "tokens", "value", "stderr", "chance"]
    points = [
        [key, row["step"], row["tokens"], *(score[name] for name in columns[3:])]
        for row in rows
        for key, score in row["scores"].items()
        if score["status"] == "done"
    ]
    # a task without a standard error, or without chance, has NaN there
    table = pd.DataFrame(points, columns=columns).astype({name: float for name in columns[3:]})
    return draw(run, "04_checkpoints", table)


@draws("04_checkpoints")
def _checkpoints(table: pd.DataFrame) -> Figure:
    figure, axes = subplots()
    styles = cycle(style for style in LINES if style["color"] != PAPER)
    for (task, points), style in zip(table.groupby("task", sort=False), styles, strict=False):
        score, error = 100 * points.value, 100 * points.stderr
        axes.plot(points.tokens, score, label=str(task), **style)
        axes.fill_between(points.tokens, score - error, score + error, color=style["color"], alpha=0.15, lw=0)
        chance = points.chance.iloc[-1]
        if chance == chance:
            axes.axhline(100 * chance, color=style["color"], lw=1, ls=":", label=label("{}, chance", str(task)))
    arc = paper.table("arc_460m")
    name = label("ARC, 460m, published")
    axes.plot(arc.step * TOKENS_PER_STEP, arc.arc, "^-", color=PAPER, label=name)
    axes.set(title=label("Scores over training"), xscale="log")
    axes.set(xlabel=label("tokens seen (log scale)"), ylabel=label("score (%)"))
    axes.xaxis.set_major_formatter(thousands)
    legend_below(figure)
    return figure


def inference(run: Run, rows: list[dict]) -> Figure:
    """Tokens written per second by each way and batch size, beside what the memory's bandwidth would allow."""
    names = ["way", "batch_size", "decode_tokens_per_second", "share_of_limit", "perplexity"]
    return draw(run, "04_inference", pd.DataFrame([row for row in rows if row["status"] == "done"], columns=names))


@draws("04_inference")
def _inference(done: pd.DataFrame) -> Figure:
    figure, axes = subplots(height=0.9 + 0.6 * len(done))
    limit = done.decode_tokens_per_second / done.share_of_limit
    names = [label("{}, batch {}", way, str(size)) for way, size in zip(done.way, done.batch_size, strict=True)]
    both = label("measured"), label("the bandwidth's limit")
    bars = _pairs(axes, names, (done.decode_tokens_per_second, limit), both, LIGHT)
    bar_labels(axes, bars, ",.0f")
    axes.set(title=label("Writing, token by token"), xscale="log")
    axes.set_xlabel(label("tokens per second, all rows together (log scale)"))
    axes.xaxis.set_major_formatter(thousands)
    legend_below(figure, 2)
    return figure


def _pairs(
    axes: Axes,
    names: Iterable[str],
    values: tuple[pd.Series, pd.Series],
    labels: tuple[str, str],
    colour: str,
    whiskers: pd.Series | None = None,
) -> BarContainer:
    """Two bars a row, the first of them ours, which are returned."""
    names = [wrapped(name) for name in names]
    places = np.arange(len(names))
    bars = axes.barh(places - 0.2, values[0], 0.38, xerr=whiskers, color=OURS, label=labels[0])
    axes.barh(places + 0.2, values[1], 0.38, color=colour, label=labels[1])
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    return bars
