"""Text in files of this machine: Parquet, JSON lines and plain text, the last two also as .gz and .zst.

A document at a time and at flat memory, whatever the files hold: what cannot be read as text, or is larger than
64 MB, is a `Problem` in the document's place.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ttl_utils.errors import SourceError
from ttl_utils.params import project_root
from ttl_utils.schema import Source, TextSet

LIMIT = 64 * 2**20
TOO_LARGE, NOT_UTF8, NOT_JSON = "larger than 64 MB", "not UTF-8", "not JSON"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".json", ".ndjson")
# lines of a JSON file that are looked at for its columns, and their bytes
PEEK_LINES, PEEK_BYTES = 1000, 2**24
BATCH_ROWS, BATCH_BYTES, BUFFER_BYTES = 1024, 2**22, 2**23
# text per byte of a .gz or .zst, for estimates
COMPRESSED_RATIO = 3

# from a set's columns, those that are read; SourceError where one is missing
Choose = Callable[[list[str]], list[str]]


class Problem(NamedTuple):
    """A document that could not be read as text: why, and its length in bytes."""

    reason: str
    size: int


def kind(path: Path) -> str:
    """parquet, json or text, by the name."""
    suffix = (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix
    if path.suffix == ".parquet":
        return "parquet"
    if suffix in JSON_LINES:
        return "json"
    if suffix == ".txt":
        return "text"
    raise SourceError(
        f"{path}: of an unknown kind; known: .parquet, {', '.join(JSON_LINES)} (a JSON object a line) and .txt, the "
        "last two also with .gz or .zst"
    )


def find(item: Source | TextSet) -> list[Path]:
    """The files that the patterns name, sorted; relative ones in the working folder, or else in the project's root."""
    roots = [root for root in dict.fromkeys((Path.cwd(), project_root())) if root]
    found: set[Path] = set()
    for pattern in item.files:
        for root in roots:
            names = glob.glob(str(Path(pattern).expanduser()), root_dir=root, recursive=True)
            if files := [root / name for name in names if (root / name).is_file()]:
                break
        else:
            raise SourceError(
                f"source {item.name!r}: no file fits {pattern!r} (looked in {' and '.join(map(str, roots))})"
            )
        found.update(files)
    for path in found:
        kind(path)
    return sorted(found)


def _stream(path: Path) -> io.BufferedReader:
    if path.suffix in COMPRESSIONS:
        return io.BufferedReader(pa.input_stream(str(path), compression=COMPRESSIONS[path.suffix]), 2**18)
    return path.open("rb")


def _lines(stream: io.BufferedReader) -> Iterator[bytes | Problem]:
    while line := stream.readline(LIMIT + 1):
        if len(line) <= LIMIT or line.endswith(b"\n"):
            yield line
            continue
        size = len(line)
        while line and not line.endswith(b"\n"):
            line = stream.readline(2**20)
            size += len(line)
        yield Problem(TOO_LARGE, size)


def _filled_lines(stream: io.BufferedReader) -> Iterator[bytes | Problem]:
    return (line for line in _lines(stream) if isinstance(line, Problem) or not line.isspace())


def _blocks(stream: io.BufferedReader) -> Iterator[bytes | Problem]:
    block, size = [], 0
    for line in _lines(stream):
        if isinstance(line, bytes) and line.isspace():
            if size:
                yield Problem(TOO_LARGE, size) if size > LIMIT else b"".join(block)
            block, size = [], 0
            continue
        size += line.size if isinstance(line, Problem) else len(line)
        if size > LIMIT:
            block = []
        else:
            block.append(line)
    if size:
        yield Problem(TOO_LARGE, size) if size > LIMIT else b"".join(block)


def _whole(stream: io.BufferedReader) -> Iterator[bytes | Problem]:
    data = stream.read(LIMIT + 1)
    size = len(data)
    if size <= LIMIT:
        yield data
        return
    del data
    while part := stream.read(2**20):
        size += len(part)
    yield Problem(TOO_LARGE, size)


_CUTS = {"file": _whole, "line": _filled_lines, "blank line": _blocks}


