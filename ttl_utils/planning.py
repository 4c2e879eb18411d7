"""Sizing before training: what a run is, what it takes, and what a budget buys (paper, sections 3.1 and 3.5)."""

from __future__ import annotations

import math
import textwrap
from numbers import Real

import pandas as pd

from ttl_utils import costs, devices, paper
from ttl_utils.budget import (
    CHINCHILLA,
    HOFFMANN_EXPONENT,
    MAX_EPOCHS,
    TOKENS_PER_PARAMETER,
    UNIQUE_TOKENS,
    affordable,
    chinchilla_loss,
    chinchilla_optimum,
    count,
    hours_for,
    read_budget,
)
from ttl_utils.errors import ParameterError
from ttl_utils.memory import USABLE, memory_table, needed, precision_of, rows_that_fit
from ttl_utils.model import parameters_by_part
from ttl_utils.params import Params


def tokens_of(params: Params) -> int:
    return params.pretraining.max_steps * params.pretraining.tokens_per_step


def sizing_table(params: Params) -> pd.DataFrame:
    """Parameters by part with their share, steps, tokens and FLOPs of the run."""
    total, tokens, flops = count(params), tokens_of(params), costs.flops_of(params)
    parts = parameters_by_part(params.model, params.tokenizer.vocab_size)
    rows = [(f"parameters, {part}", number, number / total) for part, number in parts.items()]
    figures = {"parameters": total, "steps": params.pretraining.max_steps, "tokens": tokens}
    figures |= {"tokens per parameter": tokens / total}
    figures |= {f"FLOPs per token, {name}": number for name, number in flops.items()}
    figures["FLOPs in all, convention"] = flops["convention"] * tokens
    return pd.DataFrame([*rows, *((*item, math.nan) for item in figures.items())], columns=["figure", "value", "share"])


def chinchilla_table(run: str, parameters: int, tokens: int) -> pd.DataFrame:
    """What the law and the 20-tokens rule say of the paper's runs, and of this one."""
    rows = []
    for size in paper.SIZES:
        figures = paper.headline(size)
        rows.append((f"paper, {size}", *(figures[name].value for name in ("parameters", "tokens", "validation_loss"))))
    rows.append((f"this run ({run})", parameters, tokens, math.nan))
    table = pd.DataFrame(rows, columns=["run", "parameters", "tokens", "published loss"])
    table.insert(3, "20-tokens rule", TOKENS_PER_PARAMETER * table.parameters)
    table["law as printed"] = chinchilla_loss(table.parameters, table.tokens)
    table["law, Hoffmann's exponent"] = chinchilla_loss(table.parameters, table.tokens, HOFFMANN_EXPONENT)
    return table


def cards(params: Params, utilisation: float | None = None) -> pd.DataFrame:
    """Every known GPU: GiB that the file's micro-batch needs, rows that fit, projected hours and kg per utilisation."""
    rows = []
    for name, gpu in devices.gpus().iterrows():
        precision = precision_of(params, gpu)
        row: dict[str, object] = {"GPU": name, "precision": precision or f"no {params.pretraining.precision}"}
        if precision:
            row |= {"GiB needed": needed(params, precision), "of": gpu.memory_gib}
            row["rows fit"] = rows_that_fit(params, gpu)
            for share in [utilisation] if utilisation else costs.paper_and_tucano():
                found = costs.cost(tokens_of(params) / costs.speed(params, gpu, share) / 3600, params, gpu)
                row |= {f"{unit} at {share:.0%}": found[unit] for unit in ("hours", "kg")}
        rows.append(row)
    return pd.DataFrame(rows)


def projection(
    params: Params, gpu: pd.Series, usd_per_hour: float | None = None, utilisation: float | None = None
) -> pd.DataFrame:
    """Projected speed, hours, energy, emissions and price on this GPU, a row per utilisation that was reached."""
    rows = []
    for name, share in {"as given": utilisation}.items() if utilisation else costs.anchors().items():
        speed = costs.speed(params, gpu, share)
        hours = tokens_of(params) / speed / 3600
        row = {"projected at the share of": name, "share": share, "tokens/s": speed, **costs.cost(hours, params, gpu)}
        rows.append(row | {"USD": hours * costs.price(gpu, usd_per_hour)})
    return pd.DataFrame(rows)


