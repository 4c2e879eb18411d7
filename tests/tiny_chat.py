"""A run with a chat model of random weights over a tiny run's tokenizer: made in a second, for talk and demo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ttl_utils.checkpoints import save_model_folder
from ttl_utils.conversations import prepare_chat_tokenizer
from ttl_utils.model import new_model
from ttl_utils.params import load_params
from ttl_utils.run import Run
from ttl_utils.tokenizer import load_tokenizer

CONTEXT, NEW_TOKENS = 256, 24


def chat_run(done: Run, outputs: Path, finished: bool = True) -> Run:
    """A copy of `done` (stages 01 and 02) with `05_chat/model`, that says nonsense and seldom ends by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTL_OUTPUTS", str(outputs))
        run = Run(
            load_params(
                {
                    "file": done.params.file,
                    "model": {"max_position_embeddings": CONTEXT},
                    "pretraining": {"per_device_train_batch_size": 1},
                    "chat": {"max_new_tokens": NEW_TOKENS, "temperature": 1.0},
                }
            )
        )
    shutil.copytree(done.folder, run.folder, ignore=shutil.ignore_patterns(".locks"))
    if finished:
        save_chat_model(run, run.folder / "05_chat" / "model")
        (run.folder / "05_chat" / "manifest.json").write_text("{}")
    return run


def save_chat_model(run: Run, folder: Path) -> None:
    source = run.folder / "02_tokenizer"
    tokenizer = prepare_chat_tokenizer(load_tokenizer(source), run.params.chat)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model_folder(new_model(run.params.model, tokenizer, 0, "sdpa"), tokenizer, folder)
