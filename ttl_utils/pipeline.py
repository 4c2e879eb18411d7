"""The six notebooks through papermill, in order, reusing what is finished."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ttl_utils.errors import ParameterError, StageConflict, TTLError
from ttl_utils.files import read_json, write_text
from ttl_utils.params import bundled, load_params, read_file
from ttl_utils.progress import clock
from ttl_utils.run import STAGES, Run, Stage


def overrides(settings: list[str]) -> dict:
    """`["pretraining.max_steps=50"]` as nested values; the part after `=` is YAML."""
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ParameterError(f"--set {setting!r}: expected section.key=value, as in pretraining.max_steps=50")
        *path, last = key.split(".")
        place = given
        for name in path:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ParameterError(f"--set {setting!r}: {name} was given a value already")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ParameterError(f"--set {setting!r}: {' '.join(str(error).split())}") from None
    return given


def given_values(arguments: argparse.Namespace) -> dict:
    """What the command line says, as a notebook's parameters cell would."""
    size = arguments.size
    named = {"size": size}
    if size.endswith((".yaml", ".yml")):
        # both, since a notebook's own cell says a size
        named = {
            "file": str(Path(size).resolve()) if Path(size).is_file() else size,
            "size": read_file(size).get("size"),
        }
    for name in ("run", "base"):
        if getattr(arguments, name):
            named[name] = getattr(arguments, name)
    return {**named, **overrides(arguments.set)}


def choose(first: str | None, last: str | None) -> list[str]:
    """Stage names from `first` to `last`, each named by its number or name."""
    names = list(STAGES)

    def find(text: str | None, default: int) -> int:
        if text is None:
            return default
        for number, name in enumerate(names):
            if text in (name, name[:2], name[1:2], name[3:]):
                return number
        raise ParameterError(f"there is no stage {text!r}; stages: {', '.join(names)}")

    start, stop = find(first, 0), find(last, len(names) - 1)
    if start > stop:
        raise ParameterError(f"--from {first} comes after --to {last}")
    return names[start : stop + 1]


def run_notebooks(arguments: argparse.Namespace) -> None:
    given = given_values(arguments)
    params = load_params(given)
    print("\n".join(params.notes), end="\n" if params.notes else "")
    run, started = Run(params), time.monotonic()
    for name in choose(arguments.first, arguments.last):
        stage = run.stage(name)
        executed = run.folder / "notebooks" / f"{name}.ipynb"
        try:
            reused = stage.reuse()
        except StageConflict:
            if not arguments.force:
                raise
            stage.set_aside()
            executed.unlink(missing_ok=True)
            reused = False
        if reused and _shows(executed, run, name) and not _left(stage):
            continue
        execute(run, name, given)
    run.gather_metrics()
    run.record()
    finished = [name for name in STAGES if run.stage(name).finished]
    done = f"run {run.name!r} is complete" if len(finished) == len(STAGES) else f"{', '.join(finished)} finished"
    print(f"{done} in {run.folder} (this took {clock(time.monotonic() - started)})")


def _asked(run: Run, name: str) -> dict:
    """The sections that a notebook reads, as plain data: keys that are no identity decide what it reports."""
    # answers are measured by what stage 04 asks
    sections = (*STAGES[name].sections, *(["evaluation"] if name == "05_chat" else []))
    return {section: getattr(run.params, section).model_dump(mode="json") for section in sections}


def _shows(executed: Path, run: Run, name: str) -> bool:
    """Whether there is an executed notebook of these parameters."""
    import nbformat

    return executed.is_file() and nbformat.read(executed, as_version=4).metadata.get("ttl") == _asked(run, name)


def _left(stage: Stage) -> bool:
    """Whether something of stage 04 could not be run: it is asked for again."""
    from ttl_utils.evaluation import not_run

    return stage.name == "04_evaluation" and any(not_run(stage.metrics()))


def execute(run: Run, name: str, given: dict) -> None:
    """One notebook through papermill into `notebooks/` of the run; the executed copy is put there when it is whole."""
    import nbformat
    import papermill
    from nbformat.sign import NotebookNotary
    from papermill.exceptions import PapermillExecutionError

    folder = run.folder / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    final, partial, failed = (folder / f"{name}{end}.ipynb" for end in ("", ".running", ".failed"))
    print(f"{name}: running notebooks/{name}.ipynb", flush=True)
    started = time.monotonic()
    try:
        with follow(run.stage(name)):
            papermill.execute_notebook(
                bundled("notebooks") / f"{name}.ipynb",
                partial,
                parameters=given,
                progress_bar=False,
                kernel_name="python3",
                coalesce_streams=True,
                # the kernel's own log would land on the terminal; what a cell prints is in the notebook
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
    except PapermillExecutionError as error:
        os.replace(partial, failed)
        if error.ename in {cls.__name__ for cls in _all_errors(TTLError)}:
            raise TTLError(f"{name}: {error.evalue}") from None
        trace = "\n".join(error.traceback)
        raise TTLError(f"{name}: {error.ename}: {error.evalue}\n{trace}\nThe notebook so far: {failed}") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    made = nbformat.read(partial, as_version=4)
    made.metadata["ttl"] = _asked(run, name)
    nbformat.write(made, partial)
    # JupyterLab shows the tables' styles of notebooks that its user trusts, which this one's is
    NotebookNotary().sign(made)
    if STAGES[name].report:
        write_text(final.with_suffix(".html"), notebook_page(made))
    os.replace(partial, final)
    failed.unlink(missing_ok=True)
    print(f"{name}: done in {clock(time.monotonic() - started)}", flush=True)


def notebook_page(notebook: Any) -> str:
    """An executed notebook as one HTML file that asks for no other."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    # they fetch libraries for formulas and widgets, of which there are none
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def _all_errors(cls: type) -> Iterator[type]:
    yield cls
    for inner in cls.__subclasses__():
        yield from _all_errors(inner)


@contextlib.contextmanager
def follow(stage: Stage, every_s: float = 2.0) -> Iterator[None]:
    """Show the stage's status line while its notebook runs: in place on a terminal, now and then in a log."""
    status, done = stage.folder / "status.json", threading.Event()
    tty = sys.stdout.isatty()

    def watch() -> None:
        shown, pause = None, every_s if tty else 30.0
        while not done.wait(pause):
            with contextlib.suppress(OSError, TTLError):
                line = read_json(status)["line"] if status.is_file() else None
                if line and line != shown:
                    print(f"\r\033[K  {line}" if tty else f"  {line}", end="" if tty else "\n", flush=True)
                    shown = line
        if tty and shown:
            print("\r\033[K", end="", flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
