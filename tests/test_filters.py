"""Cleaning, masking, quality rules at their boundaries, the split, and duplicates."""

from __future__ import annotations

import re
import sqlite3
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils.filters import SeenTexts, clean, digest, is_held_out, mask, rejection, unit_key
from ttl_utils.schema import Filter

LOOSE = Filter(
    min_words=1,
    max_words=10**6,
    min_mean_word_length=0.0,
    max_mean_word_length=1e6,
    min_letter_words=0.0,
    max_symbols_per_word=1e6,
    min_stop_words=0,
)


def rule(**thresholds: float) -> Filter:
    return Filter.model_validate(LOOSE.model_dump() | thresholds)


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


LINKS = st.sampled_from(
    ["http://t.co/{}", "https://exemplo.org/{}?q=1&r=2", "HTTPS://T.CO/{}", "www.bolsa.com.br/{}", "bit.ly/{}"]
)
NAMES = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789", min_size=6, max_size=12).map("Qzx".__add__)
SECRETS = st.one_of(
    st.builds(lambda link, name: (link.format(name), name), LINKS, NAMES),
    NAMES.map(lambda name: (f"@{name}", name)),
    NAMES.map(lambda name: (f"＠{name}_", name)),
    NAMES.map(lambda name: (f"{name}.silva+a@correio.exemplo.com.br", name)),
    st.integers(10**8, 10**20).map(lambda number: (str(number), str(number))),
    st.integers(10**17, 10**18).map(lambda number: (f"{number}l", str(number))),
)
PLAIN = st.sampled_from(
    ["PETR4", "3,50", "R$ 10", "#vale5", "hoje:", "(de novo)", "água", "12345678", "e/ou", "17/04/14"]
)
GAPS = st.sampled_from([" ", "\n", " (", ": ", ", ", ' "', " - "])


@given(st.lists(st.tuples(GAPS, st.one_of(SECRETS, PLAIN)), min_size=1, max_size=12))
@settings(max_examples=400, deadline=None)
def test_mask_leaves_no_handle_link_address_or_id(parts):
    text = "".join(gap + (item if isinstance(item, str) else item[0]) for gap, item in parts)
    masked = mask(text)
    for _, item in parts:
        if isinstance(item, tuple):
            assert item[1] not in masked
    assert not re.search(r"[@＠]|https?:|www\.|\d{9}", masked, re.IGNORECASE)
    # words that nobody is known by stay
    for _, item in parts:
        if isinstance(item, str):
            assert item in masked


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("@fulano veja http://t.co/3PJlEQ agora", "[usuário] veja [link] agora"),
        ("RT @fulano: veja http…", "RT [usuário]: veja [link]"),
        ("fale com a.b+c@d.com.br.", "fale com [e-mail]."),
        ("protocolo 123456789, dia 20140417", "protocolo [id], dia 20140417"),
        ("ibovespa a 51.000,00 www.x.com", "ibovespa a 51.000,00 [link]"),
        ("@ fulano (@beltrano_9)", "[usuário] ([usuário])"),
    ],
)
def test_mask_examples(raw, wanted):
    assert mask(raw) == wanted


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_mask_of_a_masked_text_is_the_same(text):
    once = mask(text)
    assert mask(once) == once


WORDS = st.lists(st.sampled_from(["água", "ação", "PETR4", "sobe", "12", "mercado"]), min_size=1, max_size=8)


@given(WORDS, st.sampled_from([" ", "  ", "\n", ", ", " … ", "! "]), st.sampled_from(["", "[link] ", "RT [usuário]: "]))
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


# (the rule, a text on its boundary, one beyond it, the reason)
BOUNDARIES = [
    (rule(min_words=3), "um dois três", "um dois", "too few words"),
    (rule(max_words=3), "um dois três", "um dois três quatro", "too many words"),
    (rule(min_mean_word_length=3.0), "aaa aaa", "aaa aa", "mean word length"),
    (rule(max_mean_word_length=3.0), "aaa aaa", "aaa aaaa", "mean word length"),
    (rule(max_symbols_per_word=0.5), "#um dois", "#um … dois", "too many symbols"),
    (rule(max_symbols_per_word=0.5), "um... dois", "um... #dois", "too many symbols"),
    (rule(min_letter_words=0.5), "um 2", "um 2 3", "too few words with a letter"),
    (rule(min_stop_words=2), "A casa, de um", "A casa, a", "too few stop words"),
    (rule(min_stop_words=1), "isso É!", "isso não", "too few stop words"),
]


@pytest.mark.parametrize(("rules", "within", "beyond", "reason"), BOUNDARIES)
def test_each_rule_at_its_boundary(rules, within, beyond, reason):
    assert rejection(within, rules) is None
    assert rejection(beyond, rules) == reason


def test_an_empty_text_has_its_own_reason():
    assert rejection("", rule(min_words=0)) == "empty"
    assert rejection("🚀", LOOSE) is None


@given(st.lists(st.sampled_from(["a", "b", "A", "á", "á", "", "a ", "🚀", "corpus\na"]), max_size=60))
@settings(max_examples=60, deadline=None)
def test_seen_texts_agree_with_a_set(tmp_path_factory, texts):
    seen, known = SeenTexts(tmp_path_factory.mktemp("seen") / "seen.sqlite"), set()
    for text in texts:
        assert seen.add(text) == (text not in known)
        known.add(text)
    seen.close()
    assert not seen.path.exists()


def test_seen_texts_begin_empty_after_a_kill(tmp_path):
    killed = SeenTexts(tmp_path / "seen.sqlite")
    killed.add("um")
    killed.database.execute("COMMIT")
    killed.database.close()
    assert sqlite3.connect(tmp_path / "seen.sqlite").execute("SELECT count(*) FROM seen").fetchone() == (1,)
    seen = SeenTexts(tmp_path / "seen.sqlite")
    assert seen.add("um")
    seen.close()


def test_digest_is_16_bytes():
    assert len(digest("água")) == 16 and digest("água") != digest("agua")
