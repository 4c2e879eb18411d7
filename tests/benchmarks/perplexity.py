"""The perplexity pass beside a bare forward pass, and documents in batches beside one by one.

`python -m tests.benchmarks.perplexity [--rounds 10]`. A 160m of random weights in fp32, 1 x 2048 tokens: `bare` is
`model(ids, use_cache=False)` with its logits, `body` the same without the output layer. Two processes take turns, one
of which keeps freed memory, as training does on a CPU (`lean.kept_memory`). Documents: lengths as of short and middling
texts, the same for both ways, by the same tokenizer; the figures of both are compared. On a machine that is never
idle, `--cpu` counts CPU time instead, with one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.common import median_and_interval, table, write_tokens
from tests.benchmarks.memory import VOCAB, model_160m


class Numbers:
    """A tokenizer of texts that are numbers with spaces between them."""

    bos_token_id, eos_token_id, unk_token_id = 1, 2, 0

    def __call__(self, texts: Any, **options: Any) -> dict:
        if isinstance(texts, str):
            return {"input_ids": [1, *map(int, texts.split())]}
        return {"input_ids": [list(map(int, text.split())) for text in texts]}


def worker(pipe: Connection, kept: bool, arguments: argparse.Namespace) -> None:
    """Answers the name of a way with its seconds, and `loss` with ours and that of a plain computation."""
    import torch

    from ttl_utils.blocks import TokenBlocks
    from ttl_utils.lean import kept_memory
    from ttl_utils.perplexity import perplexity

    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(1 if arguments.cpu else arguments.threads)
    shape, model = model_160m(arguments.layers)
    model.eval()
    context = shape.max_position_embeddings
    with tempfile.TemporaryDirectory() as folder, kept_memory() if kept else contextlib.nullcontext(), torch.no_grad():
        blocks = TokenBlocks(write_tokens(Path(folder), arguments.rows * context, VOCAB), context)
        ids = torch.from_numpy(blocks.batch(range(arguments.rows)))

        def plain() -> float:
            logits = model(ids, use_cache=False).logits[:, :-1].double()
            return -logits.log_softmax(-1).gather(2, ids[:, 1:, None]).mean().item()

        ways = {
            "bare": lambda: model(ids, use_cache=False),
            "body": lambda: model.model(ids, use_cache=False),
            "ours": lambda: perplexity(model, blocks, batch_size=arguments.rows),
        }
        for way in ways.values():
            way()
        pipe.send("ready")
        while asked := pipe.recv():
            if asked == "loss":
                pipe.send((ways["ours"]()["loss"], plain()))
                continue
            started = clock()
            ways[asked]()
            pipe.send(clock() - started)


def passes(arguments: argparse.Namespace) -> None:
    context, pipes = multiprocessing.get_context("spawn"), {}
    for kept in (False, True):
        pipes[kept], other = context.Pipe()
        context.Process(target=worker, args=(other, kept, arguments), daemon=True).start()
        pipes[kept].recv()

    def ask(kept: bool, what: str) -> Any:
        pipes[kept].send(what)
        return pipes[kept].recv()

    found: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for number in range(arguments.rounds):
        order = [(way, kept) for way in ("bare", "ours", "body") for kept in (False, True)]
        for way, kept in order[:: 1 if number % 2 else -1]:
            found[way, kept].append(ask(kept, way))
    tokens = arguments.rows * 2048
    rows = [("", "s", "tok/s", "rate of bare", "95%", "rate of bare, same memory")]
    for (way, kept), seconds in sorted(found.items(), key=lambda item: item[0][1]):
        rates = [a / b for a, b in zip(found["bare", False], seconds, strict=True)]
        same = statistics.median(a / b for a, b in zip(found["bare", kept], seconds, strict=True))
        middle, low, high = median_and_interval(rates)
        median = statistics.median(seconds)
        name = f"{way}{', memory kept' if kept else ''}"
        rows.append(
            (name, f"{median:.2f}", f"{tokens / median:.0f}", f"{middle:.3f}", f"{low:.3f}-{high:.3f}", f"{same:.3f}")
        )
    table(f"{arguments.layers} layers, {arguments.rows} x 2048 tokens, medians of {arguments.rounds} rounds", rows)
    for kept, pipe in pipes.items():
        ours, plain = ask(kept, "loss")
        print(f"  mean nats {'(memory kept)' if kept else ''}: ours {ours:.7f}, plain transformers {plain:.7f}")
        pipe.send(None)


def one_by_one(model: Any, tokenizer: Any, texts: list[str], context: int) -> tuple[float, int]:
    """Nats and tokens scored, a pass and a wait for each document."""
    import torch

    from ttl_utils.loss import summed_loss

    nats, scored = 0.0, 0
    with torch.no_grad():
        for text in texts:
            for block in torch.tensor([tokenizer(text)["input_ids"]]).split(context, dim=1):
                if block.shape[1] > 1:
                    nats += summed_loss(model, {"input_ids": block, "labels": block}).item()
                    scored += block.shape[1] - 1
    return nats, scored


def by_documents(arguments: argparse.Namespace) -> None:
    import torch

    from ttl_utils.perplexity import score_texts

    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(1 if arguments.cpu else arguments.threads)
    shape, model = model_160m(arguments.layers)
    model.eval()
    rng, tokenizer = np.random.default_rng(0), Numbers()
    rows = [("documents", "tokens each", "one by one, s", "batched, s", "gain", "95%", "difference of nats")]
    for mean, count in ((40, arguments.documents), (250, arguments.documents // 4)):
        lengths = np.clip(rng.lognormal(np.log(mean), 0.7, count), 4, 2000).astype(int)
        texts = [" ".join(map(str, rng.integers(4, VOCAB, length))) for length in lengths]
        first, second, ratios = [], [], []
        for _ in range(arguments.rounds):
            started = clock()
            nats, scored = one_by_one(model, tokenizer, texts, shape.max_position_embeddings)
            middle = clock()
            found = score_texts(model, tokenizer, (("all", text) for text in texts), shape.max_position_embeddings)[
                "all"
            ]
            first.append(middle - started)
            second.append(clock() - middle)
            ratios.append(first[-1] / second[-1])
            assert found["scored"] == scored
        gain, low, high = median_and_interval(ratios)
        times = f"{statistics.median(first):.2f}", f"{statistics.median(second):.2f}"
        spread = f"{lengths.min()}-{lengths.max()}, mean {lengths.mean():.0f}"
        rows.append(
            (count, spread, *times, f"{gain:.2f}", f"{low:.2f}-{high:.2f}", f"{abs(found['nats'] / nats - 1):.1e}")
        )
    table(f"{arguments.layers} layers, documents on their own, medians of {arguments.rounds} rounds", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--documents", type=int, default=64, help="short ones; a quarter as many longer ones; 0: none")
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread, for a busy machine")
    arguments = parser.parse_args()
    passes(arguments)
    if arguments.documents:
        by_documents(arguments)


if __name__ == "__main__":
    main()
