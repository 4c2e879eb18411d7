"""Runs: what a stage's identity is, reuse, conflicts, bases, locks, damage, interruption, and what is recorded."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from tests.test_ledger import rows_of
from ttl_utils import progress as progress_module
from ttl_utils import provenance
from ttl_utils import run as module
from ttl_utils.errors import DamagedFile, MissingStage, ParameterError, StageConflict, TTLError
from ttl_utils.files import read_json, write_json, write_text
from ttl_utils.params import Params, load_params, project_root
from ttl_utils.progress import Progress, clock
from ttl_utils.run import STAGES, Run, Stage, outputs_folder
from ttl_utils.schema import SECTIONS, Origin

THIS, OTHER = "a" * 40, "b" * 40
NANO = load_params({})
# what each stage makes, beside what later stages read
GROUPS = {
    "01_data": ("corpus", "downstream", "chat"),
    "02_tokenizer": ("tokenizer", "tokens"),
    "03_pretraining": ("model", "curve"),
    "04_evaluation": (),
    "05_chat": ("model",),
    "06_carbon_report": ("report",),
}
# the keys that may change while a stage is under way: said here again, so that a new one is a decision
LOOP = (
    "per_device_train_batch_size device precision attention compile gradient_checkpointing optim "
    "logging_steps log_with save_steps resumable_checkpoints save_total_limit resume_from_checkpoint max_hours copy_to"
)
FREE = {
    "data.shard_mb",
    "data.workers",
    "data.overlap",
    "tokenizer.comparison",
    "tokenizer.parity_documents",
    "tokenizer.shard_tokens",
    *(f"{section}.{key}" for section in ("pretraining", "chat") for key in LOOP.split()),
    *(f"pretraining.{key}" for key in ("eval_steps", "eval_tokens", "prompts", "max_new_tokens")),
    *(f"pretraining.{key}" for key in ("init_revision", "init_schedule", "search_steps")),
    *(f"evaluation.{key}" for key in ("batch_size", "model_revision", "texts", "texts_limit", "checkpoint_tasks")),
    *(f"evaluation.{key}" for key in ("inference", "generation")),
    "chat.base_model_revision",
    "carbon.measure_power_s",
}


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch, no_energy) -> Path:
    monkeypatch.setenv("TTL_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(module, "code_version", lambda: {"commit": THIS, "clean": True})
    return tmp_path / "outputs"


def a_run(base: str | None = None, name: str | None = None, **overrides: Any) -> Run:
    if not overrides:
        values = NANO.values.model_copy(update={"run": name, "base": base})
        return Run(Params(values, NANO.origins, ()))
    return Run(load_params({"run": name, "base": base, **overrides}))


def make(run: Run, name: str, metrics: dict | None = None) -> Stage:
    """Make a stage whose files are a pure function of its identity, as a real one's are."""
    stage = run.stage(name)
    if stage.reuse():
        return stage
    with stage.work():
        outputs = {}
        for group in GROUPS[name]:
            path = stage.folder / group / "part.txt"
            write_text(path, f"{group} from {json.dumps(stage.identity())}\n")
            outputs[group] = [path]
        stage.finish({"figure": 1.5} if metrics is None else metrics, outputs)
    return stage


def make_to(run: Run, last: str) -> list[Stage]:
    names = list(STAGES)
    return [make(run, name) for name in names[: names.index(last) + 1]]


def begin(run: Run, name: str) -> Stage:
    stage = run.stage(name)
    with pytest.raises(KeyboardInterrupt), stage.work():
        write_text(stage.folder / "half.txt", "half")
        raise KeyboardInterrupt
    return stage


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_parses(text: str) -> list[str]:
    """The commands that a message tells the user to type are commands."""
    from ttl_utils.commands import parser

    commands = [shlex.split(found) for found in re.findall(r"`(ttl [^`]+)`", text)]
    assert commands
    for command in commands:
        parser().parse_args(command[1:])
    return [" ".join(command) for command in commands]


# identity


def keys_of(model: type[BaseModel], value: Any, path: tuple = ()) -> list[tuple]:
    """Every key of the schema that a value holds, lists by the first item."""
    found = []
    for key in model.model_fields:
        item = getattr(value, key)
        found.append((*path, key))
        items = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []
        inner = items[0] if items else None
        if isinstance(inner, BaseModel):
            first = next(iter(item)) if isinstance(item, dict) else 0
            found += keys_of(type(inner), inner, (*path, key, first))
    return found