def paper_runs() -> pd.DataFrame:
    """The paper's runs by this planner, from their own throughput, beside the logs: differences in percent."""
    gpu, logs = devices.find_gpu(costs.PAPER_GPU), paper.table("codecarbon_final").set_index("size")
    rows = []
    for size in paper.SIZES:
        figures, log = paper.headline(size), logs.loc[size]
        logged = {"hours": log.duration_s / 3600, "kWh": log.energy_kwh, "kg": log.emissions_kg}
        for metric, what in (("tokens_per_second", "mean"), ("tokens_per_second_peak", "peak")):
            if metric in figures:
                speed = figures[metric].value
                planned = costs.cost(figures["tokens"].value / speed / 3600, costs.paper_params(size), gpu)
                row = {"run": size, "at its": what, "tokens/s": speed}
                for name, value in logged.items():
                    row |= {name: planned[name], f"{name}, log": value, f"{name}, %": 100 * (planned[name] / value - 1)}
                rows.append(row)
    return pd.DataFrame(rows)


def throughput_table() -> pd.DataFrame:
    """Tokens per second of the paper's shapes on one GPU: published, ours, and projected."""
    share, rows = costs.paper_and_tucano()[1], []
    for size in paper.SIZES:
        published = {name: figure.value for name, figure in paper.headline(size).items()}
        for gpu in (devices.find_gpu("A100-40GB"), devices.find_gpu("H100-SXM")):
            own = gpu.name == costs.PAPER_GPU
            row = {"shape": size, "GPU": gpu.name}
            row |= {"paper, mean": published["tokens_per_second"] if own else math.nan}
            row |= {"paper, peak": published.get("tokens_per_second_peak", math.nan) if own else math.nan}
            anchor = own and size == "160m"
            row |= {"Tucano": costs.TUCANO_TOKENS_PER_SECOND if anchor else math.nan}
            row["ours"] = "not measured"
            # the share is the anchor's own: no projection beside it
            projected = costs.speed(costs.paper_params(size), gpu, share)
            row[f"projected at {share:.0%}"] = math.nan if anchor else projected
            rows.append(row)
    return pd.DataFrame(rows)


