"""Models that the parameters name in the place of the run's own, and what they add to a stage's identity."""

from __future__ import annotations

import hashlib
from operator import attrgetter
from pathlib import Path

from ttl_utils.errors import SourceError
from ttl_utils.files import sha256
from ttl_utils.params import Params

INITIAL, EVALUATED, CHAT_BASE = "pretraining.init_from", "evaluation.model", "chat.base_model"
# what a model's hash is called in the identity
NAMES = {INITIAL: "initial weights", EVALUATED: "evaluated weights", CHAT_BASE: "base weights"}
# of a model folder: what decides its scores beside the weights
BESIDE_WEIGHTS = ("config.json", "tokenizer.json", "tokenizer_config.json")


def named(params: Params, key: str) -> tuple[str | None, str | None]:
    """The model that this key names, and its revision."""
    revision = "pretraining.init_revision" if key == INITIAL else f"{key}_revision"
    return attrgetter(key, revision)(params)


def fingerprint(params: Params, key: str, recorded: dict | None = None) -> dict | None:
    """What the named model adds to the stage's identity: the model itself, not the place it came from.

    `recorded` is what it was when the work began: it stands where the source cannot be had any more.

    Raises:
        SourceError: the source cannot be had, or holds no safetensors weights.
    """
    # here: where no model is named, nothing waits for pyarrow
    from ttl_utils import hub

    name, revision = named(params, key)
    if name is None:
        return None
    schedule = {"schedule": params.pretraining.init_schedule} if key == INITIAL else {}
    try:
        folder = hub.local_model(name, revision, key)
        found = schedule | {"weights": hub.weight_hashes(folder, key)}
    except SourceError:
        if recorded and schedule.items() <= recorded.items():
            return recorded
        raise
    # the run's own configuration and tokenizer stand beside the weights that it begins from
    return found if key == INITIAL else found | {"beside_weights": beside_weights(folder_hashes(folder))}


def folder_hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for name in BESIDE_WEIGHTS if (path := folder / name).is_file()}


def beside_weights(hashes: dict[str, str]) -> str:
    """Of a model folder's files by name: one hash of those that decide its scores beside the weights."""
    return hashlib.sha256("".join(hashes.get(name, "") for name in BESIDE_WEIGHTS).encode()).hexdigest()
