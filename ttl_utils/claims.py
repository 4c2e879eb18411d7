"""What the paper states, value by value, and where a run of ours has the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pandas as pd

from ttl_utils import paper, score_tables
from ttl_utils.equivalents import car_km
from ttl_utils.judged import Judged, published_params
from ttl_utils.model import count_parameters
from ttl_utils.paper import Figure

Value = Callable[[Judged], Any]


@dataclass(frozen=True)
class Claim:
    """`value_of` gives a run's value, or None; `setting` is that of our parameter file, which needs no run."""

    item: str
    size: str
    metric: str
    figure: Figure
    value_of: Value = lambda run: None
    setting: Any = None
    # verdict and reason by another rule than the figure's tolerance, where it can be told
    rule: Callable[[Judged], tuple[str, str] | None] = lambda run: None


@cache
def items() -> pd.DataFrame:
    """The paper's tables and figures, and the sections that print values beside them, in its order."""
    return paper.table("items").set_index("item")


def claims(item: str) -> Iterator[Claim]:
    """All but the curves, which are compared at many points."""
    yield from _TABLES.get(item, lambda: ())()
    published = {size: paper.headline(size) for size in (*paper.SIZES, "both")}
    for metric, value_of in _MEASURED.get(item, {}).items():
        for size in published:
            if metric in published[size]:
                yield Claim(item, size, metric, published[size][metric], value_of)


def _at(path: str, convert: Callable[[float], float] = float) -> Value:
    """The value of this dotted name in metrics.json."""
    return lambda run: None if (value := run.number(path)) is None else convert(value)


def _of_chat(name: str) -> Value:
    return lambda run: next(
        (row[name] for row in run.at("06_carbon_report.stages") or [] if row["stage"] == "05_chat"), None
    )


_MEASURED: dict[str, dict[str, Value]] = {
    "Section 3.2": {"documents": _at("01_data.documents_kept")},
    "Table 2": {"parameters": _at("03_pretraining.parameters")},
    "Table 3": {name: _at(f"03_pretraining.{name}") for name in ("steps", "tokens")},
    "Section 3.5": {
        "tokens_per_second": _at("03_pretraining.tokens_per_second"),
        "tokens_per_second_peak": lambda run: max(run.points("tokens_per_second"), default=None),
        "duration_s": _at("03_pretraining.duration_s"),
    },
    "Section 4.2": {
        "energy_kwh": _at("03_pretraining.energy_kwh"),
        "emissions_kg": _at("03_pretraining.emissions_kg"),
        "car_km": _at("03_pretraining.emissions_kg", car_km),
    },
    "Section 4.3": {f"chat_{name}": _of_chat(name) for name in ("energy_kwh", "emissions_kg", "duration_s")},
}


def _tokenizers() -> Iterator[Claim]:
    def measured(run: Judged, name: str, column: str) -> float | None:
        for row in run.at("02_tokenizer.comparison.table_1") or []:
            same = row["tokenizer"].startswith("ours") if name == "TTL" else row["tokenizer"] == name
            if same and row["text"] == "measured here":
                return row[column]
        return None

    for row in paper.table("table1_tokenizers").astype(object).itertuples():
        for column, unit, tolerance in (("tokens", "tokens", math.nan), ("vocab_size", "pieces", 0)):
            figure, value_of = Figure(getattr(row, column), unit, "", tolerance), partial(measured, name=row.tokenizer)
            yield Claim("Table 1", "both", f"{row.tokenizer}: {column}", figure, partial(value_of, column=column))


def _printed(name: str, size: str) -> dict[str, Any]:
    # as objects: whole numbers stay whole, and true and false Python's
    return paper.table(name).astype(object).set_index("size").loc[size].to_dict()


def _shape() -> Iterator[Claim]:
    for size in paper.SIZES:
        params, printed = published_params(size), _printed("table2_architecture", size)
        ours = params.model.model_dump() | {"vocab_size": params.tokenizer.vocab_size}
        ours["parameters, counted"] = count_parameters(params.model, params.tokenizer.vocab_size)
        printed["parameters, counted"] = int(paper.headline(size)["parameters"].value)
        for name, value in printed.items():
            yield Claim("Table 2", size, name, Figure(value, "", "", 0), setting=ours[name])


