"""A list of overrides, each pretrained as a run of its own on one corpus and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ttl_utils.errors import MissingStage, ParameterError, TTLError
from ttl_utils.params import Params, leaves, load_params
from ttl_utils.progress import clock
from ttl_utils.run import Run, outputs_folder

LONGEST_NAME = 100
PRETRAIN = (sys.executable, "-m", "ttl_utils", "pretrain")


@dataclass(frozen=True)
class Outcome:
    """What became of one item: `run` holds its stage 03, which may be another's with the same parameters."""

    run: str
    state: str  # finished, reused or failed
    message: str = ""
    duration_s: float | None = None


@dataclass(frozen=True)
class Item:
    name: str
    overrides: Mapping[str, Any]
    params: Params


def sweep_command(size: str, file: str, base: str | None = None) -> None:
    """Run the sweep of a YAML file, and show what became of each item.

    Raises:
        TTLError: the file or an item is wrong, or at the end, when items have failed.
    """
    outcomes = sweep(size, read_sweep(file), base)
    width = max(len(outcome.run) for outcome in outcomes)
    print()
    for outcome in outcomes:
        took = "" if outcome.duration_s is None else f" in {clock(outcome.duration_s)}"
        print(f"{outcome.run:{width}}  {outcome.state}{took}{': ' if outcome.message else ''}{outcome.message}")
    failed = [outcome.run for outcome in outcomes if outcome.state == "failed"]
    made = list(dict.fromkeys(outcome.run for outcome in outcomes if outcome.state != "failed"))
    if made:
        print(f"\ncompare them: ttl compare {shlex.join(made)}")
    if failed:
        raise TTLError(
            f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}; the same command runs them again"
        )


def read_sweep(file: str) -> list[dict]:
    path = Path(file)
    try:
        items = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(items, list):
        raise ParameterError(
            f"{file}: expected a list of overrides, such as `- {{pretraining: {{learning_rate: 1.0e-3}}}}`, "
            f"found {type(items).__name__}"
        )
    return items


def sweep(size: str, overrides: list[dict], base: str | None = None, run_prefix: str | None = None) -> list[Outcome]:
    """Pretrain every item, one after another, each in a process of its own; finished ones are reused.

    Args:
        size: a size, or the path of a parameter file.
        overrides: an item holds the keys to change, by section, as `{"pretraining": {"learning_rate": 1e-3}}`.
        base: the run whose stages 01 and 02 all of them use; default: the size's own.
        run_prefix: what the runs' names begin with; default: the size.

    Raises:
        TTLError: any item is wrong, or the base lacks a stage; nothing was started then.
    """
    given = {"file": size} if size.endswith((".yaml", ".yml")) else {"size": size}
    own = load_params(given)
    base = base or own.base or own.run_name
    home = outputs_folder() / base
    if not (home / "02_tokenizer" / "manifest.json").is_file():
        named = "" if base == own.run_name else f" --run {base}"
        raise MissingStage(
            f"the corpus and tokenizer are those of run {base!r}, whose stage 02 is not finished ({home}): make it "
            f"with `ttl run {size}{named} --to 02`, or name another run with --base"
        )
    items = _items(given | {"base": base}, run_prefix or own.run_name, overrides)
    finished = _check(items, size, base)
    outcomes = []
    for number, item in enumerate(items, start=1):
        if item.name in finished:
            outcomes.append(Outcome(finished[item.name], "reused"))
            continue
        print(f"\n{number} of {len(items)}: {item.name}", flush=True)
        started = time.monotonic()
        message = _pretrain(_arguments(size, base, item))
        outcomes.append(Outcome(item.name, "failed" if message else "finished", message, time.monotonic() - started))
    return outcomes


