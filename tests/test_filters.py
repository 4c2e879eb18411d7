"""Cleaning, words as numbers, the rules of quality and repetition at their boundaries and against plain Python."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils.cleaning import clean, digest, is_held_out, unit_key
from ttl_utils.errors import ParameterError
from ttl_utils.filters import REASONS, RULES, STOP_WORDS, Document, check_language, rejection
from ttl_utils.schema import Filter
from ttl_utils.words import ngram_hashes, word_bounds, word_codes

# every rule is off
LOOSE = Filter()


def rule(**thresholds: object) -> Filter:
    return Filter.model_validate(LOOSE.model_dump() | thresholds)


def top(size: int, limit: float) -> Filter:
    return rule(max_top_ngrams=[limit if size == each else 1.0 for each in (2, 3, 4)])


def repeats(size: int, limit: float) -> Filter:
    return rule(max_duplicate_ngrams=[limit if size == each else 1.0 for each in range(5, 11)])


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_clean_twice_is_clean_once(text):
    once = clean(text)
    assert clean(once) == once


# the characters that one step of cleaning could bring into another's reach
@given(st.text("a\u0301\u0300e \n\r\t\u200b\u00a0\x00\u2028\u2029\x85\u3000\ufeff\x0b\u0344", max_size=40))
@settings(max_examples=300, deadline=None)
def test_clean_output_has_one_form(text):
    once = clean(text)
    assert clean(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == once.strip()
    assert "\n\n\n" not in once and "  " not in once and "\r" not in once
    assert all(line == line.strip() for line in once.split("\n"))
    assert all(unicodedata.category(character) != "Cc" or character == "\n" for character in once)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("a\u0301gua", "água"),
        ("um\u200b a\u00a0 dois\t três", "um a dois três"),
        ("  um  \r\n\r\n\r\n\r\n dois\r", "um\n\ndois"),
        ("um\x00\x07dois\ufeff", "umdois"),
        ("um\n \u200b \n\n\ndois", "um\n\ndois"),
        ("", ""),
    ],
)
def test_clean(raw, wanted):
    assert clean(raw) == wanted


WORDS = st.lists(st.sampled_from(["água", "ação", "PETR4", "sobe", "12", "mercado"]), min_size=1, max_size=8)


@given(
    WORDS,
    st.sampled_from([" ", "  ", "\n", ", ", " … ", "! "]),
    st.sampled_from(["", "[link] ", "RT [usuário]: ", "[CPF], [telefone] "]),
)
def test_unit_key_sees_through_case_digits_masks_and_punctuation(words, gap, before):
    key = unit_key(" ".join(words))
    assert unit_key(before + gap.join(words) + " [id]!") == key
    assert unit_key(" ".join(words).upper()) == key
    assert unit_key(" ".join(words).replace("12", "98").replace("PETR4", "petr3")) == key
    assert unit_key(unicodedata.normalize("NFD", " ".join(words))) == key
    assert unit_key(" ".join(words) + " vale") != key


def test_unit_key_of_symbols_alone_is_empty():
    assert unit_key("🚀 [link] …") == ""


def test_held_out_share_is_a_pure_function_of_seed_and_text():
    keys = [f"texto {number}" for number in range(20_000)]
    sides = [is_held_out(key, 42, 0.1) for key in keys]
    # six standard deviations of a draw with p = 0.1
    assert abs(sum(sides) - 2000) < 6 * (20_000 * 0.1 * 0.9) ** 0.5
    assert [is_held_out(key, 42, 0.1) for key in reversed(keys)] == sides[::-1]
    other = [is_held_out(key, 43, 0.1) for key in keys]
    assert abs(sum(a and b for a, b in zip(sides, other, strict=True)) - 200) < 90
    # a larger share holds the smaller one's texts
    assert all(is_held_out(key, 42, 0.2) for key, side in zip(keys, sides, strict=True) if side)
    assert not any(is_held_out(key, 42, 0.0) for key in keys)
    assert all(is_held_out(key, 42, 1.0) for key in keys)


def test_digest_is_16_bytes():
    assert len(digest("água")) == 16 and digest("água") != digest("agua")


# --- words as numbers


def test_word_characters_are_those_of_the_pattern():
    every = "".join(map(chr, range(0x110000)))
    # no character is asked twice: lower case would make one of another
    for text in (every[:0xD800], every[0xE000:]):
        _, starts, ends = word_bounds(text)
        assert [text.lower()[a:b] for a, b in zip(starts, ends, strict=True)] == re.findall(r"\w+", text.lower())


@given(st.one_of(st.text(max_size=60), st.text("aAáÁbİ_9² -.\n\ud800ΣΑ", max_size=60)))
@settings(max_examples=500, deadline=None)
def test_words_have_one_code_each(text):
    words = re.findall(r"\w+", text.lower())
    codes = word_codes(text).tolist()
    assert len(codes) == len(words)
    assert len(set(codes)) == len(set(words)) == len(set(zip(codes, words, strict=True)))
    _, starts, ends = word_bounds(text)
    assert (ends - starts).tolist() == list(map(len, words))


def test_a_words_code_does_not_depend_on_its_place_or_neighbours():
    words = ["água", "pão", "a", "bacia", "sedimentar"] * 40
    codes = dict(zip(words, word_codes(" ".join(words)).tolist(), strict=True))
    for size in range(1, 40):
        text = "\n".join(["?"] * size + words[size:])
        assert word_codes(text).tolist() == [codes[word] for word in words[size:]]


def test_words_that_look_alike_have_codes_of_their_own():
    words = [f"{a}{b}{c}" for a in range(60) for b in "aáàãb_" for c in range(60)]
    assert len(set(word_codes(" ".join(words)).tolist())) == len(set(words))


def test_codes_are_the_same_on_every_machine():
    assert word_codes("Água mole, pedra").tolist() == [14868497841256284121, 5388486654927980093, 5314840522813431406]
    assert ngram_hashes(word_codes("Água mole, pedra"), 2).tolist() == [7575807375598007912, 6557328065215251917]


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_ngrams_have_one_hash_each(words, size):
    ngrams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    hashes = ngram_hashes(word_codes(" ".join(words)), size).tolist()
    assert len(hashes) == len(ngrams)
    assert len(set(hashes)) == len(set(ngrams)) == len(set(zip(hashes, ngrams, strict=True)))


# --- the rules

# (the rule, a text on its boundary, one beyond it, the reason)
BOUNDARIES = [
    (rule(min_words=3), "um dois três", "um dois", "too few words"),
    (rule(max_words=3), "um dois três", "um dois três quatro", "too many words"),
    (rule(min_mean_word_length=3.0), "aaa aaa", "aaa aa", "mean word length"),
    (rule(max_mean_word_length=3.0), "aaa aaa", "aaa aaaa", "mean word length"),
    # "#" and ellipses are two ratios
    (rule(max_symbols_per_word=0.5), "#um … dois", "#um # dois", "too many symbols"),
    (rule(max_symbols_per_word=0.5), "um... #dois", "um... dois…", "too many symbols"),
    (rule(max_bullet_lines=0.5), "- um\n\n\ndois", "• um\n* dois\ntrês", "bullet lines"),
    (rule(max_bullet_lines=0.5), "- um, disse ele", "- um\n- dois", "bullet lines"),
    (
        rule(max_ellipsis_lines=0.3),
        "um...\n" * 3 + "um\n" * 7,
        "um…\ndois...\ntrês\nquatro",
        "lines ending in an ellipsis",
    ),
    (rule(min_letter_words=0.5), "um, 2", "um 2 3", "too few words with a letter"),
    (rule(min_letter_words=0.5), "(um) 2!a 3 |", "um | | |", "too few words with a letter"),
    (rule(min_stop_words=2), "A casa, de um", "A casa, a", "too few stop words"),
    (rule(min_stop_words=1), "isso É!", "isso não", "too few stop words"),
    (rule(max_duplicate_lines=0.3), "a\nb\nc\nd\ne\nf\ng\na\nb\nc", "a\nb\na", "duplicate lines"),
    (rule(max_duplicate_line_characters=0.25), "aa\nbb\naa", "aa\naa\nb", "characters in duplicate lines"),
    (rule(max_duplicate_paragraphs=0.5), "um\n\num", "um\n\num\n\num", "duplicate paragraphs"),
    (
        rule(max_duplicate_paragraph_characters=0.4),
        "abcd\n\nabcd",
        "abcde\n\nabcde",
        "characters in duplicate paragraphs",
    ),
    # "a b" twice: 6 of 12 characters
    (top(2, 0.5), "a b, c. A b!", "a b c a b", "top 2-gram"),
    (top(3, 0.5), "a b c d e f g h i j k l", "a b c, a b c", "top 3-gram"),
    (top(4, 0.5), "a b c d a b c e", "a b c d; a b c d", "top 4-gram"),
    *(
        # the second run of `size` one-letter words is that share of the characters
        (repeats(size, 0.25), run + "." * (2 * size) + run, run + " " + run, f"duplicate {size}-grams")
        for size in range(5, 11)
        for run in [" ".join("abcdefghij"[:size])]
    ),
]


@pytest.mark.parametrize(("rules", "within", "beyond", "reason"), BOUNDARIES)
def test_each_rule_at_its_boundary(rules, within, beyond, reason):
    assert rejection(within, rules) is None
    assert rejection(beyond, rules) == reason


def test_every_rule_has_its_boundary_tested():
    assert {"empty", *(reason for *_, reason in BOUNDARIES)} == set(REASONS)


def test_an_empty_text_has_its_own_reason():
    assert rejection("", rule(min_words=0)) == "empty"
    assert rejection(" \n", LOOSE) == "empty"
    assert rejection("🚀", LOOSE) is None


def test_the_reason_is_the_first_rule_broken():
    rules = rule(min_words=3, max_duplicate_lines=0.0, max_top_ngrams=[0.0, 1.0, 1.0])
    assert rejection("a a", rules) == "too few words"
    assert rejection("um dois\num dois", rules) == "duplicate lines"
    assert rejection("um dois três um dois", rules) == "top 2-gram"


def test_stop_words_follow_the_language():
    rules = rule(min_stop_words=2)
    assert rejection("el perro y la luna", rules, language="es") is None
    assert rejection("el perro y la luna", rules) == "too few stop words"
    assert rejection("unha casa na aldea", rules, language="gl") is None


def test_stop_words_that_no_list_has_are_refused_up_front():
    for language in STOP_WORDS:
        check_language(language)
        check_language(language, 15)
    with pytest.raises(ParameterError, match="min_stop_words of data.filters .* 'fr', but none are known"):
        check_language("fr")
    with pytest.raises(ParameterError, match="but 16 are known"):
        check_language("pt", 17)


# --- the same rules in plain Python, with exact fractions


def fraction(part: int, whole: int) -> Fraction:
    return Fraction(part, whole) if whole else Fraction(0)


def seen_before(parts: list) -> list[bool]:
    return [part in parts[:place] for place, part in enumerate(parts)]


def ngram_list(text: str, size: int) -> list[list[str]]:
    words = re.findall(r"\w+", text.lower())
    return [words[place : place + size] for place in range(len(words) - size + 1)]


def plain_shares(text: str) -> dict[str, Fraction | int]:
    """What each rule measures, as an exact number."""
    words = text.split()
    lines = re.split(r"\n+", text.strip())
    paragraphs = re.split(r"\n{2,}", text.strip())
    found = {
        "words": len(words),
        "mean word length": fraction(len("".join(words)), len(words)),
        "too many symbols": fraction(max(text.count("#"), len(re.findall(r"\.\.\.|…", text))), len(words)),
        "bullet lines": fraction(
            len([line for line in lines if "\n" in text and re.match("[-*•‣◦▪●·]", line)]), len(lines)
        ),
        "lines ending in an ellipsis": fraction(
            len([line for line in lines if re.search(r"(\.\.\.|…)$", line)]), len(lines)
        ),
        "too few words with a letter": fraction(
            len([word for word in words if re.search(r"[^\W\d_]", word)]), len(words)
        ),
        "too few stop words": len(set(sum(ngram_list(text, 1), [])) & set(STOP_WORDS["pt"].split())),
    }
    for name, parts in (("lines", lines), ("paragraphs", paragraphs)):
        before = seen_before(parts)
        found[f"duplicate {name}"] = fraction(sum(before), len(parts))
        characters = sum(len(part) for part, seen in zip(parts, before, strict=True) if seen)
        found[f"characters in duplicate {name}"] = fraction(characters, len(text))
    for size in (2, 3, 4):
        counts = Counter(map(" ".join, ngram_list(text, size))).most_common(1)
        ngram, count = counts[0] if counts else ("", 0)
        found[f"top {size}-gram"] = fraction(len(ngram) * count if count > 1 else 0, len(text))
    for size in range(5, 11):
        covered = set()
        for place, seen in enumerate(seen_before(ngram_list(text, size))):
            covered |= set(range(place, place + size)) if seen else set()
        characters = sum(len(word) for place, (word,) in enumerate(ngram_list(text, 1)) if place in covered)
        found[f"duplicate {size}-grams"] = fraction(characters, len(text))
    return found


def plain_verdicts(text: str, rules: Filter) -> dict[str, bool]:
    """Which rules a text breaks."""
    share = plain_shares(text)
    limits = {
        "too many symbols": rules.max_symbols_per_word,
        "bullet lines": rules.max_bullet_lines,
        "lines ending in an ellipsis": rules.max_ellipsis_lines,
        "duplicate lines": rules.max_duplicate_lines,
        "characters in duplicate lines": rules.max_duplicate_line_characters,
        "duplicate paragraphs": rules.max_duplicate_paragraphs,
        "characters in duplicate paragraphs": rules.max_duplicate_paragraph_characters,
    }
    for size, limit in zip((2, 3, 4), rules.max_top_ngrams, strict=True):
        limits[f"top {size}-gram"] = limit
    for size, limit in zip(range(5, 11), rules.max_duplicate_ngrams, strict=True):
        limits[f"duplicate {size}-grams"] = limit
    exact = {name: Fraction(str(limit)) for name, limit in limits.items()}
    # a share of 1 is allowed by a limit of 1; runs that overlap themselves count for more than all characters
    broken = {
        name: min(share[name], 1) > limit if "gram" in name else share[name] > limit for name, limit in exact.items()
    }
    return broken | {
        "empty": share["words"] == 0,
        "too few words": share["words"] < rules.min_words,
        "too many words": share["words"] > rules.max_words,
        "mean word length": not rules.min_mean_word_length <= share["mean word length"] <= rules.max_mean_word_length,
        "too few words with a letter": share["too few words with a letter"] < Fraction(str(rules.min_letter_words)),
        "too few stop words": share["too few stop words"] < rules.min_stop_words,
    }


TENTHS = st.integers(0, 20).map(lambda number: number / 20)
THRESHOLDS = st.builds(
    rule,
    min_words=st.integers(0, 12),
    max_words=st.integers(8, 60),
    min_mean_word_length=st.sampled_from([0.0, 1.0, 2.0, 2.5]),
    max_mean_word_length=st.sampled_from([2.5, 3.0, 4.0, 9.0]),
    max_symbols_per_word=TENTHS,
    max_bullet_lines=TENTHS,
    max_ellipsis_lines=TENTHS,
    min_letter_words=TENTHS,
    min_stop_words=st.integers(0, 4),
    max_duplicate_lines=TENTHS,
    max_duplicate_line_characters=TENTHS,
    max_duplicate_paragraphs=TENTHS,
    max_duplicate_paragraph_characters=TENTHS,
    max_top_ngrams=st.lists(TENTHS, min_size=3, max_size=3),
    max_duplicate_ngrams=st.lists(TENTHS, min_size=6, max_size=6),
)
# few words and whole phrases again and again: what breaks the rules of repetition, and what just does not
PIECES = st.sampled_from(
    ["a", "o", "De", "que", "casa", "Água", "na serra", "12", "#vale", "…", "fim...", "|", "- ", "\n", "\n\n", "\n• "]
    + ["o rio corre para o mar", "a bacia de Campos produz petróleo e gás", "O rio corre para o mar."]
)
TEXTS = st.builds(
    lambda pieces, times: clean(" ".join(pieces * times)),
    st.lists(PIECES, max_size=25),
    st.sampled_from([1, 1, 1, 2, 3]),
)


@given(TEXTS, THRESHOLDS)
@settings(max_examples=500, deadline=None)
def test_each_rule_agrees_with_plain_python(text, rules):
    wanted = plain_verdicts(text, rules)
    document = Document(text)
    assert {reason: breaks(document, rules) for reason, breaks in RULES.items()} == wanted
    first = next((reason for reason in REASONS if wanted[reason]), None)
    assert rejection(text, rules) == first
    assert rejection(text, rules, word_codes(text)) == first


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_shares_of_ngrams_agree_with_plain_python(text):
    wanted, document = plain_shares(text), Document(text)
    for size in (2, 3, 4):
        assert document.top_ngram_share(size) == pytest.approx(float(wanted[f"top {size}-gram"]), abs=1e-12)
    # longest first: no share leans on one that was asked before
    shares = [document.duplicate_ngram_share(size) for size in range(10, 4, -1)]
    assert shares == [pytest.approx(float(wanted[f"duplicate {size}-grams"]), abs=1e-12) for size in range(10, 4, -1)]
    # what lets the shortest acquit all
    assert shares == sorted(shares)


def test_rules_that_are_off_need_no_words():
    document = Document("um dois um dois um dois")
    assert not any(breaks(document, LOOSE) for breaks in RULES.values())
    assert "codes" not in vars(document)


def test_a_lone_surrogate_and_a_million_equal_words_are_judged():
    assert rejection("um \ud800 dois", top(2, 0.1)) is None
    assert rejection("a " * 10**6, rule(max_top_ngrams=[0.9, 0.9, 0.9])) == "top 2-gram"
    assert Document("a " * 10**6).duplicate_ngram_share(5) == pytest.approx(0.5, abs=1e-5)


def test_codes_of_the_caller_are_used():
    assert rejection("casa dois três", rule(min_stop_words=1), word_codes("de dois três")) is None
    assert isinstance(Document("um", np.empty(0, np.uint64)).codes, np.ndarray)


def test_breaks_of_lines_and_pages_keep_words_apart():
    for sign in ("\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\r", "\r\n"):
        assert clean(f"fim da página{sign}início") == "fim da página\ninício"


def test_the_sign_that_sentencepiece_writes_for_a_space_is_one():
    assert clean("\u2581\u2582 preços\u2581altos") == "\u2582 preços altos"
