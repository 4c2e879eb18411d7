"""Figures of several runs, and of several ways to run: what `comparison` and `search` found."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ttl_utils.figures import (
    GREY,
    LINES,
    OURS,
    PAPER,
    draw,
    draws,
    label,
    label_of_data,
    legend_below,
    number,
    percent,
    row_height,
    small,
    subplots,
    thousands,
    wrapped,
)
from ttl_utils.figures_pretraining import PAPER_STEPS, WINDOW, scale_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttl_utils.run import Run


@draws("curves")
def _curves(data: pd.DataFrame) -> Figure:
    """Training and validation loss of each setting; of several seeds the mean, with a band of one deviation."""
    measure = data.measure.iloc[0]
    settings = data.groupby("setting", sort=False)
    figure, panels = subplots(2, height=3.6 + 0.2 * len(settings))
    for column, axes in zip(("smoothed", measure), panels, strict=True):
        for (setting, rows), style in zip(settings, cycle(LINES), strict=False):
            seeds, state = rows.seeds.iloc[0], rows.state.iloc[0]
            name = label("{} ({} seeds)", setting, str(seeds)) if seeds > 1 else str(setting)
            name += "" if state == "finished" else f": {label_of_data(state)}"
            tokens, mean, deviation = _mean_curve(rows, column)
            axes.plot(tokens, mean, label=name, **style | ({} if column == measure else {"marker": ""}))
            if seeds > 1:
                band = mean - deviation, mean + deviation
                axes.fill_between(tokens, *band, color=style["color"], alpha=0.2, lw=0)
        curves = [values for _, rows in data.groupby("run") if len(values := rows[column].dropna())]
        if curves:
            scale_loss(axes, max(values.iloc[0] for values in curves), max(values.max() for values in curves))
        axes.set(xlabel=label("tokens seen"), ylabel=label("nats per token"))
        axes.xaxis.set_major_formatter(thousands)
    panels[0].set(title=_smoothing(data))
    bands = data.seeds.max() > 1
    panels[1].set_title(label("Validation; bands: ± deviation over seeds") if bands else label("Validation"))
    if measure == "bits_per_byte":
        panels[1].set_ylabel(label("bits per byte"))
    handles, labels = panels[1].get_legend_handles_labels()
    legend_below(figure, 2, handles=handles, labels=labels)
    return figure


def _mean_curve(data: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mean and sample deviation over the seeds that count, as far as all of them have come.

    Without the evaluation before the first step: it is the same for all, and would hide what is not.
    """
    counted = data[data.counted & (data.tokens > 0)]
    curves = [rows.dropna(subset=column) for _, rows in counted.groupby("run", sort=False)]
    if not curves or not all(map(len, curves)):
        return (np.array([]),) * 3
    first, last = max(curve.tokens.min() for curve in curves), min(curve.tokens.max() for curve in curves)
    tokens = curves[0].tokens[curves[0].tokens.between(first, last)].to_numpy()
    values = np.stack([np.interp(tokens, curve.tokens, curve[column]) for curve in curves])
    return tokens, values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(tokens))


def _smoothing(data: pd.DataFrame) -> str:
    windows = data.window.unique()
    if len(windows) == 1:
        return label("Training loss, centred mean over {} steps", number(windows[0], ","))
    return label("Training loss, centred mean over {} of the steps", percent(round(WINDOW / PAPER_STEPS, 2), 0))


def search(run: Run, table: pd.DataFrame) -> Figure:
    return draw(run, "03_search", table)


@draws("03_search")
def _search(table: pd.DataFrame) -> Figure:
    """Tokens per second and memory of each row; those of the paper's claim (column `claim`) in its colour, hatched."""
    # a parameter and its value, as in the file, need no translation
    parts = [[part if ": " in part else label(part) for part in name.split(" = ")] for name in table.name]
    names = [wrapped(" = ".join(words)) for words in parts]
    figure, panels = subplots(2, height=1.2 + row_height(names) * len(table))
    places = np.arange(len(table))
    words = label("Training (red: the paper's claim)"), label("Memory at most")
    columns = ("tokens_per_second", label("tokens per second")), ("peak_memory_gib", "GiB")
    for axes, title, (column, unit) in zip(panels, words, columns, strict=True):
        bars = axes.barh(places, table[column].fillna(0), color=np.where(table.claim, PAPER, OURS))
        for bar, claimed in zip(bars, table.claim, strict=True):
            bar.set(hatch="//" if claimed else "", edgecolor="white")
        axes.set_yticks(places, [""] * len(names) if axes.get_subplotspec().colspan.start else names)
        axes.set(title=title, xlabel=unit, ylim=(len(table) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
    for at, status in table.status[table.status != "ok"].items():
        panels[0].text(0, at, f" {label(status)}", va="center", fontsize=small(), color=GREY)
    panels[0].xaxis.set_major_formatter(thousands)
    return figure
