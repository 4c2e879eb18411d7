"""The carbon report as a page: its tables, ready to read, and the words between them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ttl_utils import costs, equivalents, paper
from ttl_utils.forecast import after_the_point, paper_returns
from ttl_utils.ledger import PARTS, paper_rows, stage_totals
from ttl_utils.run import Run
from ttl_utils.table_files import markdown
from ttl_utils.tables import verdict_of
from ttl_utils.units import quantity, readable

PRETRAINING = "03_pretraining"


def tables(run: Run, metrics: dict[str, Any]) -> dict[str, tuple[pd.DataFrame, str]]:
    """The report's tables by the name of their files, as data; each with its caption."""
    stages, points, kwh = pd.DataFrame(metrics["stages"]), pd.DataFrame(metrics["checkpoints"]), metrics["energy_kwh"]
    first = ["stage", *(["run"] if metrics["of_other_runs_kwh"] else [])]
    cost = [*first, "sessions", "duration_s", *(["shared_s"] if stages.shared_s.any() else []), "mean_watts"]
    cost += ["energy_kwh", *(["set_aside_kwh"] if metrics["set_aside_kwh"] else []), "share_of_energy", "emissions_kg"]
    parts = [*first, *(f"{part}_{what}" for part in PARTS for what in ("kwh", "method"))]
    where = [*first, "country_iso_code", "intensity_g_per_kwh", "intensity_source", "pue"]
    logs = stage_totals(paper_rows()).rename(columns={"stage": "run"})
    log = ["run", "duration_s", "energy_kwh", "measured_kwh", "modelled_kwh", "emissions_kg", "mean_watts", "gpu_watts"]
    spent, overhead = run.need(PRETRAINING).metrics()["energy_kwh"], stages[stages.stage == PRETRAINING].pue.iloc[0]
    forecasts, same = pd.DataFrame(metrics["forecast"]), equivalents.equivalents(metrics["emissions_kg"], kwh)
    made = {
        "06_stages": (stages[cost], "Energy and emissions by stage, with their share of the whole"),
        "06_parts": (stages[parts], "Energy by part of the machine, measured or modelled"),
        "06_intensity": (stages[where], "Where the stages ran: grams of CO2 equivalent per kWh, and overhead (PUE)"),
        "06_paper_logs": (logs[[*log, "intensity_g_per_kwh"]], "The authors' CodeCarbon logs, added up by this code"),
        "06_checkpoints": (points, f"Perplexity and energy at each evaluation of run {run.name}"),
        "06_table6": (paper_returns(), "The paper's table 6 (460m); what its progress cost is computed"),
        "06_160m": (paper_returns("160m"), "The same from the authors' evaluation log of the 160m"),
        "06_forecast": (forecasts, "Pretraining as forecast from its first steps, and the error once it is done"),
        "06_equivalents": (same, "The same emissions and energy in other terms"),
        "06_grids": (equivalents.grids(kwh), "The run's energy on other grids"),
        "06_overheads": (
            equivalents.overheads(kwh, overhead, metrics["emissions_kg"] / kwh * 1000),
            "The same work in data centres of other overheads (PUE)",
        ),
        "06_gpus": (
            equivalents.gpus(run.params, spent),
            "Projected: this pretraining on one GPU, at the shares of the peak that the paper and Tucano reached",
        ),
        "06_utilisation": (
            equivalents.utilisation(),
            "Projected: the paper's runs at the shares of an A100's peak that others reached, at the logs' own power",
        ),
    }
    return made


