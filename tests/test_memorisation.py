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
from ttl_utils.blocks import TokenWriter
from ttl_utils.progress import Progress

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
def test_passages_are_different_and_lie_within_one_document(tmp_path_factory, lengths, length, most, data):
    shard = data.draw(st.sampled_from([7, 40, 10**6]))
    paths = pack(tmp_path_factory.mktemp("tokens"), lengths, shard)
    found = me.sample_passages(paths, length, seed=1, most=most)
    ends = np.cumsum(lengths)
    possible = sum(max(0, one - length + 1) for one in lengths)
    assert found.shape == (min(most, possible), length)
    assert len(set(found[:, 0].tolist())) == len(found)
    for row in found.tolist():
        assert row == list(range(row[0], row[0] + length))
        assert np.searchsorted(ends, row[0], side="right") == np.searchsorted(ends, row[-1], side="right")


def test_every_place_is_as_likely_as_another_and_the_seed_decides(tmp_path):
    paths = pack(tmp_path, [3, 12, 5])
    places = [me.sample_passages(paths, 4, seed, most=1)[0, 0] for seed in range(600)]
    counts = np.bincount(places, minlength=20)
    assert sorted(set(places)) == [3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16]
    assert counts[counts > 0].min() > 25 and counts.max() < 90
    assert np.array_equal(me.sample_passages(paths, 4, 5, 3), me.sample_passages(paths, 4, 5, 3))


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
        found, control = (me.completed(model, passages, 6, 0, progress) for passages in (known, other))
        # three that differ in the third token after the prompt, and in no other
        spoilt = known.copy()
        spoilt[:3, 8] ^= 1
        half = me.completed(model, spoilt, 6, 0, progress)
    assert (found["completed"], found["share"], found["mean_prefix"]) == (6, 1.0, 10.0)
    assert (control["completed"], control["share"]) == (0, 0.0) and control["mean_prefix"] < 3
    assert (half["share"], half["mean_prefix"]) == (0.5, 6.0)
    assert half["low"] < 0.5 < half["high"] and half["mean_prefix_low"] < 6 < half["mean_prefix_high"]


@given(st.integers(1, 5000).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_wilsons_interval_holds_the_share_and_stays_in_bounds(case):
    low, high = me.wilson(*case)
    assert 0 <= low <= case[0] / case[1] + 1e-12 and case[0] / case[1] - 1e-12 <= high <= 1
    assert high > low
    flipped = me.wilson(case[1] - case[0], case[1])
    assert flipped == pytest.approx((1 - high, 1 - low))


def test_wilsons_interval_at_none_of_ten():
    assert me.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_a_short_context_gets_half_as_prompt_and_what_was_measured_is_kept(run, monkeypatch):
    stage = run.stage("03_pretraining")
    found = me.memorisation(run, "base", stage)
    assert (found["prompt"], found["continuation"]) == (32, 32)
    assert found["train"]["passages"] == me.PASSAGES and 0 <= found["train"]["share"] <= 1
    said = me.sentence(found)
    assert "32 tokens of a passage" in said and "held-out text, the control" in said
    monkeypatch.setattr(me, "load_model", lambda *_: pytest.fail("measured twice"))
    assert me.memorisation(run, "base", stage) == found
    monkeypatch.setattr(me, "PASSAGES", 10)
    with pytest.raises(pytest.fail.Exception, match="measured twice"):
        me.memorisation(run, "base", stage)


def test_what_cannot_be_measured_says_why(run, monkeypatch):
    stage = run.stage("05_chat")
    none = me.completed(None, np.empty((0, 8), np.int64), 4, 0, Progress("none", 0))
    assert none is None
    figures = {"prompt": 4, "continuation": 4, "train": None, "test": None}
    assert "not measured" in me.sentence(figures)
    monkeypatch.setattr(me, "load_tokenizer", lambda _: SimpleNamespace(get_vocab=lambda: {"a": 1}))
    assert "no tokens of this model's vocabulary" in me.sentence(me.memorisation(run, "chat", stage))
