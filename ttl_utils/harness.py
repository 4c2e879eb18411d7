"""Benchmarks by lm-evaluation-harness, in process: one plain row per task (paper, table 4)."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import io
import logging
import os
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import yaml

from ttl_utils.errors import TTLError

TASKS = Path(__file__).parent / "tasks"
OWN_TASKS = ("ttl_smoke_pt",)
NOISY = ("lm_eval", "datasets", "huggingface_hub", "transformers", "httpx", "httpx2")


def run_harness(
    model, tokenizer, tasks: list, *, batch_size: int, device, limit: int | None, seed: int
) -> dict[str, dict]:
    """Score a model on each task (dicts or objects with `name` and `num_fewshot`): {task name: row}.

    `limit` keeps the first items of each task; `seed` draws the few-shot examples. Where TTL_MIRROR holds a
    task's data set, that copy is used and the row says so. A task whose data cannot be reached gives a
    "not run" row with the reason, and the others go on. In a row, `truncated` counts the items that did not
    fit in the model's context; `bos` says whether prompts begin with BOS, as the tokenizer has it; `value`,
    `stderr`, `chance` and `constant_answer` are shares, 0 to 1.
    Raises TTLError for a task unknown to lm-eval and for a tokenizer that ends every text with EOS.
    """
    wanted = {_get(task, "name"): _get(task, "num_fewshot") for task in tasks}
    if len(wanted) < len(tasks):
        raise TTLError(f"evaluation: a task is named twice among {[_get(t, 'name') for t in tasks]}: name it once.")
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        # every name is looked up before the first task runs, so that a typing error costs no evaluation
        specs = {name: _specification(name, Path(folder)) for name in wanted}
        training = model.training
        try:
            lm = _language_model(model.to(device), tokenizer, batch_size)
            rows = {}
            for name, num_fewshot in wanted.items():
                start = time.perf_counter()
                row = _run_task(lm, name, *specs[name], num_fewshot=num_fewshot, limit=limit, seed=seed)
                rows[name] = row | {"duration_s": time.perf_counter() - start}
        finally:
            model.train(training)
    return rows


def _run_task(lm, name: str, spec: str, dataset: dict, *, num_fewshot: int, limit: int | None, seed: int) -> dict:
    """Load one task's data and score it; only a failure to get the data is turned into a "not run" row."""
    import lm_eval

    try:
        task = _manager(name not in OWN_TASKS).load([spec])["tasks"][name]
    except _data_errors() as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {"task": name, "status": "not run", "reason": reason, **dataset}
    # set here, not by simple_evaluate, which ignores a number of shots where a task's file says 0
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed)
    # evaluate, not simple_evaluate: that one also asks the hub and git about the model and reseeds python
    results = lm_eval.evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=1000)
    scores = {key.split(",")[0]: value for key, value in results["results"][name].items()}
    metrics = ["acc_norm", "acc", *(entry["metric"] for entry in task.config.metric_list or [])]
    metric = next(name for name in metrics if name in scores)
    samples = results["samples"][name]
    stderr = scores.get(f"{metric}_stderr")
    return {
        "task": name,
        "status": "done",
        **dataset,
        "version": results["versions"][name],
        "num_fewshot": num_fewshot,
        "metric": metric,
        "value": float(scores[metric]),
        "stderr": float(stderr) if isinstance(stderr, float) else None,
        "samples": len(samples),
        "truncated": sum(_too_long(lm, sample) for sample in samples),
        **_chance(name, task.OUTPUT_TYPE, samples),
        "bos": lm.tok_encode("Resposta:")[0] == lm.tokenizer.bos_token_id,
        "seed": seed,
        "batch_size": lm.batch_size,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "harness_version": lm_eval.__version__,
    }


