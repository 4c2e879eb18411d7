"""Exact and near duplicates over the whole corpus: arrays on disk, a bucket of one band in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ttl_utils.errors import DamagedFile
from ttl_utils.schema import NearDuplicates
from ttl_utils.words import ngram_hashes

# what `duplicates.npy` says of a document
KEPT, EXACT, NEAR = 0, 1, 2
# shingles hashed at once: with 112 hashes of 4 bytes each they stay in the processor's cache
_SHINGLES = 1024
# documents of a bucket, each of which takes about 100 bytes while its bucket is sorted
BUCKET_DOCUMENTS = 2**21
# in the place of an exact duplicate's parent
_EXACT_PARENT = np.uint64(2**64 - 1)


@cache
def _multipliers(count: int) -> np.ndarray:
    """(count, 1) uint32: the first `count` outputs of splitmix64 (Steele et al. 2014) from 0, made odd."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (((state ^ (state >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32) | np.uint32(1))[:, None]


def band_hashes(codes: np.ndarray, settings: NearDuplicates) -> np.ndarray:
    """(bands,) uint64 of a text's word codes: texts that agree in one band are candidates; all 0 for too few words.

    MinHash (Broder 1997): two texts agree in one of the bands x rows minima with the probability of their Jaccard
    similarity, as sets of runs of `ngram` words. A permutation multiplies odd 32-bit numbers by an odd constant,
    modulo 2^32. 31 bits suffice: unlike texts of 100,000 shingles each share a minimum by chance once in 40,000
    times, and a band asks for `rows` of them.
    """
    shingles = (ngram_hashes(codes, settings.ngram) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    if not len(shingles):
        return np.zeros(settings.bands, np.uint64)
    multipliers = _multipliers(settings.bands * settings.rows)
    minima = np.full(len(multipliers), 2**32 - 1, np.uint32)
    for start in range(0, len(shingles), _SHINGLES):
        # (hashes, shingles)
        permuted = multipliers * shingles[start : start + _SHINGLES]
        np.minimum(minima, permuted.min(axis=1), out=minima)
    # a band is a run of `rows` minima; 0 stands for no part in the search
    hashes = ngram_hashes(minima.astype(np.uint64), settings.rows)[:: settings.rows]
    return np.maximum(hashes, np.uint64(1))


def found_probability(similarity: np.ndarray | float, settings: NearDuplicates) -> np.ndarray | float:
    """The probability that two texts of this Jaccard similarity agree in a band at least: 1 - (1 - s^rows)^bands."""
    return 1 - (1 - similarity**settings.rows) ** settings.bands


def mark(
    parts: Sequence[Path],
    folder: Path,
    on_progress: Callable[[int, int], object] | None = None,
    bucket_documents: int = BUCKET_DOCUMENTS,
) -> Path:
    """Write `folder/duplicates.npy`: uint8 for each document, KEPT, EXACT (an earlier one is the same) or NEAR.

    Beside a part `PART.any` stand `PART.digests.npy` (documents, 2) and `PART.bands.npy` (bands, documents), both
    uint64; a document's number is its place over all parts. Candidates are joined over all bands into clusters, as
    FineWeb does (Penedo et al. 2024): a document may be NEAR one with which it agrees only through others. The first
    of a cluster is kept. An exact duplicate, and a document whose bands are 0, takes no part in that.

    Digests, then each band, are dealt into buckets on disk by their high bits; a bucket is sorted in memory. So the
    result depends neither on `bucket_documents` nor on how the documents are cut into parts. The scratch on disk is
    at most 32 bytes a document; `on_progress` is told how much is done, and of how much.

    Raises:
        DamagedFile: an array that is missing or not what was written.
    """
    sizes = {part: size for part in parts if (size := len(_open(part, "digests")))}
    bands = {len(_open(part, "bands", size)) for part, size in sizes.items()}
    if len(bands) > 1:
        raise DamagedFile(f"the .bands.npy files of {parts[0].parent} differ in bands {sorted(bands)}: make them anew")
    scratch = folder / ".duplicates"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _mark(sizes, max(bands, default=0), scratch, on_progress, bucket_documents)
        os.replace(scratch / "marks", folder / "duplicates.npy")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder / "duplicates.npy"


def _mark(
    sizes: dict[Path, int],
    bands: int,
    scratch: Path,
    on_progress: Callable[[int, int], object] | None,
    bucket_documents: int,
) -> None:
    documents, done = sum(sizes.values()), 0
    parents = _own_parents(scratch / "parents", documents, bucket_documents)

    def records(band: int | None) -> Iterator[np.ndarray]:
        """(documents, keys + 1) uint64 by part: the digest, or one band's hash, and the document's number."""
        nonlocal done
        start = 0
        for part, size in sizes.items():
            numbers = np.arange(start, start + size, dtype=np.uint64)
            if band is None:
                yield np.column_stack((_open(part, "digests"), numbers))
            else:
                keys = np.array(_open(part, "bands", size)[band])
                taken = (keys != 0) & (parents[start : start + size] != _EXACT_PARENT)
                yield np.column_stack((keys[taken], numbers[taken]))
            start, done = start + size, done + size
            if on_progress:
                on_progress(done, documents * (bands + 1))

    # 256 files at most are open at once; 2^21 documents each are half a billion
    bits = min(8, max(0, (documents - 1) // bucket_documents).bit_length())
    for _, others in _pairs(records(None), scratch, bits, bucket_documents):
        parents[others] = _EXACT_PARENT
    for band in range(bands):
        for firsts, others in _pairs(records(band), scratch, bits, bucket_documents):
            _join(parents, firsts, others)
    _write_marks(scratch / "marks", parents, bucket_documents)


def _open(part: Path, kind: str, documents: int | None = None) -> np.ndarray:
    """An array beside a part, memory-mapped."""
    path = part.with_suffix(f".{kind}.npy")
    try:
        array = np.load(path, mmap_mode="r")
        if array.dtype != np.uint64 or array.ndim != 2 or (array.shape[1] != (2 if documents is None else documents)):
            raise ValueError(f"{array.dtype} {array.shape}")
    except (OSError, ValueError, EOFError) as error:
        state = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise DamagedFile(f"{path} is {state}: delete the files of this part, so that it is made again") from None
    return array


def _pairs(
    records: Iterable[np.ndarray], scratch: Path, bits: int, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents that share their keys: (first, other) numbers, as two arrays for each chunk of a bucket."""
    paths = [scratch / f"bucket-{number}" for number in range(2**bits)]
    files = [path.open("wb") for path in paths]
    columns = 2
    try:
        for rows in records:
            columns = rows.shape[1]
            buckets = (rows[:, 0] >> np.uint64(64 - bits)).astype(np.uint8) if bits else np.zeros(len(rows), np.uint8)
            order = np.argsort(buckets, kind="stable")
            ends = np.cumsum(np.bincount(buckets, minlength=len(files)))
            for file, piece in zip(files, np.split(rows[order], ends[:-1]), strict=True):
                file.write(piece)
    finally:
        for file in files:
            file.close()
    for path in paths:
        with path.open("rb") as file:
            seen = np.empty((0, columns), np.uint64)
            while len(read := np.fromfile(file, np.uint64, chunk * columns)):
                # stable: of equal keys the earliest document stands first
                rows = np.concatenate((seen, read.reshape(-1, columns)))
                rows = rows[np.lexsort(rows.T[-2::-1])]
                new = np.ones(len(rows), bool)
                new[1:] = (rows[1:, :-1] != rows[:-1, :-1]).any(axis=1)
                # only the first of each key goes on: a key that millions share takes no memory
                seen = rows[new]
                yield np.repeat(seen[:, -1], np.diff(np.flatnonzero(new), append=len(rows)))[~new], rows[~new, -1]
        path.unlink()


def _own_parents(path: Path, documents: int, chunk: int) -> np.ndarray:
    """(documents,) uint64 on disk: each document its own parent, which is what a cluster's first one stays."""
    # written before it is mapped: a full disk is then an error and not the end of the process
    with path.open("wb") as file:
        for start in range(0, documents, chunk):
            file.write(np.arange(start, min(start + chunk, documents), dtype=np.uint64))
    return np.memmap(path, np.uint64, "r+") if documents else np.empty(0, np.uint64)


def _roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The first of each document's cluster; the way there is shortened."""
    found = parents[documents]
    while not np.array_equal(above := parents[found], found):
        parents[documents] = found = above
    return found


def _join(parents: np.ndarray, firsts: np.ndarray, others: np.ndarray) -> None:
    """One cluster for each pair's two: a parent is always an earlier document."""
    while len(firsts):
        firsts, others = _roots(parents, firsts), _roots(parents, others)
        apart = firsts != others
        firsts, others = firsts[apart], others[apart]
        np.minimum.at(parents, np.maximum(firsts, others), np.minimum(firsts, others))


def _write_marks(path: Path, parents: np.ndarray, chunk: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": parents.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(parents), chunk):
            piece = np.array(parents[start : start + chunk])
            own = np.arange(start, start + len(piece), dtype=np.uint64)
            file.write(np.where(piece == own, KEPT, np.where(piece == _EXACT_PARENT, EXACT, NEAR)).astype(np.uint8))
        file.flush()
        os.fsync(file.fileno())
