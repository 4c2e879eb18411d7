"""The notebooks' first cell where the project is not installed, as on Colab: run for real, with pip, offline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CELL = next(
    "".join(cell["source"])
    for cell in json.loads((ROOT / "notebooks" / "01_data.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
)
# stands for hatchling, which a machine without a network may not have: a wheel of what lies there
BACKEND = """
import pathlib, tomllib, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {needed}" for needed in project["dependencies"]]
    with zipfile.ZipFile(pathlib.Path(folder, f"{stem}-py3-none-any.whl"), "w") as wheel:
        for path in pathlib.Path("ttl_utils").rglob("*.*"):
            wheel.write(path)
        for name in ("params", "notebooks"):
            for path in pathlib.Path(name).rglob("*.*"):
                wheel.write(path, f"ttl_utils/bundle/{path.as_posix()}")
        wheel.writestr(f"{stem}.dist-info/METADATA", "\\n".join(lines) + "\\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return f"{stem}-py3-none-any.whl"
"""


def write_checkout(folder: Path, *needs: str) -> Path:
    """A copy of this project, which needs what it needs, or what is named."""
    for name in ("ttl_utils", "params", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text.replace('requires = ["hatchling"]', 'requires = []\nbackend-path = ["."]')
    text = text.replace('build-backend = "hatchling.build"', 'build-backend = "backend"')
    if needs:
        # pip looks at each one: fewer are faster
        text = re.sub(
            r"^dependencies = \[.*?^\]", f"dependencies = {json.dumps(needs)}", text, flags=re.DOTALL | re.MULTILINE
        )
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    (folder / "backend.py").write_text(BACKEND, encoding="utf-8")
    return folder


def write_library(folder: Path, version: str) -> None:
    """A wheel of a library that the project may need in a newer version than the session's."""
    folder.mkdir(exist_ok=True)
    stem = f"aged_library-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("aged_library.py", f"version = {version!r}\n")
        about = f"Metadata-Version: 2.1\nName: aged-library\nVersion: {version}\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", about)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


class Session:
    """A virtual environment that has everything but this project, and processes in it."""

    def __init__(self, folder: Path):
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        packages = folder / "packages"
        packages.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.startswith(("ttl_utils", "__editable__", "_editable_impl")):
                (packages / path.name).symlink_to(path)
        (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (own / "others.pth").write_text(f"{packages}\n", encoding="utf-8")
        (folder / "content").mkdir()

    def run(self, code: str, source: Path | str = "") -> subprocess.CompletedProcess:
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TTL_SOURCE")}
        env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.folder / "wheels"), "PIP_NO_CACHE_DIR": "1"}
        env |= {"TTL_SOURCE": str(source)} if source else {}
        return subprocess.run(
            [self.python, "-c", code], cwd=self.folder / "content", env=kept | env, capture_output=True, text=True
        )

    def pip(self, *words: str) -> None:
        done = self.run(
            f"import runpy, sys; sys.argv = {['pip', *words]!r}; runpy.run_module('pip', run_name='__main__')"
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    if os.name != "posix":
        pytest.skip("the environment is put together with links")
    made = Session(tmp_path_factory.mktemp("colab"))
    for version in ("1.0", "2.0"):
        write_library(made.folder / "wheels", version)
    return made


VERSIONS = """
from importlib import metadata
import ttl_utils.params, ttl_utils.run
print(*(metadata.version(name) for name in ("torch", "numpy")), ttl_utils.params.load_params({"size": "nano"}).size)
"""


def test_it_says_what_is_missing(session: Session) -> None:
    done = session.run(CELL)
    assert done.returncode == 1 and "set TTL_SOURCE to the project" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("address", ["git+https://host.example/owner/name", "git+ssh://git@host.example/owner/name"])
def test_an_address_without_a_version_is_refused(session: Session, address: str) -> None:
    done = session.run(CELL, address)
    assert done.returncode == 1 and "@VERSION" in done.stderr.splitlines()[-1]


def test_it_installs_and_goes_on_and_torch_stays(session: Session, tmp_path: Path) -> None:
    done = session.run(CELL + VERSIONS, write_checkout(tmp_path / "checkout"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [metadata.version("torch"), metadata.version("numpy"), "nano"]
    # again, and from then on, it does nothing
    assert session.run("import subprocess\nsubprocess.run = None\n" + CELL + VERSIONS).returncode == 0
    session.pip("uninstall", "--quiet", "--yes", "ttl-utils")


def test_it_asks_for_a_restart_where_a_loaded_package_was_replaced(session: Session, tmp_path: Path) -> None:
    session.pip("install", "--quiet", "aged-library==1.0")
    source = write_checkout(tmp_path / "checkout", "numpy", "aged-library>=2")
    done = session.run("import aged_library, numpy\n" + CELL, source)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: restart the session, then run from the top: ")
    assert "aged-library was replaced" in done.stderr and "numpy" not in done.stderr.splitlines()[-1]
    assert "running this cell again is not enough" in done.stderr
    # after the restart
    done = session.run("import aged_library\n" + CELL + VERSIONS + "print(aged_library.version)")
    assert done.returncode == 0 and done.stdout.split()[-1] == "2.0", done.stderr
