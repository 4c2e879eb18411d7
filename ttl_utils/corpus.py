"""Stage 01: sources become cleaned documents with source and licence, split before anything else.

In three steps, each at flat memory and each going on where it was stopped:

1. read: every source is read in parts of about 64 MB or 131,072 documents; worker processes clean and judge
   (`judge.py`); a part's kept documents, what marks them and its counts are written, then its `.json`, with the place
   to read on from.
2. mark: exact and near duplicates over all parts, training texts that equal a held-out one, toxic ones.
3. write: what is left goes to `<use>/<side>-NNNNN.parquet`, and the working folder is deleted.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ttl_utils import datasheet, duplicates, hub, local_files, sources
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.judge import SIDES, Batch, Judge, judge_in_worker, start_worker
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Data, Source

_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
_COMMON = [(name, pa.string()) for name in ("text", "source", "origin", "kind", "licence")]
_MESSAGES, _LABEL = ("messages", pa.list_(_TURN)), ("label", pa.int64())
SCHEMAS = {
    "corpus": pa.schema(_COMMON),
    "chat": pa.schema([*_COMMON, _MESSAGES]),
    "downstream": pa.schema([*_COMMON, _LABEL]),
}
PART_SCHEMA = pa.schema([*_COMMON, ("part", pa.string()), ("side", pa.string()), _MESSAGES, _LABEL])
# what is read between two places to go on from, and what a worker is given at a time
PART_CHARACTERS, PART_DOCUMENTS, BATCH_CHARACTERS, BATCH_ROWS = 2**26, 2**17, 2**20, 512
# what the mark of a document says, in the order of looking
MARKS = ("kept", *datasheet.LATER)
KEPT, EXACT, NEAR, HELD_OUT, TOXIC = range(5)


class ShardWriter:
    """Parquet files `<use>/<side>-NNNNN.parquet` of about `shard_mb` megabytes of text each."""

    def __init__(self, folder: Path, use: str, side: str, shard_mb: int):
        self.folder, self.use, self.side, self.limit = folder / use, use, side, shard_mb * 2**20
        self.rows: list[dict] = []
        self.paths: list[Path] = []
        self.pending = self.written = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.pending += len(row["text"])
        if self.pending > 4 * 2**20:
            self._flush()

    def _flush(self) -> None:
        if self.writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.paths.append(self.folder / f"{self.side}-{len(self.paths):05}.parquet")
            self.writer = pq.ParquetWriter(self.paths[-1], SCHEMAS[self.use], compression="zstd")
            self.written = 0
        self.writer.write_table(pa.Table.from_pylist(self.rows, SCHEMAS[self.use]))
        self.written += self.pending
        self.rows, self.pending = [], 0
        if self.written > self.limit:
            self._close_file()

    def _close_file(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def close(self) -> list[Path]:
        if self.rows or not self.paths:
            self._flush()
        self._close_file()
        return self.paths


def prepare_corpus(run: Run) -> Stage:
    """Make stage 01: documents to learn from and to score, as Parquet files by use and side.

    The side of a document is a pure function of the seed and its unit. Of a wheel, the unit is the text that a document
    was made from (a tweet, a passage, a conversation) together with the texts that hold it: what is scored in any stage
    is in no training text of any stage. Of the hub and of files, it is the first words of the document, which copies
    and cuts share, whatever their kind; a text with the words of a held-out one is left out of training, and what
    stands inside longer texts is reported by `overlap.py`.

    Raises:
        SourceError: a source cannot be reached, or its bytes are not the expected ones.
        ParameterError: the language has no stop words here, or the language check does not know it.
    """
    stage = run.stage("01_data")
    work = stage.folder / "work"
    if stage.reuse():
        shutil.rmtree(work, ignore_errors=True)
        return stage
    data = run.params.data
    Judge(data, run.params.seed).check()
    with stage.work():
        for use in SCHEMAS:
            shutil.rmtree(stage.folder / use, ignore_errors=True)
        # a set that cannot be had is found out now, not after hours of reading the others
        mirrored = {source.name: hub.check(source.dataset, source.revision) for source in data.active}
        for source in data.active:
            if source.files:
                local_files.find(source)
        _check_classifier(run)
        parts = _read_all(run, stage, work)
        marks, toxicity = _mark(run, stage, work, parts)
        outputs, kept = _write(run, stage, parts, marks)
        reports = [datasheet.source_report(source, kept, _counts(parts, source)) for source in data.active]
        learned = [report for report in reports if report["use"] == "corpus"]
        if learned and not any(report["documents_kept"] for report in learned):
            reasons = sum((Counter(report["rejected"]) for report in learned), Counter()).most_common(3)
            why = "; ".join(f"{reason}: {count:,}" for reason, count in reasons) or "the sources are empty"
            raise TTLError(
                f"no document of the corpus was kept to learn from ({why}): see data.filters and data.sources"
            )
        for report in reports:
            report["version"] = next(
                (r for p in parts if p.source == report["source"] and (r := p.record["version"])), None
            )
            report["from_mirror"] = mirrored[report["source"]]
        metrics = datasheet.metrics(reports, kept, toxicity)
        datasheet.write(stage.folder / "data_sheet.md", run.name, metrics)
        stage.finish(metrics, outputs)
    shutil.rmtree(work, ignore_errors=True)
    return stage


class WorkPart(NamedTuple):
    """A part of a source on disk: `<path>.parquet`, arrays beside it, and `<path>.json`, which is written last."""

    source: str
    path: Path

    @property
    def record(self) -> dict:
        return read_json(self.path.with_suffix(".json"))

    def rows(self, columns: list[str] | None = None) -> Iterator[dict]:
        return _rows([self.path.with_suffix(".parquet")], columns)


# step 1: read


def _read_all(run: Run, stage: Stage, work: Path) -> list[WorkPart]:
    data = run.params.data
    workers = data.workers or os.cpu_count() or 1
    parts: list[WorkPart] = []
    total = _announce(stage, sources.estimate(data.active))
    with Progress("documents", total, stage.folder / "status.json") as progress, contextlib.ExitStack() as stack:
        # a wheel is small: starting processes would take longer than its text
        pool = None
        if workers > 1 and not all(source.package for source in data.active):
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, context, start_worker, (data, run.params.seed))
            stack.callback(pool.shutdown, cancel_futures=True)
        judge = Judge(data, run.params.seed)
        before = 0
        for number, source in enumerate(data.active):
            folder = work / f"{number:02}-{source.name}"
            found, documents = _read_source(
                source, data, folder, judge, None if source.package else pool, progress, before
            )
            parts += [WorkPart(source.name, path) for path in found]
            before += documents
    return parts


def _announce(stage: Stage, estimates: list[dict]) -> int | None:
    """Say what will go over the network and onto the disk; returns the number of documents, where it is known."""

    def total(name: str) -> int | None:
        figures = [estimate[name] for estimate in estimates]
        return None if None in figures else sum(figures)

    text = sum(estimate["text_bytes"] or 0 for estimate in estimates)
    if text:
        download, free = total("download_bytes"), shutil.disk_usage(stage.folder).free
        over = "unknown" if download is None else f"{download / 1e9:,.1f} GB"
        # measured on prose: Parquet takes 0.45 of the text, once to work on and once to keep
        needed = 0.9 * text
        print(
            f"sources: about {text / 1e9:,.1f} GB of text; over the network: {over} (not kept); on disk while it is "
            f"made: about {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB free"
        )
        if needed > free:
            print("the disk is too small by this estimate: free some space, or set TTL_OUTPUTS to another disk")
    return total("documents")


def _read_source(
    source: Source,
    data: Data,
    folder: Path,
    judge: Judge,
    pool: ProcessPoolExecutor | None,
    progress: Progress,
    before: int,
) -> tuple[list[Path], int]:
    """Read one source to its end, from the place where an earlier run stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    done = _whole_parts(folder)
    last = read_json(done[-1].with_suffix(".json")) if done else {"state": None, "ended": False, "documents": 0}
    documents = last["documents"]
    if last["ended"]:
        return done, documents
    if done:
        print(f"source {source.name!r}: {documents:,} documents were read before, going on")
    left_out: Counter = Counter()
    reader = sources.open_source(source, data, left_out, last["state"])
    batches = _batches(reader, source)
    ended = False
    while not ended:
        path = folder / f"part-{len(done):05}"
        judged, characters, read, state = [], 0, 0, None
        window: deque = deque()
        for rows in batches:
            window.append(pool.submit(judge_in_worker, source.name, rows) if pool else judge.judge(source.name, rows))
            # a few batches ahead of the workers, never the whole source
            while len(window) > 2 * (data.workers or os.cpu_count() or 1):
                judged.append(_result(window.popleft(), source))
            documents += len(rows)
            progress.update(before + documents, source.name)
            characters += sum(row.get("size", len(row["text"])) for row in rows)
            read += len(rows)
            # a wheel is small, and has no place to read on from
            if (characters >= PART_CHARACTERS or read >= PART_DOCUMENTS) and not source.package:
                state = reader.state()
                break
        else:
            ended = True
        judged += [_result(item, source) for item in window]
        record = {"state": state, "ended": ended, "documents": documents, "left_out": dict(left_out)}
        record["version"] = getattr(reader.records, "version", None)
        _write_part(path, judged, record)
        left_out.clear()
        done.append(path)
    return done, documents


