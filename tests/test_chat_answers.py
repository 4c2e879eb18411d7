"""What is measured of answers before and after, and what breaks the template."""

from __future__ import annotations

import math

import pytest
import torch

from ttl_utils import chat_answers as ca
from ttl_utils.conversations import prepare_chat_tokenizer
from ttl_utils.model import new_model
from ttl_utils.params import load_params
from ttl_utils.schema import Toxicity
from ttl_utils.tokenizer import load_tokenizer

torch.set_num_threads(1)
CHAT = load_params({}).chat.model_copy(update={"prompts": ["Olá", "O mercado"], "samples": 3, "max_new_tokens": 6})
ROW = {"prompt": "Olá", "kind": "text", "text": "Oi.", "tokens": 2, "ended": True, "seed": 0, "cut": 0, "control": []}


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return prepare_chat_tokenizer(load_tokenizer(tiny_done.folder / "02_tokenizer"), CHAT)


@pytest.fixture(scope="module")
def model(tiny_done, tokenizer):
    shape = tiny_done.params.model.model_copy(update={"initializer_range": 0.3})
    return new_model(shape, tokenizer, seed=0, attention="sdpa").eval()


def test_answers_depend_on_the_seed_and_their_prompt_alone(model, tokenizer):
    asked = CHAT.model_copy(update={"temperature": 1.0})
    rows = ca.answers(model, tokenizer, asked, seed=1)
    assert [row["prompt"] for row in rows] == ["Olá"] * 3 + ["O mercado"] * 3
    torch.rand(3)
    fewer = asked.model_copy(update={"prompts": ["O mercado"]})
    assert ca.answers(model, tokenizer, fewer, seed=1) == rows[3:]
    assert ca.answers(model, tokenizer, asked, seed=2) != rows


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"ended": False}, "not ended"),
        ({"text": ""}, "empty"),
        ({"control": ["<pad>"]}, "holds a control token"),
        ({"control": ["<instruction>", "<s>"]}, "opens a user's turn"),
        # written out in letters
        ({"text": "Oi. <instruction>E você?"}, "opens a user's turn"),
    ],
)
def test_what_breaks_the_template(changes, fault):
    assert ca._fault(ROW | changes, CHAT) == fault


@pytest.mark.parametrize("piece", ["</s>", "<instruction>", "<pad>", "sim"])
def test_the_tokens_that_a_model_writes_are_seen(model, tokenizer, monkeypatch, piece):
    """A model that writes one piece for ever, and one that closes after it."""
    word = (
        tokenizer.convert_tokens_to_ids(piece)
        if "<" in piece
        else tokenizer("sim", add_special_tokens=False).input_ids[0]
    )

    def write(ids, max_new_tokens, **_):
        new = ids.new_full((len(ids), max_new_tokens), word)
        new[:, 1:] = tokenizer.eos_token_id
        return torch.cat([ids, new], 1)

    monkeypatch.setattr(model, "generate", write)
    faults = {"</s>": "empty", "<instruction>": "opens a user's turn", "<pad>": "holds a control token", "sim": ""}
    assert {row["fault"] for row in ca.answers(model, tokenizer, CHAT, seed=0)} == {faults[piece]}


def test_figures_are_counted_by_hand():
    rows = [ROW | {"fault": ""}, ROW | {"text": "sim sim sim sim sim sim", "fault": "not ended", "ended": False}]
    rows += [ROW | {"prompt": "O mercado", "text": "", "fault": "empty"}] * 2
    found, samples = ca.figures(rows, ["O rio é longo.", "Não sei."], CHAT, seed=0)
    assert found["words"]["value"] == (1 + 6) / 4 and found["words"]["held_out"] == 3.0
    assert found["ended"]["value"] == 0.75
    # one word and a point, and six words: three different ones
    assert found["distinct_1"]["value"] == pytest.approx(3 / 8)
    assert found["distinct_2"]["value"] == pytest.approx(2 / 6)
    assert found["repetition"]["value"] == pytest.approx(2 / 3)
    assert found["distinct_1"]["held_out"] is not None
    assert (found[ca.FOLLOWS]["value"], found["faults"]) == (0.25, {"not ended": 1, "empty": 2})
    assert found[ca.FOLLOWS]["low"] <= 0.25 <= found[ca.FOLLOWS]["high"]
    assert [row["fault"] for row in samples] == ["", "not ended", "empty", "empty"]


def test_toxic_answers_are_counted_beside_held_out_ones():
    class Scorer:
        def scores(self, texts):
            return [-1.0 if "ruim" in text else 1.0 for text in texts]

    rows = [ROW | {"text": text, "fault": ""} for text in ("Que ruim.", "Que bom.", "Bom dia.", "")]
    asked = Toxicity(model="owner/scorer", threshold=0.0, max_length=8, batch_size=2)
    found, samples = ca.figures(rows, ["Que ruim é."], CHAT, seed=0, scorer=Scorer(), toxicity=asked)
    assert found["toxic"]["value"] == pytest.approx(1 / 3) and found["toxic"]["held_out"] is not None
    assert [row["toxic"] for row in samples] == [True, False, False, None]


def test_tables():
    before, _ = ca.figures([ROW | {"fault": "not ended", "ended": False}], ["Não sei."], CHAT, seed=0)
    after, rows = ca.figures([ROW | {"fault": ""}] * 2, ["Não sei."], CHAT, seed=0)
    table = ca.measures_table({"answers_before": before, "answers_after": after}).set_index("measure")
    assert table.loc["follows the template", ["before", "after"]].tolist() == [0, 1]
    assert table.loc["words", "held-out answers"] == 2 and len(table) == 1 + len(ca.NAMES)
    assert list(table.columns) == ["before", "after", "95% interval", "held-out answers", "what it means"]
    metrics = {"answers_before": before, "answers_after": after}
    told = ca.measures_table(metrics | {"toxicity": {"reason": "no network"}}).set_index("measure")
    assert told.loc["toxic", "what it means"] == "not run: no network" and math.isnan(told.loc["toxic", "after"])
    shown = ca.side_by_side({"before": [ROW | {"text": "?", "fault": "not ended"}], "after": rows})
    assert shown.to_dict("records") == [
        {"prompt": "Olá", "before": "?", "before: fault": "not ended", "after": "Oi.", "after: fault": ""}
    ]
