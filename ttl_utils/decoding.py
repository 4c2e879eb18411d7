"""A model that writes, greedily and token by token: its times, its memory, and what the device's memory could give."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from transformers import Cache

# larger than any cache
BUFFER = 2**30


@torch.inference_mode()
def greedy(
    model: Any, ids: torch.Tensor, new_tokens: int, cache: Cache | None = None, step: Callable | None = None
) -> tuple[torch.Tensor, list[float]]:
    """The likeliest continuation of `ids` (batch, prompt): (batch, new_tokens), and the seconds of each token.

    The first token's are those of the prompt. `step` takes the model's place after it; a `cache` is emptied first.
    """
    from transformers import DynamicCache

    if cache is None:
        cache = DynamicCache(config=model.config)
    else:
        cache.reset()
    mark, seconds_between = _clock(ids.device.type)
    marks, written = [mark()], []
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    while True:
        written.append(logits[:, -1].argmax(-1, keepdim=True))
        marks.append(mark())
        if len(written) == new_tokens:
            return torch.cat(written, dim=1), seconds_between(marks)
        logits = (step or model)(written[-1], past_key_values=cache, use_cache=True).logits


def _clock(device: str) -> tuple[Callable[[], Any], Callable[[list], list[float]]]:
    """A function that marks a moment, and one that turns marks into seconds between them."""
    if device == "cuda":
        # the GPU's own moments: nothing waits for it but the end

        def event() -> torch.cuda.Event:
            made = torch.cuda.Event(enable_timing=True)
            made.record()
            return made

        def elapsed(marks: list) -> list[float]:
            torch.cuda.synchronize()
            return [one.elapsed_time(other) / 1e3 for one, other in itertools.pairwise(marks)]

        return event, elapsed

    def moment() -> float:
        if device == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return moment, lambda marks: [other - one for one, other in itertools.pairwise(marks)]


def generate_seconds(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """How long transformers' own `generate` takes for the same, greedily, never stopping early."""
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    begin = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths)
    wait(ids.device.type)
    return time.perf_counter() - begin


def memory_growth(device: str, action: Callable[[], Any]) -> int | None:
    """Bytes by which what the process holds rose at most during the action; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Linux: the peak of resident memory counts from here
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_resident()
    except OSError:
        before = None
    action()
    # each thread's pages are counted late, so that a peak may lie a little below what was held before it
    return None if before is None else max(0, _peak_resident() - before)


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise OSError("this system does not tell the peak of resident memory")


def free_memory(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def read_bandwidth(device: str) -> float:
    """Bytes per second that the device reads of a buffer larger than its caches, with all threads, at best.

    A GPU's are those of a copy, read and written.
    """
    numbers = min(BUFFER, free_memory(device) // 4) // 4 // 4096 * 4096
    one = torch.ones(numbers, device=device)
    if device == "cpu":
        table, other = one.view(-1, 4096), torch.ones(4096)
        return one.nbytes / min(best_seconds(partial(torch.mv, table, other), 0.5), best_seconds(one.sum, 0.5))
    other = torch.empty_like(one)
    return 2 * one.nbytes / best_seconds(lambda: (other.copy_(one), wait(device)), 0.5)


def best_seconds(action: Callable[[], Any], budget_s: float) -> float:
    """The shortest of the calls, two at least, that fit in about this time after a first one."""
    action()
    times, end = [], time.perf_counter() + budget_s
    while len(times) < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def wait(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()
