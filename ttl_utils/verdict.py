"""The paper against ours: every table and figure of the paper beside the runs at hand, each value with a verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttl_utils import paper, table_files
from ttl_utils.claims import Claim, claims, items
from ttl_utils.figures import draw_in
from ttl_utils.figures_verdict import NAMES
from ttl_utils.files import write_text
from ttl_utils.judged import Judged, load
from ttl_utils.run import outputs_folder

VERDICTS = ("reproduced", "close", "differs", "not comparable", "not run")
COLUMNS = ("item", "size", "metric", "unit", "paper", "ours", "run", "difference", "verdict", "reason")
SETTING = "our parameter file"
# the headline's metric, the published table, and its column, which is our curve's too
CURVES = {
    "Figure 1 (a)": ("train_loss", "train_loss_smoothed", "loss"),
    "Figure 1 (b)": ("validation_perplexity", "evaluation_log", "perplexity"),
    "Figure 2": ("harness_arc", "arc_460m", "arc"),
}
HOW = """A value of ours is judged only where configuration and data are the paper's: then it is *reproduced* within its
tolerance, *close* within three times that, and else *differs*. Counts have to be exact, what the machine decides may
lie 10% apart, scores two standard errors (close: four). Figures of another text, vocabulary or protocol are shown and
not judged. Settings are judged by our parameter files, and counted apart: nothing was trained for them."""


def verdicts(runs: Sequence[str], folder: Path | None = None) -> pd.DataFrame:
    """A row for each published value and each of these runs that it can be held against; "not run" where none can.

    `difference` is in percent of the paper's value. Only a run of the paper's own configuration and data is judged.

    Raises:
        TTLError: a run that is not there, or whose files are damaged.
    """
    return _judge(_load(runs, folder or outputs_folder()))


def _load(runs: Sequence[str], folder: Path) -> list[Judged]:
    return [load(name, folder) for name in dict.fromkeys(runs)]


def _judge(runs: list[Judged]) -> pd.DataFrame:
    rows = []
    for item in items().index:
        rows += [row for claim in claims(item) for row in _rows(claim, runs)]
        if item in CURVES:
            rows += _curve_rows(item, runs)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"difference": float})


def _rows(claim: Claim, runs: list[Judged]) -> list[dict]:
    """A row for each run that has the value or ought to have it; where there is none, what would make it."""
    if claim.setting is not None:
        same = claim.setting == claim.figure.value
        row = _row(
            claim, None, claim.setting, "reproduced" if same else "differs", SETTING if same else "not as printed"
        )
        return [row | {"run": f"params/{claim.size}.yaml"}]
    if claim.item in ("Table 4", "Table 5"):
        runs = [run.scored() for run in runs]
    if claim.size == "both" and claim.item != "Table 1":
        return [_together(claim, runs)]
    values = [(run, claim.value_of(run)) for run in runs if claim.size in (run.of, "both") or run.of is None]
    found = [_judged(claim, run, ours) for run, ours in values if ours is not None or run.size == claim.size]
    return found or [_judged(claim, None, None)]


def _row(claim: Claim, run: Judged | None, ours: Any, verdict: str, reason: str, difference: float = math.nan) -> dict:
    row = {"item": claim.item, "size": claim.size, "metric": claim.metric, "unit": claim.figure.unit}
    row |= {"paper": claim.figure.value, "ours": ours, "run": run.name if run else "", "difference": difference}
    return row | {"verdict": verdict, "reason": reason}


def _judged(claim: Claim, run: Judged | None, ours: Any) -> dict:
    figure = claim.figure
    if ours is None:
        command = f"ttl run {'160m' if claim.size == 'both' else claim.size}"
        command += f" --run {run.name}" if run and run.name != claim.size else ""
        return _row(claim, run, None, "not run", f"`{command} --to {items().stage[claim.item][:2]}`")
    if run.size is None or claim.size not in (run.size, "both"):
        return _row(claim, run, ours, "not comparable", run.why)
    if isinstance(figure.value, str | bool):
        return _row(
            claim, run, ours, *(("reproduced", "as printed") if ours == figure.value else ("differs", "otherwise"))
        )
    difference, verdict = paper.judge(float(ours), figure)
    verdict, reason = claim.rule(run) or (verdict, _reason(claim, ours, verdict))
    return _row(claim, run, ours, verdict, reason, difference)


def _reason(claim: Claim, ours: float, verdict: str) -> str:
    if verdict == "not comparable":
        return items().unjudged[claim.item]
    if not math.isfinite(ours):
        return "not a number: the run diverged"
    if claim.figure.tolerance == 0:
        return "exact" if verdict == "reproduced" else "not exact, as a count has to be"
    times = {"reproduced": "within", "close": "within three times", "differs": "beyond three times"}[verdict]
    return f"{times} {claim.figure.tolerance:g}%"


def _together(claim: Claim, runs: list[Judged]) -> dict:
    """The sum over one run of each published size."""
    known = [run for run in runs if claim.value_of(run) is not None]
    parts = [next((run for run in known if run.size == size), None) for size in paper.SIZES]
    if None in parts:
        needed = ", ".join(f"`ttl run {size} --to 03`" for size in paper.SIZES)
        return _row(claim, None, None, "not run", f"a run of each size: {needed}")
    both = replace(parts[0], name=" + ".join(run.name for run in parts))
    return _judged(claim, both, sum(claim.value_of(run) for run in parts))


def curve(run: Judged, column: str) -> pd.Series:
    """A column of the run's curve by step; `arc` in percent, of the checkpoints that were scored."""
    if column != "arc":
        return run.points(column)
    rows = run.at("04_evaluation.checkpoint_scores") or []
    scores = {row["step"]: row["scores"].get("paper/arc_pt", {}) for row in rows}
    done = {step: score["value"] for step, score in scores.items() if score.get("status") == "done"}
    return 100 * pd.Series(done, dtype=float).sort_index()


