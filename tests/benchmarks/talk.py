"""Answers as they come, and the search of neighbours: `python -m tests.benchmarks.talk` (a run whose stage 05 is made).

First token: from the question's text to the first piece of the answer, beside one bare forward pass over the same ids.
Decoding: a token of the streamed answer (drawn, decoded to text) beside evaluation's greedy loop on the same prompt, in
rounds that take turns; a ratio is taken within a round. Neighbours: an index of invented conversations in a run's
files, with the process's memory; words follow Zipf's law, as many of them and as long as in instruct-aira.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch

from tests.benchmarks.common import median_and_interval, table
from ttl_utils import talk
from ttl_utils.corpus import ShardWriter
from ttl_utils.decoding import generate_seconds, greedy, memory_growth
from ttl_utils.neighbours import Neighbours
from ttl_utils.params import load_params
from ttl_utils.run import Run


def speed(run: Run, rounds: int, new_tokens: int, texts: list[str]) -> None:
    model, tokenizer = talk.load(run)
    settings = run.params.chat.model_copy(update={"max_new_tokens": new_tokens})
    context = model.config.max_position_embeddings
    rows: list[tuple] = [
        ("prompt", "forward pass", "first piece", "later by", "greedy, tokens/s", "streamed, tokens/s")
    ]
    rows[0] += ("to greedy", "95% interval", "transformers' generate, tokens/s")
    for text in texts:
        forward, first, plain, ours, theirs = [], [], [], [], []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            ids, _ = talk.fit([talk.question(text)], tokenizer, settings, context, new_tokens)
            # an end by itself would leave too few tokens to time
            model.generation_config.eos_token_id, moments = None, [begin]
            tokenizer_end, tokenizer.eos_token = tokenizer.eos_token, None
            for _ in talk.stream(model, tokenizer, ids, settings, 1):
                moments.append(time.perf_counter())
            tokenizer.eos_token = tokenizer_end
            prompt, *steps = greedy(model, torch.tensor([ids], device=model.device), new_tokens)[1]
            theirs.append(new_tokens / generate_seconds(model, torch.tensor([ids], device=model.device), new_tokens))
            forward.append(prompt)
            first.append(moments[1] - begin)
            plain.append(median(steps))
            # a character of several tokens comes as one piece
            ours.append(median(np.diff(moments[1:])))
        ratio = median_and_interval([one / other for one, other in zip(plain[1:], ours[1:], strict=True)])
        rows.append(
            (f"{len(ids)} tokens", f"{1e3 * median(forward[1:]):.1f} ms", f"{1e3 * median(first[1:]):.1f} ms")
            + (f"{1e3 * median(o - f for o, f in zip(first[1:], forward[1:], strict=True)):.1f} ms",)
            + (f"{1 / median(plain[1:]):,.0f}", f"{1 / median(ours[1:]):,.0f}")
            + (f"{ratio[0]:.2f}", "{1:.2f} to {2:.2f}".format(*ratio), f"{median(theirs[1:]):,.0f}")
        )
    table(f"{run.name}, {torch.get_num_threads()} threads, {new_tokens} tokens, {rounds} rounds", rows)


def search(conversations: int) -> None:
    rng = np.random.default_rng(0)
    shares = np.cumsum(1 / np.arange(1, 60_001))
    vocabulary = np.array([f"{'abcdefghij'[n % 10]}{n:x}" for n in range(60_000)])

    def invented(words: int) -> str:
        return " ".join(vocabulary[np.searchsorted(shares, rng.random(words) * shares[-1])])

    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "chat", "train", 256)
        for _ in range(conversations):
            turns = [("user", invented(int(rng.integers(5, 25)))), ("assistant", invented(int(rng.integers(40, 260))))]
            text = "\n\n".join(content for _, content in turns)
            row = dict.fromkeys(("source", "origin", "kind", "licence"), "")
            writer.add(row | {"text": text, "messages": [{"role": role, "content": one} for role, one in turns]})
        paths = writer.close()
        stage = SimpleNamespace(files=lambda use: paths)
        made: list[Neighbours] = []
        begin, cpu = time.perf_counter(), time.process_time()
        peak = memory_growth("cpu", lambda: made.append(Neighbours.of(SimpleNamespace(need=lambda name: stage))))
        built, cpu = time.perf_counter() - begin, time.process_time() - cpu
        times = []
        for _ in range(20):
            query, begin = invented(100), time.process_time()
            made[0].nearest(query, side="answer")
            times.append(time.process_time() - begin)
    held = sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in made[0].matrices.values())
    rows = [("conversations", "built in", "of a core", "memory rose at most by", "matrices", "a search, of a core")]
    rows.append(
        (
            f"{conversations:,}",
            f"{built:.1f} s",
            f"{cpu:.1f} s",
            f"{(peak or 0) / 1e6:,.0f} MB",
            f"{held / 1e6:,.0f} MB",
        )
        + (f"{1e3 * median(times):.0f} ms",)
    )
    table("Neighbours", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano", help="a size or parameter file whose run has stage 05")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--conversations", type=int, default=81_000, help="of the search; 0: none")
    arguments = parser.parse_args()
    named = "file" if arguments.size.endswith(".yaml") else "size"
    with torch.inference_mode():
        speed(Run(load_params({named: arguments.size})), arguments.rounds, arguments.new_tokens, ["Olá", "Olá, " * 30])
    if arguments.conversations:
        search(arguments.conversations)


if __name__ == "__main__":
    main()
