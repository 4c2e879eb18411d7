"""Copies of a run's newest checkpoints and curves, made while it goes on, in a folder or on the hub."""

from __future__ import annotations

import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

from ttl_utils import checkpoints
from ttl_utils.errors import TTLError
from ttl_utils.files import read_json, write_bytes

HUB = "hub:"
# seconds between copies of the curve, where no checkpoint comes first; and how long the end waits for the last copy
EVERY_S, WAIT_S = 600.0, 1800.0
# the step that a run has gone back to, once: another machine must not go back again
WENT_BACK = f"checkpoints/{checkpoints.WENT_BACK}"
CURVES = ("metrics.jsonl", "samples.jsonl", "status.json")


class Copies:
    """A thread that keeps `copy_to` up to date: `send` and `close` never raise, and `send` never waits.

    A folder gets `<run>/<stage>/`, as `outputs/` has it, thinned as the run's own checkpoints are. On the hub, main has
    the newest checkpoint, whole, with the curves in `<run>/`, and the revision `step-NNNNNNN` has the model of that
    step; the repository is private where it is made here, and the token is `HF_TOKEN` of the environment. (A hub keeps
    what its history ever held: the user may squash main's.)

    Raises:
        TTLError: `copy_to` cannot be meant.
    """

    def __init__(
        self,
        target: str | None,
        stage_folder: Path,
        run_name: str,
        keep_resumable: int = 2,
        total_limit: int | None = None,
    ):
        self.target, self.stage_folder, self.run_name = target, stage_folder, run_name
        if target is None:
            return
        self.place = place_of(target, stage_folder)
        self.keep = (keep_resumable, total_limit)
        self.copied: dict[str, tuple[int, int]] = {}
        self.newest, self.reason, self.failed = "none", "", 0
        self.queued: Path | None = None
        self.lock, self.wake, self.closing = threading.Lock(), threading.Event(), False
        self.thread = threading.Thread(target=self._work, name="copies", daemon=True)
        self.thread.start()

    def send(self, checkpoint: Path | None = None) -> None:
        """Have this checkpoint copied, in the place of one that still waits, and the curves."""
        if self.target is None:
            return
        with self.lock:
            self.queued = checkpoint or self.queued
        self.wake.set()

    def close(self) -> None:
        """Copy what is left, and say what the target holds; once."""
        if self.target is None or self.closing:
            return
        self.closing = True
        self.wake.set()
        self.thread.join(2)
        if self.thread.is_alive():
            print(f"copy_to {self.target}: waiting for the last copy; interrupt to leave it")
            self.thread.join(WAIT_S)
        text = f"copy_to {self.target}: newest checkpoint copied: {self.newest}"
        if self.thread.is_alive():
            text += f"; the last copy was not done in {WAIT_S / 60:.0f} minutes"
        if self.failed:
            text += f"; {self.failed} failed" + (f", the last one too ({self.reason})" if self.reason else "")
        print(text)

    def _work(self) -> None:
        while True:
            self.wake.wait(EVERY_S)
            self.wake.clear()
            # asked before the copy, so that what is queued before the end is copied
            closing = self.closing
            with self.lock:
                checkpoint, self.queued = self.queued, None
            try:
                self._copy(checkpoint)
            except Exception as error:
                self._fail(error)
                with self.lock:
                    # tried again, unless a newer one came or retention took it
                    self.queued = self.queued or (checkpoint if checkpoint and checkpoint.is_dir() else None)
            else:
                if self.reason:
                    print(f"copy_to {self.target}: works again")
                self.reason = ""
            if closing:
                return

    def _fail(self, error: Exception) -> None:
        self.failed += 1
        before, self.reason = self.reason, without_token(error)
        if not before:
            print(f"copy_to {self.target}: a copy failed ({self.reason}); training goes on, and so do the tries")

    def _copy(self, checkpoint: Path | None) -> None:
        if isinstance(self.place, Path):
            self._copy_to_folder(self.place, checkpoint)
        else:
            self._copy_to_hub(self.place, checkpoint)
        if checkpoint:
            self.newest = checkpoint.name

    def _changed(self) -> dict[str, Path]:
        """The curves, the ledger and the figures that are not copied yet, by their place in the run's folder."""
        run = self.stage_folder.parent
        paths = [self.stage_folder / name for name in ("stage.json", *CURVES, WENT_BACK)] + [run / "energy.jsonl"]
        paths += sorted(path for path in (run / "figures").glob("*") if not path.name.startswith("."))
        found = {path.relative_to(run).as_posix(): path for path in paths if path.is_file()}
        return {name: path for name, path in found.items() if self.copied.get(name) != _stamp(path)}

    def _copy_to_folder(self, target: Path, checkpoint: Path | None) -> None:
        if not target.is_dir():
            # a drive that is not mounted any more: made anew, the folder would be on the local disk
            raise FileNotFoundError(f"{target} is gone")
        stage = target / self.run_name / self.stage_folder.name
        own, there = self.stage_folder / "stage.json", stage / "stage.json"
        if own.is_file() and there.is_file() and own.read_bytes() != there.read_bytes():
            aside = checkpoints.set_aside(stage, "old")
            print(f"copy_to {self.target}: a copy of other work is there; it is kept as {aside.name}")
            self.copied.clear()
        folder = stage / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint:
            # they are of a run that went back to an earlier step
            checkpoints.set_later_aside(folder, checkpoints.step_of(checkpoint))
        for place, path in self._changed().items():
            stamp = _stamp(path)
            write_bytes(stage.parent / place, whole_lines(path))
            self.copied[place] = stamp
        if checkpoint:
            copy_checkpoint(checkpoint, folder / checkpoint.name)
            checkpoints.thin_out(folder, *self.keep)

    def _copy_to_hub(self, repo: str, checkpoint: Path | None) -> None:
        from huggingface_hub import CommitOperationAdd

        api, name = hub_api(), checkpoint.name if checkpoint else "curves"
        api.create_repo(repo, private=True, exist_ok=True)
        own = f"{self.run_name}/{self.stage_folder.name}/stage.json"
        if others := [path for path in api.list_repo_files(repo) if path.endswith("/stage.json") and path != own]:
            other = others[0].removesuffix("/stage.json")
            raise TTLError(f"{repo} holds {other}: every stage of a run needs a repository of its own")
        changed = self._changed()
        stamps = {place: _stamp(path) for place, path in changed.items()}
        files = [CommitOperationAdd(f"{self.run_name}/{place}", whole_lines(path)) for place, path in changed.items()]
        if files:
            api.create_commit(repo, files, commit_message=name, revision="main")
            self.copied |= stamps
        if checkpoint:
            api.create_branch(repo, branch=name, exist_ok=True)
            # a hub forgets nothing: what resumes, twice the model's size, goes to main alone
            apart = [checkpoints.OPTIMIZER, checkpoints.RANDOM, "checkpoint.json"]
            upload = partial(api.upload_folder, repo_id=repo, folder_path=checkpoint, commit_message=name)
            upload(revision=name, ignore_patterns=apart, delete_patterns=apart)
            upload(revision="main")


