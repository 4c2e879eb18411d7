"""What a run will cost, from its first steps; and where more energy stops paying (paper, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from ttl_utils import paper

# of the steps: a run is forecast from its first percent, and again from its tenth part
SHARES = (0.01, 0.1)


def forecast(records: Sequence[dict], max_steps: int, share: float = SHARES[0], eval_steps: int | None = None) -> dict:
    """The whole run's kWh from the records of its first steps; {} before a record at `share` of the steps.

    Steps to come cost what those so far have, checkpoints and work done twice included. Evaluations to come cost what
    one has; before there was a second, all until the first record of the run, loading included: an upper bound.
    Returns `step`, `share` (those used), `spent_kwh` and `energy_kwh`.
    """
    end = next((n for n, row in enumerate(records) if row["step"] >= share * max_steps and "loss" in row), None)
    if end is None:
        return {}
    rows = records[: end + 1]
    first = {"step": 0, "energy_kwh": rows[0]["energy_kwh"] if rows[0]["step"] == 0 else 0.0}
    between = [
        (new["step"] - old["step"], new["energy_kwh"] - old["energy_kwh"], "validation_loss" in new)
        for old, new in pairwise([first, *rows])
    ]
    training = [(steps, kwh) for steps, kwh, evaluated in between if not evaluated]
    per_step = sum(kwh for _, kwh in training) / max(sum(steps for steps, _ in training), 1)
    evaluations = [kwh - steps * per_step for steps, kwh, evaluated in between if evaluated][rows[0]["step"] == 0 :]
    step, spent = rows[-1]["step"], rows[-1]["energy_kwh"]
    # the one at this very step is still to come, and the last step has one in any case
    left = math.ceil(max_steps / eval_steps) - (step - 1) // eval_steps if eval_steps else 0
    total = spent + per_step * (max_steps - step) + left * float(np.mean(evaluations or [first["energy_kwh"]]))
    return {"step": step, "share": step / max_steps, "spent_kwh": spent, "energy_kwh": total}


def watts_until(rows: Sequence[dict], spent_kwh: float) -> float:
    """Mean watts of a stage's ledger rows, in order, until it had spent so many kWh (or so far)."""
    newest: dict[str, dict] = {}
    for row in rows:
        newest[row["session"]] = row
        if sum(each["energy_kwh"] for each in newest.values()) >= spent_kwh:
            break
    seconds = sum(each["duration_s"] for each in newest.values() if not each.get("rank"))
    return sum(each["energy_kwh"] for each in newest.values()) * 3.6e6 / seconds if seconds else math.nan


def returns(points: pd.DataFrame) -> pd.DataFrame:
    """What each evaluation's progress cost: kWh per point and per percent of perplexity, and where it stops paying.

    Both rates begin with the second evaluation of a trained model.

    `points` has step, tokens, perplexity and energy_kwh, in order. The point of diminishing returns (`diminishing`)
    is where log perplexity lies furthest below the straight line, over energy, from the first evaluation of a trained
    model to the last: before it a percent costs less than on average over that span, after it more.
    """
    rows = points.reset_index(drop=True)
    spent, ratio = rows.energy_kwh.diff(), rows.perplexity.shift() / rows.perplexity
    points_saved = rows.perplexity.shift() - rows.perplexity
    percent = 100 * (1 - 1 / ratio)
    rows["kwh_per_billion_tokens"] = rows.energy_kwh / rows.tokens.where(rows.tokens > 0) * 1e9
    if "emissions_kg" in rows:
        rows["kg_per_billion_tokens"] = rows.emissions_kg / rows.tokens.where(rows.tokens > 0) * 1e9
    # from the untrained model a point costs next to nothing
    later = rows.step.shift() > 0
    rows["kwh_per_point"] = spent / points_saved.where(later & (points_saved > 0))
    rows["kwh_per_percent"] = spent / percent.where(later & (percent > 0))
    rows["diminishing"] = False
    trained = rows[rows.step > 0]
    if len(trained) > 2 and np.isfinite(trained.perplexity).all():
        energy, loss = trained.energy_kwh, np.log(trained.perplexity)
        line = np.interp(energy, energy.iloc[[0, -1]], loss.iloc[[0, -1]])
        if (line - loss).max() > 1e-9:
            rows.loc[(line - loss).idxmax(), "diminishing"] = True
    return rows


def after_the_point(rows: pd.DataFrame) -> dict:
    """The point of diminishing returns in numbers, {} where there is none: what came after it cost and brought."""
    if not rows.diminishing.any():
        return {}
    at, last = rows[rows.diminishing].iloc[0], rows.iloc[-1]
    return {
        "step": int(at.step),
        "energy_kwh": float(at.energy_kwh),
        "perplexity": float(at.perplexity),
        "energy_share_after": float(1 - at.energy_kwh / last.energy_kwh),
        "perplexity_percent_after": float(100 * (1 - last.perplexity / at.perplexity)),
    }


def paper_returns(size: str = "460m") -> pd.DataFrame:
    """The paper's table 6, or the 160m's log, with what its progress cost."""
    if size == "460m":
        return returns(paper.table("table6_energy_460m").drop(columns="tokens_printed"))
    logged = paper.table("evaluation_log")
    return returns(logged[logged["size"] == size].drop(columns=["size", "loss"]))
