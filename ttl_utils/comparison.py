"""Runs beside each other: which parameters differ, their curves in one figure, and what they came to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ttl_utils.errors import TTLError
from ttl_utils.figures import draw_in
from ttl_utils.figures_pretraining import smoothing_window
from ttl_utils.files import read_json, write_text
from ttl_utils.health import Finding
from ttl_utils.progress import clock
from ttl_utils.run import Run, known_runs, outputs_folder
from ttl_utils.trained import COLUMNS, COUNTED, LOSSES, STAGE, TOKENIZER, TOKENS, Trained, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = {"seed", "pretraining.seed"}


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other; runs that differ in the seed alone are one setting.

    `parameters`: a row per run, a column per parameter that differs. `table`: a row per setting; of several seeds the
    mean, the sample deviation and their number n. `folder`: where figure and tables are saved.
    """

    parameters: pd.DataFrame
    table: pd.DataFrame
    notes: tuple[str, ...]
    findings: dict[str, list[Finding]]
    figure: Figure
    folder: Path


def compare(names: Sequence[str], folder: Path | None = None) -> Comparison:
    """Compare stage 03 of these runs of `folder` (default: the outputs), and save it in its `comparisons/`.

    Raises:
        TTLError: a run that is not there, that has no stage 03 yet, or whose files are damaged.
    """
    folder = folder or outputs_folder()
    runs = [load(name, folder) for name in dict.fromkeys(names)]
    if not runs:
        known = ", ".join(known_runs(folder, STAGE)) or "none"
        raise TTLError(f"name the runs to compare; in {folder} there are: {known}")
    settings = _settings(runs)
    parameters = _differing(runs)
    table, notes = _table(settings), _notes(runs, settings)
    place = folder / "comparisons" / _folder_name([run.name for run in runs])
    figure = draw_in(place / "figures", "curves", _curves(settings))
    write_text(place / "comparison.csv", _with_runs(table, settings, parameters).to_csv(index=False))
    return Comparison(parameters, table, notes, {run.name: run.findings for run in runs}, figure, place)


def of_the_same_text(run: Run) -> list[str]:
    """The other runs of these outputs whose stage 03 is finished and learned from the same tokens as this run's."""
    own, found = run.need(STAGE).folder, []
    for path in sorted(outputs_folder().glob(f"*/{STAGE}/manifest.json")):
        same = read_json(path)["identity"].get(TOKENS) == run.need(STAGE).manifest()["identity"][TOKENS]
        if same and path.parent != own:
            found.append(path.parent.parent.name)
    return found


def compare_command(names: Sequence[str]) -> None:
    print(report(compare(names)))


