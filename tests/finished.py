"""A tiny run whose base and chat model are trained, made once for all tests that export it."""

from __future__ import annotations

import contextlib
import shutil
from functools import cache
from pathlib import Path

import pytest

from ttl_utils import carbon
from ttl_utils.chat import fine_tune_chat
from ttl_utils.params import load_params
from ttl_utils.pretraining import pretrain
from ttl_utils.run import Run

OVERRIDES = {"pretraining": {"max_steps": 40, "learning_rate": 3e-3}}


@cache
def finished(file: str, prepared: Path, root: Path) -> Run:
    """The run, with stages 01 and 02 copied from `prepared`; to read, and to export from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTL_OUTPUTS", str(root))
        patch.setattr(carbon, "track", lambda *_, **__: contextlib.nullcontext(carbon.EnergySession()))
        run = Run(load_params({"file": file, **OVERRIDES}))
        shutil.copytree(prepared, run.folder, ignore=shutil.ignore_patterns(".locks"))
        pretrain(run)
        fine_tune_chat(run)
    return run
