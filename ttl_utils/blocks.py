"""Packed tokens on disk: raw little-endian 16-bit ids with document starts beside them, read by index."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import read_json, write_json

DTYPE = np.dtype("<u2")


class TokenWriter:
    """Writes `<side>-NNNNN.bin` (ids), `.starts.npy` (where documents begin in that file) and, last, `.json`.

    A file ends with the batch that fills it. Its `.json` says that it is whole, and what was counted up to its end:
    a writer that resumes goes on from there, and the same batches then give the same bytes.
    """

    def __init__(self, folder: Path, side: str, shard_tokens: int):
        self.folder, self.side, self.shard_tokens = folder, side, shard_tokens
        self.paths: list[Path] = []
        self.starts: list[np.ndarray] = []
        self.file = None
        self.in_shard = 0
        # tokens, documents, and what else the batches counted, from the first file on
        self.totals: Counter[str] = Counter(tokens=0, documents=0)
        self.state: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Go on after the last whole file; what an interrupted process left beyond it is deleted."""
        while _is_whole(path := self._next()):
            self.paths.append(path)
        if self.paths:
            reached = read_json(self.paths[-1].with_suffix(".json"))
            self.totals, self.state = Counter(reached["totals"]), reached["state"]
        whole = {path.stem for path in self.paths}
        for path in self.folder.glob(f"{self.side}-*"):
            if path.name.partition(".")[0] not in whole:
                path.unlink()

    def _next(self) -> Path:
        return self.folder / f"{self.side}-{len(self.paths):05}.bin"

    def add(
        self,
        ids: np.ndarray | Sequence[int],
        starts: np.ndarray | Sequence[int] = (0,),
        counts: Mapping[str, int] | None = None,
        state: Any = None,
    ) -> None:
        """Append a batch: its ids, where documents begin in it, what else is counted, where its reader stands."""
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(DTYPE).max):
            raise ValueError(f"token id {int(ids.max())} does not fit in 16 bits")
        if self.file is None:
            self.paths.append(self._next())
            self.file = self.paths[-1].open("wb")
        ids.astype(DTYPE).tofile(self.file)
        self.starts.append(np.asarray(starts, dtype=np.int64) + self.in_shard)
        self.in_shard += ids.size
        self.totals.update({"tokens": ids.size, "documents": len(starts), **(counts or {})})
        self.state = state
        if self.in_shard >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if self.file is None:
            return
        _close(self.file)
        self.file = None
        path = self.paths[-1]
        with path.with_suffix(".starts.npy").open("wb") as file:
            np.save(file, np.concatenate(self.starts))
            _close(file)
        self.starts, self.in_shard = [], 0
        sizes = {name.name: name.stat().st_size for name in (path, path.with_suffix(".starts.npy"))}
        write_json(path.with_suffix(".json"), {"bytes": sizes, "totals": dict(self.totals), "state": self.state})

    def close(self) -> list[Path]:
        """The files of tokens and of starts."""
        self._close_shard()
        return [path for shard in self.paths for path in (shard, shard.with_suffix(".starts.npy"))]


def _close(file: Any) -> None:
    # on the disk before the word that it is
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _is_whole(path: Path) -> bool:
    """Whether a file of tokens and its starts are as they were when it was finished."""
    record = path.with_suffix(".json")
    if not record.is_file():
        return False
    files = [(path.with_name(name), size) for name, size in read_json(record)["bytes"].items()]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


