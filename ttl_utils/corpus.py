"""Stage 01: sources become cleaned documents with source and licence, split before anything else."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ttl_utils import filters, hub, wheels
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Source

_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
_COMMON = [(name, pa.string()) for name in ("text", "source", "origin", "kind", "licence")]
SCHEMAS = {
    "corpus": pa.schema(_COMMON),
    "chat": pa.schema([*_COMMON, ("messages", pa.list_(_TURN))]),
    "downstream": pa.schema([*_COMMON, ("label", pa.int64())]),
}
SIDES = ("train", "test")
# documents of the hub that begin with the same words are on one side: copies, cuts, and a conversation as text
UNIT_WORDS = 12


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


def read_source(source: Source, run: Run, counts: Counter) -> Iterator[dict]:
    """Rows {text} and, where the source has them, unit, turns, label, origin."""
    if source.package:
        yield from wheels.read(source, run.params.data, counts)
        return
    data = hub.load(source.dataset, source.config, source.split, source.revision)
    columns = {"content": source.column}
    if source.origin_column:
        columns["origin"] = source.origin_column
    for row in hub.rows(data, columns):
        yield _from_hub(row, counts)


def _from_hub(row: dict, counts: Counter) -> dict:
    content = row["content"]
    if content is None or isinstance(content, str):
        return {"text": content or "", "origin": row.get("origin")}
    try:
        turns = [turn["content"] for turn in content]
        if None in turns:
            counts["turn without text"] += 1
            return {"text": "", "turns": []}
        roles = [turn["role"] for turn in content]
        text = "\n\n".join(turns)
    except (TypeError, KeyError) as error:
        raise SourceError(f"a conversation is not a list of {{role, content}}: {str(content)[:80]}") from error
    if roles != ["user", "assistant"] * (len(roles) // 2):
        counts["turns do not alternate"] += 1
        return {"text": "", "turns": []}
    return {"text": text, "turns": turns}


def _kind(source: Source, origin: str | None) -> str:
    """A mixed set (the published corpus) says in a column where a document comes from."""
    if source.instruction_pattern and origin and re.search(source.instruction_pattern, origin, re.IGNORECASE):
        return "instruction"
    return source.kind


def prepare_corpus(run: Run) -> Stage:
    """Make stage 01: documents to learn from and to score, as Parquet files by use and side.

    The side of a document is a pure function of the seed and its unit: the text it was made from (a tweet, a passage,
    a conversation), together with the texts that hold it. So what is scored in any stage is in no training text of any
    stage. For a set of the hub the unit is the first words of the document: copies share it, whatever their kind.

    Raises:
        SourceError: a source cannot be reached, or its bytes are not the expected ones.
    """
    stage = run.stage("01_data")
    if stage.reuse():
        return stage
    with stage.work():
        for use in SCHEMAS:
            shutil.rmtree(stage.folder / use, ignore_errors=True)
        # a set that cannot be had is found out now, not after hours of reading the others
        mirrored = {source.name: hub.check(source.dataset, source.revision) for source in run.params.data.sources}
        sources, outputs = _read_all(run, stage)
        for source in sources:
            source["from_mirror"] = mirrored[source["source"]]
        metrics = _metrics(sources) | _overlap(outputs)
        if metrics["held_out_in_training"]:
            raise TTLError(
                f"{metrics['held_out_in_training']} held-out texts are in training text: a fault of the split"
            )
        stage.finish(metrics, outputs)
    return stage


def _read_all(run: Run, stage: Stage) -> tuple[list[dict], dict[str, list[Path]]]:
    data = run.params.data
    writers = {(use, side): ShardWriter(stage.folder, use, side, data.shard_mb) for use in SCHEMAS for side in SIDES}
    seen = filters.SeenTexts(stage.folder / "seen.sqlite")
    reports = []
    try:
        with Progress("documents", None, stage.folder / "status.json") as progress:
            total = 0
            for source in data.sources:
                report = _read_source(run, source, writers, seen, progress, total)
                total += report["documents_in"]
                reports.append(report)
        outputs = {use: [path for side in SIDES for path in writers[use, side].close()] for use in SCHEMAS}
    finally:
        for writer in writers.values():
            writer._close_file()
        seen.close()
    return reports, outputs


def _read_source(
    run: Run, source: Source, writers: dict, seen: filters.SeenTexts, progress: Progress, before: int
) -> dict:
    data, rejected, kept = run.params.data, Counter(), Counter()
    left_out: Counter = Counter()
    documents_in = characters_in = 0
    needed = {"chat": "turns", "downstream": "label"}.get(source.use)
    for row in read_source(source, run, left_out):
        if source.limit and documents_in == source.limit:
            break
        if needed and needed not in row:
            raise SourceError(f"source {source.name!r} gives no {needed}, which `use: {source.use}` needs")
        documents_in += 1
        progress.update(before + documents_in, source.name)
        text = filters.clean(row["text"])
        characters_in += len(row["text"])
        reason = filters.rejection(text, data.filters[source.filter])
        if reason is None and not seen.add(f"{source.use}\n{text}"):
            reason = "exact duplicate"
        if reason is not None:
            rejected[reason] += 1
            continue
        kind = _kind(source, row.get("origin"))
        unit = row.get("unit")
        # an empty unit (a tweet without one word) is a unit too: all that is made from it is on one side
        if unit is None:
            unit = " ".join(filters.unit_key(text).split()[:UNIT_WORDS])
        side = SIDES[filters.is_held_out(unit, run.params.seed, data.test_share)]
        document: dict[str, Any] = {
            "text": text,
            "source": source.name,
            "origin": row.get("origin"),
            "kind": kind,
            "licence": source.licence,
        }
        if source.use == "chat":
            roles = ("user", "assistant")
            turns = enumerate(map(filters.clean, row["turns"]))
            document["messages"] = [{"role": roles[number % 2], "content": turn} for number, turn in turns]
        if source.use == "downstream":
            document["label"] = row["label"]
        writers[source.use, side].add(document)
        kept[f"{side} documents"] += 1
        kept[f"{side} characters"] += len(text)
        kept[f"{kind} characters"] += len(text)
    return {
        "source": source.name,
        "use": source.use,
        "kind": source.kind,
        "licence": source.licence,
        "documents_in": documents_in,
        "characters_in": characters_in,
        "documents_kept": documents_in - sum(rejected.values()),
        "characters_kept": kept["train characters"] + kept["test characters"],
        "rejected": dict(sorted(rejected.items())),
        "left_out_on_reading": dict(sorted(left_out.items())),
        **{name.replace(" ", "_"): kept[name] for name in sorted(kept)},
    }


def _metrics(sources: list[dict]) -> dict:
    corpus = [report for report in sources if report["use"] == "corpus"]
    characters = sum(report["characters_kept"] for report in corpus)
    instructions = sum(report.get("instruction_characters", 0) for report in corpus)
    return {
        "documents_in": sum(report["documents_in"] for report in corpus),
        "documents_kept": sum(report["documents_kept"] for report in corpus),
        "characters": characters,
        # of characters; the paper's 60/40 names no unit, and its own totals give 66/34 by tokens
        "instruction_share": instructions / characters if characters else None,
        "test_characters": sum(report.get("test_characters", 0) for report in corpus),
        "sources": sources,
    }


def _overlap(outputs: dict[str, list[Path]]) -> dict[str, int]:
    """How many training texts of any use equal a held-out text, case, digits and punctuation aside: it must be none."""

    def keys(side: str) -> Iterator[bytes]:
        for use in SCHEMAS:
            for row in _rows(outputs[use], side, ["text"]):
                yield filters.digest(filters.unit_key(row["text"]))

    held_out = set(keys("test"))
    return {"held_out_texts": len(held_out), "held_out_in_training": sum(key in held_out for key in keys("train"))}


def documents(stage: Stage, use: str, side: str, columns: list[str] | None = None) -> Iterator[dict]:
    """The documents of a finished stage 01, in order, a batch in memory at a time."""
    return _rows(stage.files(use), side, columns)


def _rows(paths: list[Path], side: str, columns: list[str] | None) -> Iterator[dict]:
    for path in paths:
        if path.name.startswith(f"{side}-"):
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