KEYS = [
    place for section in SECTIONS for place in keys_of(type(getattr(NANO, section)), getattr(NANO, section), (section,))
]
# the weights that it names are the identity, not the name: test_initial
KEYS.remove(("pretraining", "init_from"))
KEYS.remove(("chat", "base_model"))
KEYS.remove(("evaluation", "model"))


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return value[:-1] or [Origin(pattern="x", kind="plain", filter="prose", licence="x")]
    if isinstance(value, dict):
        return dict(list(value.items())[:-1]) or {"x": "x"}
    return 1


def with_change(value: Any, path: tuple) -> Any:
    if not path:
        return changed(value)
    if isinstance(value, BaseModel):
        return value.model_copy(update={path[0]: with_change(getattr(value, path[0]), path[1:])})
    items = list(value) if isinstance(value, list) else dict(value)
    items[path[0]] = with_change(items[path[0]], path[1:])
    return items


def test_the_free_keys_are_these():
    assert {".".join(map(str, place)) for place in KEYS} >= FREE


@pytest.mark.parametrize("place", KEYS, ids=lambda place: ".".join(map(str, place)))
def test_a_key_is_identity_unless_it_changes_no_result(place):
    other = Run(Params(with_change(NANO.values, place), {}, ()))
    assert other.params.values != NANO.values
    free = ".".join(map(str, place)) in FREE
    for name, definition in STAGES.items():
        differs = other.stage(name).identity() != a_run().stage(name).identity()
        assert differs == (place[0] in definition.sections and not free), name


def test_the_seed_is_identity_and_names_are_not():
    update = {"size": "other", "file": "other.yaml", "run": "other"}
    renamed = Run(Params(NANO.values.model_copy(update=update), {}, ()))
    seeded = Run(Params(NANO.values.model_copy(update={"seed": 43}), {}, ()))
    for name in STAGES:
        identity = a_run().stage(name).identity()
        assert renamed.stage(name).identity() == identity
        assert seeded.stage(name).identity() == {**identity, "seed": 43}


def test_every_input_is_a_group_of_an_earlier_stage():
    names = list(STAGES)
    for number, definition in enumerate(STAGES.values()):
        for place in definition.inputs:
            stage, group = place.split("/")
            assert stage in names[:number] and group in GROUPS[stage]


def test_inputs_are_identity_by_their_bytes():
    run = a_run()
    assert run.stage("02_tokenizer").identity()["input 01_data/corpus"] is None
    first = make(run, "01_data")
    identity = run.stage("02_tokenizer").identity()
    assert identity["input 01_data/corpus"] == first.manifest()["outputs"]["corpus"]["fingerprint"]
    other = a_run(name="other", data={"test_share": 0.2})
    make(other, "01_data")
    assert other.stage("02_tokenizer").identity() != identity


def test_a_model_that_is_named_takes_the_place_of_the_runs_own(monkeypatch):
    weights = {"weights": "a"}
    monkeypatch.setattr("ttl_utils.run.fingerprint", lambda params, key, recorded: {key: weights})
    other = a_run(evaluation={"model": "somebody/model"}).stage("04_evaluation")
    assert other.inputs() == ("01_data/corpus", "01_data/downstream")
    assert other.identity()["evaluated weights"] == {"evaluation.model": weights}
    assert not any("03_pretraining" in key or "02_tokenizer" in key for key in other.identity())
    own = a_run().stage("04_evaluation")
    assert own.inputs() == STAGES["04_evaluation"].inputs and "evaluated weights" not in own.identity()
    # no other stage knows of it
    chat = a_run(evaluation={"model": "somebody/model"}).stage("05_chat")
    assert chat.inputs() == STAGES["05_chat"].inputs
    # stage 05 has a key of its own; the context, which stage 03's model would have decided, is then part of it
    tuned = a_run(chat={"base_model": "somebody/model"}).stage("05_chat")
    assert tuned.inputs() == ("01_data/chat",) and "base weights" not in chat.identity()
    assert tuned.identity()["base weights"] == {"chat.base_model": weights}
    assert tuned.identity()["context"] == 256 and "context" not in chat.identity()


# reuse


def test_a_run_is_a_folder_named_by_its_size_or_name(outputs):
    assert a_run().folder == outputs / "nano"
    assert a_run(name="variant").folder == outputs / "variant"
    assert a_run().figures == outputs / "nano" / "figures"


