"""Which benchmarks an evaluation runs, and where their lm-eval task files and data are (paper, section 4.1)."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttl_utils import resampling
from ttl_utils.errors import TTLError
from ttl_utils.schema import Evaluation
from ttl_utils.tasks import answers

TASKS = Path(answers.__file__).parent
OWN_TASKS = tuple(sorted(path.stem for path in TASKS.glob("ttl_*.yaml")))

# table 4 under two protocols: benchmark -> lm-eval's task, worked examples
PROTOCOLS = {
    "paper": {
        "arc_pt": ("arc_pt", 25),
        "hellaswag_pt": ("hellaswag_pt", 0),
        "m_mmlu_pt": ("ttl_mmlu_pt_text", 25),
        "truthfulqa_pt_mc2": ("truthfulqa_pt_mc2", 0),
    },
    "leaderboard": {
        "arc_pt": ("arc_pt", 25),
        "hellaswag_pt": ("hellaswag_pt", 10),
        "m_mmlu_pt": ("m_mmlu_pt", 5),
        "truthfulqa_pt_mc2": ("truthfulqa_pt_mc2", 0),
    },
}


@dataclass(frozen=True)
class Wanted:
    key: str  # its name among the metrics: "ttl_oab_exams", or "paper/arc_pt" under a protocol
    task: str  # the task's name for lm-eval
    num_fewshot: int | None  # None: as the task's own file says
    protocol: str | None


@dataclass
class Opened:
    wanted: Wanted
    task: Any | None  # the lm_eval Task, its shots and few-shot seed set; None: not run
    reason: str | None  # why not run
    about: dict  # plain data: what is scored and how, and how that differs from what was published
    fingerprint: str  # of prompt, shots, seed, metric and data: the key of a cache of scores; empty: not run


def wanted(settings: Evaluation) -> list[Wanted]:
    """The tasks to run, those of the protocols first.

    Raises:
        TTLError: a task is unknown or named twice, or a checkpoint task is not among the keys.
    """
    found = [
        Wanted(f"{protocol}/{name}", task, shots, protocol)
        for protocol in settings.protocols
        for name, (task, shots) in PROTOCOLS[protocol].items()
    ]
    found += [Wanted(task.name, task.name, task.num_fewshot, None) for task in settings.harness]
    keys = [item.key for item in found]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise TTLError(f"evaluation: {twice[0]!r} is named twice: name each task once.")
    for item in found:
        _file(item.task)
    for key in settings.checkpoint_tasks:
        if key not in keys:
            raise TTLError(
                f"evaluation.checkpoint_tasks: {key!r} is none of the tasks that are run: {_near(key, keys)} "
                "(a protocol's tasks are named as paper/arc_pt)."
            )
    return found


def open_task(item: Wanted, seed: int) -> Opened:
    """Load a task and its data, from TTL_MIRROR where it holds them; `seed` draws the worked examples.

    Only data that cannot be had gives a reason.

    Raises:
        TTLError: the task is unknown; its data lack a split, a column, or the worked examples asked for, or hold a
            label outside the set.
    """
    from ttl_utils.tasks.mirrored import Unreachable

    path = _file(item.task)
    with tempfile.TemporaryDirectory() as folder:
        # `class` is lm-eval's own way to bring another kind of task
        spec = Path(folder, f"{item.task}.yaml")
        loader = "class: !function ttl_utils.tasks.mirrored.MirroredTask"
        spec.write_text(f"include: {json.dumps(str(path))}\ntask: {item.task}\n{loader}\n", encoding="utf-8")
        try:
            task = _index("okapi").load([str(spec)])["tasks"][item.task]
        except Unreachable as error:
            return Opened(item, None, str(error), _about(item, error.task), "")
        except TTLError as error:
            raise TTLError(f"task {item.key!r}: {error}") from error
    shots = task.config.num_fewshot or 0 if item.num_fewshot is None else item.num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    task.seed = seed
    task.set_fewshot_seed(seed)
    # where they are drawn from the split that is evaluated, lm-eval draws one more and leaves the document itself out
    itself = task.fewshot_cfg.sampler == "default" and task.fewshot_cfg.split == task.config.test_split
    most = len(task.sampler.df) - itself
    if task.config.output_type != "generate_until" and not isinstance(_metric(task.config), str):
        raise TTLError(f"task {item.key!r}: its file names no metric that is known by a name: it cannot be reported")
    if shots > most:
        raise TTLError(f"task {item.key!r}: {shots} worked examples are asked for, and its data give {max(most, 0)}.")
    return Opened(item, task, None, _about(item, task), _fingerprint(task, seed))


def score(opened: Opened, samples: list[dict], results: dict) -> dict:
    """`metric`, `value`, `stderr`, `chance`, `constant_answer` (shares) of one task from lm_eval.evaluate's output.

    `samples` is the output's `["samples"][name]`, `results` its `["results"][name]`. `chance` is what answers drawn
    evenly would score; `constant_answer` the best that one answer to everything scores. Both are None where there
    is no such thing. The stderr of a macro F1 or a correlation is by 1,000 draws of the documents.
    """
    scores = {key.split(",")[0]: value for key, value in results.items()}
    name = _metric(opened.task.config)
    stderr = scores.get(f"{name}_stderr")
    pairs = [sample[name] for sample in samples if isinstance(sample.get(name), (tuple, list))]
    if opened.wanted.task in OWN_TASKS and opened.about["metric"] in DRAWN and len(pairs) > 1:
        columns, of = DRAWN[opened.about["metric"]]
        stderr = float(of(resampling.resample(columns(pairs), seed=0)).std(ddof=1))
        if name == "pearson" and len({predicted for _, predicted in pairs}) == 1:
            stderr = None
    chance, constant = _baselines(opened, samples)
    return {
        "metric": opened.about["metric"],
        "value": float(scores[name]),
        "stderr": stderr if isinstance(stderr, float) else None,
        "chance": chance,
        "constant_answer": constant,
    }


DRAWN = {"f1_macro": (answers.f1_columns, answers.f1_of), "pearson": (answers.pearson_columns, answers.pearson_of)}


def _baselines(opened: Opened, samples: list[dict]) -> tuple[float | None, float | None]:
    """What answers drawn evenly score, and what the best single answer scores, by the task's own metric."""
    if opened.about["output_type"] != "multiple_choice" or not samples:
        return None, None
    choices = np.array([len(sample["arguments"]) for sample in samples])
    if opened.about["metric"] == "mc2":
        # equal probabilities give the true answers their share; they come first, which a model cannot exploit
        return float(np.mean([np.mean(sample["doc"]["mc2_targets"]["labels"]) for sample in samples])), None
    if isinstance(opened.task.config.doc_to_target, int):
        return float((1 / choices).mean()), None
    if opened.about["metric"] not in ("acc", "acc_norm", "f1_macro"):
        return None, None
    right = [_place(sample, opened.task.config.target_delimiter) for sample in samples]
    if opened.about["metric"] == "f1_macro":
        shares = np.array([*Counter(right).values()]) / len(right)
        even = 1 / choices.max()
        constant = max(answers.f1_macro([(gold, label) for gold in right]) for label in set(right))
        return float((2 * shares * even / (shares + even)).mean()), constant
    return float((1 / choices).mean()), max(Counter(right).values()) / len(right)