def report(
    params: Params,
    *,
    gpu: str | None = None,
    usd_per_hour: float | None = None,
    utilisation: float | None = None,
    budget: str | None = None,
    brl_per_usd: float | None = None,
    unique_tokens: float | None = None,
) -> str:
    """What `ttl plan` prints: the size, its memory, hours and price, the paper's runs, and what a budget buys.

    Raises:
        ParameterError: a value that cannot be read or used.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ParameterError(f"utilisation: {utilisation} is not a share of the GPU's peak: above 0, up to 1")
    positive = {"usd_per_hour": usd_per_hour, "brl_per_usd": brl_per_usd, "unique_tokens": unique_tokens}
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ParameterError(f"{name}: {value} is not a number above 0")
    card, total, tokens = devices.find_gpu(gpu or costs.PAPER_GPU), count(params), tokens_of(params)
    # before anything long: a budget that cannot be read is said at once
    hours = hours_for(*read_budget(budget, brl_per_usd), params, card, usd_per_hour) if budget else 0.0
    settings, (share, rest), unique = params.pretraining, costs.power(), unique_tokens or UNIQUE_TOKENS
    precision = precision_of(params, card) or "fp32"
    optima = [chinchilla_optimum(6 * total * tokens, a) for a in (CHINCHILLA["a"], HOFFMANN_EXPONENT)]
    law = " or ".join(f"{n / 1e6:,.4g}M parameters and {d / 1e9:,.4g}B tokens ({d / n:.0f} each)" for n, d in optima)
    price = costs.price(card, usd_per_hour)
    priced = "as given" if usd_per_hour else "at most: the paper's 500 USD over its runs' logged hours"
    paid = "no price known here" if math.isnan(price) else f"{price:.2f} USD an hour, {priced}"
    forced = params.carbon.carbon_intensity_g_per_kwh is not None
    where = "as carbon.carbon_intensity_g_per_kwh says" if forced else params.carbon.country_iso_code
    rows, checkpointing = settings.per_device_train_batch_size, settings.gradient_checkpointing
    step = f"{rows} rows at a time, {precision}, attention {settings.attention}"
    sections = [
        _titled(f"{params.run_name}: what it is", sizing_table(params), exact=True),
        _titled(
            "Chinchilla (section 3.1): loss in nats per token, with the exponent as printed and with Hoffmann's, 0.34",
            chinchilla_table(params.run_name, total, tokens).rename(columns={"law, Hoffmann's exponent": "law, 0.34"}),
        ),
        _wrapped(
            f"With this run's compute the law is at its best with {law}, by the one exponent or the other. It was "
            "fitted on other text, other tokens and larger models: below 100M parameters it says little."
        ),
        _titled(
            f"Memory on {card.name}, estimated: {step}{', gradient checkpointing' if checkpointing else ''}",
            memory_table(params, card),
        ),
        _titled(
            "Every GPU, projected: the share of the peak is a parameter, and the ones here were reached on A100s; "
            f"rows of one step fit in {USABLE:.0%} of the memory",
            cards(params, utilisation),
        ),
        _titled(f"One {card.name}, projected; {paid}", projection(params, card, usd_per_hour, utilisation)),
        _wrapped(
            f"Power is an assumption: {share:.0%} of the GPU's limit and {rest:.0f} W beside it, as in the paper's "
            f"logs. {costs.intensity(params):.1f} g/kWh ({where}), PUE {params.carbon.pue}."
        ),
        _titled(
            "The paper's runs, planned from their own throughput, beside their logs (a mean is a log's own)",
            paper_runs(),
        ),
        _conflicts(),
        _titled(
            "Tokens per second on one GPU: published (Tucano: of 8 A100-80GB), ours, projected", throughput_table()
        ),
    ]
    for reached in ([utilisation] if utilisation else costs.paper_and_tucano()) if budget else []:
        table = affordable(params, card, hours, reached, unique)
        title = f"{budget} pays {hours:,.1f} hours of one {card.name} ({paid}); projected at {reached:.0%} of its peak"
        sections += [_titled(title, table), _proposal(table, unique)]
    return "\n\n".join(sections)


def _proposal(table: pd.DataFrame, unique_tokens: float) -> str:
    why = f"the largest with {TOKENS_PER_PARAMETER} tokens a parameter, from at most {MAX_EPOCHS} epochs of "
    why += f"{unique_tokens / 1e9:,.4g}B unique tokens (what is read more often teaches less), that fits in the memory."
    found = table[table.verdict == "proposed"]
    if found.empty:
        return _wrapped(f"Proposed: none of these; it would be {why}")
    row = found.iloc[0]
    return _wrapped(f"Proposed: {row['hidden x layers']} with {row.tokens / 1e9:,.4g}B tokens, {why}")


def _conflicts() -> str:
    rows = pd.concat([paper.conflicts(topic) for topic in ("duration", "throughput", "energy")])
    touching = rows[rows.metric.isin(["duration_s", "tokens_per_second", "energy_kwh"]) & (rows["size"] != "both")]
    lines = [
        f"{row.figure_a} ({row.source_a}) against {row.figure_b} ({row.source_b})" for row in touching.itertuples()
    ]
    return "\n".join(_wrapped(f"{size}: {line}") for size, line in zip(touching["size"], lines, strict=True))


def _titled(title: str, table: pd.DataFrame, exact: bool = False) -> str:
    shown = table.map(lambda cell: _number(cell, exact) if isinstance(cell, Real) else cell)
    return f"{_wrapped(title)}\n{shown.to_string(index=False, na_rep='-')}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent="  ", break_long_words=False)


def _number(value: float, exact: bool) -> str:
    if math.isnan(value):
        return "-"
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit and not exact:
            return f"{value / unit:,.4g}{name}" if value < 1e13 else f"{value:.3e}"
    whole = abs(value) >= 1000 or value == int(value)
    return (f"{value:,.0f}" if value < 1e13 else f"{value:.3e}") if whole else f"{value:.4g}"