class TokenBlocks:
    """The tokens of one side as consecutive blocks of `block_size`, memory-mapped: memory stays flat.

    Blocks run over the files' boundaries as if they were one; the last, incomplete block is `remainder`.
    """

    def __init__(self, paths: Iterable[Path], block_size: int):
        self.block_size = block_size
        self.paths = list(_token_files(paths))
        self.files = [np.memmap(path, dtype=DTYPE, mode="r") for path in self.paths]
        self.offsets = [0, *np.cumsum([len(file) for file in self.files]).tolist()]
        self.tokens = self.offsets[-1]

    def __len__(self) -> int:
        return self.tokens // self.block_size

    def span(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) as int64."""
        parts = [self.files[shard][one:other] for shard, one, other in self._parts(start, stop)]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The files of tokens [start, stop), each with the places in it."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.tokens}")
        while start < stop:
            shard = bisect_right(self.offsets, start) - 1
            until = min(stop, self.offsets[shard + 1])
            yield shard, start - self.offsets[shard], until - self.offsets[shard]
            start = until

    def block(self, index: int) -> np.ndarray:
        return self.span(index * self.block_size, (index + 1) * self.block_size)

    def remainder(self) -> np.ndarray:
        return self.span(len(self) * self.block_size, self.tokens)

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        """(batch, block_size) int64."""
        return np.stack([self.block(int(index)) for index in indices])

    @cached_property
    def starts(self) -> list[np.ndarray]:
        """For each file, the places in it where documents begin, in order and memory-mapped.

        Raises:
            DamagedFile: starts that are missing, cut short, or not those of their tokens.
        """
        return [_read_starts(path, len(file)) for path, file in zip(self.paths, self.files, strict=True)]

    @cached_property
    def _documents_before(self) -> list[int]:
        return [0, *np.cumsum([len(starts) for starts in self.starts]).tolist()]

    @property
    def documents(self) -> int:
        return self._documents_before[-1]

    def document(self, index: int) -> np.ndarray:
        """Token ids of a document as int64; it may run over the end of a file."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        return self.span(self._start(index), self._start(index + 1) if index + 1 < self.documents else self.tokens)

    def _start(self, index: int) -> int:
        shard = bisect_right(self._documents_before, index) - 1
        return self.offsets[shard] + int(self.starts[shard][index - self._documents_before[shard]])

    def positions(self, indices: Iterable[int]) -> np.ndarray:
        """(batch, block_size) int64: each token's place in its document.

        A block that begins within a document counts from its own first token.
        """
        indices = [int(index) for index in indices]
        rows = np.zeros((len(indices), self.block_size), np.int64)
        for row, index in zip(rows, indices, strict=True):
            start = index * self.block_size
            for shard, one, other in self._parts(start, start + self.block_size):
                first, last = np.searchsorted(self.starts[shard], (one, other))
                begins = self.starts[shard][first:last] + self.offsets[shard] - start
                row[begins] = begins
        return np.arange(self.block_size) - np.maximum.accumulate(rows, axis=1)


def _token_files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in sorted(path for path in paths if path.suffix == ".bin"):
        if path.stat().st_size % DTYPE.itemsize:
            raise DamagedFile(f"{path} has an odd number of bytes: it was cut short; make stage 02 again")
        if path.stat().st_size:
            yield path


def _read_starts(path: Path, tokens: int) -> np.ndarray:
    path = path.with_suffix(".starts.npy")
    try:
        starts = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        state = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise DamagedFile(f"{path} is {state}: it says where documents begin; make stage 02 again") from None
    if starts.dtype != np.int64 or starts.ndim != 1 or (len(starts) and not 0 <= starts[0] <= starts[-1] <= tokens):
        raise DamagedFile(f"{path} does not belong to the {tokens} tokens beside it; make stage 02 again")
    return starts


# a batch straddles two epochs at most
@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, blocks: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def step_indices(seed: int, step: int, batch: int, blocks: int) -> np.ndarray:
    """The `batch` block indices of optimizer step `step` (from 0): a pure function of its arguments.

    Every block is seen once an epoch, in an order of that epoch; a batch may straddle two epochs.
    """
    if blocks < 1:
        raise TTLError("there is not one whole block of training tokens: more text, or a shorter context, is needed")
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs, places = np.divmod(positions, blocks)
    return np.array([_order(seed, int(epoch), blocks)[place] for epoch, place in zip(epochs, places, strict=True)])
