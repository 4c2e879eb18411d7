"""What the benchmarks of training share: the parameters of a shape, its tokens, and spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ttl_utils.blocks import TokenWriter
from ttl_utils.params import Params, load_params

# as they stand, but for the 160m's rows, one at a time on a CPU; and one that takes next to no time itself
SHAPES: dict[str, dict] = {
    "nano": {"size": "nano"},
    "160m": {"size": "160m", "pretraining": {"tokens_per_step": 2048, "per_device_train_batch_size": 1}},
    "tiny": {
        "size": "nano",
        "model": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "max_position_embeddings": 16,
        },
        "tokenizer": {"vocab_size": 300},
        "pretraining": {"tokens_per_step": 16, "per_device_train_batch_size": 1},
        "evaluation": {"downstream": []},
    },
}
DOCUMENT_TOKENS = 600


def shape_params(shape: str) -> Params:
    return load_params(SHAPES[shape])


class Vocabulary:
    """What a model's configuration asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 3

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def write_tokens(folder: Path, tokens: int, vocab_size: int) -> list[Path]:
    """Random ids as stage 02 packs them, in files of 32M tokens; returns the files."""
    rng = np.random.default_rng(0)
    writer = TokenWriter(folder, "train", shard_tokens=2**25)
    while tokens > 0:
        ids = rng.integers(4, vocab_size, min(tokens, 2**20))
        # lengths around the mean, as documents have
        starts = np.cumsum(rng.integers(1, 2 * DOCUMENT_TOKENS, 2 * len(ids) // DOCUMENT_TOKENS))
        writer.add(ids, starts[starts < len(ids)])
        tokens -= len(ids)
    return writer.close()


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95% interval, by bootstrap."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return statistics.median(values), float(low), float(high)


def table(title: str, rows: list[tuple]) -> None:
    print(f"\n{title}")
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
