"""The quality and repetition rules: their speed, and rule by rule their verdicts beside datatrove's own.

    python -m tests.benchmarks.filters [--text FILE]

FILE: Parquet with a `text` column, or plain text. Needs `pip install datatrove`; datatrove's word splitter is
replaced by a regular expression (words and punctuation marks), so that no language model is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import yaml

from tests.benchmarks import text
from ttl_utils.cleaning import clean
from ttl_utils.filters import RULES, STOP_WORDS, Document, rejection
from ttl_utils.schema import Filter
from ttl_utils.words import word_codes

try:
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline.filters import gopher_quality_filter as quality
    from datatrove.pipeline.filters import gopher_repetition_filter as repetition
except ImportError as missing:
    raise SystemExit(f"{missing}: this benchmark needs `pip install datatrove`") from None

PARAMS = Path(__file__).parents[2] / "params" / "160m.yaml"
SIZES = (800, 3000, 10_000)


# --- text


def damage(dice: random.Random, text: str) -> str:
    """One fault of the web's text, somewhere between a trace of it and nothing else."""
    lines, words, stops = text.split("\n"), text.split(), STOP_WORDS["pt"].split()
    amount = dice.random()
    phrase = " ".join(words[: dice.randint(3, 14)])

    def some(share: float = amount) -> bool:
        return dice.random() < share

    faults: list[Callable[[], str]] = [
        lambda: "\n".join(line for line in lines for _ in range(1 + some())),
        lambda: "\n\n".join(line for line in lines for _ in range(1 + some())),
        lambda: " ".join(
            [text, *(dice.choice((phrase, phrase.upper(), phrase + ",")) for _ in range(int(amount * 40)))]
        ),
        lambda: " ".join(word for _ in range(1 + int(amount * 4)) for word in (phrase, dice.choice(words))),
        lambda: "\n".join(dice.choice("•-*") + " " + line if some() else line for line in lines),
        lambda: "\n\n".join("- " + line if some(amount**0.1) else line for line in lines),
        lambda: "\n".join(line.rstrip(".") + dice.choice(("...", "…")) if some() else line for line in lines),
        lambda: " ".join(dice.choice(("#", "", "")) + word if some() else word for word in words),
        lambda: " ".join(word + "..." if some(amount / 3) else word for word in words),
        lambda: " ".join(f"{dice.random() * 1e4:.2f}" if some() else word for word in words),
        lambda: " | ".join(word for word in words if some()) + " |",
        lambda: " ".join(words[: 1 + int(amount * 40)]),
        lambda: "".join(word + " " * some(amount / 4) for word in words),
        lambda: " ".join(word[:2] if some() else word for word in words),
        lambda: " ".join(word for word in words if word not in stops or some(amount / 20)).upper(),
    ]
    return dice.choice(faults)()


def cut(documents: Iterable[str], size: int, count: int) -> list[str]:
    """At most `count` documents of `size` characters, of documents put together or cut."""
    whole = "\n\n".join(documents)
    return [whole[place : place + size].strip() for place in range(0, min(len(whole) - size, size * count), size)]


# --- datatrove's rules, one at a time

TheirFilter = quality.GopherQualityFilter | repetition.GopherRepetitionFilter


@lru_cache(8)
def split_marks(text: str, language: str = "") -> list[str]:
    """Words and single punctuation marks, as the splitters that datatrove uses give them."""
    return re.findall(r"\w+|[^\w\s]", text)


@lru_cache(8)
def split_words(text: str, language: str = "") -> list[str]:
    return re.findall(r"\w+", text)


@lru_cache(8)
def split_spaces(text: str, language: str = "") -> list[str]:
    return text.split()


def quality_filter(rules: Filter, *only: str) -> quality.GopherQualityFilter:
    """datatrove's filter with these of its thresholds; with all of them where none is named."""
    thresholds = {
        "min_doc_words": rules.min_words,
        "max_doc_words": rules.max_words,
        "min_avg_word_length": rules.min_mean_word_length,
        "max_avg_word_length": rules.max_mean_word_length,
        "max_symbol_word_ratio": rules.max_symbols_per_word,
        "max_bullet_lines_ratio": rules.max_bullet_lines,
        "max_ellipsis_lines_ratio": rules.max_ellipsis_lines,
        "max_non_alpha_words_ratio": rules.min_letter_words,
        "min_stop_words": rules.min_stop_words,
    }
    kept = {name: limit if not only or name in only else None for name, limit in thresholds.items()}
    return quality.GopherQualityFilter(**kept, stop_words=STOP_WORDS["pt"].split())


