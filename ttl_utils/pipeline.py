"""The `ttl` command: the six notebooks through papermill, in order, reusing what is finished."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ttl_utils.errors import ParameterError, StageConflict, TTLError
from ttl_utils.files import read_json
from ttl_utils.params import bundled, load_params, read_file
from ttl_utils.progress import clock
from ttl_utils.run import STAGES, Run, Stage, outputs_folder


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
    print(f"run {run.name!r} is complete in {run.folder} (this took {clock(time.monotonic() - started)})")


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
    os.replace(partial, final)
    failed.unlink(missing_ok=True)
    print(f"{name}: done in {clock(time.monotonic() - started)}", flush=True)


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


def show_status(arguments: argparse.Namespace) -> None:
    root = outputs_folder()
    known = sorted({path.parent.parent.name for path in root.glob("*/*/stage.json")})
    if arguments.run and arguments.run not in known:
        raise TTLError(f"there is no run {arguments.run!r} in {root}; there are: {', '.join(known) or 'none'}")
    names = [arguments.run] if arguments.run else known
    for name in names:
        print(name)
        about = root / name / "run.json"
        made = read_json(about)["stages"] if about.is_file() else {}
        for stage in STAGES:
            folder = root / name / stage
            if not folder.is_dir() and stage in made:
                text = f"of run {(about.parent / made[stage]['folder']).resolve().parent.name!r}"
            elif (folder / "manifest.json").is_file():
                text = f"finished {read_json(folder / 'manifest.json')['finished']}"
            elif (folder / "status.json").is_file():
                status = read_json(folder / "status.json")
                text = f"{status['line']} (as of {clock(time.time() - status['time'])} ago)"
            else:
                text = "begun" if (folder / "stage.json").is_file() else "not made"
            print(f"  {stage:18} {text}")
    if not names:
        print(f"no runs in {root}")


def pretrain_without_notebook(arguments: argparse.Namespace) -> None:
    from ttl_utils.pretraining import pretrain

    with contextlib.ExitStack() as silence:
        if os.environ.get("RANK", "0") != "0":
            # the first of several processes speaks for all; errors are told below
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        pretrain(Run(load_params(given_values(arguments))))


def evaluate_checkpoints(arguments: argparse.Namespace) -> None:
    from ttl_utils.evaluation import evaluate_under_way
    from ttl_utils.score_tables import checkpoint_table

    print(checkpoint_table(evaluate_under_way(Run(load_params(given_values(arguments))))).to_string(index=False))


def show_plan(arguments: argparse.Namespace) -> None:
    from ttl_utils.planning import report

    names = ("gpu", "usd_per_hour", "utilisation", "budget", "brl_per_usd", "unique_tokens")
    given = given_values(arguments)
    if arguments.country:
        where = {"country_iso_code": arguments.country, "carbon_intensity_g_per_kwh": None}
        given["carbon"] = given.get("carbon", {}) | where
    print(report(load_params(given), **{name: getattr(arguments, name) for name in names}))


def search_configurations(arguments: argparse.Namespace) -> None:
    from ttl_utils.search import search_command

    search_command(Run(load_params(given_values(arguments))), arguments.steps)


def compare_runs(arguments: argparse.Namespace) -> None:
    from ttl_utils.comparison import compare_command

    compare_command(arguments.runs)


def run_sweep(arguments: argparse.Namespace) -> None:
    from ttl_utils.sweep import sweep_command

    sweep_command(arguments.size, arguments.file, arguments.base)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="ttl", description="TeenyTinyLlama, step by step: see README.md")
    commands = made.add_subparsers(dest="command", required=True)

    def sized(name: str, call: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("size", help="nano, 40m, 160m, 460m, or the path of a parameter file")
        command.add_argument("--run", help="the run's name and folder; default: the size")
        command.add_argument("--base", help="a run whose finished stages are used where they are the same")
        command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
        command.set_defaults(call=call)
        return command

    run = sized("run", run_notebooks, "run the notebooks, reusing what is finished")
    run.add_argument("--from", dest="first", metavar="STAGE", help="first stage, as in 03")
    run.add_argument("--to", dest="last", metavar="STAGE", help="last stage, as in 05")
    run.add_argument("--force", action="store_true", help="move a stage made otherwise aside, and make it anew")
    sized("pretrain", pretrain_without_notebook, "stage 03 without its notebook: same folder, same weights")
    plan = sized("plan", show_plan, "what a size takes, or what a budget buys: memory, hours, cost, energy")
    plan.add_argument("--gpu", help="such as T4, L4, A100-40GB, H100-SXM or RTX-4090; default: the paper's A100-40GB")
    plan.add_argument("--country", help="where it stands, as DEU or BRA, by its own intensity; default: section carbon")
    plan.add_argument("--usd-per-hour", type=float, help="price of that GPU")
    plan.add_argument("--utilisation", type=float, help="share of the GPU's peak, by 6N + 12 layers x hidden x context")
    plan.add_argument("--budget", metavar="AMOUNT", help='such as "500 USD", "2500 BRL" or "40 kg" (of CO2 equivalent)')
    plan.add_argument("--brl-per-usd", type=float, help="for a budget in BRL")
    plan.add_argument("--unique-tokens", type=float, help="tokens of the corpus; default: those of the published one")
    search = sized("search", search_configurations, "time precision, attention, batch split and more on this machine")
    search.add_argument("--steps", type=int, default=3, help="timed steps of each configuration")
    sized("evaluate", evaluate_checkpoints, "perplexity and checkpoint_tasks of the checkpoints so far, also under way")
    compare = commands.add_parser("compare", help="runs beside each other: parameters, curves, figures, one table")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    compare.set_defaults(call=compare_runs)
    sweep = commands.add_parser("sweep", help="pretrain a list of variants, one after another")
    sweep.add_argument("size", help="a size, or the path of a parameter file")
    sweep.add_argument("file", help="a YAML list of overrides")
    sweep.add_argument("--base", help="the run whose corpus and tokenizer all of them use; default: the size's")
    sweep.set_defaults(call=run_sweep)
    status = commands.add_parser("status", help="what is made, and what is under way")
    status.add_argument("run", nargs="?")
    status.set_defaults(call=show_status)
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        arguments.call(arguments)
    except TTLError as error:
        print(f"\nttl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nttl: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
