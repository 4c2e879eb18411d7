"""The figures of stage 04: perplexity, scores beside constant answers, scores over training, and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ttl_utils import paper
from ttl_utils.figures import LIGHT, OURS, PAPER, bar_labels, log_scale, save, subplots, thousands

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttl_utils.run import Run

COLOURS = (OURS, "#1b7837", "#6a51a3", "#b35806", "#01665e", "#c51b7d")
PAPER_TOKENS_PER_STEP = 8192  # table 3


def perplexity(run: Run, rows: list[dict], texts: dict[str, dict]) -> Figure:
    """Perplexity over checkpoints, and the model's bits per byte of each text (a source, or other text)."""
    known = {name: values["bits_per_byte"] for name, values in texts.items() if "bits_per_byte" in values}
    bits = pd.Series(known, dtype=float).sort_values()
    figure, axes = subplots(2 if rows else 1)
    left, right = axes if rows else (None, axes)
    table = pd.DataFrame(rows) if rows else bits.rename_axis("text").reset_index(name="bits_per_byte")
    if left is not None:
        left.plot(table.tokens, table.perplexity, "o-", color=OURS, ms=4)
        left.set(title="Held-out text, every checkpoint", xlabel="tokens seen", ylabel="perplexity (log scale)")
        log_scale(left)
        left.xaxis.set_major_formatter(thousands)
    bar_labels(right, right.barh(bits.index, bits.values, color=OURS), "%.2f")
    right.set(title="The model, by text", xlabel="bits per byte (fewer is better)")
    return save(figure, run, "04_perplexity", table)


def scores(run: Run, rows: pd.DataFrame) -> Figure:
    """Each score beside what a constant answer gets; whiskers are one standard error."""
    figure, axes = subplots(height=0.9 + 0.6 * len(rows))
    places = range(len(rows))
    bars = axes.barh([p - 0.2 for p in places], rows.score, 0.38, xerr=rows.stderr, color=OURS, label="ours")
    axes.barh([p + 0.2 for p in places], rows.constant, 0.38, color="#d0d0d0", label="constant answer, else chance")
    bar_labels(axes, bars, "%.1f")
    axes.set_yticks(list(places), rows.task)
    axes.invert_yaxis()
    # a correlation may be negative
    low = min(0.0, float(rows.score.min()) - 5)
    axes.set(title="Scores beside a constant answer", xlabel="score (%); whiskers: one standard error", xlim=(low, 100))
    figure.legend(loc="outside lower center", ncols=2)
    return save(figure, run, "04_scores", rows)


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
    figure, axes = subplots()
    for number, (task, points) in enumerate(table.groupby("task", sort=False)):
        colour, score, error = COLOURS[number % len(COLOURS)], 100 * points.value, 100 * points.stderr
        axes.plot(points.tokens, score, "o-", color=colour, ms=4, label=task)
        axes.fill_between(points.tokens, score - error, score + error, color=colour, alpha=0.15, lw=0)
        chance = points.chance.iloc[-1]
        if chance == chance:
            axes.axhline(100 * chance, color=colour, lw=1, ls=":", label=f"{task}, chance")
    arc = paper.table("arc_460m")
    axes.plot(arc.step * PAPER_TOKENS_PER_STEP, arc.arc, "s-", color=PAPER, ms=3, label="ARC, 460m, published")
    axes.set(title="Scores over training", xlabel="tokens seen (log scale)", ylabel="score (%)", xscale="log")
    axes.xaxis.set_major_formatter(thousands)
    axes.legend(fontsize=7.5)
    return save(figure, run, "04_checkpoints", table)


def inference(run: Run, rows: list[dict]) -> Figure:
    """Tokens written per second by each way and batch size, beside what the memory's bandwidth would allow."""
    names = ["way", "batch_size", "decode_tokens_per_second", "share_of_limit", "perplexity"]
    done = pd.DataFrame([row for row in rows if row["status"] == "done"], columns=names)
    figure, axes = subplots(height=0.9 + 0.6 * len(done))
    places = range(len(done))
    bars = axes.barh([p - 0.2 for p in places], done.decode_tokens_per_second, 0.38, color=OURS, label="measured")
    limit = done.decode_tokens_per_second / done.share_of_limit
    axes.barh([p + 0.2 for p in places], limit, 0.38, color=LIGHT, label="the bandwidth's limit")
    bar_labels(axes, bars, "%.0f")
    axes.set_yticks(list(places), [f"{way}, batch {size}" for way, size in zip(done.way, done.batch_size, strict=True)])
    axes.invert_yaxis()
    axes.set(title="Writing, token by token", xlabel="tokens per second, all rows together (log scale)", xscale="log")
    axes.xaxis.set_major_formatter(thousands)
    figure.legend(loc="outside lower center", ncols=2)
    return save(figure, run, "04_inference", done)