def published_curve(item: str, size: str) -> pd.Series:
    _, name, column = CURVES[item]
    table = paper.table(name)
    return (table[table["size"] == size] if "size" in table else table).set_index("step")[column].astype(float)


def _curve_rows(item: str, runs: list[Judged]) -> Iterator[dict]:
    """Ours at the published points: where it lies farthest apart, and at the last one that it reached."""
    metric, _, column = CURVES[item]
    for size in ("460m",) if column == "arc" else paper.SIZES:
        claim, published, rows = (
            Claim(item, size, metric, paper.headline(size)[metric]),
            published_curve(item, size),
            [],
        )
        for run in runs:
            points = curve(run, column)
            steps = published.index[(published.index >= points.index.min()) & (published.index <= points.index.max())]
            # scores go up and down: none is read between two checkpoints
            steps = steps[steps.isin(points.index)] if column == "arc" else steps
            if run.size != size or not len(steps):
                ours = points.iloc[-1] if len(points) and run.size != size else None
                rows += _rows(replace(claim, value_of=lambda run, ours=ours: ours), [run])
                continue
            ours, theirs = pd.Series(np.interp(steps, points.index, points), steps), published[steps]
            # not a number lies farthest of all
            farthest = ((ours - theirs) / theirs).abs().fillna(math.inf).idxmax()
            for told, step in (("largest difference", farthest), ("last point", steps[-1])):
                figure = replace(claim.figure, value=theirs[step])
                point = replace(claim, metric=f"{metric}, {told} (step {step:,})", figure=figure)
                rows.append(_judged(point, run, float(ours[step])))
        yield from [row for row in rows if row["run"]] or [_judged(claim, None, None)]


# the page


