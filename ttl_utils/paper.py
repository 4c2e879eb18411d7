"""The paper's published figures, their sources and contradictions, and one comparison table.

The figures are CSV files in `published/`; `sources.csv` names the place each file was taken from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files

import pandas as pd
from pandas.io.formats.style import Styler

from ttl_utils.errors import TTLError

SIZES = ("160m", "460m")

# what makes a run one of the paper's two: shape (table 2), budget and rate (table 3)
CONFIGURATION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
    "max_steps",
    "tokens_per_step",
    "learning_rate",
)


@dataclass(frozen=True)
class Figure:
    """One published value; `tolerance` is ours, in percent of the value."""

    value: float
    unit: str
    source: str
    tolerance: float


@cache
def _read(name: str) -> pd.DataFrame:
    with files("ttl_utils").joinpath("published", f"{name}.csv").open(encoding="utf-8") as file:
        # an empty cell is empty text: no number is missing in these files
        return pd.read_csv(file, keep_default_na=False)


def table(name: str) -> pd.DataFrame:
    """A published table; `attrs["source"]` says where it comes from."""
    sources = _read("sources").set_index("name")["source"]
    if name not in sources.index:
        raise TTLError(f"no published table {name!r}: choose one of {', '.join(sources.index)}")
    frame = _read(name).copy()
    frame.attrs["source"] = sources[name]
    return frame


def headline(size: str) -> dict[str, Figure]:
    """The published value of each metric for `160m`, `460m`, or `both` (sums over the two runs)."""
    rows = table("headline")
    if size not in set(rows["size"]):
        raise TTLError(f"nothing published for {size!r}: choose one of {', '.join(rows['size'].unique())}")
    return {
        row.metric: Figure(row.value, row.unit, row.source, float(row.tolerance or "nan"))
        for row in rows[rows["size"] == size].itertuples()
    }


def conflicts(topic: str | None = None) -> pd.DataFrame:
    """Where the published material contradicts itself: all rows, or those of one topic."""
    rows = table("conflicts")
    if topic is None:
        return rows
    if topic not in set(rows["topic"]):
        raise TTLError(f"no conflicts on topic {topic!r}: choose one of {', '.join(rows['topic'].unique())}")
    return rows[rows["topic"] == topic].reset_index(drop=True)


def is_paper_configuration(config: Mapping[str, float | None]) -> str | None:
    """`160m` or `460m` when shape, steps, tokens per step and learning rate are table 2's and 3's, else None.

    `config` is flat and holds the keys of `CONFIGURATION`; `num_key_value_heads` is checked where given.
    """
    if missing := [key for key in CONFIGURATION if key not in config]:
        raise TTLError(f"cannot tell whether this is the paper's configuration without {', '.join(missing)}")
    published = table("table2_architecture").merge(table("table3_training"), on="size").set_index("size")
    keys = [*CONFIGURATION, *({"num_key_value_heads"} & set(config))]
    for size in SIZES:
        row = published.loc[size]
        if all(config[key] is not None and math.isclose(config[key], row[key]) for key in keys):
            return size
    return None


def compare(
    ours: Mapping[str, float | None],
    size: str,
    comparable: bool,
    metrics: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Our values against the paper's, one row per metric (by default those of `ours`, in their order).

    Comparable: the difference is in percent of the paper's value, and the verdict is "reproduced" within the
    metric's tolerance, "close" within three times that, else "differs"; "not run" where ours is None.
    Not comparable: both published sizes stand beside our value and no difference is drawn.
    """
    sizes = (size,) if comparable else SIZES
    published = {known: headline(known) for known in sizes}
    everything = set(table("headline")["metric"])
    names = list(ours if metrics is None else metrics)
    if unknown := [name for name in names if name not in ours and name not in everything]:
        raise TTLError(
            f"metrics neither published nor ours: {', '.join(unknown)}; published are {', '.join(sorted(everything))}"
        )
    rows = []
    for name in names:
        value = ours.get(name)
        row: dict[str, object] = {"metric": name}
        for known in sizes:
            figure = published[known].get(name)
            row["paper" if comparable else f"paper {known}"] = math.nan if figure is None else figure.value
        row |= {"ours": math.nan if value is None else float(value), "difference": math.nan}
        if not comparable:
            row["verdict"] = "not comparable"
        elif value is None:
            row["verdict"] = "not run"
        elif name not in published[size]:
            row["verdict"] = "not published"
        else:
            row["difference"], row["verdict"] = judge(float(value), published[size][name])
        rows.append(row | {"note": _note(name, sizes)})
    columns = ["metric", *(["paper"] if comparable else [f"paper {known}" for known in sizes])]
    return pd.DataFrame(rows, columns=[*columns, "ours", "difference", "verdict", "note"])


def judge(ours: float, figure: Figure) -> tuple[float, str]:
    """The difference in percent of the published value, and the verdict of `compare`."""
    difference = 100 * (ours - figure.value) / figure.value
    # no tolerance: of another text, vocabulary or protocol, whatever the configuration
    if math.isnan(figure.tolerance):
        return difference, "not comparable"
    slack = 1e-9  # a value exactly on the boundary counts as inside despite rounding
    if abs(difference) <= figure.tolerance + slack:
        return difference, "reproduced"
    # NaN, a diverged run, falls through both tests
    return difference, "close" if abs(difference) <= 3 * figure.tolerance + slack else "differs"


def _note(metric: str, sizes: Sequence[str]) -> str:
    """The published contradictions that touch this metric, in one line; the size where it is not plain."""
    rows = table("conflicts")
    touching = rows["size"].isin([*sizes, "both"]) & rows["metric"].str.split().map(lambda names: metric in names)
    return "; ".join(
        (f"{row.size}: " if len(sizes) > 1 else "")
        + f"{row.figure_a} ({row.source_a}) against {row.figure_b} ({row.source_b})"
        for row in rows[touching].itertuples()
    )


def style(df: pd.DataFrame) -> Styler:
    """The table as a notebook shows it: no index, thousands separators, numbers to the right."""
    numbers = list(df.select_dtypes("number").columns)
    words = [column for column in df.columns if column not in numbers]
    formats = {}
    for column in numbers:
        whole = bool((df[column].dropna() % 1 == 0).all())
        formats[column] = _percent if column == "difference" else partial(_number, whole=whole)
    styler = df.style.hide(axis="index").format(formats).format(None, subset=words, escape="html", na_rep="–")
    sides = {column: "right" if column in numbers else "left" for column in df.columns}
    for column, side in sides.items():
        styler = styler.set_properties(subset=[column], **{"text-align": side})
    return styler.set_table_styles({c: [{"selector": "th", "props": f"text-align: {s}"}] for c, s in sides.items()})


def _number(value: float, whole: bool) -> str:
    if pd.isna(value):
        return "–"
    if whole or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"


def _percent(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:+.2f}%"
