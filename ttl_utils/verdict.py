"""The paper against ours: every table and figure of the paper beside the runs at hand, each value with a verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttl_utils import paper, table_files
from ttl_utils.claims import Claim, claims, items
from ttl_utils.figures import draw_in
from ttl_utils.figures_pretraining import TOKENS_PER_STEP, WINDOW
from ttl_utils.files import write_text
from ttl_utils.judged import Judged, load
from ttl_utils.run import outputs_folder

VERDICTS = ("reproduced", "close", "differs", "not comparable", "not run")
# without a run: what our parameter files set, and what follows from what is published
PRINTED, CALCULATED = "as printed", "calculated"
COLUMNS = ("item", "size", "metric", "unit", "paper", "ours", "run", "difference", "verdict", "reason")
SETTING = "our parameter file"
# at its ends the published centred mean is over half its window only
EDGE = WINDOW // 2
# the headline's metric, the published table, and its column, which is our curve's too
CURVES = {
    "Figure 1 (a)": ("train_loss", "train_loss_smoothed", "loss"),
    "Figure 1 (b)": ("validation_perplexity", "evaluation_log", "perplexity"),
    "Figure 2": ("harness_arc", "arc_460m", "arc"),
}
TOLD = """Of the values that a run has to measure, {} are reproduced, {} close, {} differ, {} are not comparable and {}
not run. Without a run, {} of {} more are reproduced by calculation (parameters from the shapes, and the authors' logs
through our ledger), and {} settings are in our parameter files as printed."""
HOW = """A value of ours is judged only where configuration and data are the paper's (scores also where the authors' own
weights were evaluated): then it is *reproduced* within its tolerance, *close* within three times that, and else
*differs*; the reason names the tolerance. Counts have to be exact, and scores are judged in standard errors. What is of
another text, vocabulary, protocol, grid or overhead is shown and not judged. Settings are *as printed* in our parameter
files, or differ. They and what is calculated are counted apart: nothing was trained for them."""


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
        rows += [row for claim in claims(item) for row in _rows(claim, _values(claim, runs))]
        if item in CURVES:
            rows += [row for size in _sizes(item) for row in _curve_rows(item, size, runs)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _values(claim: Claim, runs: list[Judged]) -> list[tuple[Judged, Any]]:
    """The runs that have this value, or that ought to have it."""
    if claim.setting is not None or claim.calculated:
        return []
    runs = [run.scored() for run in runs] if claim.item in ("Table 4", "Table 5") else runs
    known = [(run, claim.value_of(run)) for run in runs]
    if claim.item == "Section 4.2" and claim.size == "both":
        # the sum over a run of each size
        parts = [next((part for part in known if part[0].size == size and part[1]), None) for size in paper.SIZES]
        if None in parts:
            return []
        # one that is not to be judged decides
        part = next((run for run, _ in parts if claim.rule(run)), parts[0][0])
        both = replace(part, name=" + ".join(run.name for run, _ in parts))
        return [(both, sum(ours for _, ours in parts))]
    about = [(run, ours) for run, ours in known if claim.size in (run.of, "both") or run.of is None]
    return [(run, ours) for run, ours in about if ours is not None or run.size == claim.size]


def _rows(claim: Claim, values: list[tuple[Judged, Any]]) -> list[dict]:
    """A row for each run, or the one that says what would make one."""
    rows = []
    for run, ours in values or [(None, claim.calculated[0] if claim.calculated else claim.setting)]:
        verdict, reason, difference = _verdict(claim, run, ours)
        name = run.name if run else "" if ours is None or claim.calculated else f"params/{claim.size}.yaml"
        figure = (claim.figure.unit, claim.figure.value)
        told = (claim.item, claim.size, claim.metric, *figure, ours, name, difference, verdict, reason)
        rows.append(dict(zip(COLUMNS, told, strict=True)))
    return rows


def _verdict(claim: Claim, run: Judged | None, ours: Any) -> tuple[str, str, float]:
    """Verdict, reason, and the difference in percent."""
    if ours is None:
        rule = claim.rule(run) if run else None
        reason = rule[1] if rule and rule[0] == "not run" else _command(claim, run)
        return "not run", reason, math.nan
    if run and (run.size is None or claim.size not in (run.size, "both")):
        return "not comparable", run.why, math.nan
    if claim.setting is not None or isinstance(claim.figure.value, str | bool):
        if ours == claim.figure.value:
            return ("reproduced", "as printed", math.nan) if run else (PRINTED, SETTING, math.nan)
        return "differs", claim.told(run) if run else f"not as printed, in {SETTING}", math.nan
    difference, verdict = paper.judge(float(ours), claim.figure)
    if claim.calculated:
        return verdict, f"{CALCULATED}, {claim.calculated[1]}: {_reason(claim, ours, verdict)}", difference
    verdict, reason = claim.rule(run) or (verdict, _reason(claim, ours, verdict))
    return verdict, reason, difference


def _command(claim: Claim, run: Judged | None) -> str:
    """What makes the value."""
    sizes = {"both": paper.SIZES[:1] if claim.item == "Table 1" else paper.SIZES}.get(claim.size, (claim.size,))
    named = f" --run {run.name}" if run and run.name != claim.size else ""
    return ", ".join(f"`ttl run {size}{named} --to {items().stage[claim.item][:2]}`" for size in sizes)


def _reason(claim: Claim, ours: float, verdict: str) -> str:
    if verdict == "not comparable":
        return items().unjudged[claim.item]
    if not math.isfinite(ours):
        return "not a number: the run diverged"
    if claim.figure.tolerance == 0:
        return "exact" if verdict == "reproduced" else "not exact, as a count has to be"
    times = {"reproduced": "within", "close": "within three times", "differs": "beyond three times"}[verdict]
    return f"{times} {claim.figure.tolerance:g}%"


def _sizes(item: str) -> Sequence[str]:
    return ("460m",) if item == "Figure 2" else paper.SIZES


def _published(item: str, size: str) -> pd.Series:
    _, name, column = CURVES[item]
    table = paper.table(name)
    found = (table[table["size"] == size] if "size" in table else table).set_index("step")[column].astype(float)
    return found[found.index >= EDGE] if column == "loss" else found


def _curve_rows(item: str, size: str, runs: list[Judged]) -> list[dict]:
    """Ours at the published points: where it lies farthest apart, and at the last one that it reached."""
    (metric, _, column), published, rows = CURVES[item], _published(item, size), []
    claim = Claim(item, size, f"{metric}, last point", paper.headline(size)[metric])
    for run in runs:
        points = run.points(column)
        steps = published.index[(published.index >= points.index.min()) & (published.index <= points.index.max())]
        # scores go up and down: none is read between two checkpoints
        steps = steps[steps.isin(points.index)] if column == "arc" else steps
        if run.size != size or not len(steps):
            last = points.iloc[-1] if len(points) and run.size != size else None
            values = _values(replace(claim, value_of=lambda run, last=last: last), [run])
            rows += _rows(claim, values) if values else []
            continue
        ours, theirs = pd.Series(np.interp(steps, points.index, points), steps), published[steps]
        # not a number lies farthest of all
        farthest = ((ours - theirs) / theirs).abs().fillna(math.inf).idxmax()
        for told, step in (("largest difference", farthest), ("last point", steps[-1])):
            figure = replace(claim.figure, value=theirs[step])
            point = replace(claim, metric=f"{metric}, {told} (step {step:,})", figure=figure)
            rows += _rows(point, [(run, float(ours[step]))])
    return rows or _rows(claim, [])


# the page


def page(runs: Sequence[str], folder: Path | None = None) -> Path:
    """Write `verdict/verdict.html` and `.md` with their figures and tables in a folder of runs; the HTML's path."""
    folder = folder or outputs_folder()
    judged, place = _load(runs, folder), folder / "verdict"
    table, titles = _judge(judged), items()
    counts = summary(table)
    whole, calculated = counts.iloc[-1], table[_calculated(table)]
    right = (calculated.verdict == "reproduced").sum()
    told = TOLD.format(*whole[list(VERDICTS)], right, whole[CALCULATED], whole[PRINTED])
    parts = ["# The paper against ours", told, _markdown(counts), HOW, "## The runs", _runs(judged)]
    table_files.save(place / "tables", "summary", counts, "Values of the paper by verdict")
    for item, rows in table.groupby("item", sort=False):
        # figure_1a, table_6, section_4_2
        about, name = titles.loc[item], re.sub(r"\W", "_", re.sub(r" ?[()]", "", item.lower()))
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
        table_files.save(place / "tables", name, shown, f"The paper's {item}: {about.title}")
        parts.append(_markdown(shown))
        if about.topics:
            conflicts = paper.contradictions(*about.topics.split(","))
            parts += ["**Where the published material contradicts itself**: both figures.", _markdown(conflicts)]
    write_text(place / "tables" / "all.csv", table.to_csv(index=False))
    parts += ["## To run what is not run", _commands(table)]
    text = "\n\n".join(parts) + "\n"
    write_text(place / "verdict.md", text)
    html = table_files.html_page("The paper against ours", text, place)
    for verdict, colour in (("reproduced", "#00795a"), ("close", "#8a6100"), ("differs", "#b3261e")):
        html = html.replace(f">{verdict}</td>", f'><b style="color:{colour}">{verdict}</b></td>')
    write_text(place / "verdict.html", html)
    return place / "verdict.html"


_markdown = table_files.markdown


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """How many values have which verdict, by item and in all; what needs no run stands apart."""
    told = table.verdict.mask(_calculated(table), CALCULATED)
    counts = pd.crosstab(table["item"], told).reindex(items().index).fillna(0).astype(int)
    counts = counts.reindex(columns=[*VERDICTS, CALCULATED, PRINTED], fill_value=0)
    counts.loc["all"] = counts.sum()
    counts.insert(0, "about", items().title.reindex(counts.index).fillna(""))
    return counts.rename_axis("item").reset_index()


def _calculated(table: pd.DataFrame) -> pd.Series:
    return table.reason.str.startswith(CALCULATED)


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
    parts = [("published", size, _published(item, size), TOKENS_PER_STEP) for size in _sizes(item)]
    parts += [("ours", run.name, run.points(CURVES[item][2]), run.tokens_per_step) for run in runs]
    rows = [
        {"kind": kind, "curve": name, "step": step, "tokens": step * tokens_per_step, "value": value}
        for kind, name, points, tokens_per_step in parts
        for step, value in points.items()
    ]
    # a logarithmic axis has no zero
    return pd.DataFrame(rows)[lambda rows: rows.step > 0]


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
