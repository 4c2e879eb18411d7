"""Checkpoints are whole or not there, are opened by transformers, and damage is found, named and stepped over."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ttl_utils import checkpoints as cp
from ttl_utils import tensors
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import sha256
from ttl_utils.model import new_model
from ttl_utils.step import make_optimizer
from ttl_utils.tokenizer import load_tokenizer

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


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.lists(st.integers(1, 5), max_size=3)
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_a_tensor_file_is_the_librarys(tmp_path_factory, shapes, is_model):
    folder, metadata = tmp_path_factory.mktemp("tensors"), {"format": "pt"} if is_model else None
    values = {name: (200 * torch.rand(shape)).to(dtype) for name, (dtype, shape) in shapes.items()}
    save_file(values, folder / "theirs", metadata)
    assert tensors.write_tensors(folder / "ours", values, metadata) == sha256(folder / "ours")
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_large_tensors_of_any_layout_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_PIECE", 1000)
    values = {"turned": torch.rand(300, 7).T, "weights": torch.nn.Parameter(torch.rand(5001))}
    tensors.write_tensors(tmp_path / "ours", values)
    loaded = load_file(tmp_path / "ours")
    assert all(torch.equal(loaded[name], values[name]) for name in values)


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_is_what_save_pretrained_writes(made, tmp_path, tied):
    small = made.small.model_copy(update={"tie_word_embeddings": tied})
    model = new_model(small, made.tokenizer, seed=0, attention="sdpa")
    path = cp.save_checkpoint(tmp_path, 1, model, made.tokenizer, make_optimizer(model, made.settings), {})
    for expected in cp.save_model_folder(model, made.tokenizer, tmp_path / "model"):
        assert (path / expected.name).read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_optimizers_state_is_in_memory_and_where_it_belongs(made, folder, optim):
    model = new_model(made.small, made.tokenizer, seed=1, attention="sdpa")
    optimizer = make_optimizer(model, made.settings.model_copy(update={"optim": optim}))
    cp.load_checkpoint(folder / "step-0000003", model, optimizer)
    flip(folder / "step-0000003" / OPTIMIZER)
    for one, other in zip(made.model.parameters(), model.parameters(), strict=True):
        kept, loaded = made.optimizer.state[one], optimizer.state[other]
        assert all(torch.equal(kept[key], loaded[key]) for key in kept)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()


def test_checkpoints_stand_in_the_order_of_steps(tmp_path):
    steps = (9_999_999, 10_000_000, 5)
    for step in steps:
        (tmp_path / f"step-{step:07}").mkdir()
    for other in (".step-0000007.partial", "step-0000006.damaged", "step-12"):
        (tmp_path / other).mkdir()
    assert [cp.step_of(path) for path in cp.list_checkpoints(tmp_path)] == sorted(steps)


@pytest.mark.parametrize("fails_at", ["model", cp.WEIGHTS, OPTIMIZER, cp.RANDOM, "checkpoint.json"])
@pytest.mark.parametrize("step", [3, 4], ids=["again", "new"])
def test_a_failure_while_saving_leaves_the_old_ones_alone(made, folder, monkeypatch, fails_at, step):
    before = content(folder)

    def failing(original):
        def write(path, *arguments):
            if path.name == fails_at:
                path.write_bytes(b"half")
                raise KeyboardInterrupt
            return original(path, *arguments)

        return write

    if fails_at == "model":
        monkeypatch.setattr(made.model, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        monkeypatch.setattr(tensors, "write_tensors", failing(tensors.write_tensors))
        monkeypatch.setattr(cp, "write_json", failing(cp.write_json))
    with pytest.raises(KeyboardInterrupt):
        save(made, folder, step)
    assert content(folder) == before
    assert cp.newest_whole(folder) == folder / "step-0000003"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_told_as_one_and_keeps_the_old(made, folder, monkeypatch):
    before, opened = content(folder), Path.open

    def full(path, *arguments, **options):
        return opened(Path("/dev/full") if path.name == OPTIMIZER else path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr(Path, "open", full)
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


# retention


def names(folder):
    return [path.name for path in cp.list_checkpoints(folder)]


def test_only_the_newest_are_kept_in_all(folder):
    cp.thin_out(folder, 2, 2)
    assert names(folder) == ["step-0000002", "step-0000003"]
    cp.thin_out(folder, 2, 1)
    assert names(folder) == ["step-0000003"]
    assert len(list(folder.iterdir())) == 1
    assert cp.newest_whole(folder).name == "step-0000003"


def test_the_only_one_to_go_on_from_stays(folder):
    for name in ("step-0000002", "step-0000003"):
        (folder / name / OPTIMIZER).unlink()
    cp.thin_out(folder, 1, 1)
    assert names(folder) == ["step-0000001", "step-0000003"]
    assert cp.resumable(folder) == [folder / "step-0000001"]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 4), st.integers(1, 8) | st.none())
def test_retention_keeps_what_it_says(tmp_path_factory, data, with_optimizer, keep, limit):
    folder = tmp_path_factory.mktemp("many")
    for step, has in enumerate(with_optimizer):
        path = folder / cp.name_of(step)
        path.mkdir()
        (path / "checkpoint.json").write_text(json.dumps({OPTIMIZER: "x"} if has else {}))
        if has:
            (path / OPTIMIZER).write_text("")
    resumable = [step for step, has in enumerate(with_optimizer) if has]
    everything = list(range(len(with_optimizer)))
    cp.thin_out(folder, keep, limit)
    kept = set(everything if limit is None else everything[-limit:]) | set(resumable[-1:])
    assert [cp.step_of(path) for path in cp.list_checkpoints(folder)] == sorted(kept)
    assert [cp.step_of(path) for path in cp.resumable(folder)] == [s for s in resumable[-keep:] if s in kept]
    assert not list(folder.glob(".*"))
    before = content(folder)
    cp.thin_out(folder, keep, limit)
    assert content(folder) == before


def test_a_kill_while_one_is_deleted_leaves_nothing_that_looks_whole(made, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(KeyboardInterrupt) if path.exists() else 0
        )
        with pytest.raises(KeyboardInterrupt):
            cp.thin_out(folder, 2, 2)
    assert names(folder) == ["step-0000002", "step-0000003"]
    assert (folder / ".step-0000001.old.partial").is_dir()
    save(made, folder, 4)
    assert not list(folder.glob(".*"))


def test_what_takes_the_place_of_another_is_never_half_there(folder, monkeypatch):
    new = shutil.copytree(folder / "step-0000002", folder / ".step-0000003.partial")
    rename = cp.os.rename

    def killed(old, new):
        if Path(new).name == "step-0000003":
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cp.os, "rename", killed)
        cp.swap(folder / "step-0000003", new)
    assert names(folder) == ["step-0000001", "step-0000002"]
    assert cp.newest_whole(folder).name == "step-0000002"


# going back to an earlier step


def set_aside(folder):
    return sorted(path.name for path in folder.glob("step-*.*"))


def test_a_run_goes_back_once_and_then_on(made, folder, capsys):
    (folder.parent / "metrics.jsonl").write_text("the curve so far")
    assert cp.newest_whole(folder, 1).name == "step-0000001"
    assert names(folder) == ["step-0000001"]
    assert set_aside(folder) == ["step-0000002.later", "step-0000003.later"]
    assert "step-0000002 is kept as step-0000002.later" in capsys.readouterr().out
    assert (folder / "step-0000003.later" / "metrics.jsonl").read_text() == "the curve so far"
    # nothing made since, and nothing said
    assert cp.newest_whole(folder, 1).name == "step-0000001"
    assert capsys.readouterr().out == ""
    # killed and run again by the same command, twice
    save(made, folder, 2)
    assert cp.newest_whole(folder, 1).name == "step-0000002"
    assert "resume_from_checkpoint 1: done before" in capsys.readouterr().out
    save(made, folder, 4)
    assert cp.newest_whole(folder, 1).name == "step-0000004"
    assert set_aside(folder) == ["step-0000002.later", "step-0000003.later"]


def test_another_step_or_a_run_without_one_makes_it_count_again(made, folder):
    cp.newest_whole(folder, 2)
    save(made, folder, 3)
    assert cp.newest_whole(folder, 1).name == "step-0000001"
    save(made, folder, 3)
    assert cp.newest_whole(folder, None).name == "step-0000003"
    assert cp.newest_whole(folder, 1).name == "step-0000001"
    wanted = ["step-0000002.later", "step-0000003.later", "step-0000003.later-2", "step-0000003.later-3"]
    assert set_aside(folder) == wanted
    for path in folder.glob("*.later*"):
        cp.check(path)


def test_a_kill_while_going_back_is_made_good(folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cp, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cp.newest_whole(folder, 1)
    assert cp.newest_whole(folder, 1).name == "step-0000001"
    assert set_aside(folder) == ["step-0000002.later", "step-0000003.later"]


def test_step_0_is_the_start(made, folder):
    assert cp.newest_whole(folder, 0) is None
    assert len(set_aside(folder)) == 3
    save(made, folder, 2)
    assert cp.newest_whole(folder, 0).name == "step-0000002"
    # a run that has nothing yet
    assert cp.newest_whole(folder.parent / "other", 0) is None


def test_a_step_that_cannot_be_gone_back_to_changes_nothing(folder):
    cp.thin_out(folder, 2)
    flip(folder / "step-0000002" / OPTIMIZER)
    before = content(folder)
    for step, wanted in ((1, "has no optimizer state any more"), (2, "is damaged"), (7, "is not there")):
        with pytest.raises(TTLError, match=rf"resume_from_checkpoint {step}: .*{wanted}.* go on from: 2, 3; 0 is"):
            cp.newest_whole(folder, step)
        assert content(folder) == before
    with pytest.raises(TTLError, match="go on from: none; 0 is the start"):
        cp.newest_whole(folder.parent / "other", 4)


def test_nothing_damaged_is_thrown_away(made, folder):
    for _ in range(2):
        flip(folder / "step-0000003" / "model.safetensors")
        assert cp.newest_whole(folder).name == "step-0000002"
        save(made, folder, 3)
    assert set_aside(folder) == ["step-0000003.damaged", "step-0000003.damaged-2"]
