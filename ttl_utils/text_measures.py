"""What is counted on generated texts: repetition, loops, diversity; and human passages of the same length beside them.

All on words and punctuation marks, case aside, as in corpora of words: models with different tokenizers compare.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence

import numpy as np

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and punctuation marks, each mark on its own, in lower case."""
    return _WORD.findall(text.lower())


def ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def repeated_share(words: Sequence[str], size: int = 4) -> float | None:
    """seq-rep-n (Welleck et al. 2020, "Neural text generation with unlikelihood training"): the share of a text's
    n-grams that stood in it before, 1 - distinct / all; None where there is no n-gram.
    """
    found = ngrams(words, size)
    return 1 - len(set(found)) / len(found) if found else None


def longest_loop(words: Sequence[str]) -> int:
    """Words in the longest stretch that is one unit again and again ("a b a b a": 5), at least twice; 0: there is none.

    The loops of Holtzman et al. 2020 ("The curious case of neural text degeneration"), whatever the unit's length and
    wherever they stand.
    """
    codes = np.unique(np.array(words, dtype=object), return_inverse=True)[1] if len(words) else np.zeros(0, int)
    longest = 0
    for period in range(1, len(codes) // 2 + 1):
        same = codes[period:] == codes[:-period]
        edges = np.flatnonzero(np.diff(np.concatenate(([0], same.view(np.int8), [0]))))
        run = int((edges[1::2] - edges[::2]).max(initial=0))
        # a whole second unit, or it is no repetition
        if run >= period:
            longest = max(longest, run + period)
    return longest


def distinct_counts(groups: Sequence[Sequence[Sequence[str]]], size: int) -> np.ndarray:
    """(groups, 2): distinct n-grams and n-grams; their sums' ratio is distinct-n over all texts (Li et al. 2016, "A
    diversity-promoting objective function for neural conversation models").

    An n-gram that several groups of texts hold counts in equal parts for each, so that groups can be drawn again: drawn
    twice, a group would add no distinct n-gram, and every draw would look poorer than the texts are.
    """
    found = [Counter(gram for words in group for gram in ngrams(words, size)) for group in groups]
    holders = Counter(gram for counts in found for gram in counts)
    rows = [(sum(1 / holders[gram] for gram in counts), counts.total()) for counts in found]
    return np.array(rows, float).reshape(-1, 2)


def passages(texts: Iterable[str], lengths: Sequence[int]) -> list[str]:
    """Human text to compare with: for each length a passage of so many words, each from another place, in turn.

    The longest are found first. Where no text has so many words left, what is left of the one with most; in the end ''.
    """
    sources = deque((text, [match.end() for match in _WORD.finditer(text)], 0) for text in texts)
    found = [""] * len(lengths)
    for place in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        want = lengths[place]
        if not (want and sources):
            continue
        best = next((n for n, (_, ends, used) in enumerate(sources) if len(ends) - used >= want), None)
        if best is None:
            best = max(range(len(sources)), key=lambda n: len(sources[n][1]) - sources[n][2])
        text, ends, used = sources[best]
        del sources[best]
        stop = min(used + want, len(ends))
        if stop > used:
            found[place] = text[ends[used - 1] if used else 0 : ends[stop - 1]].strip()
        sources.append((text, ends, stop))
    return found
