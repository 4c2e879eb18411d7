"""Figures of stage 06: energy by stage, what perplexity cost, what would be elsewhere, and how early it was known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import Patch

from ttl_utils.figures import (
    GREY,
    LIGHT,
    OURS,
    PAPER,
    PAPER_2,
    PUBLISHED,
    bar_labels,
    draws,
    label,
    legend_below,
    legend_below_axes,
    log_scale,
    percent,
    subplots,
    wrapped,
)
from ttl_utils.units import unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@draws("06_energy")
def _energy(rows: pd.DataFrame) -> Figure:
    """Bars of the parts, hatched where they are modelled."""
    name, factor = unit(rows.energy_kwh.max(), "_kwh")
    figure, axes = subplots(height=1.2 + 0.42 * len(rows))
    left, handles = pd.Series(0.0, index=rows.index), []
    for part, words, colour in (("cpu", "CPU", LIGHT), ("gpu", "GPU", PAPER), ("ram", "memory", OURS)):
        values, modelled = rows[f"{part}_kwh"] * factor, rows[f"{part}_method"].str.startswith("modelled")
        style = {"edgecolor": "white", "linewidth": 0}
        bars = axes.barh(
            rows.index, values, left=left, color=colour, hatch=["///" if m else "" for m in modelled], **style
        )
        left += values
        if values.sum() > 0:
            handles.append(Patch(facecolor=colour, hatch="///" * bool(modelled.any()), label=label(words), **style))
    bar_labels(axes, bars, [percent(round(share, 3), 0) for share in rows.energy_kwh / rows.energy_kwh.sum()])
    axes.set_yticks(rows.index, rows.stage)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set(title=label("Energy by stage; hatched: modelled"), xlabel=label(f"energy ({name})"))
    legend_below(figure, handles=handles)
    return figure


@draws("06_perplexity_energy")
def _perplexity_energy(rows: pd.DataFrame) -> Figure:
    """Our evaluations, and the paper's (table 6 and the 160m's log), each at its own scale; the point in a ring."""
    figure, (left, right) = subplots(2)
    published = rows.series.str.startswith("paper ")
    name, factor = unit(rows.energy_kwh[~published].max(), "_kwh")
    for series, points in rows.groupby("series", sort=False):
        size = series.removeprefix("paper ")
        style = {"color": OURS, "marker": "o"} if size == series else PUBLISHED[size]
        axes, scale = (left, factor) if size == series else (right, 1)
        axes.plot(points.energy_kwh * scale, points.perplexity, label=size, **style)
        at = points[points.diminishing]
        ring = plt.rcParams["lines.markersize"] * 2.8
        axes.plot(at.energy_kwh * scale, at.perplexity, "o", mfc="none", mec=GREY, mew=1.3, ms=ring)
    ours = rows.series[~published].iloc[0]
    left.set(title=label("Ours ({}); ring: returns diminish", ours), xlabel=label(f"energy ({name})"))
    right.set(title=label("Published (table 6, logs; another vocabulary)"), xlabel=label("energy (kWh)"))
    for axes in (left, right):
        axes.set_ylabel(label("perplexity (log scale)"))
        log_scale(axes)
    right.legend()
    return figure


@draws("06_what_if")
def _what_if(rows: pd.DataFrame) -> Figure:
    """Emissions on other grids, and projected energy on other GPUs at two shares of their peak."""
    figure, (left, right) = subplots(2, height=1.2 + 0.24 * rows.name.nunique() / 2 + 1)
    grids, gpus = rows[rows.kind == "grid"], rows[rows.kind == "gpu"]
    name, factor = unit(grids.value.max(), "_kg")
    colours = [PAPER if "paper" in grid else LIGHT for grid in grids.name]
    bars = left.barh([wrapped(label(grid)) for grid in grids.name], grids.value * factor, color=colours)
    bar_labels(left, bars, ".3g")
    left.set(title=label("The run's energy on other grids"), xlabel=label(f"emissions ({name} CO2e)"))
    name, factor = unit(gpus.value.max(), "_kwh")
    shares = sorted(gpus.share.unique())
    names = list(dict.fromkeys(gpus.name))
    for number, (share, colour) in enumerate(zip(shares, (PAPER_2, OURS), strict=True)):
        values = gpus[gpus.share == share].value * factor
        at = [place + (number - 0.5) * 0.4 for place in range(len(names))]
        right.barh(at, values, 0.4, color=colour, label=label("{} of the peak", percent(round(share, 2), 0)))
    right.set_yticks(range(len(names)), names)
    right.set(title=label("Pretraining on one GPU, projected"), xlabel=label(f"energy ({name})"))
    for axes in (left, right):
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
    legend_below_axes(right, 2)
    return figure


@draws("06_forecast")
def _forecast(rows: pd.DataFrame) -> Figure:
    """The error of the forecast, by how much of the run it knew; 1% and 10% are marked."""
    figure, axes = subplots()
    axes.plot(rows.share, rows.energy_error, "o-", color=OURS, label=label("energy"))
    axes.plot(rows.share, rows.duration_error, "s--", color=PAPER, label=label("time"))
    axes.axhline(0, color=GREY, lw=1)
    for share in (0.01, 0.1):
        axes.axvline(share, color=GREY, lw=1, ls=":")
    most = max(1.0, *map(abs, axes.get_ylim()))
    axes.set(ylim=(-most, most), xscale="log", ylabel=label("error (%)"))
    axes.xaxis.set_major_formatter(percent)
    axes.xaxis.set_minor_formatter("")
    axes.set_title(label("Forecast of pretraining against what it came to"))
    axes.set_xlabel(label("share of the steps it was made from (log scale)"))
    axes.legend()
    return figure
