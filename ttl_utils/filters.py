"""The quality and repetition rules of Gopher (Rae et al. 2021, appendix A): a named reason for every rejection."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial

import numpy as np

from ttl_utils.errors import ParameterError
from ttl_utils.schema import Filter
from ttl_utils.words import longer, word_bounds, word_codes

# by ISO 639-1 code; the commonest words of each language as FineWeb-2 has them (Penedo et al. 2025)
STOP_WORDS = {
    "pt": "de a e o em do da que um no uma com para na é foi",
    "es": "de la en el y a que del los se por un con una las su",
    "gl": "de a e o en que do da un no os na é unha como",
}
BULLETS = ("•", "‣", "◦", "▪", "●", "·", "-", "*")
ELLIPSES = ("...", "…")


class Document:
    """What the rules ask of a cleaned text, counted once, when the first rule asks."""

    def __init__(self, text: str, codes: np.ndarray | None = None, language: str = "pt"):
        self.text, self.language = text, language
        if codes is not None:
            self.codes = codes
        self._duplicate_shares: dict[int, float] = {}

    @cached_property
    def words(self) -> list[str]:
        """What stands between spaces, as Gopher counts words."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.split("\n") if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [paragraph for paragraph in self.text.split("\n\n") if paragraph]

    @cached_property
    def codes(self) -> np.ndarray:
        """(runs of word characters,) uint64: what n-grams are made of, without case and punctuation."""
        return word_codes(self.text)

    @cached_property
    def _ngrams(self) -> dict[int, np.ndarray]:
        return {1: self.codes}

    @cached_property
    def _lengths(self) -> np.ndarray:
        """(codes,) characters of each."""
        _, starts, ends = word_bounds(self.text)
        return ends - starts

    @cached_property
    def _characters(self) -> np.ndarray:
        """(codes + 1,) characters of all before each."""
        return np.concatenate(([0], np.cumsum(self._lengths)))

    def ngrams(self, size: int) -> np.ndarray:
        """(codes - size + 1,) uint64: a hash of each run of `size` codes."""
        if size not in self._ngrams:
            self._ngrams[size] = longer(self.ngrams(size - 1), self.codes)
        return self._ngrams[size]

    def top_ngram_share(self, size: int, limit: float = 0.0) -> float:
        """Of the characters, those of the commonest n-gram, spaces included; the first of several as common.

        0 where no n-gram stands there twice, or where none is frequent enough to exceed `limit`.
        """
        hashes = self.ngrams(size)
        if len(hashes) < 2:
            return 0.0
        lengths = self._characters[size:] - self._characters[:-size] + (size - 1)
        # no n-gram exceeds the limit unless it stands there so often: few texts have one
        least = max(2, int(limit * len(self.text) / lengths.max()))
        ordered = np.sort(hashes)
        frequent = ordered[least - 1 :]
        frequent = frequent[frequent == ordered[: len(frequent)]]
        if not len(frequent):
            return 0.0
        values, counts = np.unique(frequent, return_counts=True)
        top = values[counts == counts.max()]
        count = counts.max() + least - 1
        return float(lengths[np.isin(hashes, top).argmax()] * count / len(self.text))

    def duplicate_ngram_share(self, size: int) -> float:
        """Of the characters, those in n-grams that stood there before, each character counted once."""
        if size not in self._duplicate_shares:
            hashes = self.ngrams(size)
            order = np.argsort(hashes, kind="stable")
            ordered = hashes[order]
            later = order[1:][ordered[1:] == ordered[:-1]]
            covered = np.zeros(len(self.codes), bool)
            for place in range(size):
                covered[later + place] = True
            self._duplicate_shares[size] = _share(int(self._lengths[covered].sum()), len(self.text))
        return self._duplicate_shares[size]


def _share(part: int, whole: int) -> float:
    # a quotient is exact at a threshold such as 0.3, where threshold x whole is not
    return part / whole if whole else 0.0


def _mean_word_length(text: Document, rules: Filter) -> bool:
    mean = _share(sum(map(len, text.words)), len(text.words))
    return not rules.min_mean_word_length <= mean <= rules.max_mean_word_length


def _symbols(text: Document, rules: Filter) -> bool:
    hashes = text.text.count("#")
    ellipses = sum(map(text.text.count, ELLIPSES))
    return _share(max(hashes, ellipses), len(text.words)) > rules.max_symbols_per_word


