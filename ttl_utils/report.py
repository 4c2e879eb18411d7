"""Stage 06: the carbon report (paper, section 4.2), from the energy ledgers of the run's stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttl_utils import equivalents, paper, report_page
from ttl_utils.carbon import car_km
from ttl_utils.checkpoints import list_checkpoints, step_of
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.figures import draw
from ttl_utils.files import read_json, write_text
from ttl_utils.forecast import SHARES, after_the_point, forecast, paper_returns, returns, watts_until
from ttl_utils.ledger import read_ledger, rows_since, sessions, stage_totals
from ttl_utils.records import read_records
from ttl_utils.run import STAGES, Run, Stage
from ttl_utils.table_files import html_page, save

PRETRAINING = "03_pretraining"
NEEDED = ("energy_kwh", "emissions_kg", "duration_s", "tokens")


def bill(run: Run) -> pd.DataFrame:
    """A row per stage, by the run that spent the energy: this one, and runs whose finished stages it uses.

    `set_aside_kwh` is what of it went into folders that were moved aside.

    Raises:
        TTLError: the ledger holds nothing, or nothing of pretraining.
    """
    ledgers = run.ledger_rows()
    # all at once: a moment of a machine counts once, whichever run measured it
    ledger = [{**row, "run": name} for name, own in ledgers.items() for row in own]
    rows = stage_totals(ledger, ("stage", "run"))
    if PRETRAINING not in set(rows.stage):
        raise _no_row(run.folder / "energy.jsonl")
    rows = rows.sort_values(["stage", "run"], ignore_index=True)
    rows["set_aside_kwh"], last = 0.0, sessions(ledger)
    for at, (name, spender) in rows.loc[rows.stage.isin(STAGES), ["stage", "run"]].iterrows():
        stage = run.stage(name)
        # work of this run on a base's finished stage went into no folder of its own
        if stage.folder.parent.name == spender:
            kept = {row["session"] for row in rows_since(ledgers[spender], name, stage.begun())}
            aside = [row for row in last if row["stage"] == name and row["run"] == spender]
            rows.loc[at, "set_aside_kwh"] = sum(row["energy_kwh"] for row in aside if row["session"] not in kept)
    rows["share_of_energy"] = rows.energy_kwh / rows.energy_kwh.sum()
    return rows


def _no_row(ledger: Path) -> TTLError:
    return TTLError(
        f"the energy ledger {ledger} has no row of {PRETRAINING}: without it nothing can be said of what this run "
        "cost. Restore it from a copy"
    )


def _trained(stage: Stage) -> dict[str, Any]:
    """The metrics of a finished stage 03, with what the report is made of."""
    metrics = stage.metrics()
    if missing := [name for name in NEEDED if not isinstance(metrics.get(name), int | float)]:
        raise DamagedFile(
            f"{stage.folder / 'metrics.json'} is damaged: {', '.join(missing)} missing. Restore it from a copy"
        )
    return metrics


def checkpoint_table(run: Run, totals: pd.DataFrame) -> pd.DataFrame:
    """Perplexity, energy and emissions at each evaluation of pretraining: the rows of the paper's table 6.

    Energy is all that was spent until then, on work that a kill threw away too; `checkpoint_kwh` until the checkpoint
    of that step stood, where it is kept. `totals` is the run's bill.
    """
    stage = run.need(PRETRAINING)
    records = [row for row in read_records(stage.folder / "metrics.jsonl") if "perplexity" in row]
    rows = pd.DataFrame(records)[["step", "tokens", "perplexity", "energy_kwh"]]
    kept = {step_of(path): read_json(path / "state.json") for path in list_checkpoints(stage.folder / "checkpoints")}
    rows["checkpoint_kwh"] = [kept[step]["energy_kwh"] if step in kept else math.nan for step in rows.step]
    spent = totals[totals.stage == PRETRAINING]
    rows["emissions_kg"] = rows.energy_kwh * spent.emissions_kg.sum() / spent.energy_kwh.sum()
    return returns(rows)


def forecast_table(run: Run, shares: Any = SHARES) -> pd.DataFrame:
    """Pretraining forecast from its first steps, and the error in percent once it is done; usable under way."""
    stage, settings = run.stage(PRETRAINING), run.params.pretraining
    records = read_records(stage.folder / "metrics.jsonl")
    place = stage.folder.parent / "energy.jsonl"
    ledger = rows_since(read_ledger(place), PRETRAINING, stage.begun())
    if not ledger:
        raise _no_row(place)
    done, rows = _trained(stage) if stage.finished else {}, []
    for share in shares:
        found = forecast(records, settings.max_steps, share, settings.eval_steps)
        if not found or (rows and rows[-1]["step"] == found["step"]):
            continue
        found["duration_s"] = found["energy_kwh"] * 3.6e6 / watts_until(ledger, found["spent_kwh"])
        grams = ledger[-1]["emissions_kg"] / ledger[-1]["energy_kwh"] if ledger[-1]["energy_kwh"] else math.nan
        found["emissions_kg"] = found["energy_kwh"] * grams
        for name, key in (("energy_error", "energy_kwh"), ("duration_error", "duration_s")):
            found[name] = 100 * (found[key] / done[key] - 1) if done else math.nan
        rows.append(found)
    return pd.DataFrame(rows)


def carbon_report(run: Run) -> Stage:
    """Make stage 06: metrics, figures, tables, and `report.md` and `report.html` to read."""
    stage = run.stage("06_carbon_report")
    if stage.reuse():
        return stage
    # before the folder is begun: what is missing leaves none behind
    trained, totals = _trained(run.need(PRETRAINING)), bill(run)
    points, forecasts = checkpoint_table(run, totals), forecast_table(run)
    energy_kwh, emissions_kg = float(totals.energy_kwh.sum()), float(totals.emissions_kg.sum())
    metrics = {
        "energy_kwh": energy_kwh,
        "emissions_kg": emissions_kg,
        "car_km": car_km(emissions_kg),
        "measured_kwh": float(totals.measured_kwh.sum()),
        "modelled_kwh": float(totals.modelled_kwh.sum()),
        "of_other_runs_kwh": float(totals.energy_kwh[totals.run != run.name].sum()),
        "set_aside_kwh": float(totals.set_aside_kwh.sum()),
        "duration_s": float(totals.duration_s.sum()),
        "kwh_per_billion_tokens": trained["energy_kwh"] / trained["tokens"] * 1e9,
        "kg_per_billion_tokens": trained["emissions_kg"] / trained["tokens"] * 1e9,
        "diminishing_returns": after_the_point(points),
        "forecast": _plain(forecasts),
        "stages": _plain(totals),
        "checkpoints": _plain(points),
    }
    with stage.work():
        made = report_page.tables(run, metrics)
        for name, (frame, caption) in made.items():
            save(run.folder / "tables", name, frame, caption)
        for name, data in figure_data(run, metrics).items():
            draw(run, name, data)
        title, text = f"Energy and emissions of run {run.name}", report_page.text(run, metrics, made)
        write_text(stage.folder / "report.md", f"# {title}\n\n{text}")
        write_text(stage.folder / "report.html", html_page(title, f"# {title}\n\n{text}", stage.folder))
        stage.finish(metrics, {"report": [stage.folder / "report.md", stage.folder / "report.html"]})
    return stage


def figure_data(run: Run, metrics: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """What the figures of stage 06 are drawn from, by their name."""
    points = pd.DataFrame(metrics["checkpoints"])
    series = [points[points.step > 0].assign(series=run.name)]
    series += [paper_returns(size).assign(series=f"paper {size}") for size in paper.SIZES]
    grids = equivalents.grids(metrics["energy_kwh"])
    gpus = equivalents.gpus(run.params, metrics["energy_kwh"])
    kinds = [
        pd.DataFrame({"kind": "grid", "name": grids.grid, "share": math.nan, "value": grids.emissions_kg}),
        pd.DataFrame({"kind": "gpu", "name": gpus.gpu, "share": gpus.share_of_peak, "value": gpus.energy_kwh}),
    ]
    return {
        "06_energy": pd.DataFrame(metrics["stages"]),
        "06_perplexity_energy": pd.concat(series)[["series", "step", "energy_kwh", "perplexity", "diminishing"]],
        "06_what_if": pd.concat(kinds),
        "06_forecast": forecast_table(run, np.geomspace(0.01, 1, 40)),
    }


def _plain(frame: pd.DataFrame) -> list[dict]:
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