def _items(given: dict, prefix: str, overrides: list[dict]) -> list[Item]:
    """Every item with its run's name and its parameters; all that is wrong with any of them is one error."""
    items: dict[int, Item] = {}
    wrong = [] if overrides else ["the sweep has no items"]
    for number, (item, name) in enumerate(zip(overrides, _names(prefix, overrides), strict=True), start=1):
        try:
            if not isinstance(item, Mapping):
                raise ParameterError(f"expected keys and values, as in {{pretraining: {{seed: 1}}}}, found {item!r}")
            if taken := {"size", "file", "run", "base"} & item.keys():
                raise ParameterError(f"{', '.join(sorted(taken))}: not for an item to say; it changes what the runs do")
            params = load_params({**item, **given, "run": name})
            for other, earlier in items.items():
                if params.values == earlier.params.values.model_copy(update={"run": name}):
                    raise ParameterError(f"the same parameters as item {other}")
            items[number] = Item(name, item, params)
        except TTLError as error:
            wrong.append(f"item {number}: {error}")
    if wrong:
        raise ParameterError("\n".join(wrong))
    return list(items.values())


def _names(prefix: str, overrides: list[dict]) -> list[str]:
    """A folder name for each item, such as `nano-learning_rate=0.001-seed=1`; keys are named as far as needed."""
    flat = [dict(leaves(item)) if isinstance(item, Mapping) else {} for item in overrides]
    last = Counter(key.rpartition(".")[2] for key in {key for item in flat for key in item})
    names = []
    for item in flat:
        parts = [prefix]
        for key, value in item.items():
            short = key.rpartition(".")[2]
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            parts.append(f"{short if last[short] == 1 else key}={text}")
        names.append(re.sub(r"[^\w.=+-]+", "_", "-".join(parts)))
    # a file system may not tell capitals apart
    times = Counter(name.casefold() for name in names)
    return [
        name if len(name) <= LONGEST_NAME and times[name.casefold()] == 1 else f"{name[:LONGEST_NAME]}-{_digest(item)}"
        for name, item in zip(names, flat, strict=True)
    ]


def _digest(item: dict) -> str:
    return hashlib.sha256(json.dumps(item, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _check(items: list[Item], size: str, base: str) -> dict[str, str]:
    """What is finished already: the run that holds stage 03, by the item's name.

    Raises:
        TTLError: items that cannot run, because of what is or is not there.
    """
    finished, wrong = {}, []
    for item in items:
        run = Run(item.params)
        try:
            tokenizer, stage = run.stage("02_tokenizer"), run.stage("03_pretraining")
            if not tokenizer.finished:
                wrong.append(
                    f"{item.name}: stage 02 of run {base!r} is of another seed, or other data or tokenizer parameters. "
                    "pretraining.seed varies weights and data order on one corpus; for a corpus of its own, make it "
                    f"first with `ttl run {shlex.join(_arguments(size, base, item))} --to 02`"
                )
            elif tokenizer.check() and stage.check() == "finished":
                finished[item.name] = stage.folder.parent.name
        except TTLError as error:
            wrong.append(f"{item.name}: {error}")
    if wrong:
        raise TTLError("\n".join(wrong))
    return finished


def _arguments(size: str, base: str, item: Item) -> list[str]:
    arguments = [size, "--run", item.name, "--base", base]
    for key, value in leaves(item.overrides):
        # one line, without the mark that ends a document: 0.00001 has to be written as 1.0e-05
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
        text = text.removesuffix("...\n").strip()
        arguments += ["--set", f"{key}={text}"]
    return arguments


def _pretrain(arguments: list[str]) -> str:
    """`ttl pretrain` in a process of its own, its output shown; returns why it failed, or ""."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [*PRETRAIN, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    shown: deque[str] = deque(maxlen=100)

    def show() -> int:
        for line in process.stdout:
            print(line, end="", flush=True)
            shown.append(line)
        return process.wait()

    try:
        code = show()
    except KeyboardInterrupt:
        # the terminal interrupted both of us: the run saves a checkpoint and ends
        show()
        raise
    if code == 0:
        return ""
    _, found, said = "".join(shown).rpartition("\nttl: ")
    said = " ".join((said if found else "".join(list(shown)[-1:])).split())
    return said if code > 0 and said else f"killed (signal {-code}); {said}" if code < 0 else f"exit status {code}"
