"""The words of a text as numbers: what repetition, near copies and overlap are counted on."""

from __future__ import annotations

import functools

import numpy as np

# odd 64-bit constants of splitmix64 (Steele et al. 2014), and the first one's inverse modulo 2^64
_MULTIPLIER, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


@functools.cache
def _is_word_character() -> np.ndarray:
    """(code points,) bool: what `\\w` matches."""
    table = np.frombuffer(bytearray(map(str.isalnum, map(chr, range(0x110000)))), bool)
    table[ord("_")] = True
    return table


def word_bounds(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The code points of the lower-cased text, and where each of its words (`\\w+`) begins and ends."""
    # a lone surrogate is no character, but JSON can hold one
    points = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), "<u4")
    inside = np.zeros(len(points) + 2, bool)
    inside[1:-1] = _is_word_character()[points]
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return points, edges[::2], edges[1::2]


def word_codes(text: str) -> np.ndarray:
    """(words,) uint64: a code for each word, case aside; the same in every process and on every machine."""
    points, starts, ends = word_bounds(text)
    # a word's polynomial hash is a difference of two sums from the text's beginning, moved back to power 0
    sums = np.zeros(len(points) + 1, np.uint64)
    np.cumsum(points * _powers(_MULTIPLIER, len(points)), out=sums[1:])
    codes = (sums[ends] - sums[starts]) * _powers(_INVERSE, len(points))[starts]
    return (codes ^ (codes >> np.uint64(32))) * _MIX


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """(count,) uint64: the powers of `base` modulo 2^64, from the first on."""
    return np.cumprod(np.full(count, base))


def longer(hashes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Hashes of all runs of one word more, from those of shorter runs; `codes` are the runs of one word."""
    count = len(hashes) - 1
    hashes = hashes[:-1] * _MULTIPLIER + codes[len(codes) - count :]
    hashes ^= hashes >> np.uint64(29)
    return hashes


def ngram_hashes(codes: np.ndarray, size: int) -> np.ndarray:
    """(words - size + 1,) uint64: a hash of each run of `size` words; empty where there are fewer words."""
    hashes = codes
    for _ in range(size - 1):
        hashes = longer(hashes, codes)
    return (hashes * _MIX) ^ (hashes >> np.uint64(32))
