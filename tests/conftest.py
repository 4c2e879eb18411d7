"""Fixtures: a tiny corpus and size, and runs of it in folders of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import Tiny, write_tiny
from ttl_utils.params import load_params
from ttl_utils.run import Run

# before any test imports a hub library: nothing may look for a network
os.environ["HF_HUB_OFFLINE"] = "1"
# tiny tensors: a second thread costs more than it gives
os.environ["OMP_NUM_THREADS"] = "1"

# a machine under load is no finding
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

Make = Callable[..., Run]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`file`, `cache` and `root` of a corpus and a parameter file made by code."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def _settle(patch: pytest.MonkeyPatch, tiny: Tiny, outputs: Path) -> None:
    patch.setenv("TTL_CACHE", str(tiny.cache))
    patch.setenv("TTL_OUTPUTS", str(outputs))
    patch.delenv("TTL_MIRROR", raising=False)


@pytest.fixture
def tiny_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(**overrides)`: a run of size tiny in a fresh TTL_OUTPUTS, overridden as a user would."""
    _settle(monkeypatch, tiny, tmp_path / "outputs")
    return lambda **overrides: Run(load_params({"file": tiny.file, **overrides}))


@pytest.fixture(scope="session")
def tiny_done(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with stages 01 and 02 made, to read only; `tiny_prepared` gives a copy to change."""
    from ttl_utils.corpus import prepare_corpus
    from ttl_utils.tokenizer import prepare_tokenizer

    with pytest.MonkeyPatch.context() as patch:
        _settle(patch, tiny, tmp_path_factory.mktemp("done"))
        run = Run(load_params({"file": tiny.file}))
        prepare_corpus(run)
        prepare_tokenizer(run)
    return run


@pytest.fixture
def tiny_prepared(tiny_run: Make, tiny_done: Run) -> Make:
    """As `tiny_run`; a run made from it begins with a copy of stages 01 and 02 (where no override changes them)."""

    def make(**overrides: object) -> Run:
        run = tiny_run(**overrides)
        if not run.folder.exists():
            shutil.copytree(tiny_done.folder, run.folder, ignore=shutil.ignore_patterns(".locks"))
        return run

    return make


@pytest.fixture
def no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run without CodeCarbon, whose start takes longer than a tiny stage."""
    from ttl_utils import carbon

    monkeypatch.setattr(carbon, "track", lambda *_, **__: contextlib.nullcontext(carbon.EnergySession()))
