"""Benchmarks by lm-evaluation-harness, in process: one plain row per task (paper, table 4 and figure 2)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttl_utils import checkpoints
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.named_models import beside_weights
from ttl_utils.progress import Progress
from ttl_utils.provenance import code_version, machine, now, versions
from ttl_utils.score_cache import ScoreCache
from ttl_utils.task_files import Opened, Wanted, open_task, score

NOISY = ("lm_eval", "datasets", "huggingface_hub", "transformers", "httpx", "httpx2")


@dataclass(frozen=True)
class _How:
    kept: ScoreCache
    batch_size: int
    device: str
    energy: Any
    progress: Progress


def run_harness(
    model: Any,
    tokenizer: Any,
    items: Sequence[Wanted],
    *,
    about: dict[str, Any],
    cache: Path,
    batch_size: int,
    device: str,
    limit: int | None,
    seed: int,
    label: str = "tasks scored",
    status: Path | None = None,
    energy: Any = None,
) -> dict[str, dict]:
    """Score a model on each task: {key: row}. What the folder `cache` holds already costs nothing.

    `about` says which model: "model", "weights" (their hash), "revision", and "beside_weights", a hash of what else
    decides its scores, where the caller has one. `limit` keeps the first items of each task; `seed` draws the worked
    examples. `energy` has `sample()`, which gives the kWh so far. A task whose data cannot be had, or that this model's
    context or tokenizer cannot carry, gives a "not run" row with the reason, which is never kept. In a row, `truncated`
    counts the items that lost their beginning to the model's context; `bos` says whether prompts begin with BOS;
    `value`, `stderr`, `chance` and `constant_answer` are shares.

    Raises:
        TTLError: a task is unknown or named twice, or the tokenizer ends every text with EOS.
    """
    opened, kept = _open(items, seed), ScoreCache(cache, limit, seed, _dtype(model))
    rows = _known(opened, about, kept)
    if left := _left(rows):
        with Progress(label, left, status) as progress:
            _fill(rows, opened, model, tokenizer, about, _How(kept, batch_size, device, energy, progress))
    return rows


def over_checkpoints(
    folders: Sequence[Path],
    load: Callable[[Path], tuple[Any, Any]],
    items: Sequence[Wanted],
    *,
    about: dict[str, Any],
    cache: Path,
    dtype: str,
    batch_size: int,
    device: str,
    limit: int | None,
    seed: int,
    label: str = "checkpoints' tasks scored",
    status: Path | None = None,
    energy: Any = None,
) -> list[dict]:
    """Figure 2: tasks over checkpoints, a {"step", "tokens", "energy_kwh", "scores": {key: row}} each, as ordered.

    `load(folder)` gives a checkpoint's model, in `dtype` (such as "float32"), and its tokenizer. It is called where a
    row is not in the cache, and one model is held at a time. A damaged checkpoint is left out with a line.
    """
    opened, kept = _open(items, seed), ScoreCache(cache, limit, seed, dtype)
    found = []
    for folder in folders:
        try:
            hashes, state = _read(folder / "checkpoint.json"), _read(folder / "state.json")
            which = {**about, "revision": folder.name, "weights": hashes[checkpoints.WEIGHTS]}
            which["beside_weights"] = beside_weights(hashes)
            rows = _known(opened, which, kept)
            if _left(rows):
                checkpoints.check(folder)
        except DamagedFile as error:
            print(f"checkpoint {folder.name} is not evaluated: {error}")
            continue
        found.append((folder, which, state, rows))
    if left := sum(_left(rows) for *_, rows in found):
        with Progress(label, left, status) as progress:
            how = _How(kept, batch_size, device, energy, progress)
            for folder, which, _, rows in found:
                if _left(rows):
                    # no name for the model here: it would outlive its turn
                    _fill(rows, opened, *load(folder), which, how)
    return [
        {**{key: state[key] for key in ("step", "tokens", "energy_kwh")}, "scores": rows} for *_, state, rows in found
    ]


def write_harness(path: Path, rows: Sequence[dict]) -> None:
    """`harness.json`: every row, and the code, versions and machine of the evaluation that gathered them."""
    about = {"written": now(), "code": code_version(), "versions": versions(), "machine": machine()}
    write_json(path, {**about, "rows": list(rows)})


def _open(items: Sequence[Wanted], seed: int) -> list[Opened]:
    """All of them before the first is scored, so that a typing error costs no evaluation."""
    keys = [item.key for item in items]
    if len(set(keys)) < len(keys):
        raise TTLError(f"evaluation: a task is named twice among {', '.join(keys)}: name it once")
    with _quiet():
        return [open_task(item, seed) for item in items]


def _known(opened: Sequence[Opened], about: dict, kept: ScoreCache) -> dict[str, dict | None]:
    """The rows that need no model; None for the others."""
    rows = {}
    for one in opened:
        if one.task is None:
            rows[one.wanted.key] = _row(one, about, {"status": "not run", "reason": one.reason})
        else:
            row = kept.read(about, one)
            rows[one.wanted.key] = row and _row(one, about, row)
    return rows


def _left(rows: dict[str, dict | None]) -> int:
    return sum(row is None for row in rows.values())


def _row(opened: Opened, about: dict, values: dict) -> dict:
    """Who and what come last: a row that was kept may have been scored under another name."""
    item, task = opened.wanted, dict(opened.about)
    # the model has one too
    task["dataset_revision"] = task.pop("revision", None)
    return {**values, **task, **about, "task": item.task, "key": item.key, "protocol": item.protocol}


def _fill(rows: dict, opened: Sequence[Opened], model: Any, tokenizer: Any, about: dict, how: _How) -> None:
    """Score what is left, each row kept as soon as it is there."""
    from ttl_utils.scoring import Scorer

    assert _dtype(model) == how.kept.dtype, f"the model is in {_dtype(model)}, its rows are kept as {how.kept.dtype}"
    training = model.training
    try:
        with _quiet():
            lm = Scorer(model.to(how.device), tokenizer, how.batch_size)
        for one in opened:
            if rows[one.wanted.key] is not None:
                continue
            note = " ".join(part for part in (about.get("revision"), one.wanted.key) if part)
            try:
                values = _measure(lm, one, how, note)
            except TTLError as error:
                values = {"status": "not run", "reason": str(error)}
            row = rows[one.wanted.key] = _row(one, about, values)
            if row["status"] == "done":
                how.kept.write(about, one, row)
            how.progress.update(how.progress.done + 1, note)
    finally:
        model.train(training)


def _measure(lm: Any, opened: Opened, how: _How, note: str) -> dict:
    import lm_eval

    name, seen = opened.wanted.task, sys.stderr

    def show(share: float) -> None:
        with contextlib.redirect_stderr(seen):
            how.progress.update(how.progress.done, f"{note} {share:.0%}")

    lm.truncated, lm.on_progress = set(), show
    started, before = time.perf_counter(), how.energy.sample() if how.energy else None
    with _quiet(), contextlib.redirect_stdout(io.StringIO()):
        # evaluate, not simple_evaluate: that one also asks the hub and git about the model and reseeds python
        results = lm_eval.evaluate(lm, {"tasks": {name: opened.task}}, limit=how.kept.limit, bootstrap_iters=1000)
    samples = results["samples"][name]
    return {
        "status": "done",
        **score(opened, samples, results["results"][name]),
        "samples": len({sample["doc_id"] for sample in samples}),
        "truncated": len({sample["doc_id"] for sample in samples if _lost(lm, sample)}),
        "bos": lm.tok_encode("Resposta:")[0] == lm.tokenizer.bos_token_id,
        "limit": how.kept.limit,
        "seed": how.kept.seed,
        "dtype": how.kept.dtype,
        "batch_size": how.batch_size,
        "device": how.device,
        "harness_version": lm_eval.__version__,
        "scored": now(),
        "duration_s": time.perf_counter() - started,
        "energy_kwh": how.energy.sample() - before if how.energy else None,
    }


def _lost(lm: Any, sample: dict) -> bool:
    # what is not text is how to write an answer
    texts = (tuple(part for part in arguments if isinstance(part, str)) for arguments in sample["arguments"])
    return any(text in lm.truncated for text in texts)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DamagedFile(f"{path} is missing")
    return read_json(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's logs, warnings and progress bars, some of which have no switch of their own."""
    import datasets
    import huggingface_hub.utils as hub

    # lm-eval would start processes, each with a copy of the model, to bootstrap a standard error
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    libraries = [lib for lib in (datasets, hub) if not lib.are_progress_bars_disabled()]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        for library in libraries:
            library.disable_progress_bars()
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for library in libraries:
            library.enable_progress_bars()
