"""A stage under way, brought back from its copy to a machine that has none of it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from functools import partial
from pathlib import Path

from ttl_utils import checkpoints
from ttl_utils.checkpoints import OPTIMIZER
from ttl_utils.copies import CURVES, WENT_BACK, copy_checkpoint, hub_api, place_of, whole_lines, without_token
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import read_json, write_bytes


def restore(target: str, stage_folder: Path, run_name: str, identity: dict) -> bool:
    """Bring a copy of this stage back to a machine that has no checkpoint of it: verified, with a line.

    The newest whole checkpoint, the curves, `stage.json` (when the work began), and the ledger's rows. Not where the
    stage was moved aside here: it was to be made anew.

    Raises:
        TTLError: `copy_to` cannot be meant, or it cannot be asked for a copy, or one cannot be brought back.
    """
    place = place_of(target, stage_folder)
    if checkpoints.list_checkpoints(stage_folder / "checkpoints"):
        return False
    for left in stage_folder.glob(".fetched-*"):
        # what a killed run was fetching
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as held:
        root, download = place, None
        try:
            if not isinstance(root, Path):
                stage_folder.mkdir(parents=True, exist_ok=True)
                root = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=".fetched-", dir=stage_folder)))
                download = partial(hub_api().snapshot_download, place, local_dir=root)
                download(allow_patterns=[f"{run_name}/*"])
            copy = root / run_name / stage_folder.name
            if not _fits(target, copy, stage_folder, identity):
                return False
        except Exception as error:
            if _is_not_there(error):
                return False
            # a run begun anew would soon be copied over the one that may be there
            raise TTLError(
                f"copy_to {target}: a copy of this run there could not be looked for ({without_token(error)}). Run "
                "again when it can be; or, to begin without it, set copy_to to another place or to null"
            ) from error
        try:
            if download:
                download()
            whole = [root] if (root / OPTIMIZER).is_file() else checkpoints.resumable(copy / "checkpoints")
            return _take(target, copy, stage_folder, whole)
        except Exception as error:
            # to begin anew would throw its work away unasked
            raise TTLError(
                f"copy_to {target}: the copy of this run there could not be brought back ({without_token(error)}). "
                "Run again; or, to begin anew, set copy_to to another place or to null"
            ) from error


def _is_not_there(error: Exception) -> bool:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    return isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)


def _fits(target: str, copy: Path, stage_folder: Path, identity: dict) -> bool:
    if not (copy / "stage.json").is_file():
        return False
    if read_json(copy / "stage.json")["identity"] != identity:
        print(f"copy_to {target}: the copy of {stage_folder.name} there was made otherwise, and is not taken")
        return False
    if any(stage_folder.parent.glob(f"{stage_folder.name}.old-*")):
        print(f"copy_to {target}: the copy there is not taken, since {stage_folder.name} was moved aside here")
        return False
    return True


def _take(target: str, copy: Path, stage_folder: Path, whole: list[Path]) -> bool:
    # the checkpoint last: where one stands, all of it came back
    _join_ledgers(copy.parent / "energy.jsonl", stage_folder.parent / "energy.jsonl")
    for name in ("stage.json", *CURVES[:2], WENT_BACK):
        if whole and (copy / name).is_file():
            write_bytes(stage_folder / name, whole_lines(copy / name))
    for checkpoint in reversed(whole):
        try:
            name = checkpoints.name_of(read_json(checkpoint / "state.json")["step"])
            copy_checkpoint(checkpoint, stage_folder / "checkpoints" / name)
        except (OSError, DamagedFile) as error:
            print(f"copy_to {target}: a checkpoint there is not whole ({error})")
            failure = error
            continue
        print(f"{stage_folder.name}: {name} and the curves came back from copy_to {target}")
        return True
    if whole:
        raise failure
    return False


def _join_ledgers(copy: Path, ledger: Path) -> None:
    """Add the rows that only the copy has: what was spent on another machine was spent."""
    own = whole_lines(ledger) if ledger.is_file() else b""
    known = set(own.splitlines())
    more = [line for line in whole_lines(copy).splitlines() if line not in known] if copy.is_file() else []
    if more:
        write_bytes(ledger, b"".join(line + b"\n" for line in more) + own)
