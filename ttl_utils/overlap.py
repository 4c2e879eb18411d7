"""Overlap: does what is scored later stand in the training text too? By word n-grams, as GPT-3 (Brown et al. 2020)."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from ttl_utils.errors import DamagedFile, SourceError, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.schema import TextSet
from ttl_utils.sources import read_texts
from ttl_utils.words import longer, word_bounds, word_codes

# the corpus's own held-out side, which is looked for beside the sets of the parameters
HELD_OUT = {"name": "held out"}
HELD_OUT_ITEMS = 20_000
# words: a shorter item is in any large text by chance
SHORTEST = 5
EXAMPLES = 3
# words looked up at once: they stay in the processor's cache
_WORDS = 2**16
# an n-gram is searched for only if a bit says that one with the same first 27 bits is wanted: 16 MB
_BITS = 27


def check(run: Run, stage: Stage) -> dict:
    """{ngram, sets}: for the held-out side and each of `data.overlap.sets`, what of it stands in the training text.

    A set's row has its name, `items`, those long enough to be `checked`, those `found` (with one n-gram at least),
    their `share` of the checked, `mean_ngram_share` (of an item's n-grams, those found), `training_documents` (with
    one of its n-grams at least) and a few `examples` of n-grams found; or `not_checked`: why. An item of fewer than
    `ngram` words is looked for as a whole; one of fewer than 5 is not. Nothing is removed: this is a report.

    At 64 bits, 10^10 n-grams of training text and 10^7 of the sets agree by chance in 0.005 cases.

    Rows are kept in `reports/overlap.json` for as long as the corpus is the same; sets that are new, or that could
    not be reached, are done in the next call. What a killed call had scanned is not scanned again.
    """
    settings, folder = run.params.data.overlap, stage.folder / "reports"
    files = {side: [path for path in stage.files("corpus") if path.name.startswith(side)] for side in ("train", "test")}
    basis = {"corpus": stage.manifest()["outputs"]["corpus"]["fingerprint"], "ngram": settings.ngram}
    sets = [HELD_OUT, *(item.model_dump() for item in settings.sets)]

    def texts(wanted: dict) -> Iterator[str]:
        return _held_out(files["test"]) if wanted == HELD_OUT else read_texts(TextSet(**wanted))

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".overlap.lock"):
        path = folder / "overlap.json"
        kept = read_json(path) if path.is_file() else {}
        known = [(item["set"], item["row"]) for item in kept["sets"]] if kept.get("basis") == basis else []
        checked = [(item, row) for item, row in known if "not_checked" not in row]
        pending = [item for item in sets if item not in [item for item, _ in checked]]
        if pending:
            key = hashlib.sha256(json.dumps([basis, pending]).encode()).hexdigest()[:16]
            work = folder / ".overlap" / key
            with stage.measuring():
                rows = measure(pending, texts, files["train"], work, settings.ngram, run.params.data.workers)
            checked += zip(pending, rows, strict=True)
            write_json(path, {"basis": basis, "sets": [{"set": item, "row": row} for item, row in checked]})
            shutil.rmtree(folder / ".overlap", ignore_errors=True)
    rows = [next(row for item, row in checked if item == wanted) for wanted in sets]
    found = {"ngram": settings.ngram, "sets": rows}
    if stage.metrics().get("overlap") != found:
        stage.add_metrics(overlap=found)
    return found


def measure(
    sets: list[dict],
    texts: Callable[[dict], Iterable[str]],
    train: list[Path],
    work: Path,
    ngram: int,
    workers: int | None = None,
) -> list[dict]:
    """A row for each set, whose items `texts` gives, looked for in the Parquet files `train` by `workers` processes.

    `work` is left as it is: a later call goes on from it.
    """
    if not (work / "index.json").is_file():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _write_index(sets, texts, work, ngram)
    index = read_json(work / "index.json")
    wanted = np.load(work / "wanted.npy", mmap_mode="r")
    found, documents = np.zeros(len(wanted), bool), np.zeros(len(sets), np.int64)
    if len(wanted):
        _scan_all(train, work, workers or os.cpu_count() or 1)
        for path in train:
            with np.load(_result(work, path)) as result:
                found[result["found"]] = True
                documents += result["documents"]
    hashes = np.array(wanted[found])
    rows = []
    for number, row in enumerate(index["sets"]):
        if "not_checked" not in row:
            row |= _found(work / f"{number}.jsonl", ngram, hashes)
            row["training_documents"] = int(documents[number]) if row["checked"] else None
        rows.append(row)
    return rows


def _held_out(files: list[Path]) -> Iterator[str]:
    """At most HELD_OUT_ITEMS texts of the held-out side, evenly spaced."""
    step = -(-sum(_open(path).metadata.num_rows for path in files) // HELD_OUT_ITEMS)
    number = 0
    for path in files:
        for text in _texts(path):
            if number % step == 0:
                yield text
            number += 1


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _texts(path: Path) -> Iterator[str]:
    try:
        for batch in _open(path).iter_batches(64, columns=["text"]):
            yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DamagedFile:
    reason = " ".join(str(error).split())[:200]
    return DamagedFile(f"{path} does not read ({reason}): restore it from a copy, or make stage 01 again")


def _runs(codes: np.ndarray, sizes: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Each of `sizes`, from the shortest on, with the hashes of all runs of so many words."""
    hashes = codes
    for size in range(1, max(sizes) + 1):
        hashes = hashes if size == 1 else longer(hashes, codes)
        if size in sizes:
            yield size, hashes


