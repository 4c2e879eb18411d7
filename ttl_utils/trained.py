"""Stage 03 of a run as its files tell it, finished or under way: identity, parameters, curve."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttl_utils.errors import DamagedFile, MissingStage, TTLError
from ttl_utils.figures_pretraining import smoothed, smoothing_window
from ttl_utils.files import read_json
from ttl_utils.health import Finding, findings
from ttl_utils.params import leaves
from ttl_utils.records import read_records
from ttl_utils.run import known_runs

STAGE = "03_pretraining"
TOKENIZER, TOKENS, CORPUS = "input 02_tokenizer/tokenizer", "input 02_tokenizer/tokens", "input 01_data/corpus"
COUNTED = ("steps", "tokens")
LOSSES = ("train_loss", "train_loss_smoothed", "validation_loss", "perplexity", "bits_per_byte")
COLUMNS = (*COUNTED, *LOSSES, "tokens_per_second", "energy_kwh", "duration_s")


MOVING = {f"pretraining.{key}" for key in ("eval_tokens", "device", "precision", "attention")}


@dataclass(frozen=True)
class Trained:
    """Stage 03 of a run, finished or under way, as its files tell it."""

    name: str
    stage: Path
    identity: dict[str, Any]
    # those that decide the result, of stages 01 to 03 as far as they are found, and the others that run.json knows
    parameters: dict[str, Any]
    free: dict[str, Any]
    corpus: str | None
    records: list[dict]
    findings: list[Finding]

    @property
    def finished(self) -> bool:
        return (self.stage / "manifest.json").is_file()

    @property
    def max_steps(self) -> int:
        return self.parameters["pretraining.max_steps"]

    @property
    def text(self) -> str | None:
        """What tells the text apart that it learned from and was measured on."""
        imported = any(key.startswith("tokenizer.tokens.") for key in self.parameters)
        return self.identity.get(TOKENS) if imported or self.corpus is None else self.corpus

    @property
    def state(self) -> str:
        last = self.records[-1]
        if self.finished:
            return "finished"
        if "not_finite" in last:
            return f"stopped at step {last['step']:,}: not finite"
        return f"step {last['step']:,} of {self.max_steps:,}"

    @cached_property
    def curve(self) -> pd.DataFrame:
        """The records, with the smoothed training loss beside them."""
        names = ("step", "tokens", "loss", "validation_loss", "perplexity", "bits_per_byte", "tokens_per_second")
        rows = pd.DataFrame(self.records).reindex(columns=[*names, "energy_kwh"]).astype(float)
        rows = rows.replace([np.inf, -np.inf], np.nan)
        logged = rows.loss.notna()
        values = smoothed(rows.step[logged], rows.loss[logged], smoothing_window(self.max_steps))
        return rows.assign(smoothed=pd.Series(values, rows.index[logged], float))

    def results(self, until: int | None = None) -> dict[str, float | None]:
        """The values of `COLUMNS`, at the end or as of step `until`."""
        rows = self.curve if until is None else self.curve[self.curve.step <= until]
        known = {name: values.dropna() for name, values in rows.items()}
        last = {name: values.iloc[-1] if len(values) else None for name, values in known.items()}
        found = {name: last.get(name) for name in COLUMNS}
        found |= {"steps": last["step"], "train_loss": last["loss"], "train_loss_smoothed": last["smoothed"]}
        found["tokens_per_second"] = rows.tokens_per_second.median()
        if self.finished and until is None:
            metrics = _read(self.stage / "metrics.json")
            return found | {name: metrics.get(name) for name in ("tokens_per_second", "energy_kwh", "duration_s")}
        if until is None:
            from ttl_utils.ledger import stage_energy

            begun = _read(self.stage / "stage.json")["started"]
            found["duration_s"] = stage_energy(self.stage.parent / "energy.jsonl", STAGE, begun)[2] or None
        return found


def load(name: str, folder: Path) -> Trained:
    """The run of this name in a folder of runs.

    Raises:
        TTLError: it is not there, has no stage 03 yet, or its files are damaged.
    """
    stage = _stage_folder(name, folder)
    done = stage / "manifest.json"
    identity = _read(done if done.is_file() else stage / "stage.json")["identity"]
    packed = _made_by(folder, "02_tokenizer", "tokens", identity.get(TOKENS))
    tokenizer = _read(packed / "manifest.json")["identity"] if packed else {}
    corpus = tokenizer.get(CORPUS)
    read = _made_by(folder, "01_data", "corpus", corpus)
    data = _read(read / "manifest.json")["identity"] if read else {}
    sections = {key: value for part in (data, tokenizer, identity) for key, value in part.items() if "input" not in key}
    path = stage / "metrics.jsonl"
    try:
        records = read_records(path)
        last = [(row["step"], row["tokens"]) for row in records][-1:]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): restore it from a copy, or leave run {name!r} out") from None
    if not last:
        raise MissingStage(f"run {name!r} has no record yet: nothing was logged in {path}")
    parameters = dict(leaves(sections))
    about = stage.parent / "run.json"
    given = {"pretraining": _read(about)["parameters"]["pretraining"]} if about.is_file() else {}
    # of the keys that do not decide the result, those that move its numbers a little, or what is measured
    free = {key: value for key, value in leaves(given) if key in MOVING}
    vocab_size = _read(packed / "metrics.json")["vocab_size"] if packed else None
    found = findings(records, vocab_size, parameters["pretraining.warmup_steps"])
    return Trained(name, stage, identity, parameters, free, corpus, records, found)


def _stage_folder(name: str, folder: Path) -> Path:
    known = known_runs(folder, STAGE)
    if name in known:
        return folder / name / STAGE
    about = folder / name / "run.json"
    if about.is_file() and STAGE in (stages := _read(about)["stages"]):
        # another run's, which this one was based on
        return (about.parent / stages[STAGE]["folder"]).resolve()
    if name and (folder / name).is_dir():
        raise MissingStage(f"run {name!r} has no stage 03 yet: make it with `ttl pretrain SIZE --run {name}`")
    near = difflib.get_close_matches(name, known, 3) or known[:10]
    raise TTLError(f"there is no run {name!r} in {folder}; there are: {', '.join(near) or 'none with a stage 03'}")


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DamagedFile(f"{path} is missing: restore it from a copy, or leave this run out")
    return read_json(path)


def _made_by(folder: Path, stage: str, group: str, fingerprint: str | None) -> Path | None:
    """The finished stage, of whichever run, that made these outputs; None where it is not here any more."""
    for path in folder.glob(f"*/{stage}/manifest.json") if fingerprint else ():
        if _read(path)["outputs"].get(group, {}).get("fingerprint") == fingerprint:
            return path.parent
    return None