def _bullets(text: Document, rules: Filter) -> bool:
    # one line is no list: it opens with the dash of direct speech, or with a minus
    bullets = sum(line.startswith(BULLETS) for line in text.lines) if len(text.lines) > 1 else 0
    return _share(bullets, len(text.lines)) > rules.max_bullet_lines


def _ellipses(text: Document, rules: Filter) -> bool:
    return _share(sum(line.endswith(ELLIPSES) for line in text.lines), len(text.lines)) > rules.max_ellipsis_lines


def _letters(text: Document, rules: Filter) -> bool:
    if _share(sum(map(str.isalpha, text.words)), len(text.words)) >= rules.min_letter_words:
        return False  # words of letters alone are enough, and quicker to count
    letters = sum(any(map(str.isalpha, word)) for word in text.words)
    return _share(letters, len(text.words)) < rules.min_letter_words


@cache
def _stop_codes(language: str) -> np.ndarray:
    return word_codes(STOP_WORDS[language])[:, None]


def _stop_words(text: Document, rules: Filter) -> bool:
    if not rules.min_stop_words:
        return False
    found = (_stop_codes(text.language) == text.codes).any(axis=1)
    return int(found.sum()) < rules.min_stop_words


def _repeated(parts: list[str]) -> float:
    return _share(len(parts) - len(set(parts)), len(parts))


def _repeated_characters(parts: list[str], text: str) -> float:
    return _share(sum(map(len, parts)) - sum(map(len, set(parts))), len(text))


def _top_ngram(size: int, text: Document, rules: Filter) -> bool:
    limit = rules.max_top_ngrams[size - 2]
    return limit < 1 and text.top_ngram_share(size, limit) > limit


def _duplicate_ngrams(size: int, text: Document, rules: Filter) -> bool:
    limit = rules.max_duplicate_ngrams[size - 5]
    # what repeated runs cover, the shorter runs within them cover too: 5-grams acquit most texts of all six
    return limit < 1 and text.duplicate_ngram_share(5) > limit and text.duplicate_ngram_share(size) > limit


# in the order in which they are asked; each is a pure function, true where the text breaks the rule
RULES: dict[str, Callable[[Document, Filter], bool]] = {
    "empty": lambda text, rules: not text.words,
    "too few words": lambda text, rules: len(text.words) < rules.min_words,
    "too many words": lambda text, rules: len(text.words) > rules.max_words,
    "mean word length": _mean_word_length,
    "too many symbols": _symbols,
    "bullet lines": _bullets,
    "lines ending in an ellipsis": _ellipses,
    "too few words with a letter": _letters,
    "too few stop words": _stop_words,
    "duplicate lines": lambda text, rules: _repeated(text.lines) > rules.max_duplicate_lines,
    "characters in duplicate lines": lambda text, rules: (
        _repeated_characters(text.lines, text.text) > rules.max_duplicate_line_characters
    ),
    "duplicate paragraphs": lambda text, rules: _repeated(text.paragraphs) > rules.max_duplicate_paragraphs,
    "characters in duplicate paragraphs": lambda text, rules: (
        _repeated_characters(text.paragraphs, text.text) > rules.max_duplicate_paragraph_characters
    ),
    **{f"top {size}-gram": partial(_top_ngram, size) for size in (2, 3, 4)},
    **{f"duplicate {size}-grams": partial(_duplicate_ngrams, size) for size in (5, 6, 7, 8, 9, 10)},
}
REASONS = tuple(RULES)


def rejection(text: str, rules: Filter, codes: np.ndarray | None = None, language: str = "pt") -> str | None:
    """The first rule that a cleaned text breaks, or None; `codes` are its `word_codes`, where the caller has them."""
    document = Document(text, codes, language)
    return next((reason for reason, breaks in RULES.items() if breaks(document, rules)), None)


def check_language(language: str, min_stop_words: int = 1) -> None:
    """A ParameterError where a rule asks for more stop words than the language's list has."""
    known = len(STOP_WORDS.get(language, "").split())
    if min_stop_words > known:
        raise ParameterError(
            f"min_stop_words of data.filters asks for {min_stop_words} stop words of data.language {language!r}, "
            f"but {known or 'none'} are known (languages with a list: {', '.join(STOP_WORDS)}); set it to {known}"
        )