def repetition_filter(rules: Filter, *only: str | int) -> repetition.GopherRepetitionFilter:
    """datatrove's filter with these of its thresholds or sizes of n-grams; with all of them where none is named."""
    thresholds = {
        "dup_line_frac": rules.max_duplicate_lines,
        "dup_para_frac": rules.max_duplicate_paragraphs,
        "dup_line_char_frac": rules.max_duplicate_line_characters,
        "dup_para_char_frac": rules.max_duplicate_paragraph_characters,
    }
    kept = {name: limit if not only or name in only else None for name, limit in thresholds.items()}
    for name, first, limits in (
        ("top_n_grams", 2, rules.max_top_ngrams),
        ("dup_n_grams", 5, rules.max_duplicate_ngrams),
    ):
        kept[name] = [(n, limit) for n, limit in enumerate(limits, first) if not only or n in only]
    return repetition.GopherRepetitionFilter(**kept)


def top_of_the_repeated(ngrams: list[str]) -> int:
    """As datatrove's, but an n-gram that stands there once is no repetition."""
    ngram, count = Counter(ngrams).most_common(1)[0]
    return len(ngram) * count if count > 1 else 0


def covered_by_repeats(words: list[str], n: int) -> int:
    """As datatrove's, but each word of a repeated n-gram counts, wherever the repeats overlap."""
    seen, covered = set(), set()
    for place in range(len(words) - n + 1):
        ngram = tuple(words[place : place + n])
        covered |= set(range(place, place + n)) if ngram in seen else set()
        seen.add(ngram)
    return sum(len(words[place]) for place in covered)


# the changes that lead from datatrove's rule to ours, one upon the other: (what, change of the text, parts replaced)
Step = tuple[str, Callable[[str], str], dict[str, object]]
SPACES: Step = ("words stand between spaces", str, {"split_into_words": split_spaces})
ALL_WORDS: Step = ("marks between spaces are words", str, {"PUNCTUATION_SET": set()})
NO_BLANKS: Step = ("blank lines are no lines", lambda text: re.sub(r"\n+", "\n", text), {})
BULLETS: Step = ("more signs are bullets", lambda text: re.sub(r"(?m)^[‣◦▪●·*]", "-", text), {})
NO_LIST: Step = ("one line is no list", lambda text: text if "\n" in text else text.lstrip("-• "), {})
CASE: Step = ("case aside", str.lower, {})
NO_MARKS: Step = ("punctuation is no word", str, {"split_into_words": split_words})
REPEATED: Step = ("once is no repetition", str, {"find_top_duplicate": top_of_the_repeated})
COVERED: Step = ("overlapping repeats count in full", str, {"find_all_duplicate": covered_by_repeats})

COMPARED: dict[str, tuple[Callable, tuple, list[Step]]] = {
    "too few words": (quality_filter, ("min_doc_words",), [SPACES, ALL_WORDS]),
    "too many words": (quality_filter, ("max_doc_words",), [SPACES, ALL_WORDS]),
    "mean word length": (quality_filter, ("min_avg_word_length", "max_avg_word_length"), [SPACES, ALL_WORDS]),
    "too many symbols": (quality_filter, ("max_symbol_word_ratio",), [SPACES]),
    "bullet lines": (quality_filter, ("max_bullet_lines_ratio",), [NO_BLANKS, BULLETS, NO_LIST]),
    "lines ending in an ellipsis": (quality_filter, ("max_ellipsis_lines_ratio",), [NO_BLANKS]),
    "too few words with a letter": (quality_filter, ("max_non_alpha_words_ratio",), [SPACES]),
    "too few stop words": (quality_filter, ("min_stop_words",), [CASE]),
    "duplicate lines": (repetition_filter, ("dup_line_frac",), []),
    "characters in duplicate lines": (repetition_filter, ("dup_line_char_frac",), []),
    "duplicate paragraphs": (repetition_filter, ("dup_para_frac",), []),
    "characters in duplicate paragraphs": (repetition_filter, ("dup_para_char_frac",), []),
    **{f"top {n}-gram": (repetition_filter, (n,), [NO_MARKS, REPEATED, CASE]) for n in (2, 3, 4)},
    **{f"duplicate {n}-grams": (repetition_filter, (n,), [NO_MARKS, CASE, COVERED]) for n in range(5, 11)},
}


