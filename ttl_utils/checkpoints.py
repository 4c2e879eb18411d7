"""Checkpoints: written whole or not at all, verified by hash, opened by transformers, resumed from bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import read_json, sha256, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS, OPTIMIZER, RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"
# of the checkpoints' folder: the step that `resume_from_checkpoint` went back to
WENT_BACK = "went_back.json"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def name_of(step: int) -> str:
    return f"step-{step:07}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; what is being written or was set aside has another name."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name)), key=step_of)


def resumable(folder: Path) -> list[Path]:
    """The checkpoints that hold the optimizer's state, oldest first."""
    return [path for path in list_checkpoints(folder) if (path / OPTIMIZER).is_file()]


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> None:
    """A folder for `from_pretrained`, with the SentencePiece model that `save_pretrained` would drop."""
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    source = Path(tokenizer.name_or_path) / "tokenizer.model"
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.model")


def save_model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[Path]:
    """`save_pretrained`, whole or not at all; returns the files."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_pretrained(model, tokenizer, partial)
    swap(folder, partial)
    return list(folder.iterdir())


def swap(final: Path, new: Path | None = None) -> None:
    """Put a folder in the place of another, or nothing: a kill half-way leaves no half folder of that name."""
    doomed = final.with_name(f".{final.name}.old.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    if final.exists():
        os.rename(final, doomed)
    if new is not None:
        os.rename(new, final)
    shutil.rmtree(doomed, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Remove what a killed run was writing or deleting."""
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `step-NNNNNNN/` beside its final place, with a hash of every file, and move it there in one step."""
    import torch

    from ttl_utils.tensors import write_tensors

    clean_up(folder)
    final = folder / name_of(step)
    partial = folder / f".{final.name}.partial"
    partial.mkdir(parents=True)
    try:
        # all but the weights, which are written below
        save_pretrained(model, tokenizer, partial, state_dict={})
        write_json(partial / "state.json", {"step": step, **state})
        small = sorted(partial.iterdir())
        weights = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in weights.items()}
        moments = {
            f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        }
        randomness = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            randomness["cuda"] = torch.cuda.get_rng_state()
        large = {WEIGHTS: weights, OPTIMIZER: moments, RANDOM: randomness}
        kinds = {WEIGHTS: {"format": "pt"}}
        with ThreadPoolExecutor() as pool:
            # side by side: hashing a file takes longer than handing it to the disk
            written = pool.map(lambda name: write_tensors(partial / name, large[name], kinds.get(name)), large)
            hashes = {path.name: sha256(path) for path in small} | dict(zip(large, written, strict=True))
        write_json(partial / "checkpoint.json", dict(sorted(hashes.items())))
        for path in (*small, partial):
            _sync(path)
        swap(final, partial)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    # Windows syncs only what is open for writing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def thin_out(folder: Path, keep_resumable: int, total_limit: int | None = None) -> None:
    """Drop the optimizer's state of all but the newest checkpoints, and all of what is older than the newest ones.

    `keep_resumable` checkpoints can be gone on from, `total_limit` (None: every one) are kept for evaluation. The only
    one that can be gone on from stays.
    """
    whole = resumable(folder)
    for path in whole[:-keep_resumable]:
        try:
            hashes = json.loads((path / "checkpoint.json").read_text())
        except (OSError, ValueError):
            # a damaged one is for whoever reads it to report
            continue
        hashes.pop(OPTIMIZER, None)
        write_json(path / "checkpoint.json", hashes)
        (path / OPTIMIZER).unlink()
    for path in list_checkpoints(folder)[:-total_limit] if total_limit else ():
        if path not in whole[-1:]:
            swap(path)


def check(path: Path) -> None:
    """Raises DamagedFile naming the first file that is not what was written."""
    try:
        hashes = json.loads((path / "checkpoint.json").read_text())
    except (OSError, ValueError):
        raise DamagedFile(f"{path / 'checkpoint.json'} is missing or damaged") from None
    for name in hashes:
        if not (path / name).is_file():
            raise DamagedFile(f"{path / name} is missing")
    with ThreadPoolExecutor() as pool:
        for name, found in zip(hashes, pool.map(lambda name: sha256(path / name), hashes), strict=True):
            if found != hashes[name]:
                raise DamagedFile(f"{path / name} is damaged")


def latest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint, to be read, not gone on from; one that is damaged is passed over with a line."""
    for path in reversed(list_checkpoints(folder)):
        try:
            check(path)
        except DamagedFile as error:
            print(f"checkpoint {path.name} is passed over: {error}", file=sys.stderr)
        else:
            return path
    return None