def report(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    same = "the parameters are the same"
    parts = [
        "Parameters that differ\n" + (_text(comparison.parameters) if len(comparison.parameters.columns) > 1 else same),
        # a column for each setting: a terminal is narrow
        "Results\n" + _text(_rounded(comparison.table).set_index("setting").T.rename_axis(columns=None), index=True),
        "\n".join(f"note: {note}" for note in comparison.notes),
        "\n".join(_findings_lines(comparison.findings)),
        f"figure and tables: {comparison.folder}",
    ]
    return "\n\n".join(part for part in parts if part)


# settings and their table


def _settings(runs: list[Trained]) -> list[list[Trained]]:
    settings: list[list[Trained]] = []
    for run in runs:
        home = next((setting for setting in settings if all(_one_setting(run, other) for other in setting)), None)
        if home is None:
            settings.append([run])
        else:
            home.append(run)
    return settings


def _one_setting(one: Trained, other: Trained) -> bool:
    """Whether they differ in the seed, and in it alone; the run's own seed also makes another corpus and tokenizer."""
    known, others = one.free | one.parameters, other.free | other.parameters
    made_by_seed = {TOKENIZER, TOKENS} if known["seed"] != others["seed"] else set()
    inputs = {key for key in one.identity.keys() | other.identity.keys() if key.startswith("input ")} - made_by_seed
    return (
        _seed(known) != _seed(others)
        and all(known[key] == others[key] for key in (known.keys() & others.keys()) - SEEDS)
        and all(one.identity.get(key) == other.identity.get(key) for key in inputs)
    )


def _seed(known: dict[str, Any]) -> tuple[int, int]:
    """Of the text, and of weights and data order."""
    own = known.get("pretraining.seed")
    return known["seed"], known["seed"] if own is None else own


def _differing(runs: list[Trained]) -> pd.DataFrame:
    """A row per run, a column per parameter with more than one known value; a value that is not known is missing."""
    values = [run.free | run.parameters for run in runs]
    names = [
        name
        for name in dict.fromkeys(name for known in values for name in known)
        if len({json.dumps(known[name], sort_keys=True) for known in values if name in known}) > 1
    ]
    rows = [
        {"run": run.name} | {name: "null" if known[name] is None else known[name] for name in names if name in known}
        for run, known in zip(runs, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["run", *names], dtype=object)


def _label(setting: list[Trained], settings: list[list[Trained]]) -> str:
    """The run's name, or what tells a setting of several seeds apart."""
    if len(setting) == 1:
        return setting[0].name
    told = [key for key in _differing([one[0] for one in settings]).columns[1:] if key not in SEEDS]
    values = setting[0].free | setting[0].parameters
    text = ", ".join(f"{key.rpartition('.')[2]}={values.get(key)}" for key in told)
    return text if 0 < len(text) <= 60 else f"{setting[0].name} and others"


def _counted(setting: list[Trained]) -> tuple[list[Trained], int | None]:
    """The runs of a setting whose mean is taken: those that finished, or else all of them up to a step all have."""
    finished = [run for run in setting if run.finished]
    if finished or len(setting) == 1:
        return finished or setting, None
    return setting, min(run.records[-1]["step"] for run in setting)


def _state(setting: list[Trained]) -> str:
    counted, until = _counted(setting)
    if len(setting) == 1 or until is not None:
        return setting[0].state if until is None else f"all at step {until:,} of {setting[0].max_steps:,}"
    return "finished" if len(counted) == len(setting) else f"{len(counted)} of {len(setting)} finished"


def _table(settings: list[list[Trained]]) -> pd.DataFrame:
    rows = []
    for setting in settings:
        counted, until = _counted(setting)
        found = pd.DataFrame([run.results(until) for run in counted], columns=COLUMNS).astype(float)
        seeds = "" if len(setting) == 1 else f" ({len(setting)} seeds)"
        row = {"setting": _label(setting, settings) + seeds, "n": len(counted), "state": _state(setting)}
        for name in COLUMNS:
            row[name] = found[name].mean()
            if name in LOSSES:
                row[f"{name}_deviation"] = found[name].std()
        rows.append(row)
    # one run alone has no deviation
    table = pd.DataFrame(rows).dropna(axis="columns", how="all")
    return table.astype(dict.fromkeys(COUNTED, int))


def _with_runs(table: pd.DataFrame, settings: list[list[Trained]], parameters: pd.DataFrame) -> pd.DataFrame:
    """The table, with the runs of a setting below it and the parameters that differ beside each run."""
    rows = []
    for (_, row), setting in zip(table.iterrows(), settings, strict=True):
        if len(setting) > 1:
            rows.append({"run": "mean of the setting", **row})
        rows += [
            {"run": run.name, "setting": row.setting, "n": 1, "state": run.state, **run.results()} for run in setting
        ]
    return parameters.merge(pd.DataFrame(rows).astype(dict.fromkeys(COUNTED, int)), on="run", how="right")


def _notes(runs: list[Trained], settings: list[list[Trained]]) -> tuple[str, ...]:
    notes = []
    tokenizers = {run.name: run.identity.get(TOKENIZER) for run in runs}
    texts = {run.name: run.text for run in runs}
    if len(set(tokenizers.values())) > 1:
        notes.append(
            f"the tokenizers differ ({_grouped(tokenizers)}): loss and perplexity are per token and do not compare; "
            "bits per byte do"
        )
    if len(set(texts.values())) > 1:
        notes.append(
            f"the corpora differ ({_grouped(texts)}), and with them the held-out text: losses do not compare; bits per "
            "byte come closest"
        )
    if len({run.free["pretraining.eval_tokens"] for run in runs if run.free}) > 1:
        notes.append("pretraining.eval_tokens differs: validation is over more or less of the held-out text")
    notes += [f"{run.name} is not finished: {run.state}" for run in runs if not run.finished]
    if any(len(setting) > 1 for setting in settings):
        notes.append("± is the sample deviation over the n seeds of a setting")
    return tuple(notes)


def _grouped(names: dict[str, Any]) -> str:
    """Names of the same value together: 'a, b | c'."""
    values = dict.fromkeys(names.values())
    return " | ".join(", ".join(name for name in names if names[name] == value) for value in values)


# what the figure shows, and the terminal


def _curves(settings: list[list[Trained]]) -> pd.DataFrame:
    """What `figures_runs` draws: each run's curve, and what is told of its setting."""
    runs = [run for setting in settings for run in setting]
    # where tokens are not of one kind, the measure that is not per token
    by_bytes = len({run.identity.get(TOKENIZER) for run in runs}) > 1
    by_bytes = by_bytes and all(run.curve.bits_per_byte.notna().any() for run in runs)
    columns = ["run", "setting", "seeds", "state", "counted", "measure", "window", "step", "tokens"]
    columns += ["loss", "smoothed", "validation_loss", "bits_per_byte"]
    parts = [
        run.curve.assign(
            run=run.name,
            setting=_label(setting, settings),
            seeds=len(setting),
            state=_state(setting),
            counted=any(run is one for one in _counted(setting)[0]),
            measure="bits_per_byte" if by_bytes else "validation_loss",
            window=smoothing_window(run.max_steps),
        )
        for setting in settings
        for run in setting
    ]
    return pd.concat(parts).reindex(columns=columns).astype({"step": int, "tokens": int})


def _folder_name(names: list[str]) -> str:
    """Of the runs' names; of the first and a hash where that is too long for a folder."""
    name = "+".join(names)
    if len(name) <= 100:
        return name
    return f"{names[0][:60]}+{len(names) - 1}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _findings_lines(findings: dict[str, list[Finding]]) -> list[str]:
    """A line per run and kind: the first, and how many."""
    lines = []
    for name, found in findings.items():
        for kind in dict.fromkeys(one.kind for one in found):
            first, *others = (one for one in found if one.kind == kind)
            lines.append(f"{name}: {first}" + (f" (and {len(others)} more)" if others else ""))
    return lines


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text: mean and deviation in one cell."""
    forms = dict.fromkeys(COLUMNS, "{:.4f}".format) | dict.fromkeys((*COUNTED, "tokens_per_second"), "{:,.0f}".format)
    forms |= {"perplexity": "{:.2f}".format, "energy_kwh": "{:.4g}".format, "duration_s": clock}
    shown = table[["setting", "n", "state"]].copy()
    for name in (name for name in COLUMNS if name in table):
        deviations = table.get(f"{name}_deviation", pd.Series(np.nan, table.index))
        shown[name] = [
            "–" if pd.isna(value) else forms[name](value) + ("" if pd.isna(by) else f" ± {forms[name](by)}")
            for value, by in zip(table[name], deviations, strict=True)
        ]
    return shown


def _text(table: pd.DataFrame, index: bool = False) -> str:
    def short(value: Any) -> str:
        text = "–" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)
        return text if len(text) <= 48 else f"{text[:47]}…"

    return table.map(short).to_string(index=index)
