"""Checkpoints are whole or not there, are opened by transformers, and damage is found, named and stepped over."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from ttl_utils import checkpoints as cp
from ttl_utils.errors import DamagedFile
from ttl_utils.model import new_model
from ttl_utils.tokenizer import load_tokenizer
from ttl_utils.training import make_optimizer

OPTIMIZER = cp.OPTIMIZER


@pytest.fixture(scope="module")
def made(tiny_done, tmp_path_factory):
    """A model after two optimizer steps, and its three checkpoints; tests work on copies."""
    params = tiny_done.params
    tokenizer = load_tokenizer(tiny_done.folder / "02_tokenizer")
    small = params.model.model_copy(update={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1})
    model = new_model(small, tokenizer, seed=0, attention="sdpa")
    optimizer = make_optimizer(model, params.pretraining)
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2, 3):
        ids = torch.arange(12)[None] + step
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cp.save_checkpoint(folder, step, model, tokenizer, optimizer, {"tokens": 10 * step})
    return SimpleNamespace(
        folder=folder, model=model, optimizer=optimizer, tokenizer=tokenizer, small=small, settings=params.pretraining
    )


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "stage" / "checkpoints")


def fresh(made):
    model = new_model(made.small, made.tokenizer, seed=1, attention="sdpa")
    return model, make_optimizer(model, made.settings)


def save(made, folder, step):
    return cp.save_checkpoint(folder, step, made.model, made.tokenizer, made.optimizer, {"tokens": 0})


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_loaded_is_what_was_saved(made, folder):
    torch.manual_seed(5)
    path = save(made, folder, 4)
    expected = torch.rand(3)
    model, optimizer = fresh(made)
    torch.rand(7)
    state = cp.load_checkpoint(path, model, optimizer)
    assert torch.equal(torch.rand(3), expected)
    assert state == {"step": 4, "tokens": 0}
    for one, other in zip(made.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
        kept, loaded = made.optimizer.state[one], optimizer.state[other]
        assert kept.keys() == loaded.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(kept[key], loaded[key]) and kept[key].dtype == loaded[key].dtype for key in kept)


def test_training_goes_on_as_if_never_stopped(made, folder):
    model, optimizer = fresh(made)
    cp.load_checkpoint(folder / "step-0000002", model, optimizer)
    ids = torch.arange(12)[None] + 3
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.model.parameters(), strict=True))


def test_transformers_opens_the_folder(made, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder / "step-0000003"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.model.parameters(), strict=True))
    text = "O preço do café não mudou."
    assert AutoTokenizer.from_pretrained(path)(text).input_ids == made.tokenizer(text).input_ids
    assert (path / "tokenizer.model").is_file()


def test_checkpoints_stand_in_the_order_of_steps(tmp_path):
    steps = (9_999_999, 10_000_000, 5)
    for step in steps:
        (tmp_path / f"step-{step:07}").mkdir()
    for other in (".step-0000007.partial", "step-0000006.damaged", "step-12"):
        (tmp_path / other).mkdir()
    assert [cp.step_of(path) for path in cp.list_checkpoints(tmp_path)] == sorted(steps)


@pytest.mark.parametrize("fails_at", ["model", OPTIMIZER, "random.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("step", [3, 4], ids=["again", "new"])
def test_a_failure_while_saving_leaves_the_old_ones_alone(made, folder, monkeypatch, fails_at, step):
    before = content(folder)

    def failing(original, place):
        def save(value, path, *arguments, **options):
            if Path(path).name == fails_at:
                Path(path).write_bytes(b"half")
                raise KeyboardInterrupt
            return original(value, path, *arguments, **options)

        return save if place else (lambda path, value: save(value, path))

    if fails_at == "model":
        monkeypatch.setattr(made.model, "save_pretrained", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        import safetensors.torch

        monkeypatch.setattr(safetensors.torch, "save_file", failing(safetensors.torch.save_file, True))
        write = cp.write_json
        monkeypatch.setattr(cp, "write_json", failing(lambda value, path: write(path, value), False))
    with pytest.raises(KeyboardInterrupt):
        save(made, folder, step)
    assert content(folder) == before
    assert cp.newest_whole(folder) == folder / "step-0000003"


def test_a_full_disk_is_told_as_one(made, folder, monkeypatch):
    import safetensors.torch

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = content(folder)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save(made, folder, 4)
    assert caught.value.errno == errno.ENOSPC
    assert content(folder) == before


def test_what_a_killed_run_was_writing_is_removed(made, folder):
    left = folder / ".step-0000007.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert cp.newest_whole(folder).name == "step-0000003"
    save(made, folder, 4)
    assert not left.exists()


FILES = [
    "checkpoint.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    OPTIMIZER,
    "random.safetensors",
    "state.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1] if path.suffix != ".json" else path.read_bytes()[:-3])


def test_every_file_is_named_below(folder):
    assert sorted(path.name for path in (folder / "step-0000003").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(folder, capsys, name, damage):
    damage(folder / "step-0000003" / name)
    with pytest.raises(DamagedFile, match="step-0000003"):
        cp.check(folder / "step-0000003")
    assert cp.newest_whole(folder) == folder / "step-0000002"
    said = capsys.readouterr().out
    assert "step-0000003" in said
    assert "step-0000003.damaged" in said
    assert (folder / "step-0000003.damaged").is_dir()
    assert not (folder / "step-0000003").exists()
    # said once
    assert cp.newest_whole(folder) == folder / "step-0000002"
    assert capsys.readouterr().out == ""


def test_when_all_are_damaged_nothing_is_begun_anew(folder):
    for path in cp.list_checkpoints(folder):
        flip(path / "model.safetensors")
    with pytest.raises(DamagedFile, match="no checkpoint is whole") as caught:
        cp.newest_whole(folder)
    assert str(folder.parent) in str(caught.value)
    assert len(list(folder.glob("*.damaged"))) == 3


def test_without_checkpoints_there_is_none(tmp_path):
    assert cp.newest_whole(tmp_path / "checkpoints") is None


def test_thinning_keeps_weights_and_the_newest_optimizer_states(folder):
    before = content(folder)
    cp.thin_out(folder, 2)
    gone = before.keys() - content(folder).keys()
    assert gone == {f"step-0000001/{OPTIMIZER}"}
    for path in cp.list_checkpoints(folder):
        cp.check(path)
    assert OPTIMIZER not in json.loads((folder / "step-0000001" / "checkpoint.json").read_text())
    cp.thin_out(folder, 1)
    assert [(path / OPTIMIZER).is_file() for path in cp.list_checkpoints(folder)] == [False, False, True]
    assert cp.newest_whole(folder).name == "step-0000003"
    flip(folder / "step-0000003" / "config.json")
    # the ones before are whole, but cannot be gone on from
    with pytest.raises(DamagedFile, match="no checkpoint is whole enough"):
        cp.newest_whole(folder)


def test_thinning_goes_on_where_a_kill_left_off_and_past_a_damaged_one(folder):
    hashes = json.loads((folder / "step-0000002" / "checkpoint.json").read_text())
    del hashes[OPTIMIZER]
    (folder / "step-0000002" / "checkpoint.json").write_text(json.dumps(hashes))
    (folder / "step-0000001" / "checkpoint.json").write_text("{")
    cp.thin_out(folder, 1)
    assert not (folder / "step-0000002" / OPTIMIZER).exists()
    assert (folder / "step-0000001" / OPTIMIZER).exists()
    cp.check(folder / "step-0000002")
