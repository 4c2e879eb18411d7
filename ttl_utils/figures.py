"""One style for every figure; each is drawn from a table that is saved beside it, and can be drawn anew from it."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import pkgutil
import textwrap
from contextvars import ContextVar
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from ttl_utils import __path__
from ttl_utils.files import write_bytes, write_text
from ttl_utils.labels import LANGUAGE, DecimalComma, number

# what figures are labelled with, from one place
from ttl_utils.labels import label as label
from ttl_utils.labels import label_of_data as label_of_data
from ttl_utils.labels import percent as percent
from ttl_utils.labels import thousands as thousands
from ttl_utils.labels import whole as whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

    from ttl_utils.run import Run

# apart for every kind of colour vision (Okabe and Ito 2008, some darker); lines also differ in stroke and marker
OURS, LIGHT, PAPER, PAPER_2, GREY = "#0b5fa5", "#8fc1e8", "#c94a00", "#e69f00", "#7f7f7f"
COLOURS = (OURS, PAPER, "#00795a", PAPER_2, "#9a4f88", "#56b4e9", "#333333", GREY)
LINES = [
    {"color": colour, "ls": stroke, "marker": marker}
    for stroke, marker, colour in zip(["-", "--", "-.", ":"] * 2, "osD^vPX*", COLOURS, strict=True)
]
# the published curves, everywhere
PUBLISHED = {
    "160m": {"color": PAPER_2, "ls": "--", "marker": "s"},
    "460m": {"color": PAPER, "ls": "-", "marker": "o"},
}
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
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    # the same figure is the same file
    "svg.hashsalt": "ttl",
}
plt.rcParams.update(STYLE)
SMALL = {
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    # journals ask for fonts that can be edited; they take twice as long
    "pdf.fonttype": 42,
}
# in cm: a column and a page of a journal
WIDTHS = {"column": 8.6, "page": 17.8}
_WIDTH: ContextVar[str] = ContextVar("width", default="notebook")
# a figure's name -> what draws it from its saved data
DRAWN: dict[str, Callable[[pd.DataFrame], Figure]] = {}


@contextlib.contextmanager
def style_of(language: str = "en", width: str = "notebook") -> Iterator[None]:
    """Figures drawn inside are in this language (en, pt) and of this width (notebook, column, page)."""
    tokens = LANGUAGE.set(language), _WIDTH.set(width)
    try:
        with plt.rc_context({} if width == "notebook" else SMALL):
            yield
    finally:
        LANGUAGE.reset(tokens[0])
        _WIDTH.reset(tokens[1])


# drawing


def subplots(count: int = 1, height: float = 3.4, beside: int = 2) -> tuple[Figure, Any]:
    """A panel, or a list of them, `beside` in a row where the width allows; `height` of a row in a notebook, inches."""
    width, beside = _WIDTH.get(), min(count, beside)
    inches = 7.2 if count == 1 else 9.6
    if width != "notebook":
        inches, height = WIDTHS[width] / 2.54, (0.72 if width == "column" else 0.8) * height
    if width == "column" and beside > 1:
        beside -= 1
    rows = math.ceil(count / beside)
    figure, grid = plt.subplots(rows, beside, figsize=(inches, height * rows), squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, grid[0, 0] if count == 1 else list(grid.flat[:count])


def log_scale(axes: Axes) -> None:
    """Log scale of what is drawn, whose ticks are plain numbers, also within one decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high > 20 * low else (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(thousands)


def small() -> float:
    """Points of the smallest text, as beside bars."""
    return plt.rcParams["xtick.labelsize"]


def bar_labels(axes: Axes, bars: Any, labels: str | Sequence[str]) -> None:
    """The bars' values, in the form such as '.1f', or these labels."""
    if isinstance(labels, str):
        labels = ["" if pd.isna(value) else number(value, labels) for value in bars.datavalues]
    axes.bar_label(bars, labels, padding=3, fontsize=small())


def wrapped(name: str) -> str:
    """A name beside an axis, in lines where the figure is narrow."""
    return textwrap.fill(name, 22, break_long_words=False) if _WIDTH.get() == "column" else name


def row_height(names: Sequence[str]) -> float:
    """Inches of a row, in a notebook, beside whose axis the longest of these names has room."""
    return 0.13 + 0.145 * (1 + max((name.count("\n") for name in names), default=0))


def legend_below(figure: Figure, columns: int = 3, **what: Any) -> None:
    """A legend below the panels, of as many columns as fit."""
    legend, fewer = _fitting(figure, columns, figure.bbox.width, loc="outside lower center", **what)
    # the panels keep their height, which one line is in
    lines = math.ceil(len(legend.get_texts()) / fewer) - 1
    figure.set_figheight(figure.get_figheight() + lines * 1.5 * plt.rcParams["legend.fontsize"] / 72)


def legend_below_axes(axes: Axes, columns: int = 3) -> None:
    """The same below one panel, under the label of its axis."""
    room = 0.85 * axes.figure.bbox.width / axes.get_subplotspec().get_gridspec().ncols
    _fitting(axes, columns, room, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.2)


def _fitting(where: Figure | Axes, columns: int, room: float, **what: Any) -> tuple[Legend, int]:
    for fewer in range(columns, 0, -1):
        legend = where.legend(ncols=fewer, **what)
        if fewer == 1 or legend.get_window_extent().width <= room:
            break
        legend.remove()
    return legend, fewer


def _finish(figure: Figure) -> None:
    """Decimal commas on plain axes, fewer ticks where they crowd, and lines in what is longer than its panel."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if LANGUAGE.get() == "pt" and type(axis.get_major_formatter()) is ScalarFormatter:
                axis.set_major_formatter(DecimalComma())
    figure.draw_without_rendering()
    settled = True
    for axes in figure.axes:
        boxes = [tick.label1.get_window_extent() for tick in axes.xaxis.get_major_ticks()]
        gaps = [right.x0 - left.x1 for left, right in pairwise(boxes)]
        if min(gaps, default=math.inf) < small() / 2:
            axes.xaxis.set_major_locator(MaxNLocator(3) if axes.get_xscale() == "linear" else LogLocator(numticks=4))
            settled = False
        row = [other.bbox for other in figure.axes if other.bbox.y0 < axes.bbox.y1 and other.bbox.y1 > axes.bbox.y0]
        before = max((box.x1 for box in row if box.x1 < axes.bbox.x0), default=-axes.bbox.x0)
        after = min((box.x0 for box in row if box.x0 > axes.bbox.x1), default=figure.bbox.width)
        middle = (axes.bbox.x0 + axes.bbox.x1) / 2
        side = min(middle - (before + axes.bbox.x0) / 2, (axes.bbox.x1 + after) / 2 - middle)
        for text, room in (
            (axes._left_title, after - axes.bbox.x0 - small()),
            (axes.xaxis.label, 2 * side),
            (axes.yaxis.label, axes.bbox.height),
        ):
            long = max(text.get_window_extent().size)
            if long > room:
                text.set_text(textwrap.fill(text.get_text(), max(12, int(len(text.get_text()) * room / long))))
                settled = False
    if settled:
        # once is enough: it takes longer than drawing
        figure.set_layout_engine("none")


# saving, and drawing anew


def draws(name: str) -> Callable:
    """Says that a function of the saved data draws the figure `name`; its module is named `figures_…`."""

    def known(draw: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
        DRAWN[name] = draw
        return draw

    return known


def load_all() -> None:
    """Import every module that draws figures, so that `DRAWN` knows them."""
    for module in pkgutil.iter_modules(__path__, "ttl_utils."):
        if module.name.startswith("ttl_utils.figures_"):
            importlib.import_module(module.name)


def draw(run: Run, name: str, data: pd.DataFrame) -> Figure:
    """Draw the figure, save it as PNG, SVG and PDF with its data as CSV, and return it for the notebook to show."""
    return draw_in(run.figures, name, data)


def draw_in(folder: Path, name: str, data: pd.DataFrame) -> Figure:
    """The same in any folder. What is drawn is what the CSV holds, types and rounding included."""
    text = data.to_csv(index=False, lineterminator="\n")
    figure, pictures = drawn(name, read_table(text))
    for kind, content in pictures.items():
        write_bytes(folder / f"{name}.{kind}", content)
    write_text(folder / f"{name}.csv", text)
    return figure


def drawn(name: str, data: pd.DataFrame) -> tuple[Figure, dict[str, bytes]]:
    """The figure, and its files by their ending."""
    if name not in DRAWN:
        load_all()
    pictures, others = {}, plt.get_fignums()
    try:
        figure = DRAWN[name](data)
        _finish(figure)
        # no date: the same figure is the same file
        for kind, date in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
            file = io.BytesIO()
            figure.savefig(file, format=kind, dpi=150 if _WIDTH.get() == "notebook" else 300, metadata=date)
            pictures[kind] = file.getvalue()
            # its place was found in the first pass
            figure.set_layout_engine("none")
    finally:
        # closed, so that the notebook shows what the cell returns and not a second copy
        for left in set(plt.get_fignums()) - set(others):
            plt.close(left)
    return figure, pictures


def read_table(text: str) -> pd.DataFrame:
    """The data of a CSV file; no word is taken for a missing value."""
    return pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])
