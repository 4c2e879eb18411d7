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
from ttl_utils.judged import Judged
from ttl_utils.ledger import paper_rows, stage_totals
from ttl_utils.model import count_parameters
from ttl_utils.paper import Figure

Value = Callable[[Judged], Any]


@dataclass(frozen=True)
class Claim:
    """`value_of` gives a run's value, or None; `setting` is that of our parameter file, which needs no run.

    Nor does what is `calculated`, a value and how.
    """

    item: str
    size: str
    metric: str
    figure: Figure
    value_of: Value = lambda run: None
    setting: Any = None
    calculated: tuple[float, str] | None = None
    # verdict and reason by another rule than the figure's tolerance, where it can be told
    rule: Callable[[Judged], tuple[str, str] | None] = lambda run: None
    # what a run has in the place of a text or a yes
    told: Callable[[Judged], str] = lambda run: "not as printed"


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
                place = "05_chat" if metric.startswith("chat_") else "03_pretraining"
                at_home = partial(_at_home, place=place, metric=metric)
                yield Claim(item, size, metric, published[size][metric], value_of, rule=at_home)


def _at(path: str, convert: Callable[[float], float] = float) -> Value:
    """The value of this dotted name in metrics.json."""
    return lambda run: None if (value := run.number(path)) is None else convert(value)


def _at_home(run: Judged, place: str, metric: str) -> tuple[str, str] | None:
    """Energy of another overhead, and emissions of another grid, are not judged."""
    name = metric.removeprefix("chat_")
    energy_kwh, emissions_kg = (run.number(f"{place}.{each}") for each in ("energy_kwh", "emissions_kg"))
    if name not in ("energy_kwh", "emissions_kg", "car_km") or energy_kwh is None:
        return None
    grams = paper.grams_of(paper.headline(run.size or "460m"), metric.removesuffix(name))
    why = paper.elsewhere(grams, energy_kwh, None if name == "energy_kwh" else emissions_kg, run.pue)
    return ("not comparable", why) if why else None


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
    "Section 4.3": {f"chat_{name}": _at(f"05_chat.{name}") for name in ("energy_kwh", "emissions_kg", "duration_s")},
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
        params, printed = paper.params_of(size), _printed("table2_architecture", size)
        ours = params.model.model_dump() | {"vocab_size": params.tokenizer.vocab_size}
        for name, value in printed.items():
            yield Claim("Table 2", size, name, Figure(value, "", "", 0), setting=ours[name])
        counted = count_parameters(params.model, params.tokenizer.vocab_size), "from the shape in our parameter file"
        figure = paper.headline(size)["parameters"]
        yield Claim("Table 2", size, "parameters, counted", figure, calculated=counted)


def _logs() -> Iterator[Claim]:
    """Section 4.2 from the authors' own logs, added up by our code."""
    printed = paper.table("section42_energy").set_index("size")
    for row in stage_totals(paper_rows()).itertuples():
        for name, unit in (("energy_kwh", "kWh"), ("emissions_kg", "kg CO2eq"), ("gpu_watts", "W")):
            figure = Figure(printed.loc[row.stage, name], unit, "", 1)
            calculated = getattr(row, name), "the authors' CodeCarbon log through our ledger"
            yield Claim("Section 4.2", row.stage, f"from the log: {name}", figure, calculated=calculated)


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
        params = paper.params_of(size)
        ours = params.pretraining.model_dump()
        tokens = ours["per_device_train_batch_size"] * params.model.max_position_embeddings
        ours["gradient_accumulation_steps"] = ours["tokens_per_step"] // tokens
        ours["optimizer"] = "AdamW" if ours["optim"].startswith("adamw") else ours["optim"]
        for name, value in _printed("table3_training", size).items():
            if name in decided:
                key = "attention" if name == "flash_attention_2" else "precision"
                told = partial(_found, key=f"03_pretraining.{key}")
                yield Claim("Table 3", size, name, Figure(value, "", "", 0), decided[name], told=told)
            else:
                yield Claim("Table 3", size, name, Figure(value, "", "", 0), setting=ours[name])


def _found(run: Judged, key: str) -> str:
    return f"{key.rpartition('.')[2]} was {run.at(key)}"


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
            at_home = partial(_at_home, place="03_pretraining", metric=column)
            yield Claim("Table 6", "460m", f"{column}, step {row.step:,}", figure, of_run, rule=at_home)


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
    "Section 4.2": _logs,
    "Figure 3": _sample,
}
