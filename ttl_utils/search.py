"""The least costly configuration, by trying (paper, section 3.5): a few timed steps of each, in a process of its own.

The rows vary one thing at a time around the parameter file's own setting, at constant tokens per step. Two more are
the paper's claim: its setting over fp32 without tf32 and with plain attention. Both run this project's loop, so what
they compare is precision and attention alone.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pandas as pd
import psutil

from ttl_utils.carbon import track
from ttl_utils.devices import peak
from ttl_utils.errors import ParameterError, TTLError
from ttl_utils.memory import GIB, needed
from ttl_utils.model import Hardware, choose_hardware, flops_per_token
from ttl_utils.progress import Progress
from ttl_utils.schema import Pretraining
from ttl_utils.trial import NO_MEMORY, OK, UNSUPPORTED, failure

if TYPE_CHECKING:
    from ttl_utils.run import Run

OWN, POSSIBLE, TOGETHER = "the file's own", "what auto chooses", "what gained, together"
SETTING, BASELINE = "paper's setting", "paper's baseline"
# section 3.5: how many times as fast its setting is as its baseline
CLAIMS = {"training": ("tokens_per_second", 3.0), "evaluation": ("evaluation_tokens_per_second", 6.0)}
MICRO = "per_device_train_batch_size"
CHOICES: dict[str, tuple] = {
    "precision": ("fp32", "tf32", "bf16", "fp16"),
    "attention": ("eager", "sdpa", "flash_attention_2"),
    MICRO: (),  # by the rows of a step
    "compile": (False, True),
    "gradient_checkpointing": (False, True),
    "optim": ("adamw_torch_fused", "adamw_torch"),
}
MEASURED = ["tokens_per_second", "share_of_peak", "peak_memory_gib", "evaluation_tokens_per_second"]
# speeds that are closer than this are the same, as far as a few steps can tell
NOISE = 0.03
FIRST_LIMIT_S, START_LIMIT_S = 3600.0, 600.0
COMMAND = [sys.executable, "-m", "ttl_utils.trial"]


@dataclass(frozen=True)
class Configuration:
    """Settings to try; `unsupported` says why this machine cannot."""

    name: str
    settings: Pretraining
    unsupported: str = ""

    @property
    def values(self) -> dict[str, Any]:
        return {key: getattr(self.settings, key) for key in CHOICES}


def configurations(settings: Pretraining, device: str, rows: int, name: str = OWN) -> list[Configuration]:
    """These settings first, then the paper's two rows, then one change at a time; `rows`: of a step, in all.

    Where two turn out the same, they are one, under both names.
    """
    asked = settings.model_copy(update={"device": device})
    if asked.isolate_documents and asked.attention == "auto":
        asked = asked.model_copy(update={"attention": "sdpa"})
    found = [_resolved(name, asked)]
    if found[0].unsupported:
        possible = {"precision": "auto", "attention": "sdpa" if asked.isolate_documents else "auto"}
        found.append(_resolved(POSSIBLE, asked.model_copy(update=possible)))
    base = found[-1].settings
    plain = {"compile": False, "gradient_checkpointing": False}
    changes = {
        SETTING: plain | {"precision": "bf16", "attention": "flash_attention_2"},
        BASELINE: plain | {"precision": "fp32", "attention": "eager"},
    }
    micro = base.per_device_train_batch_size
    sizes = tuple(size for size in (micro // 2, 2 * micro, 4 * micro) if size and rows % size == 0)
    for key, choices in (CHOICES | {MICRO: sizes}).items():
        for value in choices:
            if value != getattr(base, key):
                # FlashAttention knows 16 bits only
                wide = value in ("fp32", "tf32") and base.attention == "flash_attention_2"
                change = {key: value} | ({"attention": "sdpa"} if wide else {})
                changes[as_yaml(change)] = change
    for title, change in changes.items():
        new = _resolved(title, base.model_copy(update=change))
        same = next((number for number, old in enumerate(found) if old.values == new.values), None)
        if same is None:
            found.append(new)
        else:
            found[same] = replace(found[same], name=f"{found[same].name} = {title}")
    return found


def _resolved(name: str, settings: Pretraining) -> Configuration:
    try:
        hardware = choose_hardware(settings)
        if settings.isolate_documents and hardware.attention == "flash_attention_2":
            raise ParameterError("FlashAttention 2 would mix the documents of a row (isolate_documents)")
    except ParameterError as error:
        return Configuration(name, settings, str(error))
    chosen = {"precision": hardware.precision, "attention": hardware.attention}
    return Configuration(name, settings.model_copy(update=chosen))


def as_yaml(change: dict[str, Any], between: str = ": ") -> str:
    return ", ".join(f"{key}{between}{str(value).lower()}" for key, value in change.items())


def search(run: Run, steps: int) -> pd.DataFrame:
    """Try them all: a row each of what was set, how it ended and what was measured, the file's own setting first.

    Memory on a CPU is that of the whole process, Python and PyTorch with it. `training_ratio` and `evaluation_ratio`
    are over the paper's baseline on this machine.
    """
    if steps < 1:
        raise ParameterError(f"pretraining.search_steps {steps}: at least one step has to be timed")
    settings, model = run.params.pretraining, run.params.model
    tokenizer = run.stage("02_tokenizer")
    vocab_size = tokenizer.metrics()["vocab_size"] if tokenizer.finished else run.params.tokenizer.vocab_size
    block = settings.block_size or model.max_position_embeddings
    rows = settings.tokens_per_step // block
    device = choose_hardware(settings.model_copy(update={"precision": "auto", "attention": "auto"})).device
    job = {"model": model.model_dump(), "vocab_size": vocab_size, "steps": steps}
    tried: list[dict] = []
    left = configurations(settings, device, rows)
    with Progress("configuration search: rows", None) as progress:
        while left:
            one, started = left.pop(0), time.monotonic()
            found = {"status": UNSUPPORTED, "reason": one.unsupported}
            if not one.unsupported:
                progress.total = progress.done + 1 + sum(not new.unsupported for new in left)
                progress.show(one.name)
                limit_s = _limit_s(_first(tried), settings)
                found = _lack_of_memory(run, one) or _run_child(job | {"settings": one.settings.model_dump()}, limit_s)
                progress.done += 1
            micro = one.settings.per_device_train_batch_size
            seconds = {"duration_s": round(time.monotonic() - started, 1)}
            tried.append({"name": one.name, **one.values, "accumulation": rows // micro, **found, **seconds})
            if found["status"] == NO_MEMORY and not _first(tried) and micro > 1:
                # around a setting that does not fit nothing would: begin again from a smaller micro-batch
                change = {MICRO: max(size for size in range(1, micro) if rows % size == 0)}
                left = configurations(one.settings.model_copy(update=change), device, rows, as_yaml(change))
            if not left and (gains := _gains(tried)):
                left = [_resolved(TOGETHER, settings.model_copy(update={"device": device} | gains))]
            left = [new for new in left if new.values not in map(_values, tried)]
    flops = flops_per_token(model, vocab_size, block)["convention"]
    # a CPU's peak is measured, in fp32 and once
    rate_of = cache(lambda precision: peak(Hardware(device, precision, "sdpa")).flops_per_second)
    for row in tried:
        if row["status"] == OK and (rate := rate_of(row["precision"] if device != "cpu" else "fp32")):
            row["share_of_peak"] = round(row["tokens_per_second"] * flops / rate, 4)
    return _table(tried)


def _first(tried: list[dict]) -> dict | None:
    return next((row for row in tried if row["status"] == OK), None)


def _values(row: dict) -> dict[str, Any]:
    return {key: row[key] for key in CHOICES}


def _gains(tried: list[dict]) -> dict[str, Any]:
    """What every row changed that was faster than the first, the fastest one's word last; {} where none was."""
    first, together = _first(tried), {}
    if first is None:
        return {}
    faster = [row for row in tried if row.get("tokens_per_second", 0) > (1 + NOISE) * first["tokens_per_second"]]
    for row in sorted(faster, key=lambda row: row["tokens_per_second"]):
        together |= dict(_values(row).items() - _values(first).items())
    return _values(first) | together if together else {}


