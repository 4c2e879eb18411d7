"""Marks on a curve: what `health` found, with symbols and labels that do not cover each other."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.transforms import ScaledTranslation

from ttl_utils.figures import label, number, small

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of the findings, by kind in the order of their coming
MARKERS, COLOURS = "Xv^sDP*d", ("#b2182b", "#6a51a3", "#1b7837", "#b35806", "#01665e", "#c51b7d", "#4d4d4d", "#8c6d31")


def draw_findings(axes: Axes, found: pd.DataFrame, curve: pd.DataFrame) -> None:
    """A symbol on the curve for each finding, and its step in a line above.

    `found`: finding, step, tokens. Findings of a kind that would cover each other share a symbol, those of other kinds
    stand above each other, and a label that has no room is left out.
    """
    left, right = axes.get_xlim()
    symbols, taken = [], []
    kinds = found.groupby("finding", sort=False)
    for (kind, mine), marker, colour in zip(kinds, cycle(MARKERS), cycle(COLOURS), strict=False):
        name = label(kind.replace("_", " ")) + (f" ({len(mine)})" if len(mine) > 1 else "")
        for count, group in enumerate(_groups(mine.sort_values("tokens", kind="stable"), 0.025 * (right - left))):
            place = float(group.tokens.iloc[0])
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
                label=None if count else name,
                transform=axes.transData + ScaledTranslation(0, level * 7 / 72, axes.figure.dpi_scale_trans),
            )
            symbols.append((count > 0, place, height, _steps(group.step), colour))
    # the first of each kind before the others, where there is not room for all
    _draw_labels(axes, sorted(symbols))


def _groups(found: pd.DataFrame, width: float) -> list[pd.DataFrame]:
    """Neighbours that begin within `width` tokens of a group's first."""
    first, groups, number_of = -np.inf, 0, []
    for tokens in found.tokens:
        if tokens - first >= width:
            first, groups = tokens, groups + 1
        number_of.append(groups)
    return [group for _, group in found.groupby(number_of)]


def _free_level(taken: list[list[tuple[float, float]]], start: float, end: float) -> int:
    """The first level on which nothing lies between `start` and `end`, which are then taken there."""
    fits = (all(end < other[0] or other[1] < start for other in level) for level in taken)
    level = next((number for number, free in enumerate(fits) if free), len(taken))
    if level == len(taken):
        taken.append([])
    taken[level].append((start, end))
    return level


def _steps(steps: pd.Series) -> str:
    first, last = (number(step, ",") for step in (steps.iloc[0], steps.iloc[-1]))
    return label("step {}", first) if first == last else f"{first}–{last}"


def _draw_labels(axes: Axes, symbols: list[tuple], lines: int = 3, height: float = 0.08) -> None:
    """Labels in lines above the curve, each tied to its symbol by a thin line."""
    left, right = axes.get_xlim()
    character = 0.67 * small() / (axes.get_position().width * axes.figure.get_figwidth() * 72)
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
            fontsize=small(),
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkB": 3},
        )
