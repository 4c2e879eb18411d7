"""Texts that must stay on one side of the split, because one holds the other or they share words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from ttl_utils.cleaning import unit_key

# shorter texts ("bom dia") are in many others by chance
MIN_WORDS = 3


class Groups:
    """Union-find over keys; a group is named by its first key in alphabetical order."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, key: str) -> str:
        while self.parent.setdefault(key, key) != key:
            self.parent[key] = self.parent[self.parent[key]]
            key = self.parent[key]
        return key

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.root(one), self.root(other)))
        self.parent[second] = first


def group_conversations(conversations: Iterable[list[str]]) -> list[str]:
    """One unit for all conversations that share a turn of `MIN_WORDS` words or more, directly or by others."""
    groups, firsts = Groups(), []
    for turns in conversations:
        keys = [unit_key(turn) for turn in turns]
        firsts.append(keys[0])
        for key in keys[1:]:
            if len(key.split()) >= MIN_WORDS:
                groups.join(keys[0], key)
    return [groups.root(key) for key in firsts]


def group_contained(texts: Iterable[str]) -> list[str]:
    """One unit for a text and all texts that hold it whole: a quoted tweet, a cut copy, a passage of one line.

    For thousands of texts held in memory, not for a corpus: every text is looked for in all of them.
    """
    groups, keys, whole = Groups(), [], []
    for text in texts:
        key = unit_key(text)
        keys.append(key)
        # a text that was cut ends in the middle of a word
        whole.append(key.rsplit(" ", 1)[0] if text.rstrip().endswith(("…", "...")) and " " in key else key)
    unique = sorted(set(keys))
    joined = "\n".join(f" {key} " for key in unique)
    starts, position = [], 0
    for key in unique:
        starts.append(position)
        position += len(key) + 3
    for key, searched in {key: searched for key, searched in zip(keys, whole, strict=True)}.items():
        if len(searched.split()) < MIN_WORDS:
            continue
        place = joined.find(f" {searched} ")
        while place >= 0:
            groups.join(key, unique[bisect_right(starts, place) - 1])
            place = joined.find(f" {searched} ", place + 1)
    return [groups.root(key) for key in keys]
