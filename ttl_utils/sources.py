"""Where text comes from: wheels, data sets of the hub and local files, all read as rows of one form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ttl_utils import hub, local_files, wheels
from ttl_utils.cleaning import is_held_out
from ttl_utils.errors import SourceError
from ttl_utils.local_files import LIMIT, TOO_LARGE, Problem
from ttl_utils.schema import Data, Source, TextSet

# text per byte of Parquet on the hub where a card gives no sizes: the published corpus holds 29.7 GB in 17.0
HUB_RATIO = 1.75


class Reader:
    """Rows {text, origin} of a source and, where it has them, turns, unit, label.

    A row that could not be read as text has an empty text, `problem` (why) and `size` (its length). Rows that `where`
    or `share` leave out are counted, and not given. `state()` is the place after the last row given, as plain data.
    """

    def __init__(self, source: Source, records: Iterable, left_out: Counter, state: dict | None = None):
        self.source, self.records, self.left_out = source, records, left_out
        self.read, self.given = (state["read"], state["given"]) if state else (0, 0)
        # by column of `where`: a few of the values that were met
        self.others: dict[str, set] = {}

    def __iter__(self) -> Iterator[dict]:
        if self.given == self.source.limit:
            return
        for record in self.records:
            self.read += 1
            if self._left_out(record):
                continue
            self.given += 1
            yield record if self.source.package else _row(record, self.source)
            if self.given == self.source.limit:
                return
        if self.read and not self.given and self.others:
            column, values = next(iter(self.others.items()))
            raise SourceError(
                f"source {self.source.name!r}: `where`: no row has {column} {self.source.where[column]!r}; met were "
                f"{', '.join(sorted(values))}"
            )

    def _left_out(self, record: dict | Problem) -> bool:
        if isinstance(record, dict):
            for column, wanted in self.source.where.items():
                if record.get(column) != wanted:
                    self.left_out[f"other {column}"] += 1
                    values = self.others.setdefault(column, set())
                    if len(values) < 5:
                        values.add(repr(record.get(column))[:40])
                    return True
        # a pure function of the row's place: the same rows at every run
        if self.source.share < 1 and not is_held_out(f"{self.source.name}\n{self.read}", 0, self.source.share):
            self.left_out["not in the share"] += 1
            return True
        return False

    def state(self) -> dict | None:
        """Where a later Reader goes on; None for a wheel, which is small and read anew."""
        if self.source.package:
            return None
        return {"read": self.read, "given": self.given, "records": self.records.state()}


def open_source(source: Source, data: Data, left_out: Counter, state: dict | None = None) -> Reader:
    """A reader of a source's rows, from its beginning or from where an earlier one stood.

    Raises:
        SourceError: the source cannot be had, lacks a column, or is not the one that reading began with.
    """
    records = wheels.read(source, data, left_out) if source.package else _records(source, state and state["records"])
    return Reader(source, records, left_out, state)


def read_texts(text_set: TextSet) -> Iterator[str]:
    """The plain texts of a set of the hub or of files; what cannot be read is passed over."""
    for record in _records(text_set, None):
        row = _row(record, text_set)
        if "problem" not in row:
            yield row["text"]


def _records(item: Source | TextSet, state: dict | None) -> hub.Stream | local_files.LocalFiles:
    return (local_files.LocalFiles if item.files else hub.Stream)(item, partial(needed_columns, item), state)


def needed_columns(item: Source | TextSet, names: list[str]) -> list[str]:
    """Which of a set's columns are read; a column name may contain {another}, whose value completes it."""
    wanted = []
    for column in _columns(item):
        if inner := re.findall(r"{(.+?)}", column):
            pattern = "(.+)".join(map(re.escape, re.split(r"{.+?}", column)))
            wanted += [*inner, *([name for name in names if re.fullmatch(pattern, name)] or [column])]
        else:
            wanted.append(column)
    if isinstance(item, Source):
        wanted += [*item.where, *filter(None, [item.origin_column])]
    missing = [column for column in wanted if column not in names]
    if missing:
        raise SourceError(f"source {item.name!r} has no column {missing[0]!r}; it has {', '.join(names)}")
    return list(dict.fromkeys(wanted))


def _columns(item: Source | TextSet) -> list[str]:
    return item.columns or ["text"]