@contextlib.contextmanager
def patched(parts: dict[str, object]) -> Iterator[None]:
    """datatrove's two modules with these parts replaced, where they have them."""
    with contextlib.ExitStack() as stack:
        for module in (quality, repetition):
            for name, part in parts.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, part))
        yield


def rejects(their: TheirFilter, document: str, steps: list[Step]) -> bool:
    """Their verdict, with some of our changes made to it."""
    parts: dict[str, object] = {"split_into_words": split_marks}
    for _, change, replaced in steps:
        document, parts = change(document), parts | replaced
    with patched(parts):
        return their.filter(TheirDocument(text=document, id="0")) is not True


def explanation(their: TheirFilter, document: str, ours: bool, steps: list[Step]) -> str:
    """The change after which their verdict is ours, and stays it."""
    verdicts = [rejects(their, document, steps[:count]) == ours for count in range(len(steps) + 1)]
    if not verdicts[-1]:
        return "UNEXPLAINED"
    return steps[max(place for place, same in enumerate(verdicts) if not same)][0]


def compare(documents: list[str], rules: Filter) -> None:
    print(f"\n{len(documents)} documents, thresholds of prose in {PARAMS.name}: how many each rule rejects")
    print(f"{'rule':36}{'both':>7}{'only ours':>11}{'only theirs':>13}  documents that a change of theirs decides")
    judged = [Document(text) for text in documents]
    for reason, (make, only, steps) in COMPARED.items():
        their, both, why = make(rules, *only), 0, Counter()
        sides = Counter()
        for document in judged:
            ours, theirs = RULES[reason](document, rules), rejects(their, document.text, [])
            both += ours and theirs
            if ours != theirs:
                sides["ours" if ours else "theirs"] += 1
                why[explanation(their, document.text, ours, steps)] += 1
        reasons = "; ".join(f"{name}: {count}" for name, count in why.most_common())
        print(f"{reason:36}{both:7}{sides['ours']:11}{sides['theirs']:13}  {reasons}")


# --- speed


def seconds(judge: Callable[[str], object], documents: list[str]) -> float:
    start = time.process_time()
    for document in documents:
        judge(document)
    return time.process_time() - start


def measure(texts: list[str], rules: Filter) -> None:
    their_quality, their_repetition = quality_filter(rules), repetition_filter(rules)

    def theirs(text: str) -> bool:
        document = TheirDocument(text=text, id="0")
        return their_quality.filter(document) is True and their_repetition.filter(document) is True

    print("MB/s per core of all rules, thresholds of prose, on documents that both sides keep; best of three, in turn")
    print(f"{'characters':>10}{'documents':>11}{'ours':>8}{'ours, codes given':>19}{'datatrove':>11}{'ratio':>7}")
    for size in SIZES:
        # a rejected document costs less: only those that are asked everything are measured
        kept = [text for text in cut(texts, size, 500) if not rejection(text, rules) and theirs(text)]
        codes = {text: word_codes(text) for text in kept}
        judges = (partial(rejection, rules=rules), partial(with_codes, rules=rules, codes=codes), theirs)
        best = [float("inf")] * 3
        for _ in range(3):
            split_marks.cache_clear()
            best = [min(old, seconds(judge, kept)) for old, judge in zip(best, judges, strict=True)]
        volume = sum(len(text.encode()) for text in kept) / 1e6
        ours, given, other = (volume / each for each in best)
        print(f"{size:10}{len(kept):11}{ours:8.2f}{given:19.2f}{other:11.2f}{ours / other:7.1f}")


def with_codes(text: str, rules: Filter, codes: dict[str, np.ndarray]) -> str | None:
    return rejection(text, rules, codes[text])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="Parquet with a `text` column, or plain text, a document a line")
    file = parser.parse_args().text
    rules = Filter.model_validate(yaml.safe_load(PARAMS.read_text(encoding="utf-8"))["data"]["filters"]["prose"])
    prose = list(text.documents(1.0))
    real = [document for document in map(clean, text.read(file)) if document] if file else []
    with patched({"split_into_words": split_marks}):
        measure(real or prose, rules)
    # datatrove takes the mean of no words where a document is punctuation alone
    warnings.simplefilter("ignore", RuntimeWarning)
    dice = random.Random(1)
    compare([clean(damage(dice, document[: dice.randint(300, 3000)])) for document in prose * 2], rules)
    if file:
        compare(real, rules)


if __name__ == "__main__":
    main()