def test_a_finished_stage_is_reused_with_a_line(capsys):
    run = a_run()
    assert not run.stage("01_data").reuse() and not run.stage("01_data").finished
    before = contents(make(run, "01_data").folder)
    capsys.readouterr()
    stage = make(run, "01_data")
    said = capsys.readouterr().out
    assert stage.check() == "finished" and contents(stage.folder) == before
    assert said == f"01_data: finished {stage.manifest()['finished']}, reused\n"


def test_other_code_is_reused_and_named(capsys, monkeypatch):
    make(a_run(), "01_data")
    monkeypatch.setattr(module, "code_version", lambda: {"commit": OTHER, "clean": True})
    assert a_run().stage("01_data").reuse()
    assert f"reused, made by other code ({THIS[:10]})" in capsys.readouterr().out


def test_code_without_a_commit_is_named(capsys, monkeypatch):
    monkeypatch.setattr(module, "code_version", lambda: {"commit": None, "clean": None})
    make(a_run(), "01_data")
    assert a_run().stage("01_data").reuse()
    assert "other code" not in capsys.readouterr().out
    monkeypatch.setattr(module, "code_version", lambda: {"commit": THIS, "clean": True})
    assert a_run().stage("01_data").reuse()
    assert "made by other code (unknown)" in capsys.readouterr().out


def test_a_free_key_changes_nothing_that_is_made():
    make_to(a_run(), "03_pretraining")
    run = a_run(pretraining={"logging_steps": 1, "save_steps": 7, "device": "cpu"}, data={"shard_mb": 1})
    assert all(run.stage(name).reuse() for name in list(STAGES)[:3])


# other identities


def test_a_finished_stage_of_another_identity_is_a_conflict():
    stages = make_to(a_run(), "03_pretraining")
    before = contents(stages[-1].folder)
    run = a_run(pretraining={"learning_rate": 0.1, "weight_decay": 0.5})
    assert run.stage("01_data").reuse() and run.stage("02_tokenizer").reuse()
    for attempt in (run.stage("03_pretraining").check, run.stage("03_pretraining").reuse):
        with pytest.raises(StageConflict) as caught:
            attempt()
        text = str(caught.value)
        assert text.startswith(f"03_pretraining of run 'nano' was made otherwise ({stages[-1].folder}):")
        assert "\n  pretraining.learning_rate: 0.003 -> 0.1\n  pretraining.weight_decay: 0.01 -> 0.5\n" in text
        assert "`run`" in text and assert_parses(text) == ["ttl run nano --from 03 --force"]
    with pytest.raises(StageConflict), run.stage("03_pretraining").work():
        pytest.fail("the stage was entered")
    assert contents(stages[-1].folder) == before


def test_a_difference_deep_in_a_list_is_shown():
    make(a_run(), "01_data")
    sources = [source.model_dump() for source in NANO.data.sources]
    sources[2]["limit"] = 50
    with pytest.raises(StageConflict) as caught:
        a_run(data={"sources": sources}).stage("01_data").check()
    assert "\n  data.sources.2.limit: None -> 50\n" in str(caught.value)
    with pytest.raises(StageConflict) as caught:
        a_run(data={"sources": [*sources, {**sources[0], "name": "more"}]}).stage("01_data").check()
    assert f"\n  data.sources.{len(sources)}: None -> {{'name': 'more'" in str(caught.value)


def test_a_changed_input_is_a_conflict_that_names_it():
    make_to(a_run(), "02_tokenizer")
    run = a_run(data={"test_share": 0.2})
    assert run.stage("01_data").set_aside()
    make(run, "01_data")
    with pytest.raises(StageConflict, match="input 01_data/corpus: [0-9a-f]{64} -> [0-9a-f]{64}"):
        run.stage("02_tokenizer").check()


def test_a_begun_stage_goes_on(capsys):
    stage = begin(a_run(), "01_data")
    assert not stage.finished and stage.check() == "begun"
    before = contents(stage.folder)
    run = a_run(data={"shard_mb": 1})
    assert not run.stage("01_data").reuse()
    with run.stage("01_data").work():
        assert contents(stage.folder) == before
    started = read_json(stage.folder / "stage.json")["started"]
    assert f"01_data: begun {started}, going on" in capsys.readouterr().out
    assert make(run, "01_data").manifest()["started"] == started


def test_a_begun_stage_of_another_identity_is_a_conflict():
    stage = begin(a_run(), "01_data")
    with pytest.raises(StageConflict, match=r"was begun otherwise .*\n  data.test_share: 0.1 -> 0.2\n"):
        a_run(data={"test_share": 0.2}).stage("01_data").check()
    assert "half.txt" in contents(stage.folder)