def _training() -> Iterator[Claim]:
    def choice(run: Judged, key: str, chosen: tuple[str, ...]) -> bool | None:
        return None if run.at(key) is None else run.at(key) in chosen

    # what the machine decides; bf16 on CUDA sets tf32 too
    decided: dict[str, Value] = {
        "mixed_precision": lambda run: run.at("03_pretraining.precision"),
        "tf32": partial(choice, key="03_pretraining.precision", chosen=("bf16", "tf32")),
        "flash_attention_2": partial(choice, key="03_pretraining.attention", chosen=("flash_attention_2",)),
    }
    for size in paper.SIZES:
        params = published_params(size)
        ours = params.pretraining.model_dump()
        tokens = ours["per_device_train_batch_size"] * params.model.max_position_embeddings
        ours["gradient_accumulation_steps"] = ours["tokens_per_step"] // tokens
        ours["optimizer"] = "AdamW" if ours["optim"].startswith("adamw") else ours["optim"]
        for name, value in _printed("table3_training", size).items():
            where = {"value_of": decided[name]} if name in decided else {"setting": ours[name]}
            yield Claim("Table 3", size, name, Figure(value, "", "", 0), **where)


def _scores(item: str, prefix: str, tasks: dict[str, str]) -> Iterator[Claim]:
    """In standard errors of our score, as notebook 04 judges them; the average by its tolerance."""

    def value(run: Judged, names: list[str]) -> float | None:
        values = run.scores.get("ours", pd.Series(dtype=float)).reindex(names)
        return None if values.isna().any() else float(values.mean())

    def in_errors(run: Judged, task: str) -> tuple[str, str] | None:
        row = run.scores.loc[task]
        if row.verdict == "not run" and run.at("04_evaluation"):
            return row.verdict, row.note
        if row.verdict not in ("reproduced", "close", "differs"):
            return None
        return row.verdict, f"{row['difference (points)']:+.2f} points; standard error {row.stderr:.2f}"

    def average(run: Judged) -> tuple[str, str] | None:
        judged = [in_errors(run, task) for task in tasks.values()]
        return None if all(judged) else ("not comparable", "scores that are not judged themselves")

    for size in paper.SIZES:
        published = paper.headline(size)
        for name, task in tasks.items():
            figure, of_run = replace(published[prefix + name], tolerance=math.nan), partial(value, names=[task])
            yield Claim(item, size, name, figure, of_run, rule=partial(in_errors, task=task))
        of_run = partial(value, names=list(tasks.values()))
        yield Claim(item, size, "average", published[f"{prefix}average"], of_run, rule=average)


def _by_step() -> Iterator[Claim]:
    def at_step(run: Judged, step: int, column: str) -> float | None:
        if column != "emissions_kg":
            return run.points(column).get(step)
        # at the intensity of the whole stage
        energy_kwh, emissions_kg = (run.number(f"03_pretraining.{name}") for name in ("energy_kwh", "emissions_kg"))
        so_far = run.points("energy_kwh").get(step)
        return so_far * emissions_kg / energy_kwh if so_far and energy_kwh and emissions_kg else None

    head = paper.headline("460m")
    for row in paper.table("table6_energy_460m").itertuples():
        for column in ("perplexity", "energy_kwh", "emissions_kg"):
            figure = replace(head[column], value=getattr(row, column))
            of_run = partial(at_step, step=row.step, column=column)
            yield Claim("Table 6", "460m", f"{column}, step {row.step:,}", figure, of_run)


def _sample() -> Iterator[Claim]:
    sample = Figure(math.nan, "", "", math.nan)
    yield Claim("Figure 3", "460m", "sample", sample, lambda run: math.nan if run.at("05_chat") else None)


_TABLES: dict[str, Callable[[], Iterator[Claim]]] = {
    "Table 1": _tokenizers,
    "Table 2": _shape,
    "Table 3": _training,
    "Table 4": lambda: _scores("Table 4", "harness_", {k: f"paper/{v}" for k, v in score_tables.TABLE_4.items()}),
    "Table 5": lambda: _scores("Table 5", "downstream_", {name: name for name in score_tables.TABLE_5}),
    "Table 6": _by_step,
    "Figure 3": _sample,
}
