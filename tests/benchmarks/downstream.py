"""Fine-tuning steps on batches of like length beside random ones: `python -m tests.benchmarks.downstream`.

Random ids in the lengths of ASSIN2 (mean 35 tokens) and FaQuAD-NLI (mean 74, cut at 128), batches of 16, fp32 on the
CPU. `cards`: the batches of transformers' Trainer, shuffled and padded, with a mask. Rounds take turns; ratios are
those of one round, and the interval is that of their median.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from tests.benchmarks.common import SHAPES, Vocabulary, median_and_interval, shape_params, table
from ttl_utils.classifier import batches, make_optimizer, open_classifier, padded
from ttl_utils.examples import Rows
from ttl_utils.model import new_model
from ttl_utils.origins import Origin

# examples, shape and scale of the gamma distribution, longest
SETS = {"assin2": (6500, 9.0, 3.9, 99), "faquad_nli": (3150, 3.6, 21.0, 128)}
SIZE = 16
WAYS = ("cards", "no mask", "ours")


def rows_of(name: str, vocab_size: int) -> Rows:
    rng = np.random.default_rng(0)
    count, shape, scale, longest = SETS[name]
    lengths = rng.gamma(shape, scale, count).astype(int).clip(5, longest)
    return Rows([rng.integers(4, vocab_size, length) for length in lengths], None, rng.integers(0, 2, count), 0)


def epoch(way: str, lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    if way == "ours":
        return batches(lengths, SIZE, rng)
    return np.array_split(rng.permutation(len(lengths)), -(-len(lengths) // SIZE))


def padding(lengths: np.ndarray, made: list[np.ndarray]) -> float:
    return 1 - lengths.sum() / sum(lengths[chosen].max() * len(chosen) for chosen in made)


def seconds_per_example(model: Any, optimizer: Any, rows: Rows, origin: Origin, way: str, some: Iterator) -> float:
    examples, started = 0, time.perf_counter()
    for chosen in some:
        inputs = padded(rows, chosen, origin, "cpu")
        if way == "cards":
            inputs["attention_mask"] = (inputs["input_ids"] != origin.tokenizer.pad_token_id).long()
        target = torch.from_numpy(rows.labels[chosen])
        cross_entropy(model(**inputs, use_cache=False).logits, target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        examples += len(chosen)
    return (time.perf_counter() - started) / examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="of each way in each round")
    asked = parser.parse_args()
    params = shape_params(asked.shape)
    vocabulary, settings = Vocabulary(params.tokenizer.vocab_size), params.evaluation
    with tempfile.TemporaryDirectory() as folder:
        new_model(params.model, vocabulary, 0, "sdpa").save_pretrained(folder)
        tokenizer: PreTrainedTokenizerFast = SimpleNamespace(pad_token_id=vocabulary.pad_token_id)
        context = params.model.max_position_embeddings
        origin = Origin(asked.shape, Path(folder), tokenizer, False, context, len(vocabulary), {})
        model = open_classifier(origin, ["0", "1"]).train()
        optimizer = make_optimizer(model, settings)
        shown = [("set", "way", "padding", "ms an example", "s an epoch", "time against the cards' (95%)")]
        for name in SETS:
            rows, times = rows_of(name, len(vocabulary)), {way: [] for way in WAYS}
            for turn in range(asked.rounds + 1):
                for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
                    made = epoch(way, rows.lengths, turn)
                    # spread over the epoch: a window's batches are of all lengths
                    some = [made[n] for n in np.random.default_rng(turn).choice(len(made), asked.steps, replace=False)]
                    times[way].append(seconds_per_example(model, optimizer, rows, origin, way, iter(some)))
            for way in WAYS:
                # the first turn warms up
                each = times[way][1:]
                ratio = [one / other for one, other in zip(each, times["cards"][1:], strict=True)]
                median, low, high = median_and_interval(ratio)
                spent = median_and_interval(each)[0]
                share = f"{padding(rows.lengths, epoch(way, rows.lengths, 0)):.1%}"
                against = f"{median:.2f} ({low:.2f}-{high:.2f})"
                shown.append((name, way, share, f"{1000 * spent:.2f}", f"{spent * len(rows.ids):.1f}", against))
    table(f"{asked.shape}, batches of {SIZE}, {torch.get_num_threads()} threads", shown)


if __name__ == "__main__":
    main()
