"""Cleaning, masking of personal data, quality rules with a named reason, and exact duplicates."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import unicodedata
from pathlib import Path

from ttl_utils.schema import Filter

# the stop words that FineWeb-2 uses for Portuguese, in the rule of Gopher (Rae et al. 2021)
STOP_WORDS = frozenset(
    ("de", "a", "e", "o", "em", "do", "da", "que", "um", "no", "uma", "com", "para", "na", "é", "foi")
)

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd]")
_SPACES = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_LINK = re.compile(
    r"(?:https?\b|www\.)[^\s]*|\b(?:[\w-]+\.)+(?:com|net|org|br|ly|co|gl|me|tv|info|pt)(?:\.br)?/[^\s]*",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_HANDLE = re.compile(r"[@＠]\s?\w+")
_ID = re.compile(r"\b\d{9,}\w?\b")
_MASK = re.compile(r"\[(?:usuário|link|e-mail|id)\]")
_WORD = re.compile(r"\w+")
_SYMBOL = re.compile(r"#|\.\.\.|…")


def clean(text: str) -> str:
    """Composed Unicode, no control characters, single spaces, stripped lines, at most one blank line."""
    # composed only once the control characters are gone: one may stand between a letter and its accent
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    text = _SPACES.sub(" ", text)
    return _BLANK_LINES.sub("\n\n", "\n".join(line.strip() for line in text.split("\n"))).strip()


def mask(text: str) -> str:
    """Put a mask in the place of e-mail addresses, links, handles and long ids."""
    text = _LINK.sub("[link]", _EMAIL.sub("[e-mail]", text))
    return _ID.sub("[id]", _HANDLE.sub("[usuário]", text))


def unit_key(text: str) -> str:
    """What two texts share when they differ only in case, digits, masks, spaces and punctuation."""
    text = unicodedata.normalize("NFKC", _MASK.sub(" ", text)).lower()
    words = [re.sub(r"\d", "0", word) for word in _WORD.findall(text)]
    return " ".join(words[1:] if words[:1] == ["rt"] else words)


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def is_held_out(key: str, seed: int, share: float) -> bool:
    """A pure function of the text and the seed: the same text is on the same side in every source and stage."""
    place = int.from_bytes(hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest(), "little")
    return place < share * 2**64


def rejection(text: str, rules: Filter) -> str | None:
    """The first quality rule (Gopher's, Rae et al. 2021, appendix A) that the text breaks, or None."""
    if not text:
        return "empty"
    words = text.split()
    if len(words) < rules.min_words:
        return "too few words"
    if len(words) > rules.max_words:
        return "too many words"
    mean_length = sum(map(len, words)) / len(words)
    if not rules.min_mean_word_length <= mean_length <= rules.max_mean_word_length:
        return "mean word length"
    if len(_SYMBOL.findall(text)) > rules.max_symbols_per_word * len(words):
        return "too many symbols"
    if sum(any(map(str.isalpha, word)) for word in words) < rules.min_letter_words * len(words):
        return "too few words with a letter"
    if rules.min_stop_words:
        found = {word.strip(".,;:!?()\"'").lower() for word in words} & STOP_WORDS
        if len(found) < rules.min_stop_words:
            return "too few stop words"
    return None


class SeenTexts:
    """The texts seen so far, as digests on disk: exact duplicates are found at flat memory."""

    def __init__(self, path: Path):
        self.path = path
        path.unlink(missing_ok=True)
        self.database = sqlite3.connect(path, isolation_level=None)
        # a scratch file: it is made again when the stage is, so it needs no journal
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536"):
            self.database.execute(f"PRAGMA {pragma}")
        self.database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self.database.execute("BEGIN")

    def add(self, text: str) -> bool:
        """True when the text is new."""
        return self.database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest(text),)).rowcount == 1

    def close(self) -> None:
        self.database.close()
        self.path.unlink(missing_ok=True)
