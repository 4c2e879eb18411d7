"""Signatures, duplicates over the corpus, and overlap: their rates, beside two packages that people use for MinHash.

    python -m tests.benchmarks.duplicates [--text FILE] [--documents 1000000]

FILE: Parquet with a `text` column, or plain text. One core. datasketch and rensa are measured where they are
installed (`pip install datasketch rensa`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks import text
from ttl_utils import duplicates, overlap
from ttl_utils.duplicates import band_hashes, mark
from ttl_utils.schema import NearDuplicates
from ttl_utils.words import word_codes

SETTINGS = NearDuplicates(ngram=5, bands=14, rows=8)
HASHES = SETTINGS.bands * SETTINGS.rows
PAPER_DOCUMENTS, PAPER_BYTES = 10_564_643, 30e9
ROUNDS = 3
WORD = re.compile(r"\w+")


def shingles(document: str) -> list[str]:
    words = WORD.findall(document.lower())
    return [" ".join(words[start : start + SETTINGS.ngram]) for start in range(len(words) - SETTINGS.ngram + 1)]


def table(title: str, rows: list[tuple]) -> None:
    print(f"\n{title}")
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def fastest(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, the best of some rounds in which all take their turn."""
    best = dict.fromkeys(ways, float("inf"))
    for _, (name, way) in itertools.product(range(ROUNDS), ways.items()):
        started = time.perf_counter()
        way()
        best[name] = min(best[name], time.perf_counter() - started)
    return best


# --- signatures


def signatures(documents: list[str]) -> None:
    codes = [word_codes(document) for document in documents]
    ways: dict[str, Callable[[], object]] = {
        "ours, from text to bands": lambda: [band_hashes(word_codes(document), SETTINGS) for document in documents],
        "ours, of it band_hashes": lambda: [band_hashes(item, SETTINGS) for item in codes],
    }
    absent = []
    try:
        from datasketch import MinHash

        def datasketch() -> None:
            for document in documents:
                MinHash(HASHES).update_batch([shingle.encode() for shingle in shingles(document)])

        ways[f"datasketch, from text to {HASHES} hashes"] = datasketch
    except ImportError:
        absent.append("datasketch")
    try:
        from rensa import RMinHash

        def rensa() -> None:
            for document in documents:
                RMinHash(num_perm=HASHES, seed=0).update(shingles(document))

        ways[f"rensa, from text to {HASHES} hashes"] = rensa
    except ImportError:
        absent.append("rensa")
    size = sum(len(document.encode()) for document in documents) / 1e6
    seconds = fastest(ways)
    ours = next(iter(seconds.values()))
    rows = [(name, f"{size / took:.2f}", f"{took / ours:.2f}") for name, took in seconds.items()]
    rows += [(f"{name}: not installed", "", "") for name in absent]
    table(
        f"Signatures, {len(documents)} documents of {size * 1e3 / len(documents):.1f} kB",
        [("", "MB/s", "time, ours = 1"), *rows],
    )


# --- duplicates over the corpus


