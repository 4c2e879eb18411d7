"""The `ttl` command: what the words on the command line call."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ttl_utils.errors import TTLError
from ttl_utils.files import read_json
from ttl_utils.params import load_params
from ttl_utils.pipeline import given_values, run_notebooks
from ttl_utils.progress import clock
from ttl_utils.run import STAGES, Run, outputs_folder


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
                text += _forecast(root / name, folder)
            else:
                text = "begun" if (folder / "stage.json").is_file() else "not made"
            print(f"  {stage:18} {text}")
    if not names:
        print(f"no runs in {root}")


def _forecast(run: Path, stage: Path) -> str:
    """What pretraining under way will have taken in all, where its records and parameters tell."""
    from ttl_utils.forecast import forecast
    from ttl_utils.records import read_records
    from ttl_utils.units import quantity

    about, records = run / "run.json", read_records(stage / "metrics.jsonl")
    if stage.name != "03_pretraining" or not about.is_file():
        return ""
    settings = read_json(about)["parameters"]["pretraining"]
    found = forecast(records, settings["max_steps"], eval_steps=settings["eval_steps"])
    return f"; forecast for all of it: {quantity(found['energy_kwh'], '_kwh')}" if found else ""


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


def chat_with(arguments: argparse.Namespace) -> None:
    run = Run(load_params(given_values(arguments)))
    if arguments.web:
        from ttl_utils.demo import serve

        serve(run, host=arguments.host, port=arguments.port)
    else:
        from ttl_utils.talk import talk_in_terminal

        talk_in_terminal(run)


def export_models(arguments: argparse.Namespace) -> None:
    if arguments.to == "gguf" and (arguments.repository or arguments.dry_run):
        raise TTLError("--repository and --dry-run are of --to hub: add it, or leave them out")
    run = Run(load_params(given_values(arguments)))
    if arguments.to == "gguf":
        from ttl_utils.gguf_files import export_gguf

        for path in export_gguf(run):
            print(path)
    else:
        from ttl_utils.publish import publish

        publish(run, arguments.repository, dry_run=arguments.dry_run)


def later(module: str, name: str, *given: str) -> Callable[[argparse.Namespace], None]:
    """Calls `name` of the module with these arguments; it is imported only then, so that other commands start soon."""

    def call(arguments: argparse.Namespace) -> None:
        getattr(importlib.import_module(module), name)(*(getattr(arguments, argument) for argument in given))

    return call


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="ttl", description="TeenyTinyLlama, step by step: see README.md")
    commands = made.add_subparsers(dest="command", required=True)

    def plain(name: str, call: Callable, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(call=call)
        return command

    def sized(name: str, call: Callable, text: str) -> argparse.ArgumentParser:
        command = plain(name, call, text)
        command.add_argument("size", metavar="SIZE", help="nano, 40m, 160m, 460m, or the path of a parameter file")
        command.add_argument("--run", help="the run's name and folder; default: the size")
        command.add_argument("--base", help="a run whose finished stages are used where they are the same")
        change = "override a key, as pretraining.max_steps=50; may be repeated"
        command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=change)
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
    compared = later("ttl_utils.comparison", "compare_command", "runs")
    compare = plain("compare", compared, "runs beside each other: parameters, curves, figures, one table")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="names of runs, as `ttl status` lists them")
    swept = later("ttl_utils.sweep", "sweep_command", "size", "file", "base")
    sweep = plain("sweep", swept, "pretrain a list of variants, one after another")
    sweep.add_argument("size", metavar="SIZE", help="nano, 40m, 160m, 460m, or the path of a parameter file")
    sweep.add_argument("file", metavar="FILE", help="a YAML list of overrides, one run each")
    sweep.add_argument("--base", help="the run whose corpus and tokenizer all of them use; default: the size's")
    chat = sized("chat", chat_with, "talk to the chat model, in the terminal or in a web page")
    chat.add_argument("--web", action="store_true", help="a page on this machine (extra `demo`)")
    chat.add_argument("--host", default="127.0.0.1", help="address of the page; 0.0.0.0 lets other machines in")
    chat.add_argument("--port", type=int, help="default: the first free one from 7860")
    export = sized("export", export_models, "base and chat model as GGUF files, or on the hub with a model card")
    export.add_argument("--to", choices=("gguf", "hub"), default="gguf", help="default: gguf")
    export.add_argument("--repository", metavar="OWNER/NAME", help="on the hub; the chat model's ends in -Chat")
    export.add_argument("--dry-run", action="store_true", help="write the cards and list the files, send nothing")
    judged = later("ttl_utils.verdict", "verdict_command", "runs")
    verdict = plain("verdict", judged, "every table and figure of the paper against these runs, on one page")
    verdict.add_argument("runs", nargs="*", metavar="RUN", help="a run of the outputs; reference/nano is one too")
    redrawn = later("ttl_utils.redraw", "redraw_command", "run", "language", "width")
    figures = plain("figures", redrawn, "draw a run's figures and tables anew from their saved data, for a paper")
    figures.add_argument("run", metavar="RUN", help="a run's name, as `ttl status` lists it")
    figures.add_argument("--language", choices=("en", "pt"), default="en", help="of the labels; pt: decimal comma")
    figures.add_argument("--width", choices=("column", "page"), default="column", help="8.6 cm or 17.8 cm")
    status = plain("status", show_status, "what is made, and what is under way")
    status.add_argument("run", nargs="?", metavar="RUN", help="a run's name; default: all runs")
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