def test_a_stage_just_finished_elsewhere_is_not_made_twice():
    run = a_run()
    late = run.stage("01_data")
    make(run, "01_data")
    with pytest.raises(StageConflict, match="finished by another process just now"), late.work():
        pytest.fail("the stage was entered")


def test_set_aside_keeps_everything(outputs, capsys):
    run, kept = a_run(), []
    assert run.stage("01_data").set_aside() is None
    for number in (1, 2, 3):
        stage = begin(run, "01_data") if number == 2 else make(run, "01_data")
        kept.append(contents(stage.folder))
        aside = stage.set_aside()
        assert aside == outputs / "nano" / f"01_data.old-{number}" and not stage.folder.exists()
        assert f"kept as 01_data.old-{number}" in capsys.readouterr().out
    assert [contents(outputs / "nano" / f"01_data.old-{number}") for number in (1, 2, 3)] == kept
    assert run.stage("01_data").check() == "new"


def test_the_output_of_one_stage_is_missing_and_the_command_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    (outputs_folder() / "nano").mkdir(parents=True)
    with pytest.raises(ParameterError, match="no such run"):
        a_run(name="other", base="nowhere")
    file.write_text((project_root() / "params" / "nano.yaml").read_text().replace("size: nano", "size: mine"))
    for run, command in (
        (a_run(), "ttl run nano --to 01"),
        (a_run(name="other"), "ttl run nano --run other --to 01"),
        (a_run(name="other", base="nano"), "ttl run nano --run other --base nano --to 01"),
        (Run(load_params({"file": str(file)})), f"ttl run {file} --to 01"),
    ):
        with pytest.raises(MissingStage) as caught:
            run.need("01_data")
        assert assert_parses(str(caught.value)) == [command]
        assert "notebooks/01_data.ipynb" in str(caught.value)


@pytest.mark.parametrize("name", [name for name, definition in STAGES.items() if definition.inputs])
def test_a_stage_does_not_start_without_its_inputs(name):
    run = a_run()
    with pytest.raises(MissingStage, match=f"{STAGES[name].inputs[0][:2]}_.* is not finished"), run.stage(name).work():
        pytest.fail("the stage was entered")
    assert not run.stage(name).folder.exists()
    begin(run, "01_data")
    with pytest.raises(MissingStage):
        run.need("01_data")


# a base


def test_a_base_is_used_where_the_identity_is_the_same(outputs, capsys):
    make_to(a_run(), "03_pretraining")
    run = a_run(name="variant", base="nano", pretraining={"learning_rate": 0.1})
    capsys.readouterr()
    for name in ("01_data", "02_tokenizer"):
        stage = run.stage(name)
        assert stage.reuse() and stage.from_base and stage.folder == outputs / "nano" / name
        assert f"{name} of run 'nano': finished" in capsys.readouterr().out
        assert run.need(name).verify(GROUPS[name][0])[0].is_file()
    stage = make(run, "03_pretraining")
    assert not stage.from_base and stage.folder == outputs / "variant" / "03_pretraining"
    assert a_run().stage("03_pretraining").reuse()
    assert set(read_json(outputs / "variant" / "metrics.json")) == {"01_data", "02_tokenizer", "03_pretraining"}
    assert read_json(outputs / "variant" / "run.json")["stages"]["01_data"]["folder"] == os.path.join(
        "..", "nano", "01_data"
    )


def test_an_unfinished_or_other_base_is_not_used(outputs):
    begin(a_run(), "01_data")
    assert not a_run(name="variant", base="nano").stage("01_data").from_base
    make(a_run(), "01_data")
    other = a_run(name="variant", base="nano", data={"test_share": 0.2})
    stage = make(other, "01_data")
    assert not stage.from_base and stage.folder == outputs / "variant" / "01_data"
    # free keys make no difference
    assert a_run(name="third", base="nano", data={"shard_mb": 1}).stage("01_data").from_base
    assert not a_run(name="third").stage("01_data").from_base
    assert not a_run(base="nano").stage("01_data").from_base


@pytest.mark.parametrize("own", [make, begin])
def test_the_runs_own_folder_comes_before_the_base(outputs, own):
    make(a_run(), "01_data")
    variant = {"name": "variant", "base": "nano"}
    own(a_run(name="variant"), "01_data")
    stage = a_run(**variant).stage("01_data")
    assert not stage.from_base and stage.folder == outputs / "variant" / "01_data"
    with pytest.raises(StageConflict):
        a_run(**variant, data={"test_share": 0.2}).stage("01_data").check()