def _limit_s(first: dict | None, settings: Pretraining) -> float:
    """Twice the first row's time; beside it, to compile may take a twentieth of the run: longer cannot pay."""
    if first is None:
        return FIRST_LIMIT_S
    run_s = settings.max_steps * settings.tokens_per_step / first["tokens_per_second"]
    return 2 * first["duration_s"] + min(START_LIMIT_S, run_s / 20)


def _lack_of_memory(run: Run, one: Configuration) -> dict | None:
    """On a CPU too large a step would slow the whole machine down before it failed: it is not begun."""
    if one.settings.device != "cpu":
        return None
    planned = needed(run.params.values.model_copy(update={"pretraining": one.settings}), one.settings.precision)
    free = psutil.virtual_memory().available / GIB
    if planned <= free:
        return None
    return {"status": NO_MEMORY, "reason": f"not run: needs about {planned:.1f} GiB, {free:.1f} GiB are free"}


def _run_child(job: dict, limit_s: float) -> dict:
    """What a process of its own finds; however it ends is a status and a reason."""
    try:
        done = subprocess.run(
            COMMAND,
            input=json.dumps(job),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return {"status": "timed out", "reason": f"not done after {limit_s:.0f} s"}
    with contextlib.suppress(IndexError, ValueError):
        found = json.loads(done.stdout.splitlines()[-1])
        if isinstance(found, dict) and "status" in found:
            return found
    if done.returncode == -9:
        return {"status": NO_MEMORY, "reason": "the system killed the process, most likely for memory"}
    last = ([line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
    return failure(f"exit status {done.returncode}: {last}")


def _table(tried: list[dict]) -> pd.DataFrame:
    ratios = {f"{name}_ratio": column for name, (column, _) in CLAIMS.items()}
    columns = ["name", "status", *CHOICES, "accumulation", *MEASURED, *ratios, "duration_s", "reason"]
    table = pd.DataFrame(tried).reindex(columns=columns).astype(dict.fromkeys(MEASURED, float))
    baseline = table[table.name.str.contains(BASELINE)].iloc[-1]
    for ratio, column in ratios.items():
        table[ratio] = table[column] / baseline[column]
    return table


def best(table: pd.DataFrame) -> pd.Series:
    """The fastest row; among those as fast within noise one without compile and checkpointing, the file's own first.

    What varies changes no result of a run, or its precision only. Raises TTLError where no row ran.
    """
    ran = table[table.status == OK]
    if ran.empty:
        raise TTLError(f"no configuration ran; the file's own: {table.status.iloc[0]}, {table.reason.iloc[0]}")
    near = ran[ran.tokens_per_second >= (1 - NOISE) * ran.tokens_per_second.max()]
    simplest = min(
        near.index,
        key=lambda at: (near.compile[at], near.gradient_checkpointing[at], at > 0, -near.tokens_per_second[at]),
    )
    return table.loc[simplest]


def proposal(table: pd.DataFrame) -> str:
    """What to write for the best row, on the command line or in the file; nothing is applied."""
    if not (table.status == OK).any():
        return "No configuration ran."
    chosen, own = best(table), table.iloc[0]
    change = {key: chosen[key] for key in CHOICES if chosen[key] != own[key]}
    if not change:
        return f"Nothing was faster than the file's own setting by {NOISE:.0%}: leave it as it is."
    beside = f"{own.tokens_per_second:,.0f}" if own.status == OK else own.status
    lines = [f"Best: {chosen['name']}, {chosen.tokens_per_second:,.0f} tokens/s ({OWN}: {beside})"]
    if "precision" in change:
        lines.append("It changes the precision that the run is computed in.")
    lines.append(" ".join(f"--set pretraining.{as_yaml({key: value}, '=')}" for key, value in change.items()))
    return "\n".join([*lines, "or, in the file:", "pretraining:", *(f"  {as_yaml({k: v})}" for k, v in change.items())])


def claims(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's setting over its baseline (section 3.5): as claimed, and on this machine."""
    pair = [table[table.name.str.contains(name)].iloc[-1] for name in (SETTING, BASELINE)]
    missing = "; ".join(f"{row['name']}: {row.status}" for row in pair if row.status != OK)
    verdict = f"not run ({missing})" if missing else "measured"
    rows = [(name, claimed, pair[0][f"{name}_ratio"], verdict) for name, (_, claimed) in CLAIMS.items()]
    return pd.DataFrame(rows, columns=["times as fast in", "paper", "here", "verdict"])


def search_command(run: Run, steps: int) -> pd.DataFrame:
    """Search, print what was found and what to write, and save the table and its figure as `figures/03_search`."""
    from ttl_utils import figures_runs

    # a row of its own in the ledger: it is no part of the run that it prepares
    with track(run.folder / "energy.jsonl", "03_search", run.params.carbon):
        table = search(run, steps)
    figures_runs.search(run, table.assign(claim=table.name.str.contains(f"{SETTING}|{BASELINE}")))
    # a terminal is narrow: what did not run stands below with its reason
    shown = table.loc[table.status == OK, ["name", *MEASURED, *(f"{name}_ratio" for name in CLAIMS)]]
    short = {"tokens_per_second": "tokens/s", "share_of_peak": "of peak", "peak_memory_gib": "GiB"}
    short |= {"evaluation_tokens_per_second": "evaluating", "training_ratio": "ratio", "evaluation_ratio": "its ratio"}
    print(shown.rename(columns=short).to_string(index=False, float_format=_number, na_rep=""))
    print("ratios: over the paper's baseline; memory on a CPU: of the whole process, with Python and PyTorch")
    for row in table[table.reason != ""].itertuples():
        print(f"{row.name}: {row.status}: {row.reason}")
    print(f"\n{claims(table).to_string(index=False, float_format=_number, na_rep='')}\n\n{proposal(table)}")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