def copy_checkpoint(source: Path, final: Path) -> None:
    """Copy a checkpoint, whole or not at all: large sequential writes, then every byte read back and hashed."""
    checkpoints.clean_up(final.parent)
    hashes = read_json(source / "checkpoint.json")
    if (final / "checkpoint.json").is_file() and read_json(final / "checkpoint.json") == hashes:
        return
    half = final.with_name(f".{final.name}.partial")
    half.mkdir(parents=True)
    try:
        for name in (*hashes, "checkpoint.json"):
            with (source / name).open("rb") as old, (half / name).open("wb") as new:
                shutil.copyfileobj(old, new, 1 << 24)
        checkpoints.check(half)
        checkpoints.swap(final, half)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def place_of(target: str, stage_folder: Path) -> Path | str:
    """The folder, or the hub's repository, that `copy_to` names."""
    if target.startswith(HUB):
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        name = target.removeprefix(HUB)
        try:
            validate_repo_id(name)
        except HFValidationError:
            name = ""
        if name.count("/") != 1:
            raise TTLError(f"copy_to {target!r}: a place on the hub is {HUB}owner/name")
        return name
    folder, run = Path(target).expanduser().resolve(), stage_folder.parent.resolve()
    if folder == run.parent or folder.is_relative_to(run):
        raise TTLError(f"copy_to {target!r} is where the run itself stands ({run}): name a folder on another disk")
    if not folder.is_dir():
        raise TTLError(f"copy_to {target!r}: there is no such folder ({folder}): mount the drive, or make the folder")
    return folder


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def whole_lines(path: Path) -> bytes:
    """A file's bytes; of one that grows by lines, not the half of one that is being written."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1] if path.suffix == ".jsonl" else data


def hub_api() -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not os.environ.get("HF_TOKEN"):
        raise TTLError("HF_TOKEN is not set in the environment: the hub takes nothing without a token")
    disable_progress_bars()
    return HfApi(token=os.environ["HF_TOKEN"])


def without_token(error: Exception) -> str:
    text, token = " ".join(str(error).split()) or type(error).__name__, os.environ.get("HF_TOKEN")
    return (text.replace(token, "…") if token else text)[:300]
