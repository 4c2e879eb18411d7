"""Checkpoints: written whole or not at all, verified by hash, opened by transformers, resumed from bit for bit."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttl_utils.errors import DamagedFile
from ttl_utils.files import sha256, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPTIMIZER = "optimizer.safetensors"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; what is being written or was set aside has another name."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name)), key=step_of)


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder for `from_pretrained`, with the SentencePiece model that `save_pretrained` would drop."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = Path(tokenizer.name_or_path) / "tokenizer.model"
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.model")


def save_model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[Path]:
    """`save_pretrained`, whole or not at all; returns the files."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_pretrained(model, tokenizer, partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return list(folder.iterdir())


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `step-NNNNNNN/` beside its final place, hash it, and move it there in one step."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / f"step-{step:07}"
    partial = folder / f".step-{step:07}.partial"
    for left in folder.glob(".step-*.partial"):
        # what a killed run was writing
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_pretrained(model, tokenizer, partial)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        tensors = {
            f"{names[id(parameter)]}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        }
        save_file(tensors, partial / OPTIMIZER)
        randomness = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            randomness["cuda"] = torch.cuda.get_rng_state()
        save_file(randomness, partial / "random.safetensors")
        write_json(partial / "state.json", {"step": step, **state})
        hashes = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        write_json(partial / "checkpoint.json", hashes)
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(folder)
    except SafetensorError as error:
        # safetensors hides a full disk in a text of its own
        full = f"os error {errno.ENOSPC})" in str(error)
        raise (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) if full else error) from None
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


def thin_out(folder: Path, resumable: int) -> None:
    """Drop the optimizer's state of all but the newest `resumable` checkpoints; weights are kept for evaluation."""
    whole = [path for path in list_checkpoints(folder) if (path / OPTIMIZER).is_file()]
    for path in whole[:-resumable]:
        try:
            hashes = json.loads((path / "checkpoint.json").read_text())
        except (OSError, ValueError):
            # a damaged one is for whoever reads it to report
            continue
        hashes.pop(OPTIMIZER, None)
        write_json(path / "checkpoint.json", hashes)
        (path / OPTIMIZER).unlink()


def check(path: Path) -> None:
    """Raises DamagedFile naming the first file that is not what was written."""
    try:
        hashes = json.loads((path / "checkpoint.json").read_text())
    except (OSError, ValueError):
        raise DamagedFile(f"{path / 'checkpoint.json'} is missing or damaged") from None
    for name, expected in hashes.items():
        if not (path / name).is_file():
            raise DamagedFile(f"{path / name} is missing")
        if sha256(path / name) != expected:
            raise DamagedFile(f"{path / name} is damaged")


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that a run can go on from; a damaged one is set aside with a line.

    Raises:
        DamagedFile: there are checkpoints, and none is whole: starting anew would throw work away unasked.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            check(path)
        except DamagedFile as error:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            print(f"checkpoint {path.name}: {error}; it is kept as {aside.name}, and the one before is taken")
            continue
        if (path / OPTIMIZER).is_file():
            return path
    if found:
        raise DamagedFile(
            f"{folder}: no checkpoint is whole enough to go on from (see the folders *.damaged). To begin anew, "
            f"delete or rename {folder.parent} and run again"
        )
    return None


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict:
    """Put weights, optimizer and random state in place, on the model's device; returns `state.json`."""
    import torch
    from safetensors.torch import load_file, load_model

    load_model(model, path / "model.safetensors")
    parameters = dict(model.named_parameters())
    for key, value in load_file(path / OPTIMIZER).items():
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.to(parameter.device)
    randomness = load_file(path / "random.safetensors")
    torch.set_rng_state(randomness["cpu"])
    if "cuda" in randomness and torch.cuda.is_available():
        torch.cuda.set_rng_state(randomness["cuda"])
    return json.loads((path / "state.json").read_text())