def _whole_parts(folder: Path) -> list[Path]:
    """The parts before the first one that is missing or damaged; what lies beyond is deleted and made again."""
    done: list[Path] = []
    while _is_whole(path := folder / f"part-{len(done):05}"):
        done.append(path)
    names = {path.name for path in done}
    for path in folder.glob("part-*"):
        if path.name.partition(".")[0] not in names:
            path.unlink()
    return done


def _is_whole(path: Path) -> bool:
    record = path.with_suffix(".json")
    if not record.is_file():
        return False
    sizes = read_json(record)["bytes"]
    return all(
        (file := path.with_suffix(suffix)).is_file() and file.stat().st_size == size for suffix, size in sizes.items()
    )


def _result(item: Any, source: Source) -> Batch:
    if isinstance(item, Batch):
        return item
    try:
        return item.result()
    except BrokenProcessPool:
        raise TTLError(
            f"source {source.name!r}: a worker process was ended from outside; what was done is kept. For want of "
            "memory: set data.workers to fewer processes, and run again. In a script of your own: call this below "
            'if __name__ == "__main__":, since workers import the script'
        ) from None


def _batches(reader: Iterable[dict], source: Source) -> Iterator[list[dict]]:
    """Lists of rows for a worker."""
    needed = {"chat": "turns", "downstream": "label"}.get(source.use)
    rows, characters = [], 0
    for row in reader:
        if needed and needed not in row and "problem" not in row:
            raise SourceError(
                f"source {source.name!r} gives no {needed}, which `use: {source.use}` needs: "
                + ("a column of conversations" if needed == "turns" else "only readers of wheels give labels")
            )
        rows.append(row)
        characters += len(row["text"])
        if characters >= BATCH_CHARACTERS or len(rows) == BATCH_ROWS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


