"""The page's and the terminal's texts, in Portuguese and English: `demo_words.csv`."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

LANGUAGES = {"pt": "Português", "en": "English"}


@cache
def words(language: str) -> dict[str, str]:
    """Texts by key; `language` is a key of `LANGUAGES`."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return {row["key"]: row[language] for row in csv.DictReader(file)}