def _ngrams(text: str, ngram: int) -> tuple[np.ndarray, int]:
    """Hashes of an item's n-grams, and their length in words; none where it is too short to be checked."""
    codes = word_codes(text)
    size = min(ngram, len(codes))
    if size < min(SHORTEST, ngram):
        return np.empty(0, np.uint64), size
    return next(hashes for _, hashes in _runs(codes, [size])), size


def _write_index(sets: list[dict], texts: Callable[[dict], Iterable[str]], work: Path, ngram: int) -> None:
    """What is wanted: sorted hashes, which sets want each, and a bit table; beside them every set's items.

    `index.json` is written last: it stands for all.
    """
    rows, lengths, hashes = [], set(), []
    for number, item in enumerate(sets):
        count, parts, sizes = 0, [np.empty(0, np.uint64)], set()
        try:
            with (work / f"{number}.jsonl").open("w", encoding="utf-8") as file:
                for text in texts(item):
                    file.write(json.dumps(text) + "\n")
                    count += 1
                    found, size = _ngrams(text, ngram)
                    if len(found):
                        parts.append(found)
                        sizes.add(size)
        except (SourceError, DamagedFile) as error:
            rows.append({"name": item["name"], "not_checked": str(error)})
            hashes.append(np.empty(0, np.uint64))
            continue
        rows.append({"name": item["name"], "items": count, "checked": len(parts) - 1})
        hashes.append(np.unique(np.concatenate(parts)))
        lengths |= sizes
    wanted = np.unique(np.concatenate(hashes))
    # (wanted, sets), eight sets a byte
    owners = np.zeros((len(wanted), -(-len(sets) // 8)), np.uint8)
    for number, part in enumerate(hashes):
        owners[np.searchsorted(wanted, part), number // 8] |= np.uint8(128 >> number % 8)
    bits = np.zeros(2**_BITS, bool)
    bits[wanted >> np.uint64(64 - _BITS)] = True
    np.save(work / "wanted.npy", wanted)
    np.save(work / "owners.npy", owners)
    np.save(work / "bits.npy", np.packbits(bits, bitorder="little"))
    write_json(work / "index.json", {"lengths": sorted(lengths), "sets": rows})


def _code_batches(path: Path) -> Iterator[list[np.ndarray]]:
    """The word codes of some documents, at least _WORDS in all; of the last ones, those that are left."""
    batch, words = [], 0
    for text in _texts(path):
        batch.append(word_codes(text))
        words += len(batch[-1])
        if words >= _WORDS:
            yield batch
            batch, words = [], 0
    if batch:
        yield batch


def _result(work: Path, path: Path) -> Path:
    return work / f"{path.stem}.npz"


def _scan_all(paths: list[Path], work: Path, workers: int) -> None:
    left = [path for path in paths if not _result(work, path).is_file()]
    with Progress("overlap, files of training text", len(paths), done=len(paths) - len(left)) as progress:
        if min(workers, len(left)) < 2:
            for path in left:
                _scan(path, work)
                progress.update(progress.done + 1)
            return
        pool = ProcessPoolExecutor(min(workers, len(left)), multiprocessing.get_context("spawn"))
        try:
            for future in as_completed([pool.submit(_scan, path, work) for path in left]):
                future.result()
                progress.update(progress.done + 1)
        except BrokenProcessPool:
            raise TTLError(
                "overlap: a worker process was ended from outside, most likely for want of memory; the files that were "
                "done are kept: set data.workers to fewer processes, and run again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _scan(path: Path, work: Path) -> None:
    """Which of the wanted n-grams stand in a file, and in how many of its documents those of each set."""
    index = read_json(work / "index.json")
    wanted, owners, bits = (np.load(work / f"{name}.npy", mmap_mode="r") for name in ("wanted", "owners", "bits"))
    found, documents = np.zeros(len(wanted), bool), np.zeros(len(index["sets"]), np.int64)
    for batch in _code_batches(path):
        codes = np.concatenate(batch)
        numbers = np.repeat(np.arange(len(batch)), [len(item) for item in batch])
        # (documents, sets): has an n-gram of the set
        concerned = np.zeros((len(batch), len(documents)), bool)
        for size, hashes in _runs(codes, index["lengths"]):
            likely = np.flatnonzero(bits[hashes >> np.uint64(67 - _BITS)] >> (hashes >> np.uint64(64 - _BITS) & 7) & 1)
            # an n-gram that begins in one document and ends in another stands in none
            likely = likely[numbers[likely] == numbers[likely + size - 1]]
            places, there = _places(wanted, hashes[likely])
            found[places[there]] = True
            rows, columns = np.nonzero(np.unpackbits(owners[places[there]], axis=1, count=len(documents)))
            concerned[numbers[likely[there]][rows], columns] = True
        documents += concerned.sum(axis=0)
    partial = _result(work, path).with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, found=np.flatnonzero(found), documents=documents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, _result(work, path))


def _places(hashes: np.ndarray, searched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `searched` would stand among sorted `hashes`, and whether it does."""
    places = np.searchsorted(hashes, searched)
    there = places < len(hashes)
    there[there] = hashes[places[there]] == searched[there]
    return places, there


def _found(path: Path, ngram: int, hashes: np.ndarray) -> dict:
    """What of a set's items is among the n-grams that were found."""
    checked, found, shares, examples = 0, 0, 0.0, []
    with path.open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)
            wanted, size = _ngrams(text, ngram)
            if not len(wanted):
                continue
            there = _places(hashes, wanted)[1]
            checked += 1
            found += bool(there.any())
            shares += float(there.mean())
            if there.any() and len(examples) < EXAMPLES:
                _, starts, ends = word_bounds(text)
                run = slice(first := int(there.argmax()), first + size)
                example = " ".join(text.lower()[a:b] for a, b in zip(starts[run], ends[run], strict=True))
                if example not in examples:
                    examples.append(example)
    return {
        "found": found,
        "share": found / checked if checked else None,
        "mean_ngram_share": shares / checked if checked else None,
        "examples": examples,
    }