def test_a_bases_folder_is_never_moved():
    made = make(a_run(), "01_data")
    before = contents(made.folder)
    assert a_run(name="variant", base="nano").stage("01_data").set_aside() is None
    assert contents(made.folder) == before


# one process at a time


HOLD = """
import sys, types
energy = types.ModuleType("ttl_utils.carbon")
import contextlib
energy.track, energy.EnergySession = (lambda *_, **__: contextlib.nullcontext()), object
sys.modules["ttl_utils.carbon"] = energy
from ttl_utils.params import load_params
from ttl_utils.files import write_text
from ttl_utils.run import Run
stage = Run(load_params({})).stage("01_data")
with stage.work():
    write_text(stage.folder / "half.txt", "half")
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_work_in_one_stage(capsys):
    held = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        line = ""
        while line != "holding\n":
            line = held.stdout.readline()
            assert line, "the other process ended"
        stage = a_run().stage("01_data")
        assert stage.check() == "begun"
        with pytest.raises(StageConflict, match="is being made by another process") as caught, stage.work():
            pytest.fail("the stage was entered")
        assert str(stage.folder) in str(caught.value) and "`run`" in str(caught.value)
        with pytest.raises(StageConflict, match="is being made by another process"):
            stage.set_aside()
        assert "half.txt" in contents(stage.folder)
        # another run is free
        make(a_run(name="other"), "01_data")
        held.kill()
        held.wait()
        # a killed process holds nothing, and what it had begun goes on
        assert make(a_run(), "01_data").finished
        assert "going on" in capsys.readouterr().out
    finally:
        held.kill()
        held.communicate()


def test_the_lock_is_free_after_an_error():
    run = a_run()
    with pytest.raises(ValueError, match="mine"), run.stage("01_data").work():
        raise ValueError("mine")
    assert make(run, "01_data").finished


def test_other_ranks_leave_folder_and_meter_to_the_first(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = a_run()
    with run.stage("01_data").work() as energy:
        assert energy.energy_kwh == 0
    assert not run.folder.exists()


# damage


@pytest.mark.parametrize("damage", ["byte", "shorter", "longer", "missing", "folder"])
def test_a_damaged_file_is_found(damage):
    run = a_run()
    make(run, "01_data")
    stage = run.need("01_data")
    (path,) = stage.verify("corpus")
    whole = path.read_bytes()
    if damage == "byte":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage in ("shorter", "longer"):
        path.write_bytes(whole[:-1] if damage == "shorter" else whole + b" ")
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    state = "missing" if damage in ("missing", "folder") else "damaged"
    with pytest.raises(DamagedFile, match=f"{re.escape(str(path))} is {state}") as caught:
        stage.verify("corpus")
    assert str(stage.folder) in str(caught.value)
    assert assert_parses(str(caught.value)) == ["ttl run nano --from 01"]
    with pytest.raises(DamagedFile), run.stage("02_tokenizer").work():
        pytest.fail("the stage was entered")
    # the other groups are whole
    assert stage.verify("chat") == stage.files("chat")


def test_the_way_out_of_damage_works():
    run = a_run()
    make_to(run, "02_tokenizer")
    stage = run.stage("01_data")
    stage.files("corpus")[0].write_text("other")
    stage.set_aside()
    make(run, "01_data")
    # made the same, so what was made from it stands
    assert run.stage("02_tokenizer").reuse()


@pytest.mark.parametrize("content", [b"", b'{"identity": {', b"\0" * 40, b'{"a": "\xff\xfe"}'])
@pytest.mark.parametrize("name", ["manifest.json", "stage.json", "metrics.json"])
def test_damaged_json_is_named(content, name):
    run = a_run()
    stage = begin(run, "01_data") if name == "stage.json" else make(run, "01_data")
    (stage.folder / name).write_bytes(content)
    attempt = run.gather_metrics if name == "metrics.json" else run.stage("01_data").reuse
    with pytest.raises(DamagedFile) as caught:
        attempt()
    assert str(caught.value).startswith(f"{stage.folder / name} is damaged") and "delete it" in str(caught.value)


# writing


class Stop(BaseException):
    pass


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_interrupted_write_leaves_nothing_half_written(tmp_path, monkeypatch, step, old):
    path = tmp_path / "folder" / "file.json"
    if old:
        write_text(path, old)

    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(os, step, stop)
        with pytest.raises(Stop):
            write_text(path, "new " * 9999)
    assert contents(tmp_path / "folder") == ({"file.json": b"old"} if old else {})
    write_text(path, "São Paulo\n")
    assert contents(tmp_path / "folder") == {"file.json": "São Paulo\n".encode()}


KILLED = """
import os, signal, sys
from pathlib import Path
from ttl_utils.files import write_text
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_text(Path(sys.argv[1]), "new " * 99999)
"""


def test_a_kill_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, path], timeout=60)
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"
    write_text(path, "new")
    assert contents(tmp_path) == {"file.json": b"new"}


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"ação": None})
    with pytest.raises(TypeError):
        write_json(path, {"path": tmp_path})
    assert read_json(path) == {"ação": None} and "ação" in path.read_text(encoding="utf-8")


def test_the_manifest_is_written_last(monkeypatch):
    run, written = a_run(), []
    monkeypatch.setattr(module, "write_json", lambda path, value: (written.append(path.name), write_json(path, value)))
    stage = make(run, "01_data")
    mine = [name for name in written if name in ("stage.json", "metrics.json", "manifest.json")]
    # the run's gathered metrics.json follows the stage's own three
    assert mine == ["stage.json", "metrics.json", "manifest.json", "metrics.json"]
    assert stage.finished


def test_a_stage_whose_file_is_missing_does_not_finish():
    stage = a_run().stage("01_data")
    with pytest.raises(FileNotFoundError), stage.work():
        stage.finish({}, {"corpus": [stage.folder / "none.txt"]})
    assert not stage.finished and stage.check() == "begun"


def disk_full_errors() -> list:
    from safetensors import SafetensorError

    return [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/tokens.bin"),
        OSError(errno.ENOSPC, "Error writing bytes to file"),
        # what writing a checkpoint to a full disk raises
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_full_disk_is_explained(number):
    error, run = disk_full_errors()[number], a_run()
    stage = run.stage("01_data")
    with pytest.raises(TTLError) as caught, stage.work():
        raise error
    place = "/somewhere/tokens.bin" if number == 0 else stage.folder
    assert str(caught.value).startswith(f"01_data: the disk is full while writing {place}; finished work is kept")
    assert "TTL_OUTPUTS" in str(caught.value) and caught.value.__cause__ is error
    assert stage.check() == "begun" and make(run, "01_data").finished


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_really_full_device_is_explained():
    stage = a_run().stage("01_data")
    with pytest.raises(TTLError, match="the disk is full"), stage.work(), open("/dev/full", "w") as file:
        file.write("text" * 99999)


def test_other_errors_pass_as_they_are():
    for error in (PermissionError(errno.EACCES, "denied"), RuntimeError("bug"), DamagedFile("No space left on device")):
        with pytest.raises(type(error)) as caught, a_run().stage("01_data").work():
            raise error
        assert caught.value is error


# what is recorded


def test_metrics_are_gathered_by_stage(outputs):
    run = a_run()
    make(run, "01_data", {"documents_in": 10, "documents_kept": None, "by_source": {"a": {"b": [1, 2.5]}}})
    make(run, "02_tokenizer", {"vocab_size": 4096})
    begin(run, "03_pretraining")
    expected = {
        "01_data": {"documents_in": 10, "documents_kept": None, "by_source": {"a": {"b": [1, 2.5]}}},
        "02_tokenizer": {"vocab_size": 4096},
    }
    assert read_json(outputs / "nano" / "metrics.json") == expected == run.gather_metrics()
    assert run.stage("02_tokenizer").metrics() == {"vocab_size": 4096}
    run.stage("02_tokenizer").set_aside()
    assert set(run.gather_metrics()) == {"01_data"}


def test_the_manifest_says_what_made_the_stage():
    stage = make(a_run(), "01_data")
    manifest = stage.manifest()
    assert set(manifest) == {"stage", "run", "identity", "code", "versions", "started", "finished", "outputs"}
    assert manifest["stage"] == "01_data" and manifest["run"] == "nano"
    assert manifest["code"] == {"commit": THIS, "clean": True}
    assert manifest["started"] <= manifest["finished"] and manifest["finished"].endswith("+00:00")
    assert "torch" in manifest["versions"]
    file = manifest["outputs"]["corpus"]["files"]["corpus/part.txt"]
    path = stage.folder / "corpus" / "part.txt"
    assert file == {"bytes": path.stat().st_size, "sha256": module.sha256(path)}


def test_run_json_says_what_made_the_run(outputs):
    make_to(a_run(), "02_tokenizer")
    record = read_json(outputs / "nano" / "run.json")
    assert set(record) == {"run", "code", "versions", "machine", "parameters", "stages"}
    assert record["run"] == "nano" and record["code"] == {"commit": THIS, "clean": True}
    assert record["parameters"] == json.loads(json.dumps(NANO.values.model_dump()))
    assert set(record["machine"]) == {"system", "processor", "cores", "memory_gib", "python"}
    assert record["machine"]["memory_gib"] > 0 and record["machine"]["processor"]
    assert set(record["stages"]) == {"01_data", "02_tokenizer"}
    for name, stage in record["stages"].items():
        assert set(stage) == {"started", "finished", "code", "folder"} and stage["folder"] == name


def test_no_secret_of_the_environment_reaches_a_file(outputs, monkeypatch):
    secret = "hf_" + "Segredo42" * 4
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, secret)
    make_to(a_run(), "06_carbon_report")
    files = contents(outputs)
    assert len(files) > 20
    assert not [name for name, content in files.items() if secret.encode() in content]


def test_the_status_file_goes_when_the_stage_is_finished():
    run = a_run()
    stage = run.stage("01_data")
    with stage.work():
        with Progress("data", 10, stage.folder / "status.json") as progress:
            progress.update(10)
        assert (stage.folder / "status.json").is_file()
        stage.finish({}, {})
    assert not (stage.folder / "status.json").exists()


def test_the_codes_version_is_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.undo()
    version = provenance.code_version.__wrapped__
    monkeypatch.setattr(provenance, "project_root", lambda: None)
    assert version() == {"commit": None, "clean": None}
    root = tmp_path / "checkout"
    root.mkdir()
    monkeypatch.setattr(provenance, "project_root", lambda: root)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert version() == {"commit": None, "clean": None}

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    first = version()
    assert re.fullmatch("[0-9a-f]{40}", first["commit"]) and first["clean"] is True
    (root / "new.py").write_text("")
    assert version() == {**first, "clean": False}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version() == {"commit": None, "clean": None}


# where outputs are


def test_the_outputs_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, folder in (("elsewhere", tmp_path / "elsewhere"), ("~/there", Path.home() / "there")):
        monkeypatch.setenv("TTL_OUTPUTS", value)
        assert module.outputs_folder() == folder
    for unset in (lambda: monkeypatch.setenv("TTL_OUTPUTS", ""), lambda: monkeypatch.delenv("TTL_OUTPUTS")):
        unset()
        assert module.outputs_folder() == project_root() / "outputs"
    monkeypatch.setattr(module, "project_root", lambda: None)
    assert module.outputs_folder() == tmp_path / "outputs"


def test_a_moved_outputs_folder_goes_on(outputs, tmp_path, monkeypatch):
    make_to(a_run(), "03_pretraining")
    make(a_run(name="variant", base="nano", chat={"top_k": 3}), "05_chat")
    outputs.rename(tmp_path / "moved")
    monkeypatch.setenv("TTL_OUTPUTS", str(tmp_path / "moved"))
    assert a_run().stage("03_pretraining").reuse()
    assert a_run(name="variant", base="nano", chat={"top_k": 3}).stage("05_chat").reuse()
    assert a_run().need("01_data").verify("corpus")


# the report


def test_reading_the_inputs_is_measured_and_the_session_is_the_new_folders(monkeypatch):
    run, told, clock = a_run(), [], iter(range(100))
    make_to(run, "01_data")
    verify = Stage.verify

    @contextlib.contextmanager
    def track(*_):
        told.append("meter")
        yield
        told.append("end")

    monkeypatch.setattr("ttl_utils.carbon.track", track)
    monkeypatch.setattr(Stage, "verify", lambda *given: told.append(given[1]) or verify(*given))
    monkeypatch.setattr(module, "now", lambda: told.append("now") or f"2026-01-01T00:00:{next(clock):02}+00:00")
    with run.stage("02_tokenizer").work():
        assert told == ["now", "meter", "corpus"]
    assert run.stage("02_tokenizer").begun() == "2026-01-01T00:00:00+00:00" and told[-1] == "end"


def log_energy(run: Run, stage: str, kwh: float) -> None:
    with (run.folder / "energy.jsonl").open("a", encoding="utf-8") as file:
        (row, *_) = rows_of("s", 0, 0, stage=stage)
        file.write(json.dumps({**row, "energy_kwh": kwh}) + "\n")


def test_the_report_is_made_anew_when_the_ledger_grew(outputs, capsys):
    run = a_run()
    make_to(run, "03_pretraining")
    log_energy(run, "03_pretraining", 0.5)
    first = contents(make(run, "06_carbon_report").folder)
    # its own energy is not in it
    log_energy(run, "06_carbon_report", 0.1)
    assert run.stage("06_carbon_report").reuse()
    log_energy(run, "05_chat", 0.25)
    capsys.readouterr()
    again = make(run, "06_carbon_report")
    assert "the earlier folder is kept as 06_carbon_report.old-1" in capsys.readouterr().out
    assert contents(outputs / "nano" / "06_carbon_report.old-1") == first
    assert contents(again.folder) != first and again.reuse()


def test_a_begun_report_is_set_aside_inside_its_own_work(outputs):
    run = a_run()
    make_to(run, "03_pretraining")
    begin(run, "06_carbon_report")
    log_energy(run, "04_evaluation", 0.25)
    # no `reuse` before it: the folder is moved while this object holds the lock
    stage = run.stage("06_carbon_report")
    with stage.work():
        assert contents(stage.folder).keys() == {"stage.json"}
    assert "half.txt" in contents(outputs / "nano" / "06_carbon_report.old-1")


def test_a_report_follows_the_ledger_of_a_base():
    base = a_run()
    make_to(base, "03_pretraining")
    run = a_run(name="variant", base="nano")
    before = run.stage("06_carbon_report").identity()["input energy"]
    log_energy(base, "03_pretraining", 0.5)
    assert run.stage("06_carbon_report").identity()["input energy"] != before


def test_other_carbon_parameters_make_the_report_anew_and_no_other_stage(outputs):
    make_to(a_run(), "06_carbon_report")
    run = a_run(carbon={"country_iso_code": "BRA", "carbon_intensity_g_per_kwh": None})
    assert all(run.stage(name).reuse() for name in list(STAGES)[:5])
    make(run, "06_carbon_report")
    assert (outputs / "nano" / "06_carbon_report.old-1" / "manifest.json").is_file()


# progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.6, "1:00:00"), (90061, "25:01:01")]
)
def test_the_clock(seconds, text):
    assert clock(seconds) == text


def test_progress_is_a_line_now_and_then_and_a_status_for_others(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    status = tmp_path / "status.json"
    with Progress("steps", 2000, status, done=1000) as progress:
        shown = []
        for done in range(1000, 2000):
            now[0] += 0.1
            if progress.update(done + 1, "loss 2.5"):
                shown.append(done + 1)
                assert read_json(status)["done"] == done + 1
    lines = capsys.readouterr().err.splitlines()
    # in a log, every ten seconds
    assert len(shown) == 10 and len(lines) == 11
    # what was done before this process took none of its time
    assert re.fullmatch(r"steps: 1,50\d of 2,000 · loss 2\.5 · 0:(49|50) left", lines[5])
    assert lines[-1] == "steps: 2,000 of 2,000 · took 1:40"
    assert read_json(status)["line"] == lines[-1] and read_json(status)["total"] == 2000
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_an_error_leaves_the_last_status(tmp_path):
    status = tmp_path / "status.json"
    with pytest.raises(ValueError, match="mine"), Progress("steps", None, status) as progress:
        progress.update(5)
        raise ValueError("mine")
    assert read_json(status)["line"] == "steps: 5"


def test_the_work_of_a_cell_is_one_output(monkeypatch):
    from ttl_utils import progress

    shown, cell = [], SimpleNamespace(execution_count=1, kernel=None)

    def display(text, display_id):
        shown.append([repr(text)])
        return SimpleNamespace(update=lambda text, place=shown[-1]: place.append(repr(text)))

    monkeypatch.setattr("IPython.get_ipython", lambda: cell)
    monkeypatch.setattr("IPython.display.display", display)
    for label in ("first", "second"):
        with progress.Progress(label, 2, every_s=0) as work:
            work.update(1)
            work.update(2)
    # each keeps its last line, the later one below
    assert len(shown) == 1 and re.fullmatch(r"first: 2 of 2 .*\nsecond: 2 of 2 .*", shown[0][-1])
    cell.execution_count = 2
    with progress.Progress("third", 1) as work:
        work.update(1)
    assert len(shown) == 2 and shown[1][-1].startswith("third: 1 of 1") and "first" not in shown[1][-1]
