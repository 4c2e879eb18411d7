"""The words of a text as numbers: what repetition, near copies and overlap are counted on."""

from __future__ import annotations

import re
import zlib

import numpy as np

_WORD = re.compile(r"\w+")
# odd 64-bit constants of splitmix64 (Steele et al. 2014)
_MULTIPLIER, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def word_codes(text: str) -> np.ndarray:
    """(words,) uint64: a code for each word, case aside; the same in every process and on every machine."""
    return np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], dtype=np.uint64)


def ngram_hashes(codes: np.ndarray, size: int) -> np.ndarray:
    """(words - size + 1,) uint64: a hash of each run of `size` words; empty where there are fewer words."""
    count = len(codes) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for place in range(size):
        hashes = (hashes + codes[place : place + count]) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return (hashes * _MIX) ^ (hashes >> np.uint64(32))