def _row(record: dict | Problem, item: Source | TextSet) -> dict:
    if isinstance(record, Problem):
        return _problem(None, record.reason, record.size)
    origin = record.get(item.origin_column) if isinstance(item, Source) and item.origin_column else None
    origin = None if origin is None else str(origin)
    values = []
    for column in _columns(item):
        name = re.sub(r"{(.+?)}", lambda match: str(record.get(match[1])), column)
        if name not in record and name != column:
            return _problem(origin, f"no {column}", 0)
        values.append(record.get(name))
    if len(values) == 1 and isinstance(values[0], list):
        return _conversation(values[0], origin, item.name)
    for value, column in zip(values, _columns(item), strict=True):
        if isinstance(value, list | dict | bytes):
            raise SourceError(f"source {item.name!r}: column {column!r} holds no text, but {str(value)[:80]}")
    texts = [str(value) for value in values if value is not None]
    # one column is given as it is; of several, those with something to read
    text = "\n\n".join(text for text in texts if len(values) == 1 or not (text == "" or text.isspace()))
    if len(text) > LIMIT:
        return _problem(origin, TOO_LARGE, len(text))
    return {"text": text, "origin": origin}


def _conversation(turns: list, origin: str | None, name: str) -> dict:
    """Turns of user and assistant as one text, with a blank line between them (section 3.2)."""
    try:
        contents = [turn["content"] for turn in turns]
        roles = [turn["role"] for turn in turns]
        text = "\n\n".join(content for content in contents if content is not None)
    except (TypeError, KeyError) as error:
        raise SourceError(
            f"source {name!r}: a conversation is not a list of {{role, content}}: {str(turns)[:80]}; name "
            "another column, or bring the set into that form"
        ) from error
    if None in contents:
        return _problem(origin, "turn without text", len(text))
    if roles != ["user", "assistant"] * (len(roles) // 2):
        return _problem(origin, "turns do not alternate", len(text))
    if len(text) > LIMIT:
        return _problem(origin, TOO_LARGE, len(text))
    return {"text": text, "origin": origin, "turns": contents}


def _problem(origin: str | None, reason: str, size: int) -> dict:
    return {"text": "", "origin": origin, "problem": reason, "size": size}


def estimate(sources: list[Source]) -> list[dict]:
    """What reading will take: {source, download_bytes, text_bytes, documents, basis}; what is unknown is None.

    `download_bytes` go over the network and are not kept; `text_bytes` are what cleaning begins with. Both are upper
    bounds where only some columns or rows are read.
    """
    found = []
    for source in sources:
        try:
            figures = _estimate(source)
        # an estimate never stops a run: reading itself says what is wrong
        except Exception as error:
            figures = (None, None, None, f"unknown: {' '.join(str(error).split())[:200] or type(error).__name__}")
        names = ("download_bytes", "text_bytes", "documents", "basis")
        found.append({"source": source.name, **dict(zip(names, figures, strict=True))})
    return found


def _estimate(source: Source) -> tuple[int | None, int | None, int | None, str]:
    if source.package:
        name = f"{source.package}-{source.version}-{source.sha256[:16]}.whl"
        kept = (wheels.cache_folder() / "wheels" / name).is_file()
        return 0 if kept else None, None, None, "small: a wheel" + (" in the cache" if kept else "")
    choose = partial(needed_columns, source)
    download, text_bytes, rows, basis = 0, None, None, "card"
    if source.files:
        paths = local_files.find(source)
    else:
        files, text_bytes, rows = hub.sizes(source)
        paths = [Path(name) for name, _ in files] if hub.mirrored(source.dataset) else []
        if not paths:
            known = [size for _, size in files if size is not None]
            download = sum(known) if len(known) == len(files) else None
            if text_bytes is None and download is not None:
                text_bytes, basis = int(HUB_RATIO * download), f"{HUB_RATIO} x the download (the card gives no sizes)"
    if paths:
        sizes = [local_files.size(path, choose) for path in paths]
        text_bytes = sum(size for size, _, _ in sizes)
        counts = [count for _, count, _ in sizes]
        rows = None if None in counts else sum(counts)
        if source.text_documents == "file" and source.files and all(local_files.kind(p) == "text" for p in paths):
            rows = len(paths)
        basis = ", ".join(dict.fromkeys(basis for _, _, basis in sizes))
    return _scaled(source, download, text_bytes, rows, basis)


def _scaled(source: Source, *figures: Any) -> tuple[int | None, int | None, int | None, str]:
    """For `limit`, reading stops early; for `share`, all is read and a part is given."""
    download, text_bytes, rows, basis = figures
    read = 1.0
    if rows and source.limit:
        read = min(1.0, source.limit / (rows * source.share))
    if source.limit and not rows:
        basis += "; limit not taken into account"
    if source.where:
        basis += "; before `where`"
    part = read * source.share
    scale = [(download, read), (text_bytes, part), (rows, part)]
    return *(None if figure is None else round(figure * share) for figure, share in scale), basis
