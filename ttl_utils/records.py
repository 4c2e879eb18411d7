"""The curve of a run: `metrics.jsonl`, a record a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from ttl_utils.errors import DamagedFile


class Records:
    """`metrics.jsonl`: one line a record; what lies after the checkpoint resumed from is dropped, to be made again."""

    def __init__(self, path: Path, step: int, on_record: Callable[[list[dict]], None] | None, main: bool = True):
        self.path, self.on_record = path, on_record
        self.rows = [row for row in read_records(path) if row["step"] <= step and step > 0]
        if not main:
            return
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(partial, path)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.on_record:
            self.on_record(self.rows)


def read_records(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; one that is being written is not whole yet.

    Raises:
        DamagedFile: a line is not a record.
    """
    if not path.is_file():
        return []
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise DamagedFile(
                    f"{path}, line {number}: not a record (a disk that failed, most likely). Delete that line, a point "
                    "of the curve, and run again"
                ) from None
    return rows