def page(runs: Sequence[str], folder: Path | None = None) -> Path:
    """Write `verdict/verdict.html` and `.md` with their figures and tables in a folder of runs; the HTML's path."""
    folder = folder or outputs_folder()
    judged, place = _load(runs, folder), folder / "verdict"
    table, titles = _judge(judged), items()
    counts = summary(table)
    parts = ["# The paper against ours", _told(table), _markdown(counts), HOW, "## The runs", _runs(judged)]
    table_files.save(place / "tables", "summary", counts, "Values of the paper by verdict")
    for item, rows in table.groupby("item", sort=False):
        about, name = titles.loc[item], NAMES.get(item, re.sub(r"\W", "_", item.lower()))
        parts += [f"## {item}: {about.title}", about.compared]
        if item in CURVES:
            draw_in(place / "figures", name, _drawn(item, judged))
            parts.append(f"![{item}: {about.title}, ours beside the paper's](figures/{name}.png)")
        shown = rows.drop(columns="item").rename(columns={"difference": "difference (%)"})
        shown = shown.replace(
            {"reason": {run.why: "another configuration (see the runs)" for run in judged if run.why}}
        )
        # a column with nothing in it says nothing
        shown = shown.loc[:, (shown.notna() & (shown != "")).any()]
        table_files.save(place / "tables", name, shown, f"{item}: {about.title}")
        parts.append(_markdown(shown))
        conflicts = paper.conflicts()[lambda rows, about=about: rows.topic.isin(about.topics.split(","))]
        if len(conflicts):
            parts += ["**Where the paper contradicts itself**: both figures.", _markdown(conflicts[_CONFLICT])]
    table_files.save(place / "tables", "all", table, "Every value of the paper against ours")
    parts += ["## To run what is not run", _commands(table)]
    text = "\n\n".join(parts) + "\n"
    write_text(place / "verdict.md", text)
    html = table_files.html_page("The paper against ours", text, place)
    for verdict, colour in (("reproduced", "#00795a"), ("close", "#8a6100"), ("differs", "#b3261e")):
        html = html.replace(f"<td>{verdict}</td>", f'<td><b style="color:{colour}">{verdict}</b></td>')
    write_text(place / "verdict.html", html)
    return place / "verdict.html"


_CONFLICT = ["topic", "size", "figure_a", "source_a", "figure_b", "source_b", "note"]
_markdown = table_files.markdown


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """How many values have which verdict, by item and in all; settings of our files stand apart."""
    told = table.verdict.where(table.reason != SETTING, "settings as printed")
    counts = pd.crosstab(table["item"], told).reindex(items().index).fillna(0).astype(int)
    counts = counts.reindex(columns=[*VERDICTS, "settings as printed"], fill_value=0)
    counts.loc["all"] = counts.sum()
    counts.insert(0, "about", items().title.reindex(counts.index).fillna(""))
    return counts.rename_axis("item").reset_index()


def _told(table: pd.DataFrame) -> str:
    counts = summary(table).set_index("item").loc["all"]
    return (
        f"{len(table)} rows: of the values that a run has to measure, {counts['reproduced']} are reproduced, "
        f"{counts['close']} close, {counts['differs']} differ, {counts['not comparable']} are not comparable and "
        f"{counts['not run']} not run. {counts['settings as printed']} settings are in our parameter files as printed."
    )


def _runs(runs: list[Judged]) -> str:
    if not runs:
        return "None was given."
    rows = []
    for run in runs:
        code, stages = run.about.get("code") or {}, run.about.get("stages", {})
        judged = f"the paper's {run.size}" if run.size else f"not comparable: {run.why}"
        commit = f"{(code.get('commit') or 'unknown')[:10]}{'' if code.get('clean') in (True, None) else ', changed'}"
        rows.append(
            {"run": run.name, "judged as": judged, "finished": ", ".join(stages) or "nothing yet", "code": commit}
        )
    return _markdown(pd.DataFrame(rows))


def _drawn(item: str, runs: list[Judged]) -> pd.DataFrame:
    """Over tokens: the published curves, and those of the runs."""
    column, parts = CURVES[item][2], []
    for size in ("460m",) if column == "arc" else paper.SIZES:
        tokens_per_step = paper.headline(size)["tokens"].value / paper.headline(size)["steps"].value
        parts.append(("published", size, published_curve(item, size), tokens_per_step))
    for run in runs:
        last = next((row for row in reversed(run.records) if row["step"]), None)
        if last:
            parts.append(("ours", run.name, curve(run, column), last["tokens"] / last["step"]))
    rows = [
        {"kind": kind, "curve": name, "step": step, "tokens": step * factor, "value": value}
        for kind, name, points, factor in parts
        for step, value in points.items()
        # a logarithmic axis has no zero
        if step
    ]
    return pd.DataFrame(rows)


def _commands(table: pd.DataFrame) -> str:
    missing = table[table.verdict == "not run"]
    if missing.empty:
        return "Everything was run."
    rows = missing.groupby("reason", sort=False)["item"].agg(lambda found: ", ".join(dict.fromkeys(found)))
    return _markdown(rows.rename_axis("command").rename("for").reset_index())


def verdict_command(runs: Sequence[str]) -> None:
    path = page(runs)
    table = pd.read_csv(path.parent / "tables" / "summary.csv")
    print(table.drop(columns="about").to_string(index=False))
    print(f"\n{path}\n{path.with_suffix('.md')}\n{path.parent / 'tables'}")
