"""Perplexity against a slow oracle, and the evaluation of checkpoints that goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ttl_utils import evaluation as ev
from ttl_utils.blocks import TokenBlocks, TokenWriter
from ttl_utils.checkpoints import list_checkpoints
from ttl_utils.corpus import documents
from ttl_utils.errors import MissingStage, TTLError
from ttl_utils.files import read_json
from ttl_utils.model import Hardware, new_model
from ttl_utils.params import load_params
from ttl_utils.pretraining import pretrain
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CPU = Hardware("cpu", "fp32", "sdpa")
BLOCK = 8


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture(scope="module")
def model(tiny_done, tokenizer):
    # weights larger than usual: the losses of tokens differ
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "initializer_range": 0.5}
    return new_model(tiny_done.params.model.model_copy(update=shape), tokenizer, seed=3, attention="sdpa").eval()


def blocks_of(folder: Path, tokens: int) -> TokenBlocks:
    """Random tokens in two files."""
    ids = np.random.default_rng(tokens).integers(4, 500, tokens)
    writer = TokenWriter(folder, "test", shard_tokens=max(1, tokens // 2))
    for part in np.array_split(ids, 4):
        writer.add(part)
    return TokenBlocks(writer.close(), BLOCK)


def slow_nats(model, ids) -> list[float]:
    """-log p of each token but the first, each from a pass of its own over the tokens before it."""
    nats = []
    for place in range(1, len(ids)):
        logits = model(torch.tensor([ids[:place].tolist()])).logits[0, -1]
        nats.append(-logits.double().log_softmax(-1)[ids[place]].item())
    return nats


@pytest.mark.parametrize("tokens", [5 * BLOCK + 3, 4 * BLOCK, 4 * BLOCK + 1, BLOCK - 2])
def test_perplexity_is_that_of_token_by_token(model, tmp_path, tokens):
    blocks = blocks_of(tmp_path, tokens)
    ids = blocks.span(0, tokens)
    with torch.no_grad():
        nats = [value for start in range(0, tokens, BLOCK) for value in slow_nats(model, ids[start : start + BLOCK])]
    expected = sum(nats) / len(nats)
    for batch_size in (1, 3, 100):
        found = ev.perplexity(model, blocks, text_bytes=97, batch_size=batch_size)
        # every token but the first of each block, the short one's too
        assert found["scored_tokens"] == len(nats) == tokens - -(-tokens // BLOCK)
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(expected / math.log(2) * tokens / 97, rel=1e-5)


def test_a_cap_scores_the_first_blocks(model, tmp_path):
    blocks = blocks_of(tmp_path, 5 * BLOCK + 3)
    first = ev.perplexity(model, blocks_of_span(tmp_path / "first", blocks, 2 * BLOCK))
    assert ev.perplexity(model, blocks, max_tokens=2 * BLOCK + 5) == first
    assert first["scored_tokens"] == 2 * (BLOCK - 1)
    assert first["bits_per_byte"] is None
    # at least one block; no more than there are
    assert ev.perplexity(model, blocks, max_tokens=3)["scored_tokens"] == BLOCK - 1
    assert ev.perplexity(model, blocks, max_tokens=10**9)["scored_tokens"] == 5 * (BLOCK - 1)


def blocks_of_span(folder, blocks, stop):
    writer = TokenWriter(folder, "test", shard_tokens=10**6)
    writer.add(blocks.span(0, stop))
    return TokenBlocks(writer.close(), BLOCK)


def test_less_than_a_block_is_scored_even_under_a_cap_and_nothing_is_an_error(model, tmp_path):
    short = blocks_of(tmp_path / "short", BLOCK - 2)
    assert ev.perplexity(model, short, max_tokens=100) == ev.perplexity(model, short)
    for tokens in (0, 1):
        with pytest.raises(TTLError, match=f"there are {tokens} held-out tokens"):
            ev.perplexity(model, blocks_of_span(tmp_path / str(tokens), short, tokens))


def test_sources_are_scored_document_by_document(model, tiny_done, tokenizer):
    found = ev.by_source(model, tiny_done.need("01_data"), tokenizer, context=24)
    rows = list(documents(tiny_done.need("01_data"), "corpus", "test"))
    assert sum(values["documents"] for values in found.values()) == len(rows)
    name = rows[0]["source"]
    nats, scored, tokens, size = 0.0, 0, 0, 0
    for row in (row for row in rows if row["source"] == name):
        ids = tokenizer(row["text"]).input_ids
        for start in range(0, len(ids), 24):
            part = torch.tensor([ids[start : start + 24]])
            if part.shape[1] > 1:
                nats += model(part, labels=part).loss.item() * (part.shape[1] - 1)
                scored += part.shape[1] - 1
        tokens += len(ids) - 1
        size += len(row["text"].encode())
    assert scored < tokens
    assert found[name]["loss"] == pytest.approx(nats / scored, rel=1e-5)
    assert found[name]["bits_per_byte"] == pytest.approx(nats / scored * tokens / size / math.log(2), rel=1e-5)


@pytest.fixture
def trained(tiny_prepared, no_energy):
    run = tiny_prepared()
    pretrain(run)
    return run


@pytest.fixture
def loads(monkeypatch):
    """The checkpoints that were loaded; `loads.fail_at` interrupts before one of them."""

    class Loads(list):
        fail_at = None

    seen, original = Loads(), ev.load_model

    def load(path, *arguments):
        if path.name == seen.fail_at:
            raise KeyboardInterrupt
        seen.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(ev, "load_model", load)
    return seen


def test_checkpoints_are_evaluated_once(trained, loads, tmp_path, capsys):
    stage = trained.stage("04_evaluation")
    os.makedirs(stage.folder)
    blocks = blocks_of(tmp_path / "tokens", 5 * BLOCK)
    folder = trained.folder / "03_pretraining" / "checkpoints"
    names = [path.name for path in list_checkpoints(folder)]
    assert names == ["step-0000004", "step-0000008", "step-0000012"]

    loads.fail_at = names[2]
    with pytest.raises(KeyboardInterrupt):
        ev.over_checkpoints(trained, stage, blocks, 100, CPU)
    loads.fail_at = None
    assert [row["step"] for row in read_json(stage.folder / "checkpoints.json")] == [4, 8]
    rows = ev.over_checkpoints(trained, stage, blocks, 100, CPU)
    assert loads == names
    assert ev.over_checkpoints(trained, stage, blocks, 100, CPU) == rows
    assert loads == names

    assert [row["step"] for row in rows] == [4, 8, 12]
    records = {
        row["step"]: row
        for row in map(json.loads, (folder.parent / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    }
    for row in rows:
        assert row["tokens"] == records[row["step"]]["tokens"]
        expected = ev.perplexity(ev.load_model(folder / f"step-{row['step']:07}", CPU), blocks, text_bytes=100)
        assert row == {"step": row["step"], "tokens": row["tokens"], "energy_kwh": 0.0, **expected}


def test_a_damaged_checkpoint_is_named_and_left_out(trained, loads, tmp_path, capsys):
    stage = trained.stage("04_evaluation")
    os.makedirs(stage.folder)
    path = trained.folder / "03_pretraining" / "checkpoints" / "step-0000008" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    rows = ev.over_checkpoints(trained, stage, blocks_of(tmp_path / "tokens", 3 * BLOCK), 100, CPU)
    assert [row["step"] for row in rows] == [4, 12]
    assert "step-0000008 is not evaluated" in capsys.readouterr().out


def test_a_model_is_loaded_for_scoring_in_the_runs_precision(trained):
    folder = trained.folder / "03_pretraining" / "model"
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("tf32", torch.float32)):
        loaded = ev.load_model(folder, Hardware("cpu", precision, "sdpa"))
        assert loaded.dtype == dtype
        assert not loaded.training
    assert ev.load_model(folder, Hardware("cpu", "bf16", "sdpa"), torch.float32).dtype == torch.float32


def test_the_whole_stage(trained, capsys):
    without = load_params({"file": trained.params.file, "evaluation": {"harness": [], "downstream_epochs": 1}})
    run = type(trained)(without)
    stage = ev.evaluate(run)
    metrics = stage.metrics()
    last = metrics["checkpoints"][-1]
    assert metrics["perplexity"] == pytest.approx(last["perplexity"], rel=1e-6)
    assert metrics["scored_tokens"] == last["scored_tokens"]
    assert set(metrics["downstream"]["trust"]) >= {"accuracy", "macro_f1", "constant_answer", "last_epoch"}
    assert ev.evaluate(run).metrics() == metrics
    assert "reused" in capsys.readouterr().out


def test_the_stage_says_what_is_missing(tiny_prepared, no_energy):
    with pytest.raises(MissingStage, match="03_pretraining .* is not finished"):
        ev.evaluate(tiny_prepared())