def newest_whole(folder: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint that a run can go on from; a damaged one is set aside with a line.

    `step` (`resume_from_checkpoint`) goes back to that step first, once: see `go_back`.

    Raises:
        DamagedFile: there are checkpoints, and none is whole: starting anew would throw work away unasked.
        TTLError: the step that was asked for has no checkpoint to go on from.
    """
    if step is None:
        # it can be asked for again
        (folder / WENT_BACK).unlink(missing_ok=True)
    else:
        go_back(folder, step)
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            check(path)
        except DamagedFile as error:
            aside = set_aside(path, "damaged")
            print(f"checkpoint {path.name}: {error}; it is kept as {aside.name}, and the one before is taken")
            continue
        if (path / OPTIMIZER).is_file():
            return path
    if found or (step != 0 and any(folder.glob("step-*.damaged*"))):
        raise DamagedFile(
            f"{folder}: no checkpoint is whole enough to go on from (see the folders *.damaged). To begin anew, "
            f"delete or rename {folder.parent} and run again"
        )
    return None


def go_back(folder: Path, step: int) -> None:
    """Set the checkpoints after `step` aside as `step-NNNNNNN.later`: the run goes on from there; 0 is its start.

    A command that is run again after a kill still names the step, and must go on from what it made since: the step is
    recorded, and asked for again it changes nothing. A run without it, or with another step, ends that.

    Raises:
        TTLError: there is no such checkpoint, it lacks its optimizer, or it is damaged.
    """
    record, newest = folder / WENT_BACK, list_checkpoints(folder)[-1:]
    if record.is_file() and read_json(record)["step"] == step:
        if newest and step_of(newest[0]) != step:
            print(
                f"resume_from_checkpoint {step}: done before, so the run goes on from {newest[0].name}; to go back "
                f"again, delete {record}"
            )
        return
    path, steps = folder / name_of(step), [step_of(path) for path in resumable(folder)]
    known = f"{folder} holds these to go on from: {', '.join(map(str, steps)) or 'none'}; 0 is the start"
    if step and step not in steps:
        lacks = "has no optimizer state any more" if path.is_dir() else "is not there"
        raise TTLError(f"resume_from_checkpoint {step}: {path.name} {lacks}. {known}")
    if step:
        try:
            check(path)
        except DamagedFile as error:
            raise TTLError(f"resume_from_checkpoint {step}: {error}. {known}") from None
    set_later_aside(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, {"step": step})


def set_later_aside(folder: Path, step: int) -> None:
    later = [path for path in list_checkpoints(folder) if step_of(path) > step]
    for curve in ("metrics.jsonl", "samples.jsonl"):
        # what led there goes with them, first: the run writes its own anew from `step` on
        if later and (folder.parent / curve).is_file():
            shutil.copyfile(folder.parent / curve, later[-1] / curve)
    for path in later:
        print(f"checkpoint {path.name} is kept as {set_aside(path, 'later').name}")


def set_aside(path: Path, why: str) -> Path:
    """Rename to `<name>.<why>`, or `<name>.<why>-2` where that is taken: nothing is thrown away."""
    aside, number = path.with_name(f"{path.name}.{why}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{why}-{number}")
    os.rename(path, aside)
    return aside


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict:
    """Put weights, optimizer and random state in place, on the model's device; returns `state.json`."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, load_model

    load_model(model, path / WEIGHTS)
    parameters = dict(model.named_parameters())
    fused = bool(optimizer.defaults.get("fused"))
    with safe_open(path / OPTIMIZER, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, kind = key.rsplit("/", 1)
            parameter = parameters[name]
            # AdamW counts on the CPU, unless it is fused
            device = parameter.device if fused or kind != "step" else "cpu"
            # copied, tensor by tensor: a view would keep the file mapped, and its deletion later from freeing space
            optimizer.state[parameter][kind] = file.get_tensor(key).to(device, copy=True)
    randomness = load_file(path / RANDOM)
    torch.set_rng_state(randomness["cpu"])
    if "cuda" in randomness and torch.cuda.is_available():
        torch.cuda.set_rng_state(randomness["cuda"])
    return read_json(path / "state.json")
