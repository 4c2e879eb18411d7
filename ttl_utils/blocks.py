"""Packed tokens on disk: raw little-endian 16-bit ids with document starts beside them, read by index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ttl_utils.errors import DamagedFile

DTYPE = np.dtype("<u2")


class TokenWriter:
    """Writes `<side>-NNNNN.bin` (ids) and `<side>-NNNNN.starts.npy` (where each document begins in that file)."""

    def __init__(self, folder: Path, side: str, shard_tokens: int):
        self.folder, self.side, self.shard_tokens = folder, side, shard_tokens
        self.paths: list[Path] = []
        self.starts: list[int] = []
        self.file = None
        self.in_shard = self.tokens = self.documents = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, ids: Iterable[int]) -> None:
        """Append one document; a document never straddles two files."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(DTYPE).max):
            raise ValueError(f"token id {int(ids.max())} does not fit in 16 bits")
        if self.file is None:
            self.paths.append(self.folder / f"{self.side}-{len(self.paths):05}.bin")
            self.file = self.paths[-1].open("wb")
        self.starts.append(self.in_shard)
        ids.astype(DTYPE).tofile(self.file)
        self.in_shard += ids.size
        self.tokens += ids.size
        self.documents += 1
        if self.in_shard >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if self.file is None:
            return
        self.file.close()
        self.file = None
        starts = self.paths[-1].with_suffix(".starts.npy")
        np.save(starts, np.asarray(self.starts, dtype=np.int64))
        self.starts, self.in_shard = [], 0

    def close(self) -> list[Path]:
        self._close_shard()
        return [path for shard in self.paths for path in (shard, shard.with_suffix(".starts.npy"))]


class TokenBlocks:
    """The tokens of one side as consecutive blocks of `block_size`, memory-mapped: memory stays flat.

    Blocks run over the files' boundaries as if they were one; the last, incomplete block is `remainder`.
    """

    def __init__(self, paths: Iterable[Path], block_size: int):
        self.block_size = block_size
        self.files = [np.memmap(path, dtype=DTYPE, mode="r") for path in _token_files(paths)]
        self.offsets = [0, *np.cumsum([len(file) for file in self.files]).tolist()]
        self.tokens = self.offsets[-1]

    def __len__(self) -> int:
        return self.tokens // self.block_size

    def span(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) as int64."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.tokens}")
        parts = []
        while start < stop:
            shard = bisect_right(self.offsets, start) - 1
            until = min(stop, self.offsets[shard + 1])
            parts.append(self.files[shard][start - self.offsets[shard] : until - self.offsets[shard]])
            start = until
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def block(self, index: int) -> np.ndarray:
        return self.span(index * self.block_size, (index + 1) * self.block_size)

    def remainder(self) -> np.ndarray:
        return self.span(len(self) * self.block_size, self.tokens)

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        """(batch, block_size) int64."""
        return np.stack([self.block(int(index)) for index in indices])


def _token_files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in sorted(path for path in paths if path.suffix == ".bin"):
        if path.stat().st_size % DTYPE.itemsize:
            raise DamagedFile(f"{path} has an odd number of bytes: it was cut short; make stage 02 again")
        if path.stat().st_size:
            yield path


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, blocks: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def step_indices(seed: int, step: int, batch: int, blocks: int) -> np.ndarray:
    """The `batch` block indices of optimizer step `step` (from 0): a pure function of its arguments.

    Every block is seen once an epoch, in an order of that epoch; a batch may straddle two epochs.
    """
    if blocks < 1:
        raise ValueError("there is not one whole block of training tokens: more text, or a shorter context, is needed")
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs, places = np.divmod(positions, blocks)
    return np.array([_order(seed, int(epoch), blocks)[place] for epoch, place in zip(epochs, places, strict=True)])
