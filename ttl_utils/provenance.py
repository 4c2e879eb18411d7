"""What made a result: the code's commit, the versions, the machine and the time."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from ttl_utils.params import project_root

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "sentencepiece",
    "accelerate",
    "lm-eval",
    "codecarbon",
    "papermill",
)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def code_version() -> dict:
    """The checkout's commit, and whether its tree was clean; None where there is no git."""

    def git(*arguments: str) -> str | None:
        root = project_root()
        if root is None:
            return None
        try:
            done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")
    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "clean": None if commit is None else changes == ""}


def machine() -> dict:
    import psutil

    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["processor"] = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return found


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