def _write_part(path: Path, judged: list[Batch], record: dict) -> None:
    rows = [row for batch in judged for row in batch.rows]
    digests = [item for batch in judged for item in batch.digests]
    bands = [item for batch in judged for item in batch.bands]
    keys = [item for batch in judged for item in batch.keys]
    counts: Counter = sum((batch.counts for batch in judged), Counter())
    table = pa.Table.from_pylist(rows, PART_SCHEMA)
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=4096, compression="zstd")
    arrays = {
        "digests": np.array(digests, "<u8").reshape(-1, 2),
        "bands": np.array(bands, "<u8").T.copy(),
        "keys": np.array(keys, "<u8"),
        "held": np.array([row["side"] == "test" for row in rows], bool),
    }
    for name, array in arrays.items():
        np.save(path.with_suffix(f".{name}.npy"), array)
    suffixes = [".parquet", *(f".{name}.npy" for name in arrays)]
    # on the disk before the record that says so
    for suffix in suffixes:
        with path.with_suffix(suffix).open("rb+") as file:
            os.fsync(file.fileno())
    record["bytes"] = {suffix: path.with_suffix(suffix).stat().st_size for suffix in suffixes}
    write_json(path.with_suffix(".json"), record | {"counts": [[*key, count] for key, count in counts.items()]})


