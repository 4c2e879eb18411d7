"""Texts that hold one another stay on one side of the split."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils.cleaning import unit_key
from ttl_utils.grouping import MIN_WORDS, group_contained

WORDS = st.lists(st.sampled_from(["alta", "baixa", "petr0", "vale0", "hoje", "ontem", "sobe"]), min_size=1, max_size=6)


def holds(one: str, other: str) -> bool:
    return len(other.split()) >= MIN_WORDS and f" {other} " in f" {one} "


@settings(deadline=None)
@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=12))
def test_a_text_is_grouped_with_those_that_hold_it_and_with_no_others(texts: list[str]) -> None:
    units = group_contained(texts)
    # a slow oracle: the connected components of "holds"
    group = list(range(len(texts)))
    for _ in texts:
        for i, one in enumerate(texts):
            for j, other in enumerate(texts):
                if one == other or holds(one, other):
                    group[i] = group[j] = min(group[i], group[j])
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert (units[i] == units[j]) == (group[i] == group[j])


def test_a_quoted_and_a_cut_tweet_follow_the_tweet() -> None:
    tweet = "Petrobras sobe 3% e puxa a bolsa para cima"
    quoted, cut = f"que dia! RT [usuário]: {tweet}", "RT [usuário]: Petrobras sobe 2% e puxa a bol…"
    assert len(set(group_contained([tweet, quoted, cut]))) == 1
    assert len(set(group_contained([tweet, "Vale cai 3% e puxa a bolsa para baixo"]))) == 2


def test_short_texts_group_nothing() -> None:
    assert len(set(group_contained(["bom dia", "bom dia bolsa", "muito bom dia mesmo"]))) == 3
    assert unit_key("Bom dia!") in group_contained(["Bom dia!", "bom dia bolsa"])
