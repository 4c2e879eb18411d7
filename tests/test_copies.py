"""Copies of a run under way: whole or not there, in the background, softly failing; and how they come back."""

from __future__ import annotations

import fnmatch
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ttl_utils import checkpoints as cp
from ttl_utils import copies
from ttl_utils.copies import Copies, copy_checkpoint
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import sha256, write_json
from ttl_utils.restore import restore

STAGE, IDENTITY, TOKEN = "03_pretraining", {"seed": 1, "model": {"hidden_size": 8}}, "hf_secret"


def write_checkpoint(stage: Path, step: int, text: str = "") -> Path:
    path = stage / "checkpoints" / cp.name_of(step)
    path.mkdir(parents=True)
    for name in (cp.WEIGHTS, cp.OPTIMIZER, cp.RANDOM):
        (path / name).write_bytes(f"{name} {step} {text}".encode() * 1000)
    write_json(path / "state.json", {"step": step})
    write_json(path / "checkpoint.json", {file.name: sha256(file) for file in sorted(path.iterdir())})
    return path


@pytest.fixture
def stage(tmp_path) -> Path:
    """A stage under way with two checkpoints."""
    stage = tmp_path / "outputs" / "run" / STAGE
    stage.mkdir(parents=True)
    (stage.parent / "figures").mkdir()
    (stage.parent / "figures" / "03_loss.png").write_bytes(b"a figure")
    write_json(stage / "stage.json", {"identity": IDENTITY, "started": "then"})
    (stage / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    (stage / "samples.jsonl").write_text('{"step": 4}\n')
    (stage / "status.json").write_text("{}")
    (stage.parent / "energy.jsonl").write_text('{"row": 1}\n{"row": 2}\n')
    for step in (2, 4):
        write_checkpoint(stage, step)
    return stage


@pytest.fixture
def drive(tmp_path) -> Path:
    (tmp_path / "drive").mkdir()
    return tmp_path / "drive"


def newest(stage: Path) -> Path:
    return cp.list_checkpoints(stage / "checkpoints")[-1]


def copy(stage: Path, target: object, *checkpoints: Path | None, **options: object) -> None:
    made = Copies(str(target), stage, stage.parent.name, **options)
    for checkpoint in checkpoints or (newest(stage),):
        made.send(checkpoint)
        wait(made)
    made.close()
    assert not made.thread.is_alive()


def wait(made: Copies) -> None:
    """Until the thread has done what it was woken for, and waits."""
    end = time.monotonic() + 20
    while (made.wake.is_set() or not made.wake._cond._waiters) and time.monotonic() < end:
        time.sleep(0.002)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(stage: Path) -> list[str]:
    return sorted(path.name for path in (stage / "checkpoints").iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


# to a folder


def test_the_copy_is_laid_out_as_the_run(stage, drive, capsys):
    copy(stage, drive)
    wanted = {name: data for name, data in content(stage.parent).items() if "step-0000002" not in name}
    assert content(drive / "run") == wanted
    assert capsys.readouterr().out == f"copy_to {drive}: newest checkpoint copied: step-0000004\n"


def test_without_a_target_nothing_happens(stage, capsys):
    before = threading.active_count()
    made = Copies(None, stage, "run")
    made.send(newest(stage))
    assert capsys.readouterr().out == "" and threading.active_count() == before
    made.close()


def test_send_does_not_wait_and_the_newest_waits_in_its_place(stage, drive, monkeypatch):
    begun, go_on, copied = threading.Event(), threading.Event(), []

    def slow(source, final):
        begun.set()
        assert go_on.wait(20)
        copied.append(source.name)

    monkeypatch.setattr(copies, "copy_checkpoint", slow)
    made = Copies(str(drive), stage, "run")
    made.send(stage / "checkpoints" / "step-0000002")
    assert begun.wait(20)
    for step in (4, 6, 8):
        made.send(stage / "checkpoints" / cp.name_of(step))
    made.send(None)
    go_on.set()
    made.close()
    assert copied == ["step-0000002", "step-0000008"]


def test_curves_are_copied_between_checkpoints_when_they_grow(stage, drive, monkeypatch):
    monkeypatch.setattr(copies, "EVERY_S", 0.02)
    made = Copies(str(drive), stage, "run")
    path = drive / "run" / STAGE / "metrics.jsonl"
    for number in range(3):
        with (stage / "metrics.jsonl").open("a") as file:
            # the last line is being written
            file.write(f'{{"step": {number}}}\n{{"st')
        whole = (stage / "metrics.jsonl").read_bytes()[: -len('{"st')]
        end = time.monotonic() + 20
        while (not path.is_file() or path.read_bytes() != whole) and time.monotonic() < end:
            time.sleep(0.005)
        assert path.read_bytes() == whole
        (stage / "metrics.jsonl").write_bytes(whole)
    made.close()
    assert not cp.list_checkpoints(drive / "run" / STAGE / "checkpoints")


def test_what_did_not_change_is_not_written_again(stage, drive, monkeypatch):
    written = []
    write = copies.write_bytes
    monkeypatch.setattr(copies, "write_bytes", lambda path, data: written.append(path.name) or write(path, data))
    made = Copies(str(drive), stage, "run")
    made.send(newest(stage))
    wait(made)
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5}\n')
    made.close()
    assert written[-1] == "metrics.jsonl" and len(written) == len(set(written)) + 1


def test_older_copies_are_thinned_as_the_run_is(stage, drive):
    for step in (6, 8):
        write_checkpoint(stage, step)
    found = cp.list_checkpoints(stage / "checkpoints")
    copy(stage, drive, *found)
    folder = drive / "run" / STAGE / "checkpoints"
    assert [cp.step_of(path) for path in cp.list_checkpoints(folder)] == [2, 4, 6, 8]
    assert [cp.step_of(path) for path in cp.resumable(folder)] == [6, 8]
    for path in cp.list_checkpoints(folder):
        cp.check(path)
    shutil.rmtree(drive / "run")
    copy(stage, drive, *found, keep_resumable=1, total_limit=3)
    assert [cp.step_of(path) for path in cp.list_checkpoints(folder)] == [4, 6, 8]
    assert [cp.step_of(path) for path in cp.resumable(folder)] == [8]


def test_a_run_that_went_back_keeps_the_copies_of_what_came_after(stage, drive):
    copy(stage, drive, *cp.list_checkpoints(stage / "checkpoints"))
    before = (drive / "run" / STAGE / "metrics.jsonl").read_bytes()
    cp.newest_whole(stage / "checkpoints", 2)
    (stage / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    copy(stage, drive, write_checkpoint(stage, 3))
    assert names(drive / "run" / STAGE) == ["step-0000002", "step-0000003", "step-0000004.later", cp.WENT_BACK]
    assert (drive / "run" / STAGE / "checkpoints" / "step-0000004.later" / "metrics.jsonl").read_bytes() == before


def test_a_copy_of_other_work_is_kept_aside(stage, drive, capsys):
    copy(stage, drive)
    before = content(drive / "run" / STAGE)
    write_json(stage / "stage.json", {"identity": {"seed": 2}, "started": "now"})
    copy(stage, drive)
    assert "a copy of other work is there; it is kept as 03_pretraining.old\n" in capsys.readouterr().out
    assert content(drive / "run" / f"{STAGE}.old") == before
    assert content(drive / "run" / STAGE).keys() == before.keys()


@pytest.mark.parametrize("name", [cp.WEIGHTS, cp.OPTIMIZER, "state.json", "checkpoint.json"])
def test_a_failure_half_way_leaves_no_half_copy(stage, drive, monkeypatch, name, capsys):
    copy(stage, drive, stage / "checkpoints" / "step-0000002")
    before, failing = content(drive / "run" / STAGE / "checkpoints"), [True]
    really = shutil.copyfileobj

    def write(old, new, length):
        if failing[0] and Path(new.name).name == name:
            new.write(old.read(10))
            raise OSError(28, "No space left on device")
        really(old, new, length)

    capsys.readouterr()
    monkeypatch.setattr(shutil, "copyfileobj", write)
    made = Copies(str(drive), stage, "run")
    for _ in range(3):
        made.send(newest(stage))
        wait(made)
    assert content(drive / "run" / STAGE / "checkpoints") == before
    assert not list((drive / "run" / STAGE / "checkpoints").glob(".*"))
    # said once
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 1 and "training goes on" in said
    failing[0] = False
    made.close()
    said = capsys.readouterr().out
    assert "works again" in said and "newest checkpoint copied: step-0000004; " in said and "; 3 failed\n" in said
    cp.check(drive / "run" / STAGE / "checkpoints" / "step-0000004")


def test_a_failure_at_the_end_is_told_with_its_reason(stage, drive, capsys):
    made = Copies(str(drive), stage, "run")
    shutil.rmtree(drive)
    made.send(newest(stage))
    made.close()
    assert f"newest checkpoint copied: none; 1 failed, the last one too ({drive} is gone)" in capsys.readouterr().out
    assert not drive.exists()


def test_what_arrives_otherwise_than_it_left_is_not_taken(stage, drive, monkeypatch):
    final = drive / "step-0000004"
    really = shutil.copyfileobj

    def damage(old, new, length):
        really(old, new, length)
        if Path(new.name).name == cp.WEIGHTS:
            new.seek(5)
            new.write(b"x")

    monkeypatch.setattr(shutil, "copyfileobj", damage)
    with pytest.raises(DamagedFile, match="model.safetensors is damaged"):
        copy_checkpoint(newest(stage), final)
    assert not list(drive.iterdir())


def test_retention_that_deletes_what_is_being_copied(stage, drive, monkeypatch, capsys):
    checkpoint, really = newest(stage), shutil.copyfileobj

    def delete(old, new, length):
        shutil.rmtree(checkpoint, ignore_errors=True)
        really(old, new, length)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", delete)
        made = Copies(str(drive), stage, "run")
        made.send(checkpoint)
        wait(made)
    assert made.queued is None
    made.send(write_checkpoint(stage, 6))
    made.close()
    assert names(drive / "run" / STAGE) == ["step-0000006"]
    assert "newest checkpoint copied: step-0000006; 1 failed\n" in capsys.readouterr().out


def test_a_whole_copy_is_not_made_again_and_another_is_replaced(stage, drive, monkeypatch):
    final = drive / "step-0000004"
    for left in (".step-0000004.partial", ".step-0000002.old.partial"):
        (drive / left).mkdir()
    copy_checkpoint(newest(stage), final)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", lambda *_: pytest.fail("copied again"))
        copy_checkpoint(newest(stage), final)
    shutil.rmtree(newest(stage))
    copy_checkpoint(write_checkpoint(stage, 4, "another"), final)
    assert content(final) == content(newest(stage))
    assert [path.name for path in drive.iterdir()] == ["step-0000004"]


def test_a_target_that_cannot_be_meant_is_named_at_once(stage, tmp_path):
    run = stage.parent
    for target in (run.parent, run, stage, stage / "checkpoints", tmp_path / "outputs" / "run" / ".." / "run"):
        with pytest.raises(TTLError, match="is where the run itself stands"):
            Copies(str(target), stage, "run")
    for target in ("hub:", "hub:owner", "hub:a/b/c", "hub:owner/two words", "hub:/name", "hub:owner/"):
        with pytest.raises(TTLError, match=f"copy_to '{target}': a place on the hub is hub:owner/name"):
            Copies(target, stage, "run")
    with pytest.raises(TTLError, match="there is no such folder .*mount the drive"):
        restore(str(tmp_path / "nowhere"), stage, "run", {})


# back from a folder


@pytest.fixture
def lost(stage, drive, tmp_path, capsys) -> Path:
    """The stage's folder on another machine, whose copy is in `drive`."""
    copy(stage, drive, *cp.list_checkpoints(stage / "checkpoints"))
    capsys.readouterr()
    return tmp_path / "elsewhere" / "run" / STAGE


def test_a_run_comes_back_to_another_machine(stage, drive, lost, capsys):
    assert restore(str(drive), lost, "run", IDENTITY)
    assert f"{STAGE}: step-0000004 and the curves came back from copy_to {drive}\n" == capsys.readouterr().out
    for name in ("stage.json", "metrics.jsonl", "samples.jsonl", "checkpoints/step-0000004/checkpoint.json"):
        assert (lost / name).read_bytes() == (stage / name).read_bytes()
    assert (lost.parent / "energy.jsonl").read_bytes() == (stage.parent / "energy.jsonl").read_bytes()
    assert cp.newest_whole(lost / "checkpoints").name == "step-0000004"
    # it goes on there, and in the same copy
    assert not restore(str(drive), lost, "run", IDENTITY)
    copy(lost, drive, write_checkpoint(lost, 6))
    assert "other work" not in capsys.readouterr().out
    assert names(drive / "run" / STAGE) == ["step-0000002", "step-0000004", "step-0000006"]


def test_rows_of_both_ledgers_are_kept_once(drive, lost):
    lost.parent.mkdir(parents=True)
    (lost.parent / "energy.jsonl").write_text('{"row": 2}\n{"row": 3}\n')
    assert restore(str(drive), lost, "run", IDENTITY)
    rows = [json.loads(line)["row"] for line in (lost.parent / "energy.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3]


def test_a_damaged_copy_is_stepped_over(drive, lost, capsys):
    damaged = drive / "run" / STAGE / "checkpoints" / "step-0000004"
    flip(damaged / cp.OPTIMIZER)
    before = content(damaged)
    assert restore(str(drive), lost, "run", IDENTITY)
    assert "is not whole" in capsys.readouterr().out
    assert names(lost) == ["step-0000002"] and content(damaged) == before


def test_where_none_is_whole_nothing_is_begun_anew(drive, lost):
    for path in (drive / "run" / STAGE / "checkpoints").iterdir():
        flip(path / cp.WEIGHTS)
    with pytest.raises(TTLError, match="could not be brought back .*to begin anew, set copy_to"):
        restore(str(drive), lost, "run", IDENTITY)


def test_what_is_not_this_run_stays_where_it_is(drive, lost, capsys):
    before = content(drive)
    assert not restore(str(drive), lost, "another", IDENTITY)
    assert capsys.readouterr().out == ""
    assert not restore(str(drive), lost, "run", IDENTITY | {"seed": 2})
    assert "was made otherwise, and is not taken" in capsys.readouterr().out
    (lost.parent / f"{STAGE}.old-1").mkdir(parents=True)
    assert not restore(str(drive), lost, "run", IDENTITY)
    assert "was moved aside here" in capsys.readouterr().out
    shutil.rmtree(lost.parent)
    (drive / "run" / STAGE / "stage.json").write_text("{")
    with pytest.raises(TTLError, match="could not be looked for .*stage.json"):
        restore(str(drive), lost, "run", IDENTITY)
    assert not lost.exists() and content(drive).keys() == before.keys()


def test_a_copy_without_a_checkpoint_yet_is_no_copy(drive, lost):
    shutil.rmtree(drive / "run" / STAGE / "checkpoints")
    assert not restore(str(drive), lost, "run", IDENTITY)
    assert not (lost / "stage.json").exists()


def test_a_kill_while_it_comes_back_is_made_good(stage, drive, lost, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cp, "check", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        restore(str(drive), lost, "run", IDENTITY)
    assert restore(str(drive), lost, "run", IDENTITY)
    assert (lost.parent / "energy.jsonl").read_bytes() == (stage.parent / "energy.jsonl").read_bytes()
    assert names(lost) == ["step-0000004"]


# on the hub


class Hub:
    """Branches of one repository: files by path."""

    def __init__(self):
        self.branches: dict[str, dict[str, bytes]] = {}
        self.private, self.fails = None, None

    def __call__(self, token: str) -> Hub:
        assert token == TOKEN
        if self.fails:
            raise self.fails
        return self

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        assert repo == "owner/name" and exist_ok
        self.private = private
        self.branches.setdefault("main", {})

    def create_branch(self, repo: str, branch: str, exist_ok: bool) -> None:
        self.branches.setdefault(branch, dict(self.branches["main"]))

    def list_repo_files(self, repo: str) -> list[str]:
        return list(self.branches["main"])

    def upload_folder(
        self, repo_id, folder_path, revision, commit_message, ignore_patterns=(), delete_patterns=()
    ) -> None:
        def matches(name, patterns):
            return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

        kept = {name: data for name, data in self.branches[revision].items() if not matches(name, delete_patterns)}
        new = {
            path.name: path.read_bytes() for path in folder_path.iterdir() if not matches(path.name, ignore_patterns)
        }
        self.branches[revision] = kept | new

    def create_commit(self, repo, operations, commit_message, revision) -> None:
        self.branches[revision] |= {add.path_in_repo: add.path_or_fileobj for add in operations}

    def snapshot_download(self, repo, local_dir, allow_patterns=("*",)) -> None:
        for name, data in self.branches["main"].items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(data)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.HfApi", found)
    return found


def test_the_hub_gets_a_revision_a_step_and_the_newest_in_main(stage, hub):
    copy(stage, "hub:owner/name", *cp.list_checkpoints(stage / "checkpoints"))
    assert hub.private is True
    assert hub.branches.keys() == {"main", "step-0000002", "step-0000004"}
    main = hub.branches["main"]
    assert {name: data for name, data in main.items() if "/" not in name} == content(newest(stage))
    assert main[f"run/{STAGE}/metrics.jsonl"] == (stage / "metrics.jsonl").read_bytes()
    assert {"run/energy.jsonl", "run/figures/03_loss.png"} <= main.keys()
    for path in cp.list_checkpoints(stage / "checkpoints"):
        own = {name for name in hub.branches[path.name] if "/" not in name}
        assert own == {cp.WEIGHTS, "state.json"}
        assert hub.branches[path.name][cp.WEIGHTS] == (path / cp.WEIGHTS).read_bytes()


def test_a_run_comes_back_from_the_hub(stage, hub, tmp_path, capsys):
    copy(stage, "hub:owner/name", *cp.list_checkpoints(stage / "checkpoints"))
    lost = tmp_path / "elsewhere" / "run" / STAGE
    assert not restore("hub:owner/name", lost, "run", {"seed": 2})
    assert restore("hub:owner/name", lost, "run", IDENTITY)
    assert content(newest(lost)) == content(newest(stage)) and not list(lost.glob(".*"))
    assert (lost / "metrics.jsonl").read_bytes() == (stage / "metrics.jsonl").read_bytes()


def test_an_unreachable_hub_is_one_line_without_the_token(stage, hub, tmp_path, capsys):
    hub.fails = ConnectionError(f"no route to https://user:{TOKEN}@hub.invalid {'x' * 250} {TOKEN} {TOKEN}")
    copy(stage, "hub:owner/name", *cp.list_checkpoints(stage / "checkpoints"))
    lost = tmp_path / "elsewhere" / "run" / STAGE
    said = capsys.readouterr().out
    assert said.count("training goes on") == 1 and "3 failed, the last one too (no route to" in said
    # to begin anew would throw away what may be there
    with pytest.raises(TTLError, match=r"could not be looked for \(no route.*set copy_to") as found:
        restore("hub:owner/name", lost, "run", IDENTITY)
    assert TOKEN[:5] not in said + str(found.value) and cp.list_checkpoints(lost) == []
    assert not list(lost.glob(".fetched-*"))


def test_a_repository_that_is_not_there_yet_holds_no_copy(hub, tmp_path, capsys):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = SimpleNamespace(headers={}, request=None, status_code=404)
    hub.fails = RepositoryNotFoundError("404", response=response)
    assert not restore("hub:owner/name", tmp_path / "run" / STAGE, "run", IDENTITY)
    hub.fails = GatedRepoError("403", response=response)
    with pytest.raises(TTLError, match="could not be looked for"):
        restore("hub:owner/name", tmp_path / "run" / STAGE, "run", IDENTITY)


def test_a_download_that_breaks_off_begins_nothing_anew(stage, hub, tmp_path, monkeypatch):
    copy(stage, "hub:owner/name")
    download = Hub.snapshot_download

    def broken(self, repo, local_dir, allow_patterns=None):
        if allow_patterns is None:
            raise ConnectionError("reset by peer")
        download(self, repo, local_dir, allow_patterns)

    monkeypatch.setattr(Hub, "snapshot_download", broken)
    lost = tmp_path / "elsewhere" / "run" / STAGE
    with pytest.raises(TTLError, match=r"could not be brought back \(reset by peer\)"):
        restore("hub:owner/name", lost, "run", IDENTITY)
    assert not list(lost.iterdir())


def test_without_a_token_the_hub_is_not_asked(stage, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    copy(stage, "hub:owner/name")
    assert "HF_TOKEN is not set in the environment" in capsys.readouterr().out
    assert hub.private is None


def test_two_stages_do_not_share_a_repository(stage, hub, capsys):
    copy(stage, "hub:owner/name")
    before = dict(hub.branches["main"])
    other = shutil.copytree(stage, stage.with_name("05_chat"))
    copy(other, "hub:owner/name")
    assert (
        f"owner/name holds run/{STAGE}: every stage of a run needs a repository of its own" in capsys.readouterr().out
    )
    assert hub.branches["main"] == before
