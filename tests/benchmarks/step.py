"""One bare training step against the machine's matrix products: `python -m tests.benchmarks.step [--alone]`.

A 160m step of 1 x 2048 tokens (forward, backward, fused AdamW) in fp32: the flops it executes per second, as a share
of what a 2048-square matrix product reaches in the same process just before and after. `plain` is transformers' own
model and loss. Each way has a process of its own; they take turns, so that other work slows all alike. On a machine
that is never idle, `--cpu` counts the processes' CPU time instead, with one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection

from tests.benchmarks.memory import VOCAB, model_160m
from ttl_utils.params import load_params

SQUARE = 2048
# kept memory, lean modules, chunked loss
WAYS = {
    "plain": (False, False, False),
    "kept memory alone": (True, False, False),
    "lean modules alone": (False, True, False),
    "chunked loss alone": (False, False, True),
    "ours": (True, True, True),
}


def worker(pipe: Connection, way: str, arguments: argparse.Namespace) -> None:
    """Answers `step` with (seconds, share), and `parts` with seconds by part."""
    import torch

    from ttl_utils.lean import kept_memory, make_lean
    from ttl_utils.loss import summed_loss
    from ttl_utils.model import flops_per_token

    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(1 if arguments.cpu else arguments.threads)
    shape, model = model_160m(arguments.layers)
    context = shape.max_position_embeddings
    tokens = arguments.rows * context
    flops = flops_per_token(shape, model.config.vocab_size)["executed"] * tokens
    if WAYS[way][1]:
        make_lean(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(model.config.vocab_size, (arguments.rows, context), generator=torch.Generator().manual_seed(1))
    square = torch.randn(SQUARE, SQUARE)

    def reference(clock: Callable[[], float] = clock) -> float:
        """Flops per second."""
        seconds = []
        for _ in range(6):
            started = clock()
            square @ square
            seconds.append(clock() - started)
        return 2 * SQUARE**3 / statistics.median(seconds)

    def step() -> float:
        started = clock()
        if WAYS[way][2]:
            loss = summed_loss(model, {"input_ids": ids, "labels": ids}) / (tokens - arguments.rows)
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock() - started

    def parts() -> tuple[dict[str, float], float]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            step()
        seconds: dict[str, float] = defaultdict(float)
        for event in profile.events():
            sizes = {size for sizes in event.input_shapes or [] if isinstance(sizes, list) for size in sizes}
            four = any(isinstance(sizes, list) and len(sizes) == 4 for sizes in event.input_shapes or [])
            if event.name in ("aten::mm", "aten::addmm", "aten::bmm") and len(sizes) > 1:
                part = "matrix products"
            elif "scaled_dot_product" in event.name:
                part = "attention"
            elif "adam" in event.name.lower():
                part = "optimizer"
            elif shape.intermediate_size in sizes:
                part = "activations"
            elif model.config.vocab_size in sizes or "softmax" in event.name.lower():
                part = "loss"
            elif four:
                part = "rotary"
            elif event.name.startswith("aten::"):
                part = "norms, residuals"
            else:
                part = "the rest"
            seconds[part] += event.self_cpu_time_total / 1e6
        return dict(seconds), reference(time.perf_counter)

    with kept_memory() if WAYS[way][0] else contextlib.nullcontext():
        step()
        pipe.send("ready")
        while asked := pipe.recv():
            if asked == "parts":
                pipe.send(parts())
            else:
                before = reference()
                seconds = step()
                pipe.send((seconds, flops / seconds / ((before + reference()) / 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="each of what makes it faster by itself, too")
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread, for a busy machine")
    arguments = parser.parse_args()
    names = list(WAYS) if arguments.alone else ["plain", "ours"]
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in names:
        pipes[name], other = context.Pipe()
        context.Process(target=worker, args=(other, name, arguments), daemon=True).start()
        # one at a time: each has a first step to make
        pipes[name].recv()

    def ask(name: str, what: str) -> tuple:
        pipes[name].send(what)
        return pipes[name].recv()

    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name in names:
            found[name].append(ask(name, "step"))
    print(f"{arguments.layers} layers, {arguments.rows} x 2048 tokens, medians of {arguments.rounds} rounds")
    print(f"{'':20} {'s a step':>9} {'share of matrix products':>25} {'from-to':>12} {'faster than plain by':>21}")
    for name in names:
        seconds, shares = zip(*found[name], strict=True)
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found["plain"], found[name], strict=True))
        span = f"{min(shares):.2f}-{max(shares):.2f}"
        print(f"{name:20} {statistics.median(seconds):9.2f} {statistics.median(shares):25.3f} {span:>12} {ratio:21.3f}")

    shape = load_params({"size": "160m"}).model
    width, layers = shape.hidden_size, arguments.layers
    tokens = arguments.rows * shape.max_position_embeddings
    flops = {"attention": 6.0 * layers * width * shape.max_position_embeddings * tokens}
    flops["matrix products"] = (
        6.0 * tokens * (layers * width * (4 * width + 3 * shape.intermediate_size) + VOCAB * width)
    )
    by_part = {name: ask(name, "parts") for name in ("plain", "ours")}
    print(f"\n{'one profiled step':20}" + "".join(f"{name + ', s':>10} {'share':>6} {'rate':>5}" for name in by_part))
    for part in sorted(by_part["plain"][0], key=lambda part: -by_part["plain"][0][part]):
        row = f"{part:20}"
        for seconds, rate in by_part.values():
            share = seconds.get(part, 0) / sum(seconds.values())
            speed = f"{flops[part] / seconds[part] / rate:.2f}" if part in flops else ""
            row += f"{seconds.get(part, 0):10.2f} {share:6.1%} {speed:>5}"
        print(row)
    for pipe in pipes.values():
        pipe.send(None)
    print("rate: executed flops against the square product; in backward attention computes a quarter more")


if __name__ == "__main__":
    main()
