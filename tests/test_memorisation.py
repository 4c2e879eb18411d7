"""Which passages are drawn, what counts as completed, and a model that knows its text by heart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.finished import finished
from ttl_utils import memorisation as me
from ttl_utils.blocks import TokenBlocks, TokenWriter, step_indices
from ttl_utils.corpus import documents
from ttl_utils.ledger import read_ledger
from ttl_utils.pretraining import token_blocks
from ttl_utils.progress import Progress
from ttl_utils.tokenizer import load_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tiny, tiny_done, tmp_path_factory):
    return finished(tiny.file, tiny_done.folder, tmp_path_factory.getbasetemp() / "finished")


def pack(folder, lengths, shard=10**6):
    """Documents whose ids are the numbers of their places in the whole."""
    writer = TokenWriter(folder, "train", shard_tokens=shard)
    at = 0
    for length in lengths:
        writer.add(np.arange(at, at + length), np.array([0]))
        at += length
    return writer.close()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 12), st.integers(1, 9), st.data())
def test_passages_are_different_and_lie_within_one_document_and_block_read(
    tmp_path_factory, lengths, length, most, data
):
    shard, block = data.draw(st.sampled_from([7, 40, 10**6])), data.draw(st.integers(length, 40))
    blocks = TokenBlocks(pack(tmp_path_factory.mktemp("tokens"), lengths, shard), block)
    read = data.draw(st.sets(st.integers(0, max(0, len(blocks) - 1))))
    read = np.array(sorted(read & set(range(len(blocks)))), np.int64)
    found = me.sample_passages(blocks, read, length, seed=1, most=most)
    ends = np.cumsum(lengths)
    possible = [
        place
        for place in range(len(blocks) * block - length + 1)
        if place // block in read
        and place // block == (place + length - 1) // block
        and np.searchsorted(ends, place, side="right") == np.searchsorted(ends, place + length - 1, side="right")
    ]
    assert found.shape == (min(most, len(possible)), length)
    assert len(set(found[:, 0].tolist())) == len(found) and set(found[:, 0].tolist()) <= set(possible)
    assert all(row == list(range(row[0], row[0] + length)) for row in found.tolist())


def test_every_place_is_as_likely_as_another_and_the_seed_decides(tmp_path):
    blocks, read = TokenBlocks(pack(tmp_path, [3, 12, 5]), 10), np.arange(2)
    places = [me.sample_passages(blocks, read, 4, seed, most=1)[0, 0] for seed in range(600)]
    counts = np.bincount(places, minlength=20)
    # documents begin at 3 and 15, a block at 10
    assert sorted(set(places)) == [3, 4, 5, 6, 10, 11, 15, 16]
    assert counts[counts > 0].min() > 40 and counts.max() < 120
    first, again = (me.sample_passages(blocks, read, 4, 5, 3) for _ in range(2))
    assert np.array_equal(first, again)


def cut(rows):
    return [(row[:6].tolist(), row[6:].tolist()) for row in rows]


def test_a_model_that_knows_a_text_by_heart_completes_it_and_no_other():
    rng = np.random.default_rng(0)
    known, other = rng.integers(4, 60, (2, 6, 16))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model, rows = LlamaForCausalLM(config), torch.from_numpy(known)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with Progress("passages", None) as progress:
        found, control = (me.completed(model, cut(passages), 0, progress) for passages in (known, other))
        # three that differ in the third token after the prompt, and in no other
        spoilt = known.copy()
        spoilt[:3, 8] ^= 1
        half = me.completed(model, cut(spoilt), 0, progress)
        # prompts and ends of several lengths
        mixed = [(row[:n].tolist(), row[n : n + 3].tolist()) for n, row in zip((4, 6, 6, 9), spoilt, strict=False)]
        short = me.completed(model, mixed, 0, progress)
    assert (found["completed"], found["share"], found["mean_prefix"]) == (6, 1.0, 10.0)
    assert (control["completed"], control["share"]) == (0, 0.0) and control["mean_prefix"] < 3
    assert (half["share"], half["mean_prefix"]) == (0.5, 6.0)
    assert (short["completed"], short["mean_tokens"], short["mean_prefix"]) == (2, 3.0, (3 + 2 + 2 + 3) / 4)
    assert half["low"] < 0.5 < half["high"] and half["mean_prefix_low"] < 6 < half["mean_prefix_high"]


def test_the_interval_of_none_of_ten_is_wilsons(monkeypatch):
    monkeypatch.setattr(me, "greedy", lambda model, ids, new: (ids.new_zeros(len(ids), new), []))
    with Progress("passages", None) as progress:
        found = me.completed(SimpleNamespace(device="cpu"), [([1], [1])] * 10, 0, progress)
    assert (found["low"], found["high"]) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_a_short_block_gives_a_quarter_as_prompt_and_what_was_measured_is_kept(run, monkeypatch):
    stage = run.stage("03_pretraining")
    found = me.memorisation(run, "base", stage)
    assert (found["prompt"], found["continuation"]) == (16, 16)
    assert 0 < found["train"]["passages"] <= me.PASSAGES and 0 <= found["train"]["share"] <= 1
    said = me.sentence(found)
    assert "16 tokens of a passage" in said and "held-out text, the control" in said
    # under a name of its own in the ledger
    assert [row["stage"] for row in read_ledger(run.folder / "energy.jsonl") if row["final"]].count("export") == 1
    monkeypatch.setattr(me, "load_model", lambda *_: pytest.fail("measured twice"))
    assert me.memorisation(run, "base", stage) == found
    monkeypatch.setattr(me, "PASSAGES", 10)
    with pytest.raises(pytest.fail.Exception, match="measured twice"):
        me.memorisation(run, "base", stage)


def test_only_blocks_that_training_read_are_tried(run, monkeypatch):
    stage, blocks = run.stage("03_pretraining"), token_blocks(run, "train")
    per_step = run.params.pretraining.tokens_per_step // blocks.block_size
    steps = stage.metrics()["steps"]
    read = {n for step in range(steps) for n in step_indices(run.params.pretraining_seed, step, per_step, len(blocks))}
    assert 0 < len(read) < len(blocks) and set(me.blocks_read(run, stage, blocks)) == read
    known = {tuple(blocks.block(n)) for n in read}
    for prompt, rest in me._passages(run, stage, "train", 16):
        passage = (*prompt, *rest)
        assert any(passage == block[at : at + 32] for block in known for at in range(33))
    monkeypatch.setattr(stage, "metrics", lambda: {"steps": 10**6})
    assert sorted(me.blocks_read(run, stage, blocks)) == list(range(len(blocks)))
    share = {"prompt": 16, "continuation": 16, "read_share": 0.6, "train": None, "test": None}
    assert "Training read 60.0% of the packed text" in me.sentence(share)


@pytest.mark.parametrize("base_model", [None, "owner/theirs"])
def test_the_chat_model_is_asked_for_the_answers_it_was_tuned_on(run, monkeypatch, base_model):
    chat = run.params.chat.model_copy(update={"base_model": base_model})
    other = SimpleNamespace(folder=run.folder, need=run.need, name=run.name)
    other.params = SimpleNamespace(
        chat=chat, **{n: getattr(run.params, n) for n in ("model", "pretraining", "seed", "carbon")}
    )
    asked = []
    monkeypatch.setattr(me, "completed", lambda model, passages, *_: asked.append(passages))
    monkeypatch.setattr(me, "token_blocks", lambda *_: pytest.fail("the corpus is not what it was tuned on"))
    stage = run.stage("05_chat")
    found = me.memorisation(other, "chat", stage)
    (run.folder / "export" / "memorisation-chat.json").unlink()
    tokenizer = load_tokenizer(stage.folder / "model")
    for side, passages in zip(("train", "test"), asked, strict=True):
        wanted = {
            (one["content"], other["content"])
            for row in documents(run.need("01_data"), "chat", side, ["messages"])
            for one, other in zip(row["messages"], row["messages"][1:], strict=False)
            if one["role"] == "user"
        }
        assert passages
        for prompt, rest in passages:
            question = tokenizer.decode(prompt).split("<instruction>")[-1].removesuffix("</instruction>").strip()
            answer = tokenizer.decode(rest, skip_special_tokens=True).strip()
            assert any(question == one and other.startswith(answer) for one, other in wanted)
            assert rest[-1] == tokenizer.eos_token_id or len(prompt) + len(rest) == 64 or len(rest) == me.CONTINUATION
    assert ("a model of others" in me.sentence(found)) == (base_model is not None)
    assert "a conversation up to an answer" in me.sentence(found)


def test_what_cannot_be_measured_says_why():
    assert me.completed(None, [], 0, Progress("none", 0)) is None
    assert "not measured" in me.sentence({"prompt": 4, "continuation": 4, "train": None, "test": None})
