"""One style for every figure; each is saved with the data behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ttl_utils import paper

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ttl_utils.run import Run

OURS, LIGHT, PAPER, PAPER_2, GREY = "#1f5fa8", "#8fb8de", "#c8553d", "#e0a458", "#8a8a8a"
STYLE = {
    "figure.figsize": (7.2, 3.4),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
plt.rcParams.update(STYLE)
# a figure's name -> what draws it from its saved data
DRAWN: dict[str, Callable[[pd.DataFrame], Figure]] = {}


@FuncFormatter
def thousands(value: float, _: int) -> str:
    """Tick labels such as 200k, 1.5M and 10B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def log_scale(axes: Axes) -> None:
    """Log scale of what is drawn, whose ticks are plain numbers, also within one decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high > 20 * low else (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(thousands)


def subplots(columns: int = 1, width: float | None = None, height: float = 3.4) -> tuple[Figure, Any]:
    return plt.subplots(1, columns, figsize=(width or (7.2 if columns == 1 else 9.6), height))


def draws(name: str) -> Callable:
    """Says that a function of the saved data draws the figure `name`: it can then be drawn anew from its file alone."""

    def known(draw: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
        DRAWN[name] = draw
        return draw

    return known


def draw(run: Run, name: str, data: pd.DataFrame) -> Figure:
    """Draw the figure from its data, save both, and return it for the notebook to show."""
    return save_in(run.figures, DRAWN[name](data), name, data)


def label(text: str) -> str:
    """The text in the language of the figures."""
    return text


def save(figure: Figure, run: Run, name: str, data: pd.DataFrame) -> Figure:
    """Write `figures/<name>.png`, `.svg` and the data as `.csv`, and return the figure for the notebook to show."""
    return save_in(run.figures, figure, name, data)


def save_in(folder: Path, figure: Figure, name: str, data: pd.DataFrame) -> Figure:
    folder.mkdir(parents=True, exist_ok=True)
    # no date: the same figure is the same file
    for kind, date in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata=date)
    data.to_csv(folder / f"{name}.csv", index=False)
    # closed, so that the notebook shows what the cell returns and not a second copy
    plt.close(figure)
    return figure


def bar_labels(axes: Axes, bars: Any, form: str) -> None:
    axes.bar_label(bars, fmt=form, padding=3, fontsize=8)


def energy_by_stage(run: Run, totals: pd.DataFrame) -> Figure:
    figure, axes = subplots(height=0.8 + 0.45 * len(totals))
    left = pd.Series(0.0, index=totals.index)
    for part, colour in (("cpu", OURS), ("gpu", PAPER), ("ram", LIGHT)):
        values = totals[f"{part}_kwh"] * 1000
        axes.barh(totals.stage, values, left=left, color=colour, label=part.upper())
        left += values
    axes.invert_yaxis()
    axes.set(title="Energy by stage", xlabel="energy (Wh)")
    figure.legend(loc="outside lower center", ncols=3)
    return save(figure, run, "06_energy", totals)


def perplexity_against_energy(run: Run, rows: pd.DataFrame) -> Figure:
    """Our checkpoints, and the paper's (table 6 and the 160m's log), each at its own scale."""
    figure, (left, right) = subplots(2)
    left.plot(rows.energy_kwh * 1000, rows.perplexity, "o-", color=OURS, ms=4)
    left.set(title=f"Ours ({run.name})", xlabel="energy (Wh)", ylabel="perplexity (log scale)")
    log_scale(left)
    logged = paper.table("evaluation_log")
    for size, colour in (("160m", PAPER_2), ("460m", PAPER)):
        points = logged[logged["size"] == size]
        right.plot(points.energy_kwh, points.perplexity, "o-", color=colour, ms=4, label=size)
    right.set(title="Published (table 6, logs; another vocabulary)", xlabel="energy (kWh)")
    log_scale(right)
    right.legend()
    return save(figure, run, "06_perplexity_energy", rows)