def _counts(parts: list[WorkPart], source: Source) -> Counter:
    """What was counted while the source was read: (what, part of the source[, reason]), summed over its parts."""
    counts: Counter = Counter()
    for part in parts:
        if part.source == source.name:
            record = part.record
            for *key, count in record["counts"]:
                counts[tuple(key)] += count
            for reason, count in record["left_out"].items():
                counts["left out", reason] += count
    return counts


# step 2: mark


def _mark(run: Run, stage: Stage, work: Path, parts: list[WorkPart]) -> tuple[np.ndarray, dict]:
    """A mark (index of MARKS) for every document that was judged good, in order, and what the classifier said."""
    with Progress("duplicates, records sorted", None, stage.folder / "status.json") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        marked = duplicates.mark([part.path for part in parts], work, show)
    marks = np.load(marked)
    _mark_held_out(parts, marks)
    return marks, _mark_toxic(run, stage, parts, marks)


def _mark_held_out(parts: list[WorkPart], marks: np.ndarray) -> None:
    """Mark what is learned from and has the words of a held-out text of any use, case, digits and punctuation aside."""
    held_out, start = [np.empty(0, np.uint64)], 0
    for part in parts:
        held = np.load(part.path.with_suffix(".held.npy"))
        kept = marks[start : start + len(held)] == KEPT
        held_out.append(np.load(part.path.with_suffix(".keys.npy"))[held & kept])
        start += len(held)
    scored, start = np.unique(np.concatenate(held_out)), 0
    for part in parts:
        held = np.load(part.path.with_suffix(".held.npy"))
        mine = marks[start : start + len(held)]
        found = np.isin(np.load(part.path.with_suffix(".keys.npy")), scored)
        mine[found & ~held & (mine == KEPT)] = HELD_OUT
        start += len(held)


def _mark_toxic(run: Run, stage: Stage, parts: list[WorkPart], marks: np.ndarray) -> dict:
    """Scores of the classifier for what is still kept, saved part by part; where it cannot be had, the reason."""
    from ttl_utils import toxicity

    data, settings = run.params.data, run.params.data.toxicity
    asked = Judge(data, run.params.seed).asked_for_toxicity()
    if settings is None or not asked:
        return {"ran": False, "why": "data.toxicity is null" if asked else "no filter of these sources asks for it"}
    try:
        scorer = toxicity.load(settings)
    except SourceError as error:
        print(f"toxicity: skipped, {error}")
        return {"ran": False, "why": str(error)}
    print(f"toxicity: {settings.model} on {scorer.hardware}")
    start, scores, names = 0, [], []
    with Progress("toxicity, documents", int((marks == KEPT).sum()), stage.folder / "status.json") as progress:
        for part in parts:
            rows = list(part.rows(["text", "source", "part"]))
            mine = marks[start : start + len(rows)]
            asked_now = (mine == KEPT).sum()
            scored = np.array([(row["source"], row["part"]) in asked for row in rows], bool) & (mine == KEPT)
            texts = [row["text"] for row, chosen in zip(rows, scored, strict=True) if chosen]
            if texts:
                found = _scores(part.path.with_suffix(".toxicity.npy"), scorer, texts)
                mine[np.flatnonzero(scored)[found < settings.threshold]] = TOXIC
                scores.append(found)
                names += [row["part"] or row["source"] for row, chosen in zip(rows, scored, strict=True) if chosen]
            progress.update(progress.done + int(asked_now), part.source)
            start += len(rows)
    every = np.concatenate(scores) if scores else np.empty(0, np.float32)
    return {
        "ran": True,
        "model": settings.model,
        "threshold": settings.threshold,
        "scored": len(every),
        "sensitivity": toxicity.sensitivity(every, names, settings.threshold).to_dict("records"),
    }


