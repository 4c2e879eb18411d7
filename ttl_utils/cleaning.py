"""A text's one form, what two texts share, and the side of the split on which a text lies."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd]")
# of lines and pages: a word before one and a word after it stay apart
_BREAKS = re.compile(r"\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_SPACES = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_MASK = re.compile(r"\[(?:usuário|link|e-mail|id|CPF|telefone)\]")
_WORD, _DIGIT = re.compile(r"\w+"), re.compile(r"\d")


def clean(text: str) -> str:
    """Composed Unicode, no control characters, single spaces, stripped lines, at most one blank line."""
    # composed only once the control characters are gone: one may stand between a letter and its accent
    text = unicodedata.normalize("NFC", _CONTROL.sub("", _BREAKS.sub("\n", text)))
    # SentencePiece writes a space as this sign, and could not tell them apart
    text = _SPACES.sub(" ", text.replace("\u2581", " "))
    return _BLANK_LINES.sub("\n\n", "\n".join(line.strip() for line in text.split("\n"))).strip()


def unit_key(text: str) -> str:
    """What two texts share when they differ only in case, digits, masks, spaces and punctuation."""
    text = unicodedata.normalize("NFKC", _MASK.sub(" ", text)).lower()
    words = _WORD.findall(_DIGIT.sub("0", text))
    return " ".join(words[1:] if words[:1] == ["rt"] else words)


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def is_held_out(key: str, seed: int, share: float) -> bool:
    """A pure function of the text and the seed: the same text is on the same side in every source and stage."""
    place = int.from_bytes(hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest(), "little")
    return place < share * 2**64
