"""One document's fate: a pure function of its row and the parameters, the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils import cleaning, judge
from ttl_utils.judge import SIDES, Judge
from ttl_utils.params import load_params

TEXT = "A casa fica na beira do rio, e o porto de pedra com uma torre é o lugar de onde saem os barcos para a ilha."
SOURCE = {"kind": "plain", "filter": "prose", "licence": "CC BY 4.0", "files": ["x.jsonl"], "columns": ["text"]}
ORIGINS = [
    {"pattern": "wiki", "kind": "plain", "filter": "prose", "licence": "CC BY-SA 3.0"},
    {"pattern": "instruct|wiki", "kind": "instruction", "filter": "instruction", "licence": "CC BY-NC 4.0"},
]
SOURCES = [
    {"name": "plain", "use": "corpus", **SOURCE},
    {"name": "mixed", "use": "corpus", **SOURCE, "origin_column": "where", "origins": ORIGINS},
    {"name": "talks", "use": "chat", **SOURCE, "filter": "instruction"},
]


def make(tiny, **data) -> Judge:
    given = {"file": tiny.file, "data": {"sources": SOURCES, **data}, "evaluation": {"downstream": []}}
    params = load_params(given)
    return Judge(params.data, params.seed)


def verdict(found: Judge, name: str, **row) -> str | dict:
    """The document kept, or why it is not."""
    batch = found.judge(name, [{"text": "", "origin": None, **row}])
    if batch.rows:
        return batch.rows[0]
    (reason,) = (key[2] for key in batch.counts if key[0] == "rejected")
    return reason


def test_the_first_origin_that_fits_says_what_a_document_is(tiny):
    found = make(tiny)
    row = verdict(found, "mixed", text=TEXT, origin="source: Wikipedia")
    assert (row["kind"], row["licence"], row["part"]) == ("plain", "CC BY-SA 3.0", "wiki")
    row = verdict(found, "mixed", text="Por quê? Porque sim.", origin="INSTRUCT-PTBR")
    assert (row["kind"], row["licence"]) == ("instruction", "CC BY-NC 4.0")
    assert verdict(found, "mixed", text="Por quê? Porque sim.", origin="crawl") == "too few words"
    assert verdict(found, "mixed", text=TEXT)["licence"] == "CC BY 4.0"


def test_reasons_are_asked_in_order(tiny, monkeypatch):
    found = make(tiny, filters={"prose": {"max_characters": 500, "min_language_probability": 0.5}})
    assert verdict(found, "plain", problem="not UTF-8", size=9) == "not UTF-8"
    assert verdict(found, "plain", text="") == "empty"
    english = "The house stands by the river, and the harbour of stone with a tower is where ships leave for a do e."
    assert verdict(found, "plain", text=english) == "language"
    monkeypatch.setattr(judge, "clean", lambda _: pytest.fail("it was cleaned"))
    assert verdict(found, "plain", text=TEXT * 10) == "too long"
    assert verdict(make(tiny, permissive_only=True), "mixed", text=TEXT, origin="instruct") == "licence"


def test_personal_data_is_masked_counted_or_drops_the_document(tiny):
    text = f"{TEXT} Fale com ana@exemplo.com.br ou com @ana_maria."
    batch = make(tiny).judge("plain", [{"text": text}])
    assert batch.rows[0]["text"].endswith("Fale com [e-mail] ou com [usuário].")
    assert batch.counts["masked", "", "email"] == batch.counts["masked", "", "handle"] == 1
    keep = {"cpf": "keep", "email": "drop", "telephone": "keep", "handle": "keep"}
    assert verdict(make(tiny, personal_data=keep), "plain", text=text) == "personal data (email)"


def test_a_conversation_is_cleaned_and_masked_turn_by_turn(tiny):
    row = verdict(make(tiny), "talks", turns=["Qual  é o teu e-mail?", "É ana@exemplo.com.br\x00."], text="as read")
    assert row["messages"] == [
        {"role": "user", "content": "Qual é o teu e-mail?"},
        {"role": "assistant", "content": "É [e-mail]."},
    ]
    assert row["text"] == "Qual é o teu e-mail?\n\nÉ [e-mail]."
    assert verdict(make(tiny), "talks", turns=["Oi, tudo bem?", " \n"], text="x") == "empty"


def test_copies_and_cuts_are_on_one_side(tiny):
    found = make(tiny, test_share=0.5)
    sides = set()
    for number in range(26):
        text = f"Capítulo {chr(97 + number) * 4}: {TEXT}"
        rows = [text, text.upper(), f"{text} E mais isto.", text.replace(",", " ;")]
        (side,) = {verdict(found, "plain", text=row)["side"] for row in rows}
        sides.add(side)
    assert sides == set(SIDES)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=300) | st.just(TEXT) | st.just(None), max_size=12), st.integers(0, 12))
def test_every_document_is_kept_or_has_one_reason(tiny, texts, cut):
    found = make(tiny)
    rows = [{"text": "", "problem": "not UTF-8", "size": 3} if text is None else {"text": text} for text in texts]
    batch = found.judge("plain", rows)
    rejected = sum(count for key, count in batch.counts.items() if key[0] == "rejected")
    assert len(batch.rows) + rejected == batch.counts["documents_in", ""] == len(rows)
    lengths = {len(batch.rows), len(batch.digests), len(batch.keys), len(batch.bands)}
    assert len(lengths) == 1
    assert batch.counts["characters_in", ""] == sum(3 if text is None else len(text) for text in texts)
    # batches change nothing
    one, two = found.judge("plain", rows[:cut]), found.judge("plain", rows[cut:])
    assert one.rows + two.rows == batch.rows and one.counts + two.counts == +batch.counts
    assert all(cleaning.clean(row["text"]) == row["text"] for row in batch.rows)


def test_another_process_judges_the_same(tiny):
    """Marks must not hang on Python's seed for hashes."""
    script = (
        "import json, sys\n"
        "from tests.test_judge import make, TEXT\n"
        "from types import SimpleNamespace\n"
        "batch = make(SimpleNamespace(file=sys.argv[1])).judge('plain', [{'text': TEXT}])\n"
        "print(json.dumps([batch.rows[0]['side'], batch.keys, *(a.tolist() for a in batch.digests + batch.bands)]))\n"
    )
    found = Counter()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script, tiny.file]
        found[subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout] += 1
    assert len(found) == 1 and any(json.loads(next(iter(found)))[-1])