def _check_classifier(run: Run) -> None:
    """What is wrong with the classifier's settings is found out before hours of reading."""
    from ttl_utils import toxicity

    if run.params.data.toxicity and Judge(run.params.data, run.params.seed).asked_for_toxicity():
        try:
            toxicity.load(run.params.data.toxicity)
        except SourceError as error:
            print(f"toxicity will be skipped, as it is now: {error}")


def _scores(path: Path, scorer: Any, texts: list[str]) -> np.ndarray:
    if path.is_file():
        found = np.load(path)
        # the same parts and marks as before, unless the part was damaged
        if len(found) == len(texts):
            return found
    found = scorer.scores(texts)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, found)
    os.replace(partial, path)
    return found


# step 3: write


def _write(run: Run, stage: Stage, parts: list[WorkPart], marks: np.ndarray) -> tuple[dict[str, list[Path]], Counter]:
    """The files of the stage, and counts of what they hold by (what, source, part of the source)."""
    data = run.params.data
    uses = {source.name: source.use for source in data.active}
    writers = {(use, side): ShardWriter(stage.folder, use, side, data.shard_mb) for use in SCHEMAS for side in SIDES}
    kept: Counter = Counter()
    try:
        with Progress("documents written", len(marks), stage.folder / "status.json") as progress:
            place = 0
            for part in parts:
                for row in part.rows():
                    key, mark = (part.source, row.pop("part")), marks[place]
                    side = row.pop("side")
                    place += 1
                    progress.update(place)
                    if mark != KEPT:
                        kept[MARKS[mark], *key] += 1
                        continue
                    use, characters = uses[part.source], len(row["text"])
                    writers[use, side].add({name: row[name] for name in SCHEMAS[use].names})
                    kept["documents", *key] += 1
                    kept[f"{side} documents", *key] += 1
                    kept[f"{side} characters", *key] += characters
                    kept[f"{row['kind']} characters", *key] += characters
                    kept[f"licence {row['licence']}", *key] += characters
                    if use == "corpus":
                        kept[f"words {datasheet.length_bin(row['text'])}", row["kind"]] += 1
        outputs = {use: [path for side in SIDES for path in writers[use, side].close()] for use in SCHEMAS}
    finally:
        for writer in writers.values():
            writer._close_file()
    return outputs, kept


def documents(stage: Stage, use: str, side: str, columns: list[str] | None = None, skip: int = 0) -> Iterator[dict]:
    """The documents of a finished stage 01, in order, a batch in memory at a time; the first `skip` are passed over."""
    return _rows([path for path in stage.files(use) if path.name.startswith(f"{side}-")], columns, skip)


def _rows(paths: list[Path], columns: list[str] | None, skip: int = 0) -> Iterator[dict]:
    for path in paths:
        with pq.ParquetFile(path) as file:
            if skip >= file.metadata.num_rows:
                skip -= file.metadata.num_rows
                continue
            # a row group is a few megabytes of text, in the working folder up to a whole part
            for group in range(file.num_row_groups):
                taken = file.read_row_group(group, columns=columns).slice(skip)
                skip = max(0, skip - file.metadata.row_group(group).num_rows)
                for batch in taken.to_batches(max_chunksize=1024):
                    yield from batch.to_pylist()
