"""The paper's published figures, their sources and contradictions, and one comparison table.

The figures are CSV files in `published/`; `sources.csv` names the place each file was taken from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import ValidationError

from ttl_utils.errors import TTLError
from ttl_utils.params import Params, leaves, load_params
from ttl_utils.schema import Data

if TYPE_CHECKING:
    from IPython.display import HTML

SIZES = ("160m", "460m")

# what a run of the paper's has in common with our file for that size, beside model and data
_SAME = [f"pretraining.{name}" for name in ("max_steps", "tokens_per_step", "learning_rate", "lr_scheduler_type")]
_SAME += [f"pretraining.{name}" for name in ("warmup_steps", "weight_decay", "max_grad_norm", "init_from")]
_SAME += [f"pretraining.{name}" for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "isolate_documents")]
_SAME += ["tokenizer.vocab_size", "tokenizer.source", "pretraining.block_size"]


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


def contradictions(*topics: str) -> pd.DataFrame:
    """The same for these topics, to be read."""
    rows = pd.concat([conflicts(topic) for topic in topics], ignore_index=True).drop(columns="metric")
    heads = {"figure_a": "one figure", "source_a": "where it stands"}
    return rows.rename(columns=heads | {"figure_b": "another", "source_b": "where that stands"})


@cache
def params_of(size: str) -> Params:
    """Our parameter file for a published size."""
    return load_params({"size": size})


def configuration(parameters: dict, sources: Iterable[dict] = ()) -> tuple[str | None, str | None, str]:
    """The published size whose configuration and data these are, the size they are a variant of, and what differs.

    `parameters` are a run's, resolved; `sources` those of its finished stage 01. Each size is None where there is none.
    """
    ours = dict(leaves(parameters))
    if ours.get("pretraining.block_size") == ours.get("model.max_position_embeddings"):
        ours["pretraining.block_size"] = None
    differing = {}
    for size in SIZES:
        published = params_of(size)
        theirs = published.flat()
        keys = [*(key for key in theirs if key.startswith("model.")), *_SAME]
        found = [key for key in keys if ours.get(key) != theirs[key]]
        told = [f"{key.partition('.')[2]} {ours.get(key)}, not {theirs[key]}" for key in found[:3]]
        told += [f"{len(found) - 3} more"] if len(found) > 3 else []
        try:
            same = Data.model_validate(parameters.get("data")).identity() == published.data.identity()
            differing[size] = told + ([] if same else ["other data"])
        except ValidationError:
            differing[size] = [*told, "data parameters of another version of this code"]
    if not all(differing.values()):
        size = next(size for size in SIZES if not differing[size])
        if any(source.get("from_mirror") for source in sources):
            return None, size, f"the {size}'s configuration, but its data came from a local mirror"
        return size, size, ""
    of = parameters.get("size") if parameters.get("size") in SIZES else None
    size = of or min(SIZES, key=lambda size: len(differing[size]))
    return None, of, f"not the {size}'s configuration: {'; '.join(differing[size])}"


def grams_of(published: Mapping[str, Figure], of: str = "") -> float:
    """The g/kWh behind published energy and emissions (of `chat_`)."""
    return 1000 * published[f"{of}emissions_kg"].value / published[f"{of}energy_kwh"].value


def elsewhere(published: float, energy_kwh: float, emissions_kg: float | None, pue: float) -> str:
    """Why energy or emissions are not the paper's to compare with: another overhead, or another grid; else nothing.

    `published` are the paper's g/kWh; emissions are None where energy alone is compared. Two percent is no other grid.
    """
    if pue != 1:
        return f"another overhead (PUE {pue:g}, the paper's 1)"
    if emissions_kg is None or not energy_kwh or not math.isfinite(ours := 1000 * emissions_kg / energy_kwh):
        return ""
    near = abs(ours / published - 1) <= 0.02
    return "" if near else f"another grid ({ours:.0f} g/kWh, the paper's {published:.6g})"


def compare(
    ours: Mapping[str, float | None],
    size: str,
    comparable: bool,
    metrics: Sequence[str] | None = None,
    pue: float = 1.0,
) -> pd.DataFrame:
    """Our values against the paper's, one row per metric (by default those of `ours`, in their order).

    Comparable: the difference is in percent of the paper's value, and the verdict is "reproduced" within the
    metric's tolerance, "close" within three times that, else "differs"; "not run" where ours is None. Energy of another
    overhead (`pue`) and emissions of another grid are "not comparable".
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
            if name in ("energy_kwh", "emissions_kg", "car_km"):
                spent = ours.get("energy_kwh") or 0.0
                emitted = None if name == "energy_kwh" else ours.get("emissions_kg")
                row["elsewhere"] = elsewhere(grams_of(published[size]), spent, emitted, pue)
            if row.get("elsewhere"):
                row["verdict"] = "not comparable"
        rows.append(row | {"note": "; ".join(filter(None, (row.get("elsewhere"), _note(name, sizes))))})
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


def style(df: pd.DataFrame) -> HTML:
    """The table as a notebook shows it: as in the reports."""
    from IPython.display import HTML

    from ttl_utils import table_files

    return HTML(table_files.html(df.rename(columns={"difference": "difference (%)"})))