def _language_model(model, tokenizer, batch_size: int):
    """The model as lm-eval wants it. The tokenizer decides whether a text begins with BOS, as in training."""
    import torch
    from lm_eval.models.huggingface import HFLM

    # lm-eval finds a choice's tokens by cutting off as many as the prompt has: an EOS would cut one too many
    if tokenizer("Resposta:")["input_ids"][-1] == tokenizer.eos_token_id:
        raise TTLError(
            "evaluation: the tokenizer ends every text with its EOS token, which spoils the scores of "
            "choices: load it with add_eos_token=False."
        )
    # a copy, because lm-eval adds a pad token if there is none; float32: choices tie in half precision
    return HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        softmax_dtype=torch.float32,
    )


def _specification(name: str, folder: Path) -> tuple[str, dict]:
    """What lm-eval loads for a name, and where its data come from.

    Our own task and a mirrored data set need a path known only now: a file in `folder` including the task's.
    """
    if name in OWN_TASKS:
        base, data = TASKS / f"{name}.yaml", {"data_files": {"test": str(TASKS / f"{name}.jsonl")}}
        return _extend(base, name, {"dataset_kwargs": data}, folder), {"dataset": name, "from_mirror": False}
    manager = _manager(True)
    if name not in manager.all_subtasks:
        near = difflib.get_close_matches(name, [*OWN_TASKS, *manager.all_subtasks], n=5)
        hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
        raise TTLError(f"evaluation: '{name}' is no task of lm-eval (groups of tasks do not count): {hint}")
    entry = manager.task_index[name]
    dataset = entry.cfg.get("dataset_path")
    mirror = Path(os.environ["TTL_MIRROR"], str(dataset)) if os.environ.get("TTL_MIRROR") else None
    mirrored = bool(dataset and mirror and mirror.is_dir())
    spec = _extend(entry.yaml_path, name, {"dataset_path": str(mirror.resolve())}, folder) if mirrored else name
    return spec, {"dataset": dataset, "from_mirror": mirrored}


def _extend(base: Path, name: str, changes: dict, folder: Path) -> str:
    """Write a task file that is `base` with some keys changed; its path."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"include": str(base), "task": name, **changes}), encoding="utf-8")
    return str(path)


@functools.cache  # indexing the packaged tasks takes about 10 seconds
def _manager(packaged: bool):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=packaged)


def _data_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises when the hub, or a data set on it, is out of reach (offline, gated, absent)."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # the first base is the root of the http library's errors, which a time-out in a download raises as is
    http = HfHubHTTPError.__bases__[0]
    return (
        ConnectionError,
        http,
        LocalEntryNotFoundError,
        DatasetNotFoundError,
        DataFilesNotFoundError,
        EmptyDatasetError,
    )


def _chance(name: str, output_type: str, samples: list[dict]) -> dict[str, float | None]:
    """`chance`: expected score of random answers; `constant_answer`: score of the best single position."""
    if output_type != "multiple_choice" or not samples:
        return {"chance": None, "constant_answer": None}
    if name.startswith("truthfulqa") and name.endswith("mc2"):
        # scored by the probability of all true answers together: equal probabilities give their share
        shares = [sum(s["doc"]["mc2_targets"]["labels"]) / len(s["arguments"]) for s in samples]
    else:
        shares = [1 / len(s["arguments"]) for s in samples]
    positions = Counter(str(s["target"]) for s in samples)
    # truthfulqa always lists the right answer first, which a model cannot exploit: no baseline
    best = max(positions.values()) / len(samples) if len(positions) > 1 else None
    return {"chance": sum(shares) / len(shares), "constant_answer": best}


def _too_long(lm, sample: dict) -> bool:
    """Whether a prompt with a choice exceeds the context: lm-eval then drops its beginning, BOS included."""
    texts = ["".join(part for part in args if isinstance(part, str)) for args in sample["arguments"]]
    # the last token is only predicted, never fed: one more than the context fits
    return any(len(lm.tok_encode(text)) > lm.max_length + 1 for text in texts)


def _get(task, key: str):
    return task[key] if isinstance(task, dict) else getattr(task, key)


@contextlib.contextmanager
def _quiet():
    """Silence lm-eval's logs, warnings and progress bars, some of which have no switch of their own."""
    import datasets
    import huggingface_hub.utils as hub

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
