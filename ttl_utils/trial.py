"""A few timed steps of one configuration: what `search` starts as a process of its own, so that each begins afresh.

`python -m ttl_utils.trial` reads the configuration as JSON and prints what it found as JSON, in its last line.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from ttl_utils.errors import ParameterError
from ttl_utils.model import checkpoint_activations, choose_hardware, new_model
from ttl_utils.schema import Model, Pretraining

OK, UNSUPPORTED, NO_MEMORY = "ok", "unsupported", "out of memory"


@dataclass(frozen=True)
class _Vocabulary:
    """As much of a tokenizer as a model's configuration asks for."""

    size: int
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 3

    def __len__(self) -> int:
        return self.size


def measure(job: dict) -> dict:
    """Time training steps and evaluation of one configuration, with the code that the loop runs."""
    import torch

    from ttl_utils.distributed import make_accelerator
    from ttl_utils.lean import make_lean
    from ttl_utils.loss import Learner, summed_loss
    from ttl_utils.step import Step, make_optimizer, train_step

    settings, shape = Pretraining.model_validate(job["settings"]), Model.model_validate(job["model"])
    hardware = choose_hardware(settings)
    accelerator = make_accelerator(hardware)
    model = make_lean(new_model(shape, _Vocabulary(job["vocab_size"]), 0, hardware.attention)).to(accelerator.device)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer, learner = make_optimizer(model, settings), Learner(model)
    learner, optimizer = accelerator.prepare(torch.compile(learner) if settings.compile else learner, optimizer)
    block = settings.block_size or shape.max_position_embeddings
    rows = settings.tokens_per_step // block
    ids = torch.randint(job["vocab_size"], (rows, block), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(settings.per_device_train_batch_size)]
    if settings.isolate_documents:
        for batch in batches:
            # documents of a quarter of a row
            positions = torch.arange(block) % max(1, block // 4)
            batch["position_ids"] = positions.expand_as(batch["input_ids"]).contiguous()
    data = Step(batches, targets=rows * (block - 1))

    def train() -> torch.Tensor:
        return train_step(learner, optimizer, accelerator, data, settings.max_grad_norm)

    def evaluate() -> torch.Tensor:
        # as the loop: never compiled
        with torch.no_grad(), accelerator.autocast():
            moved = ({key: value.to(accelerator.device) for key, value in batch.items()} for batch in batches)
            return sum(summed_loss(model, batch) for batch in moved)

    model.train()
    training_s = _seconds_each(train, job["steps"], warm_up=2 if settings.compile else 1)
    memory = torch.cuda.max_memory_allocated() if hardware.device == "cuda" else _process_memory()
    model.eval()
    evaluation_s = _seconds_each(evaluate, job["steps"])
    tokens = ids.numel()
    return {
        "tokens_per_second": round(tokens / training_s, 1),
        "evaluation_tokens_per_second": round(tokens / evaluation_s, 1),
        "peak_memory_gib": round(memory / 2**30, 3),
    }


def _seconds_each(call: Callable, times: int, warm_up: int = 1) -> float:
    """Seconds of one call, of at least `times` calls and a second and a half: short ones drown in the noise."""
    _seconds(call, warm_up)
    times = max(times, math.ceil(1.5 / _seconds(call, 1)))
    return _seconds(call, times) / times


def _seconds(call: Callable, times: int) -> float:
    """Of so many calls, with one synchronisation: to read the last loss is to wait for all that was asked before."""
    started = time.perf_counter()
    for _ in range(times):
        last = call()
    last.item()
    return time.perf_counter() - started


def _process_memory() -> int:
    """Bytes this process has held at most; where the system does not say, what it holds now."""
    with contextlib.suppress(OSError, AttributeError):
        # not getrusage's: that one begins with the memory of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    held = psutil.Process().memory_info()
    return getattr(held, "peak_wset", held.rss)


def failure(text: str, status: str = "failed") -> dict:
    if re.search("out of memory|allocate memory|bad_alloc", text, re.IGNORECASE):
        status = NO_MEMORY
    return {"status": status, "reason": " ".join(text.split())[:200]}


def answer(job: dict) -> dict:
    try:
        return {"status": OK, "reason": "", **measure(job)}
    except Exception as error:
        missing = isinstance(error, ImportError | ParameterError)
        compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        text = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        return failure(text, UNSUPPORTED if missing or compiler else "failed")


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
