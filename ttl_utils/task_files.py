"""Which benchmarks an evaluation runs, and where their lm-eval task files and data are (paper, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ttl_utils.schema import Evaluation


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
    fingerprint: str  # of prompt, shots, metric and data: the key of a cache of scores


def wanted(settings: Evaluation) -> list[Wanted]:
    """The tasks to run, those of the protocols first.

    Raises:
        TTLError: a task is unknown or named twice, or a checkpoint task is not among the keys.
    """
    raise NotImplementedError


def open_task(item: Wanted, seed: int) -> Opened:
    """Load a task and its data. Only data that cannot be had gives a reason; everything else raises."""
    raise NotImplementedError


def score(opened: Opened, samples: list[dict], results: dict) -> dict:
    """`metric`, `value`, `stderr`, `chance`, `constant_answer` (shares) of one task from lm_eval.evaluate's output.

    `samples` is the output's `["samples"][name]`, `results` its `["results"][name]`.
    """
    raise NotImplementedError