def _text(piece: bytes | Problem) -> dict | Problem:
    if isinstance(piece, Problem):
        return piece
    try:
        return {"text": piece.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError:
        return Problem(NOT_UTF8, len(piece))


def _record(piece: bytes | Problem) -> dict | Problem:
    line = _text(piece)
    if isinstance(line, Problem):
        return line
    try:
        record = json.loads(line["text"])
        # an escape such as \ud800 stands for half a character: no text
        if "\\ud" in line["text"].lower():
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Problem(NOT_UTF8, len(piece))
    except (ValueError, RecursionError):
        return Problem(NOT_JSON, len(piece))
    return record if isinstance(record, dict) else Problem(NOT_JSON, len(piece))


def parquet(file: Any, choose: Choose, skip: int) -> Iterator[dict | Problem]:
    """Rows of a Parquet file (a path, or an open file) after the first `skip`."""
    with pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True) as opened:
        columns = choose(opened.schema_arrow.names)
        for number in range(opened.num_row_groups):
            group = opened.metadata.row_group(number)
            if skip >= group.num_rows:
                skip -= group.num_rows
                continue
            rows = min(BATCH_ROWS, 1 + BATCH_BYTES * group.num_rows // max(1, group.total_byte_size))
            for batch in opened.iter_batches(rows, [number], columns):
                yield from _batch_rows(batch.slice(skip))
                skip = max(0, skip - batch.num_rows)


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict | Problem]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            yield Problem(NOT_UTF8, batch.nbytes)
            return
        for row in range(batch.num_rows):
            yield from _batch_rows(batch.slice(row, 1))


def _names(path: Path) -> list[str]:
    """The columns of a text file, or of the first lines of JSON lines."""
    if kind(path) == "text":
        return ["text"]
    names: dict[str, None] = {}
    seen = 0
    # a file that is cut in its first lines: reading it says so, after the documents before the cut
    with _stream(path) as stream, contextlib.suppress(OSError):
        for line in islice(_filled_lines(stream), PEEK_LINES):
            record = _record(line)
            names.update(dict.fromkeys(record if isinstance(record, dict) else ()))
            seen += line.size if isinstance(line, Problem) else len(line)
            if seen > PEEK_BYTES:
                break
    if seen and not names:
        raise SourceError(f"{path}: none of its first lines is a JSON object; JSON lines hold one a line")
    return list(names)


class Files:
    """Records of files, one file after the other; `state()` is the place after the last record given."""

    def __init__(self, paths: list, read: Callable[[Any, int], Iterator[dict | Problem]], state: dict | None = None):
        self.paths, self.read = paths, read
        self.file, self.row = (state["file"], state["row"]) if state else (0, 0)

    def __iter__(self) -> Iterator[dict | Problem]:
        while self.file < len(self.paths):
            for record in self.read(self.paths[self.file], self.row):
                self.row += 1
                yield record
            self.file, self.row = self.file + 1, 0

    def state(self) -> dict:
        return {"file": self.file, "row": self.row}


class LocalFiles(Files):
    """Records of the local files of a source, of the columns that `choose` picks."""

    def __init__(self, item: Source | TextSet, choose: Choose, state: dict | None = None):
        super().__init__(find(item), self._read, state)
        self.item, self.choose = item, choose
        files = [(str(path), path.stat().st_size) for path in self.paths]
        self.version = {
            "files": len(files),
            "bytes": sum(size for _, size in files),
            "digest": hashlib.blake2b(repr(files).encode(), digest_size=16).hexdigest(),
        }
        if state and state["version"] != self.version:
            before = state["version"]
            raise SourceError(
                f"source {item.name!r}: its files changed since reading began (then {before['files']} of "
                f"{before['bytes']:,} bytes, now {len(files)} of {self.version['bytes']:,}): bring those back, or "
                "begin anew with --force"
            )

    def _read(self, path: Path, skip: int) -> Iterator[dict | Problem]:
        try:
            if kind(path) == "parquet":
                yield from parquet(path, self.choose, skip)
                return
            # a file without a line has no columns to choose from
            if names := _names(path):
                self.choose(names)
            json_lines = kind(path) == "json"
            cut, make = (_filled_lines, _record) if json_lines else (_CUTS[self.item.text_documents], _text)
            with _stream(path) as stream:
                yield from map(make, islice(cut(stream), skip, None))
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(
                f"{path} cannot be read after document {self.row:,} ({reason}): put a whole copy in its place, or "
                "leave it out of `files`"
            ) from error

    def state(self) -> dict:
        return {"version": self.version, **super().state()}


def size(path: Path, choose: Choose) -> tuple[int, int | None, str]:
    """Bytes of text, number of rows where it is known, and what the two rest on; the file's content is not read."""
    if path.suffix == ".parquet":
        metadata = pq.read_metadata(path)
        wanted = set(choose(metadata.schema.to_arrow_schema().names))
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        text_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted)
        return text_bytes, metadata.num_rows, "Parquet footers"
    if path.suffix in COMPRESSIONS:
        return COMPRESSED_RATIO * path.stat().st_size, None, f"{COMPRESSED_RATIO} x the compressed bytes"
    return path.stat().st_size, None, "file sizes"