def write_parts(folder: Path, documents: int, size: int = 20_000) -> list[Path]:
    """Random digests and bands; of a tenth each an exact copy, or a near one by three bands, stands within 50,000."""
    rng, parts, before = np.random.default_rng(0), [], None
    for start in range(0, documents, size):
        count = min(size, documents - start)
        digests = rng.integers(1, 2**64, (count, 2), dtype=np.uint64)
        bands = rng.integers(1, 2**64, (SETTINGS.bands, count), dtype=np.uint64)
        if before:
            exact, near = np.split(rng.choice(count, count // 5, replace=False), [count // 10])
            digests[exact] = before[0][rng.integers(0, len(before[0]), len(exact))]
            origin = rng.integers(0, len(before[0]), len(near))
            for band in rng.choice(SETTINGS.bands, 3, replace=False):
                bands[band, near] = before[1][band, origin]
        before = digests, bands
        parts.append(folder / f"{start:09}")
        np.save(f"{parts[-1]}.digests.npy", digests)
        np.save(f"{parts[-1]}.bands.npy", bands)
    return parts


def mark_parts(parts: list[Path], folder: Path, answer: multiprocessing.Queue) -> None:
    started, before = time.perf_counter(), peak_mb()
    marks = np.load(mark(parts, folder))
    answer.put((time.perf_counter() - started, before, peak_mb(), np.bincount(marks, minlength=3).tolist()))


def peak_mb() -> float:
    """The most memory this process has held, mapped files included; where the system does not tell, what it holds."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss / 2**20


def marking(documents: int) -> None:
    rows = [("documents", "seconds", "documents/s", "peak MB", "MB before", "kept, exact, near")]
    figures = []
    for count in (documents // 4, documents):
        with tempfile.TemporaryDirectory() as name:
            parts = write_parts(Path(name), count)
            # a process of its own, so that its memory is that of marking
            context = multiprocessing.get_context("spawn")
            answer = context.Queue()
            process = context.Process(target=mark_parts, args=(parts, Path(name), answer))
            process.start()
            took, before, peak, marks = answer.get()
            process.join()
        figures.append((count, took))
        rows.append((f"{count:,}", f"{took:.1f}", f"{count / took:,.0f}", f"{peak:.0f}", f"{before:.0f}", marks))
    table(f"Duplicates over all documents, {SETTINGS.bands} bands", rows)
    (few, short), (many, long) = figures
    print(f"  four times the documents take {long / short * 4 * few / many:.1f} times the time")
    disk = (SETTINGS.bands * 8 + 16) * PAPER_DOCUMENTS / 1e9
    print(
        f"  projected, {PAPER_DOCUMENTS:,} documents: {long / many * PAPER_DOCUMENTS:.0f} s, digests and bands on disk"
    )
    print(f"  {disk:.1f} GB, scratch {32 * PAPER_DOCUMENTS / 1e9:.1f} GB; buckets of {duplicates.BUCKET_DOCUMENTS:,}")
    print(f"  documents bound the memory, beside {8 * PAPER_DOCUMENTS / 2**20:.0f} MB of parents in a mapped file")


def in_memory(documents: int = 10_000) -> None:
    """What an index in memory takes, for a sample: its memory grows with the documents."""
    rows = [("index in memory", "documents/s", "bytes a document", f"projected GB for {PAPER_DOCUMENTS:,}")]

    def tokens(number: int) -> list[str]:
        return [f"{number} {place}" for place in range(20)]

    def measure(name: str, entries: Iterable, insert: Callable[[int, object], object]) -> None:
        gc.collect()
        before, started = psutil.Process().memory_info().rss, time.perf_counter()
        for number, entry in enumerate(entries):
            insert(number, entry)
        took = time.perf_counter() - started
        each = (psutil.Process().memory_info().rss - before) / documents
        rows.append((name, f"{documents / took:,.0f}", f"{each:,.0f}", f"{each * PAPER_DOCUMENTS / 1e9:.0f}"))

    try:
        from datasketch import MinHash, MinHashLSH

        index = MinHashLSH(num_perm=HASHES, params=(SETTINGS.bands, SETTINGS.rows))
        entries = [MinHash(HASHES) for _ in range(documents)]
        for number, entry in enumerate(entries):
            entry.update_batch([token.encode() for token in tokens(number)])
        measure(
            "datasketch.MinHashLSH", entries, lambda number, entry: index.query(entry) or index.insert(number, entry)
        )
    except ImportError:
        rows.append(("datasketch: not installed", "", "", ""))
    try:
        from rensa import RMinHash, RMinHashLSH

        other = RMinHashLSH(threshold=0.7, num_perm=HASHES, num_bands=SETTINGS.bands)
        hashed = [RMinHash(num_perm=HASHES, seed=0) for _ in range(documents)]
        for number, entry in enumerate(hashed):
            entry.update(tokens(number))
        measure("rensa.RMinHashLSH", hashed, lambda number, entry: other.query(entry) or other.insert(number, entry))
    except ImportError:
        rows.append(("rensa: not installed", "", "", ""))
    table(f"The same search in memory, {documents:,} signatures that are made already", rows)


# --- overlap


def scan_with_sets(path: Path, wanted: dict[int, set[str]]) -> int:
    """The plain way: every run of words as a string, looked up in a set."""
    found = 0
    for batch in pq.ParquetFile(path).iter_batches(64, columns=["text"]):
        for document in batch.column(0).to_pylist():
            words = WORD.findall(document.lower())
            for size, runs in wanted.items():
                found += sum(" ".join(words[at : at + size]) in runs for at in range(len(words) - size + 1))
    return found


def overlaps(documents: list[str], ngram: int = 13) -> None:
    """Training text of the documents; the sets: other documents and some of these, whole and as short questions."""
    others = list(text.documents(2, seed=1))
    items = {
        "long": others + documents[:20],
        "short": [" ".join(item.split()[: 5 + n % 12]) for n, item in enumerate(others)],
    }
    size = sum(len(document.encode()) for document in documents) / 1e6
    rows, base = [("", "MB/s", "time, ours = 1")], 0.0
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train-00000.parquet"
        pq.write_table(pa.table({"text": documents}), path, row_group_size=1024)
        wanted: dict[int, set[str]] = {}
        for item in items["long"]:
            words = WORD.findall(item.lower())
            wanted.setdefault(ngram, set()).update(
                " ".join(words[at : at + ngram]) for at in range(len(words) - ngram + 1)
            )
        plain = fastest({"plain": lambda: scan_with_sets(path, wanted)})["plain"]
        for sets in (["long"], ["long", "short"]):
            work = Path(name) / "-".join(sets)
            found = overlap.measure(
                [{"name": item} for item in sets], lambda item: items[item["name"]], [path], work, ngram, 1
            )
            assert found[0]["found"] == 20
            took = fastest({"ours": lambda work=work: overlap._scan(path, work)})["ours"]
            base = base or took
            what = f"runs of {ngram} words" + (" and of 5 to 12" if "short" in sets else "")
            rows.append((f"ours, {what}", f"{size / took:.1f}", f"{took / base:.2f}"))
        rows.append((f"a set of strings, runs of {ngram} words", f"{size / plain:.1f}", f"{plain / base:.2f}"))
    table(f"Overlap, {size:.0f} MB of training text from Parquet", rows)
    hours = PAPER_BYTES / 1e6 * base / size / 3600
    print(f"  projected, {PAPER_BYTES / 1e9:.0f} GB: {hours / 2:.2f} h on 2 cores, {hours / 16:.2f} h on 16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--documents", type=int, default=1_000_000)
    options = parser.parse_args()
    documents, size = [], 0
    for document in text.read(options.text) if options.text else text.documents(6):
        documents.append(document)
        size += len(document.encode())
        if size > 6e6:
            break
    signatures(documents)
    marking(options.documents)
    in_memory()
    overlaps(documents)


if __name__ == "__main__":
    main()
