"""The curves of the verdict: ours beside the paper's, at every scale."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

from ttl_utils.figures import (
    COLOURS,
    PAPER,
    PAPER_2,
    PUBLISHED,
    draws,
    label,
    legend_below,
    log_scale,
    subplots,
    thousands,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def _curves(data: pd.DataFrame, measured: str, points: bool) -> Figure:
    """A line for each `curve` (a published size, or a run) over `tokens`, logarithmic: ours may be far smaller."""
    figure, axes = subplots()
    ours = cycle([colour for colour in COLOURS if colour not in (PAPER, PAPER_2)])
    for (kind, name), rows in data.groupby(["kind", "curve"], sort=False):
        if kind == "published":
            style, told = PUBLISHED[name], label("{}, published", str(name))
        else:
            style, told = {"color": next(ours), "lw": 1.7, "alpha": 0.8}, label("{}, ours", str(name))
        marker = style.get("marker", "o") if points else None
        axes.plot(rows.tokens, rows.value, label=told, **{**style, "marker": marker})
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(thousands)
    if measured != "ARC, accuracy (%)":
        log_scale(axes)
    axes.set(xlabel=label("tokens seen (log scale)"), ylabel=label(measured))
    legend_below(figure, 4)
    return figure


draws("figure_1a")(partial(_curves, measured="training loss, smoothed (nats per token)", points=False))
draws("figure_1b")(partial(_curves, measured="perplexity (log scale)", points=True))
draws("figure_2")(partial(_curves, measured="ARC, accuracy (%)", points=True))
