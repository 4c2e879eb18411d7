"""Dynamic int8 beside fp32, writing on a CPU: `python -m tests.benchmarks.inference` (the 160m shape, random weights).

Both write the same number of tokens after the same prompt at batch 1, token by token with a cache, in rounds that take
turns; a ratio is taken within a round. With one thread and with all. `generate` is transformers' own loop around the
same model. The limit is the time that it takes to read the weights (all but the input embedding) and the cache at the
measured bandwidth. `--run OUTPUTS/NAME` takes a trained model instead, of a run whose stage 03 is finished, and adds
what the rounding costs in perplexity over held-out tokens.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from tests.benchmarks.common import Vocabulary, median_and_interval, shape_params, table
from ttl_utils.blocks import TokenBlocks
from ttl_utils.decoding import generate_seconds, greedy, read_bandwidth
from ttl_utils.model import Hardware, new_model
from ttl_utils.perplexity import perplexity
from ttl_utils.quantized import cache_bytes, int8, step_bytes, weight_bytes
from ttl_utils.subject import load_model

FP32, INT8, HEAD = "fp32", "int8", "int8, output layer in fp32"


def ways(model: Any) -> dict[str, Any]:
    mixed = int8(model)
    mixed.lm_head = model.lm_head
    return {FP32: model, INT8: int8(model), HEAD: mixed}


def rounds_of(actions: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each action by name, of each round; a round before them warms up."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in actions}
    for number in range(rounds + 1):
        for name in list(actions)[:: -1 if number % 2 else 1]:
            seconds = actions[name]()
            for part, value in seconds.items():
                if number:
                    found[name][part].append(value)
    return found


def writing(model: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    begun = time.process_time()
    first, *steps = greedy(model, ids, new_tokens)[1]
    # of the whole turn, which the prompt has a part of
    cpu = time.process_time() - begun
    return {"prompt": first, "step": median(steps), "cpu": cpu, "generate": generate_seconds(model, ids, new_tokens)}


def speed(model: Any, threads: int, rounds: int, prompt: int, new_tokens: int) -> None:
    torch.set_num_threads(threads)
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, model.config.vocab_size, (1, prompt)))
    made = ways(model)
    found = rounds_of({name: lambda one=one: writing(one, ids, new_tokens) for name, one in made.items()}, rounds)
    # before and after: another program may be reading too
    bandwidth = max(read_bandwidth("cpu") for _ in range(3))
    cache = (prompt + new_tokens / 2) * cache_bytes(model.config, torch.float32)
    rows: list[tuple] = [
        ("", "tokens/s", "ms a token", "to fp32", "95% interval", "by CPU time", "read a token", "of the limit")
        + ("prompt, tokens/s", "to fp32", "generate, tokens/s")
    ]
    for name, times in found.items():
        step = median(times["step"])

        def ratio(part: str, times: dict = times) -> tuple[float, float, float]:
            return median_and_interval([o / t for o, t in zip(found[FP32][part], times[part], strict=True)])

        read = step_bytes(made[name]) + cache
        rows.append(
            (name, f"{1 / step:.1f}", f"{step * 1e3:.2f}", f"{ratio('step')[0]:.2f}")
            + ("{1:.2f} to {2:.2f}".format(*ratio("step")), f"{ratio('cpu')[0]:.2f}", f"{read / 1e6:.1f} MB")
            + (f"{read / step / bandwidth:.0%}", f"{prompt / median(times['prompt']):,.0f}")
            + (f"{ratio('prompt')[0]:.2f}", f"{new_tokens / median(times['generate']):.1f}")
        )
    table(
        f"{threads} threads, batch 1, {prompt} + {new_tokens} tokens, {rounds} rounds, {bandwidth / 1e9:.1f} GB/s read",
        rows,
    )


def quality(model: Any, blocks: TokenBlocks, most: int | None) -> None:
    rows: list[tuple] = [("", "perplexity", "to fp32", "weights", "tokens scored")]
    plain = None
    for name, one in ways(model).items():
        # a row at a time, as there is one scale for all that is passed at once
        figures = perplexity(one, blocks, batch_size=1, max_tokens=most)
        plain = plain or figures["perplexity"]
        found = (f"{figures['perplexity']:.4f}", f"{figures['perplexity'] / plain - 1:+.3%}")
        rows.append((name, *found, f"{weight_bytes(one) / 1e6:.1f} MB", f"{figures['scored_tokens']:,}"))
    table("Perplexity over held-out tokens", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder, with stages 02 and 03 finished")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="*", help="one, and all, where none is named")
    parser.add_argument("--tokens", type=int, help="held-out tokens scored; all, where none is named")
    given = parser.parse_args()
    every = given.threads or sorted({1, torch.get_num_threads()})
    torch.set_num_threads(every[0])
    if given.run:
        model = load_model(given.run / "03_pretraining" / "model", Hardware("cpu", "fp32", "sdpa"))
        paths = sorted((given.run / "02_tokenizer" / "tokens").glob("test-*.bin"))
        quality(model, TokenBlocks(paths, model.config.max_position_embeddings), given.tokens)
    else:
        params = shape_params("160m")
        model = new_model(params.model, Vocabulary(params.tokenizer.vocab_size), 0, "sdpa").eval()
    for threads in every:
        speed(model, threads, given.rounds, given.prompt, given.new_tokens)


if __name__ == "__main__":
    main()