def _place(sample: dict, delimiter: str) -> int | str:
    """The right answer's place among the choices; what the file says of it where it is no choice."""
    target = sample["target"]
    texts = [text for _, text, *_ in sample["arguments"]]
    if isinstance(target, str) and delimiter + target in texts:
        return texts.index(delimiter + target)
    return target if isinstance(target, int) else str(target)


def _metric(config: Any) -> str | None:
    """lm-eval's name of the one metric that is reported."""
    names = [entry["metric"] for entry in config.metric_list or []]
    if not names and config.output_type == "multiple_choice":
        return "acc_norm"
    return "acc_norm" if "acc_norm" in names else next(iter(names), None)


def _about(item: Wanted, task: Any) -> dict:
    """What a row says of its task beside the score."""
    config, notes = task.config, task.notes
    shots = config.num_fewshot or 0 if item.num_fewshot is None else item.num_fewshot
    differs = list(notes.get("differs", []))
    if item.task == "hellaswag_pt" and shots:
        differs.append("no training split: the examples are drawn from the evaluated one, without the document itself")
    return {
        "task": item.task,
        "protocol": item.protocol,
        "dataset": item.task if config.dataset_path == "json" else config.dataset_path,
        "config": config.dataset_name,
        "split": task.splits["evaluated"],
        "revision": task.revision,
        "from_mirror": task.from_mirror,
        "version": task.VERSION,
        "num_fewshot": shots,
        # the same examples before every question, or others for each
        "examples": None if not shots else "fixed" if task.fewshot_cfg.sampler == "first_n" else "drawn",
        "metric": "mc2" if re.fullmatch("truthfulqa_.*mc2", item.task) else notes.get("metric") or _metric(config),
        "output_type": config.output_type,
        "scoring": notes.get("scoring"),
        "differs": differs,
    }


def _fingerprint(task: Any, seed: int) -> str:
    import lm_eval

    config = task.dump_config()
    # where the file of this one loading lay
    config["metadata"] = {key: value for key, value in (task.config.metadata or {}).items() if key != "config_source"}
    # lm-eval's version stands for what its own files import, and the text of answers.py for what ours do
    code = hashlib.sha256((TASKS / "answers.py").read_bytes()).hexdigest() if task.config.task in OWN_TASKS else None
    parts = [config, seed, lm_eval.__version__, code, task.content()]
    text = json.dumps(parts, sort_keys=True, default=lambda value: getattr(value, "__qualname__", type(value).__name__))
    return hashlib.sha256(text.encode()).hexdigest()


def _file(name: str) -> Path:
    """A task's file: ours, or lm-eval's."""
    if name in OWN_TASKS:
        return TASKS / f"{name}.yaml"
    # table 4's tasks lie in one folder; looking through all takes about 10 seconds
    found = next((entry for folder in ("okapi", "") if (entry := _index(folder).task_index.get(name))), None)
    if found is None or found.kind.name not in ("TASK", "PY_TASK"):
        near = _near(name, [*OWN_TASKS, *_index("").all_subtasks])
        raise TTLError(f"evaluation: '{name}' is no task of lm-eval (groups of tasks do not count): {near}")
    if found.kind.name == "PY_TASK":
        raise TTLError(f"evaluation: '{name}' is a program of lm-eval's, not a task file: it cannot be run here.")
    return found.yaml_path


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=5)
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known[:10]) or 'none'}"


@functools.cache
def _index(folder: str) -> Any:
    from lm_eval import tasks

    return tasks.TaskManager(include_path=Path(tasks.__file__).parent / folder, include_defaults=False)
