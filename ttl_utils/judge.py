"""What becomes of one document: cleaned, masked, judged and marked, a pure function of its row and the parameters."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ttl_utils import duplicates, filters, language, licences, privacy
from ttl_utils.cleaning import clean, digest, is_held_out, unit_key
from ttl_utils.schema import Data, Source
from ttl_utils.words import word_codes

SIDES = ("train", "test")
# documents of the hub and of files that begin with the same words are on one side: copies, cuts, a conversation as text
UNIT_WORDS = 12
ROLES = ("user", "assistant")


class Part(NamedTuple):
    """What a document of a mixed set is; of any other source, what the source is."""

    name: str
    kind: str
    filter: str
    licence: str


@dataclass
class Batch:
    """Judged documents: the kept ones with what marks them, and counts by (what, part of the source[, reason])."""

    rows: list[dict] = field(default_factory=list)
    # 128 bits of use and text; 64 bits of the words alone; MinHash bands, 0 where no near copy is looked for
    digests: list[np.ndarray] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    bands: list[np.ndarray] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


class Judge:
    """The rules of one set of parameters; cheap to send to another process."""

    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed
        self.sources = {source.name: source for source in data.active}
        self.patterns = {
            source.name: [
                (re.compile(o.pattern, re.IGNORECASE), Part(o.pattern, o.kind, o.filter, o.licence))
                for o in source.origins
            ]
            for source in data.active
        }
        self.free = {licence: licences.permissive(licence) for licence in self._licences()}
        self.no_bands = np.zeros(data.near_duplicates.bands, np.uint64)

    def _licences(self) -> set[str]:
        return {item.licence for source in self.data.active for item in (source, *source.origins)}

    def check(self) -> None:
        """A ParameterError where the filters in use ask for what is not known of the language."""
        used = [self.data.filters[item.filter] for source in self.data.active for item in (source, *source.origins)]
        filters.check_language(self.data.language, max(rules.min_stop_words for rules in used))
        if any(rules.min_language_probability for rules in used):
            language.check(self.data.language)

    def part(self, source: Source, origin: str | None) -> Part:
        """A mixed set (the published corpus) says in a column where a document comes from: the first pattern wins."""
        for pattern, part in self.patterns[source.name]:
            if origin and pattern.search(origin):
                return part
        return Part("", source.kind, source.filter, source.licence)

    def asked_for_toxicity(self) -> set[tuple[str, str]]:
        """(source, part) of what is learned from and whose filter asks for the classifier."""
        return {
            (source.name, part.name)
            for source in self.data.active
            for part in [self.part(source, None), *(part for _, part in self.patterns[source.name])]
            if source.use == "corpus" and self.data.filters[part.filter].toxicity
        }

    def judge(self, name: str, rows: list[dict]) -> Batch:
        """Judge rows {text, and where the source has them: origin, unit, turns, label, problem, size}."""
        batch, source = Batch(), self.sources[name]
        for row in rows:
            part = self.part(source, row.get("origin"))
            characters = row.get("size", len(row["text"]))
            batch.counts["documents_in", part.name] += 1
            batch.counts["characters_in", part.name] += characters
            batch.counts["licence characters", part.licence] += characters
            reason = self._judge(source, part, row, batch)
            if reason is not None:
                batch.counts["rejected", part.name, reason] += 1
        return batch

    def _judge(self, source: Source, part: Part, row: dict, batch: Batch) -> str | None:
        """Add the document to the batch, or return why it is rejected."""
        rules = self.data.filters[part.filter]
        if "problem" in row:
            return row["problem"]
        if len(row["text"]) > rules.max_characters:
            return "too long"
        if self.data.permissive_only and not self.free[part.licence]:
            return "licence"
        turns, found = [], Counter()
        for turn in row["turns"] if source.use == "chat" else [row["text"]]:
            text, masked, dropped = privacy.protect(clean(turn), self.data.personal_data)
            if dropped:
                return f"personal data ({dropped})"
            found += masked
            turns.append(text)
        if not all(turns):
            return "empty"
        text = "\n\n".join(turns)
        codes = word_codes(text)
        reason = filters.rejection(text, rules, codes, self.data.language)
        if reason is not None:
            return reason
        if rules.min_language_probability:
            probability = language.probability(text, self.data.language)
            if probability < rules.min_language_probability:
                return "language"
        for kind, count in found.items():
            batch.counts["masked", part.name, kind] += count
        self._add(source, part, row, text, turns, codes, batch)
        return None

    def _add(
        self, source: Source, part: Part, row: dict, text: str, turns: list[str], codes: np.ndarray, batch: Batch
    ) -> None:
        key, unit = unit_key(text), row.get("unit")
        # an empty unit (a tweet without one word) is a unit too: all that is made from it is on one side
        if unit is None:
            unit = " ".join(key.split(maxsplit=UNIT_WORDS)[:UNIT_WORDS])
        document: dict[str, Any] = {
            "text": text,
            "source": source.name,
            "origin": row.get("origin"),
            "kind": part.kind,
            "licence": part.licence,
            "part": part.name,
            "side": SIDES[is_held_out(unit, self.seed, self.data.test_share)],
        }
        if source.use == "chat":
            document["messages"] = [{"role": ROLES[n % 2], "content": turn} for n, turn in enumerate(turns)]
        if source.use == "downstream":
            document["label"] = row["label"]
        batch.rows.append(document)
        batch.digests.append(np.frombuffer(digest(f"{source.use}\n{text}"), "<u8"))
        batch.keys.append(int.from_bytes(digest(key)[:8], "little"))
        looked_for = source.use == "corpus" and self.data.filters[part.filter].near_duplicates
        batch.bands.append(duplicates.band_hashes(codes, self.data.near_duplicates) if looked_for else self.no_bands)


# one Judge a worker process, set when it starts
_judge: Judge | None = None


def start_worker(data: Data, seed: int) -> None:
    global _judge
    _judge = Judge(data, seed)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a parent that is killed cannot tell its workers, which would wait for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def judge_in_worker(name: str, rows: list[dict]) -> Batch:
    assert _judge is not None
    return _judge.judge(name, rows)
