"""Rows of another length, and documents that do not see each other; the paper's way stays as it is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ttl_utils import pretraining
from ttl_utils.blocks import step_indices
from ttl_utils.files import sha256
from ttl_utils.loss import summed_loss
from ttl_utils.model import Hardware, choose_hardware, new_model
from ttl_utils.params import load_params
from ttl_utils.pretraining import block_steps, pretrain, token_blocks
from ttl_utils.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("no_energy")
torch.set_num_threads(1)
ONE = SimpleNamespace(process_index=0, num_processes=1)
SHORT = {"max_steps": 2, "save_steps": 2, "eval_steps": 2, "logging_steps": 1}


def weights(stage) -> str:
    return sha256(stage.folder / "model" / "model.safetensors")


@pytest.fixture
def isolated(tiny_prepared):
    return tiny_prepared(pretraining={"isolate_documents": True})


@pytest.fixture
def model(tiny_done):
    tokenizer = load_tokenizer(tiny_done.folder / "02_tokenizer")
    return lambda attention: new_model(tiny_done.params.model, tokenizer, 0, attention).eval()


def test_the_papers_way_is_ids_alone(tiny_prepared):
    run = tiny_prepared()
    blocks = token_blocks(run, "train")
    assert blocks.block_size == 64
    step = block_steps(blocks, run)(5, ONE)
    whole = blocks.batch(step_indices(42, 5, 4, len(blocks)))
    assert [set(batch) for batch in step.micro_batches] == [{"input_ids", "labels"}] * 2
    for key in ("input_ids", "labels"):
        assert torch.cat([batch[key] for batch in step.micro_batches]).tolist() == whole.tolist()
    assert step.targets == 4 * 63
    # where documents begin is not even read
    for path in run.stage("02_tokenizer").files("tokens"):
        if path.suffix == ".npy":
            path.unlink()
    block_steps(token_blocks(run, "train"), run)(5, ONE)


def test_rows_are_the_same_and_know_their_documents(isolated, tiny_done):
    blocks = token_blocks(isolated, "train")
    step = block_steps(blocks, isolated)(5, ONE)
    plain = block_steps(token_blocks(tiny_done, "train"), tiny_done)(5, ONE)
    assert step.targets == plain.targets
    for one, other in zip(step.micro_batches, plain.micro_batches, strict=True):
        assert set(one) == {"input_ids", "labels", "position_ids"}
        assert all(torch.equal(one[key], other[key]) for key in other)
        begins = one["input_ids"] == 1
        begins[:, 0] = True
        assert torch.equal(one["position_ids"] == 0, begins)
        # they count up in between
        steps = one["position_ids"].diff(dim=1)
        assert ((steps == 1) | begins[:, 1:]).all()
    # documents begin within rows, and rows within documents
    assert begins[:, 1:].any() and (one["input_ids"][:, 0] != 1).any()
    # processes share the rows with their positions
    parts = [block_steps(blocks, isolated)(5, SimpleNamespace(process_index=n, num_processes=2)) for n in range(2)]
    shared = [row for part in parts for batch in part.micro_batches for row in batch["position_ids"].tolist()]
    assert sorted(shared) == sorted(row for batch in step.micro_batches for row in batch["position_ids"].tolist())


def logits(model, batch, **changes) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"} | changes
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_document_sees_no_other(isolated, model, attention):
    made = model(attention)
    batch = block_steps(token_blocks(isolated, "train"), isolated)(5, ONE).micro_batches[-1]
    positions = batch["position_ids"]
    row = int((positions == 0).sum(1).argmax())
    starts = torch.nonzero(positions[row] == 0).flatten().tolist() + [64]
    assert len(starts) > 2
    before = logits(made, batch)
    for first, last in zip(starts, starts[1:], strict=False):
        changed = batch["input_ids"].clone()
        changed[row, first:last] = 4 + (changed[row, first:last] + 17) % 500
        after = logits(made, batch, input_ids=changed)
        differs = (after != before).any(-1)
        assert differs[row, first:last].all()
        # not in its own row, nor in another
        differs[row, first:last] = False
        assert not differs.any()
        if first:
            # as the paper packs them, those that follow do see it
            plain = {key: value for key, value in batch.items() if key != "position_ids"}
            leaks = logits(made, plain, input_ids=changed) != logits(made, plain)
            assert last == 64 or leaks[row, last:].any()


def test_a_document_in_a_row_is_as_if_it_stood_alone(isolated, model):
    made = model("sdpa")
    batch = block_steps(token_blocks(isolated, "train"), isolated)(5, ONE).micro_batches[0]
    together, alone = summed_loss(made, batch).item(), 0.0
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = torch.nonzero(positions == 0).flatten().tolist() + [64]
        for first, last in zip(starts, starts[1:], strict=False):
            # the token that follows, the next document's first one, is learned from this document alone
            part = ids[None, first : last + 1]
            alone += summed_loss(made, {"input_ids": part, "labels": part}).item()
    assert together == pytest.approx(alone, rel=1e-5)


def test_weights_are_as_today_unless_documents_are_kept_apart(tiny_prepared):
    made = {}
    for name, changes in {
        "default": {},
        "the context by its number": {"block_size": 64},
        "isolated": {"isolate_documents": True},
        "shorter rows": {"block_size": 32},
    }.items():
        made[name] = pretrain(tiny_prepared(run=name.replace(" ", "-"), pretraining={**SHORT, **changes}))
    found = {name: weights(stage) for name, stage in made.items()}
    assert found["default"] == found["the context by its number"]
    assert len(set(found.values())) == 3
    # as many tokens a step, and what is held out is scored alike
    metrics = {name: stage.metrics() for name, stage in made.items()}
    assert len({one["tokens"] for one in metrics.values()}) == 1
    assert len({one["initial_validation_loss"] for one in metrics.values()}) == 1


def test_shorter_rows_are_for_training_alone(tiny_prepared):
    run = tiny_prepared(pretraining={"block_size": 16})
    train, test = token_blocks(run, "train"), token_blocks(run, "test")
    assert (train.block_size, test.block_size) == (16, 64)
    step = block_steps(train, run)(0, ONE)
    assert torch.cat([batch["input_ids"] for batch in step.micro_batches]).shape == (16, 16)
    assert step.targets == 16 * 15


def test_unique_tokens_are_those_of_the_rows(tiny_prepared):
    run = tiny_prepared(pretraining={**SHORT, "block_size": 32})
    metrics = pretrain(run).metrics()
    tokens = run.stage("02_tokenizer").metrics()["train_tokens"]
    assert metrics["unique_tokens"] == tokens // 32 * 32
    assert metrics["epochs"] == pytest.approx(2 * 256 / metrics["unique_tokens"])


def test_flash_attention_gives_way_with_a_reason(tiny_prepared, monkeypatch, capsys):
    real = choose_hardware(load_params({}).pretraining.model_copy(update={"device": "cpu", "precision": "fp32"}))
    flash = Hardware("cpu", "fp32", "flash_attention_2", (*real.reasons[:2], "attention: flash_attention_2 (as asked)"))
    monkeypatch.setattr(pretraining, "choose_hardware", lambda _: flash)
    stage = pretrain(tiny_prepared(pretraining={**SHORT, "isolate_documents": True}))
    assert stage.metrics()["attention"] == "sdpa"
    assert "attention: sdpa (FlashAttention 2 would mix the documents of a row: isolate_documents)" in (
        capsys.readouterr().out
    )


def test_positions_take_no_more_than_their_rows(isolated):
    blocks = token_blocks(isolated, "train")
    positions = blocks.positions(range(len(blocks)))
    assert positions.dtype == np.int64 and positions.max() < 64 and positions.shape == (len(blocks), 64)