def text(run: Run, metrics: dict[str, Any], made: dict[str, tuple[pd.DataFrame, str]]) -> str:
    """The report in Markdown, below its title; figures lie in `../figures`."""
    share, pretraining = metrics["measured_kwh"] / metrics["energy_kwh"], run.need(PRETRAINING).metrics()
    note = "Beside the paper's figures this run's are **not comparable**: another model, data or vocabulary."
    verdict, spent = verdict_of(run), quantity(metrics["energy_kwh"], "_kwh")

    def table(name: str) -> str:
        frame, caption = made[name]
        return f"{caption}.\n\n{markdown(readable(frame))}"

    parts = [
        note if verdict == "not comparable" else "This run has the paper's configuration.",
        f"**{spent}** and **{quantity(metrics['emissions_kg'], '_kg')}** of CO2 equivalent over "
        f"{quantity(metrics['duration_s'], '_s')} of work, kills and resumes included. Of the energy {share:.0%} is "
        f"measured, {1 - share:.0%} modelled; pretraining took {metrics['kwh_per_billion_tokens']:.3g} kWh and "
        f"{metrics['kg_per_billion_tokens']:.3g} kg per billion tokens. This report's own energy is not in it.",
        "## By stage",
        *(table(name) for name in ("06_stages", "06_parts", "06_intensity")),
        "A session measures the whole machine: of two at the same time in this bill the earlier one has the energy. "
        "A run that shares the machine with one of another bill carries all of it, and so does that other. Modelled "
        "figures are constants, or a load times a constant: they say how long it took rather than what it drew.",
        _figure("06_energy", "Energy by stage"),
        "## The authors' logs through the same code",
        table("06_paper_logs"),
        "The GPU's watts are its energy over the time; what the logs call power is one last sample.",
        conflicts("power", "duration"),
        "## Perplexity against energy",
        table("06_checkpoints"),
        table("06_table6"),
        table("06_160m"),
        diminishing(metrics),
        _figure("06_perplexity_energy", "Perplexity against energy"),
        conflicts("energy", "emissions"),
        "## As much as",
        table("06_equivalents"),
        "## What if",
        table("06_grids"),
        conflicts("carbon intensity"),
        table("06_overheads"),
        table("06_gpus"),
        table("06_utilisation"),
        power_note(),
        _figure("06_what_if", "The same run elsewhere"),
        "## Known early",
        table("06_forecast"),
        "Steps to come are taken to cost what those before did, and so are evaluations; time follows from the mean "
        f"power by then. It came to {quantity(pretraining['energy_kwh'], '_kwh')}, "
        f"{quantity(pretraining['emissions_kg'], '_kg')} and {quantity(pretraining['duration_s'], '_s')}.",
        _figure("06_forecast", "Error of the forecast"),
    ]
    return "\n\n".join(parts) + "\n"


def diminishing(metrics: dict[str, Any]) -> str:
    """The point of diminishing returns, defined, for this run and the paper's."""
    lines = [
        "**Where returns diminish**: the evaluation at which log perplexity, over energy, lies furthest below the "
        "straight line from the first evaluation of a trained model to the last. Before it a percent of perplexity "
        "costs less than on average over that span, after it more. It moves with the end of the run.",
        "",
    ]
    found = {"This run": metrics["diminishing_returns"]}
    found |= {f"The paper's {size}": after_the_point(paper_returns(size)) for size in paper.SIZES}
    for who, at in found.items():
        if at:
            lines.append(
                f"- {who}: step {at['step']:,}, after {quantity(at['energy_kwh'], '_kwh')}, at perplexity "
                f"{at['perplexity']:.2f}; the other {at['energy_share_after']:.0%} of the energy lowered it by "
                f"{at['perplexity_percent_after']:.1f}%."
            )
        else:
            lines.append(f"- {who}: none (fewer than three evaluations, or no such bend).")
    return "\n".join(lines)


def power_note() -> str:
    """What the projections assume, and how far that is from what Tucano measured."""
    share, rest = costs.power()
    rows = equivalents.utilisation()
    tucano = rows[rows.share_of.str.startswith("Tucano")].iloc[0]
    return (
        f"Projections, not measurements: power is {share:.0%} of the GPU's limit and {rest:.0f} W beside it, as in the "
        "paper's logs, whatever the share of the peak. A busier GPU draws more: Tucano, with the 160m's shape, reports "
        f"{costs.TUCANO_KWH_PER_BILLION_TOKENS:.2f} kWh per billion tokens (Corrêa et al. 2024), where the projection "
        f"for its share gives {tucano.kwh_per_billion_tokens:.2f}."
    )


def conflicts(*topics: str) -> str:
    """Where the published figures contradict each other on these topics."""
    return f"The published figures contradict each other here:\n\n{markdown(paper.contradictions(*topics))}"


def _figure(name: str, words: str) -> str:
    return f"![{words}](../figures/{name}.png)"
