"""The training conversations nearest to a text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttl_utils import neighbours
from ttl_utils.corpus import documents
from ttl_utils.errors import TTLError
from ttl_utils.neighbours import SHOWN_CHARACTERS, Neighbours
from ttl_utils.run import Run

CONVERSATIONS = [
    ["Qual é a capital do Brasil?", "A capital do Brasil é Brasília."],
    ["Como se faz café?", "Com água quente.", "E chá?", "Com folhas e água."],
    ["Qual é a maior cidade?", "São Paulo, " * 100],
    ["uma pergunta sem resposta"],
]


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Neighbours:
    return of(monkeypatch, CONVERSATIONS)


def of(monkeypatch: pytest.MonkeyPatch, conversations: list[list[str]]) -> Neighbours:
    def rows(stage: Any, use: str, side: str, columns: list[str]) -> list[dict]:
        assert (use, side, columns) == ("chat", "train", ["messages"])
        roles = ("user", "assistant")
        return [
            {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}
            for texts in conversations
        ]

    class Made:
        def need(self, name: str) -> str:
            assert name == "01_data"
            return name

    monkeypatch.setattr(neighbours, "documents", rows)
    return Neighbours.of(Made())  # type: ignore[arg-type]


def test_every_exchange_stands_once_and_the_unanswered_is_left_out(index: Neighbours) -> None:
    assert [row[0] for row in index.shown] == [
        "Qual é a capital do Brasil?",
        "Como se faz café?",
        "E chá?",
        "Qual é a maior cidade?",
    ]


def test_the_nearest_comes_first_without_regard_to_case_and_accents(index: Neighbours) -> None:
    first, *others = index.nearest("QUAL E A CAPITAL DO BRASIL")
    assert first["answer"] == "A capital do Brasil é Brasília." and first["similarity"] == pytest.approx(1)
    assert [row["question"] for row in others] == ["Qual é a maior cidade?", "E chá?"] and others[0]["similarity"] < 0.7


def test_an_answer_that_repeats_the_data_is_found_by_its_own_words(index: Neighbours) -> None:
    assert index.nearest("Com água quente.", side="answer")[0]["similarity"] == pytest.approx(1)
    found = index.nearest("folhas", n=1, side="answer")
    assert found == [{"question": "E chá?", "answer": "Com folhas e água.", "similarity": found[0]["similarity"]}]
    assert index.nearest("folhas") == []


def test_long_texts_are_shown_short_and_searched_whole(index: Neighbours) -> None:
    (row,) = index.nearest("São Paulo", side="answer")
    assert len(row["answer"]) == SHOWN_CHARACTERS and row["answer"].endswith("…")


def test_a_run_s_training_side_alone_is_searched(tiny_done: Run) -> None:
    index = Neighbours.of(tiny_done)
    sides = {
        side: {
            tuple(" ".join(m["content"].split()) for m in row["messages"][:2])
            for row in documents(tiny_done.need("01_data"), "chat", side, ["messages"])
        }
        for side in ("train", "test")
    }
    assert (
        sides["train"] <= set(index.shown) and sides["test"] and not (sides["test"] - sides["train"]) & set(index.shown)
    )
    question = index.shown[0][0]
    assert index.nearest(question, n=1)[0]["similarity"] == pytest.approx(1)


@given(text=st.text(), n=st.integers(0, 9), side=st.sampled_from(["question", "answer"]))
def test_any_text_is_answered(tiny_index: Neighbours, text: str, n: int, side: str) -> None:
    rows = tiny_index.nearest(text, n, side)
    similarities = [row["similarity"] for row in rows]
    assert len(rows) <= n and similarities == sorted(similarities, reverse=True)
    assert all(0 < similarity < 1.000001 for similarity in similarities)


@pytest.fixture(scope="module")
def tiny_index() -> Neighbours:
    with pytest.MonkeyPatch.context() as patch:
        return of(patch, CONVERSATIONS)


@pytest.mark.parametrize("conversations", [[], [["?", "!"]]])
def test_no_conversation_is_said(monkeypatch: pytest.MonkeyPatch, conversations: list) -> None:
    with pytest.raises(TTLError, match="no conversation to search"):
        of(monkeypatch, conversations)
