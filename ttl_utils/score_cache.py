"""Rows of the harness, a file each: a task is scored once for the same weights and settings."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttl_utils.errors import DamagedFile
from ttl_utils.files import read_json, write_json
from ttl_utils.task_files import Opened


@dataclass(frozen=True)
class ScoreCache:
    """Batch size and device change no result but for rounding, and are no part of what a row is kept under."""

    folder: Path
    limit: int | None
    seed: int
    dtype: str

    def _place(self, about: dict[str, Any], opened: Opened) -> tuple[Path, dict[str, Any]]:
        identity = {
            "weights": about["weights"],
            "beside_weights": about.get("beside_weights"),
            "task": opened.fingerprint,
        }
        identity |= {"limit": self.limit, "seed": self.seed, "dtype": self.dtype}
        name = re.sub(r"[^A-Za-z0-9._-]", "-", opened.wanted.task)
        return self.folder / f"{name}-{_digest(identity)[:16]}.json", identity

    def read(self, about: dict[str, Any], opened: Opened) -> dict | None:
        """The row that was kept; None where there is none, or, with a line, where it is not what was written."""
        path, identity = self._place(about, opened)
        if not path.is_file():
            return None
        try:
            found = read_json(path)
        except DamagedFile:
            found = None
        known = isinstance(found, dict) and found.get("identity") == identity
        if known and found.get("sha256") == _digest(found.get("row")):
            return found["row"]
        print(f"{path} is damaged: {opened.wanted.key} is scored anew")
        return None

    def write(self, about: dict[str, Any], opened: Opened, row: dict) -> None:
        path, identity = self._place(about, opened)
        write_json(path, {"identity": identity, "sha256": _digest(row), "row": row})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()
