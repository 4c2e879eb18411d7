"""Stage 06: the carbon report (paper, section 4.2), from the energy ledgers of the run's stages."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ttl_utils import carbon, paper
from ttl_utils.files import write_text
from ttl_utils.records import read_records
from ttl_utils.run import STAGES, Run, Stage


def stage_energy_table(run: Run) -> pd.DataFrame:
    """A row per stage made before this report; a stage used from another run is read from that run's ledger."""
    tables = []
    for name in STAGES:
        if name == "06_carbon_report":
            continue
        totals = carbon.stage_totals(run.stage(name).folder.parent / "energy.jsonl")
        tables.append(totals[totals.stage == name])
    return pd.concat(tables, ignore_index=True)


def checkpoint_table(run: Run) -> pd.DataFrame:
    """Perplexity, energy and emissions at each evaluation of pretraining: the rows of the paper's table 6."""
    records = [row for row in read_records(run.need("03_pretraining").folder / "metrics.jsonl") if "perplexity" in row]
    rows = pd.DataFrame(records)[["step", "tokens", "perplexity", "energy_kwh"]]
    totals = stage_energy_table(run).set_index("stage").loc["03_pretraining"]
    rows["emissions_kg"] = rows.energy_kwh * totals.intensity_g_per_kwh / 1000
    saved = rows.perplexity.shift() - rows.perplexity
    rows["wh_per_perplexity_point"] = (rows.energy_kwh - rows.energy_kwh.shift()) * 1000 / saved.where(saved > 0)
    return rows


def carbon_report(run: Run) -> Stage:
    """Make stage 06: metrics, and `report.md` to read."""
    stage = run.stage("06_carbon_report")
    if stage.reuse():
        return stage
    with stage.work():
        totals, points = stage_energy_table(run), checkpoint_table(run)
        energy_kwh, emissions_kg = float(totals.energy_kwh.sum()), float(totals.emissions_kg.sum())
        metrics = {
            "energy_kwh": energy_kwh,
            "emissions_kg": emissions_kg,
            "car_km": carbon.car_km(emissions_kg),
            "measured_kwh": float(totals.measured_kwh.sum()),
            "modelled_kwh": float(totals.modelled_kwh.sum()),
            "duration_s": float(totals.duration_s.sum()),
            "stages": totals.to_dict("records"),
            "checkpoints": points.astype(object).where(points.notna(), None).to_dict("records"),
        }
        write_text(stage.folder / "report.md", _markdown(run, metrics, totals, points))
        stage.finish(metrics, {"report": [stage.folder / "report.md"]})
    return stage


def _markdown(run: Run, metrics: dict[str, Any], totals: pd.DataFrame, points: pd.DataFrame) -> str:
    shown = totals[["stage", "duration_s", "energy_kwh", "measured_kwh", "modelled_kwh", "emissions_kg", "mean_watts"]]
    same = carbon.equivalents(metrics["emissions_kg"], metrics["energy_kwh"])
    grids = carbon.what_if(metrics["energy_kwh"])
    methods = "; ".join(
        f"{part.upper()}: {', '.join(dict.fromkeys(totals[f'{part}_method']))}" for part in ("cpu", "gpu", "ram")
    )
    share = metrics["measured_kwh"] / metrics["energy_kwh"] if metrics["energy_kwh"] else 0.0
    parts = [
        f"# Energy and emissions of run `{run.name}`",
        f"{metrics['energy_kwh']:.6f} kWh and {metrics['emissions_kg']:.6f} kg CO2e over "
        f"{metrics['duration_s']:.0f} s of work, kills and resumes included. Measured: {share:.0%} of the energy; "
        f"the rest is modelled ({methods}). The report's own energy is not in it.",
        "## By stage",
        _table(shown),
        "## Pretraining, by evaluation",
        _table(points),
        "## The paper's table 6 (460m)",
        _table(paper.table("table6_energy_460m")),
        "## The same amount as",
        _table(same),
        "## The same energy on other grids",
        _table(grids),
    ]
    return "\n\n".join(parts) + "\n"


def _table(frame: pd.DataFrame) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:,.6g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    head = f"| {' | '.join(frame.columns)} |\n|{' --- |' * len(frame.columns)}"
    return "\n".join([head, *(f"| {' | '.join(map(cell, row))} |" for row in frame.itertuples(index=False))])
