"""Reading the energy ledger: what each stage of a run cost, an interval of a machine counted once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttl_utils import paper
from ttl_utils.errors import DamagedFile

PARTS = ("cpu", "gpu", "ram")
_METHODS = [f"{part}_method" for part in PARTS]
_COUNTED = ["duration_s", *(f"{part}_kwh" for part in PARTS), "energy_kwh", "emissions_kg"]
_SUMMED = [*_COUNTED, "measured_kwh", "modelled_kwh", "shared_s"]
_TEXTS = ["country_iso_code", "intensity_source", *_METHODS]
# in every row; a text or a number too where it is there
_TEXT = {"session", "stage", "time", "country_iso_code", *_METHODS}
_TEXT_MAYBE, _NUMBER_MAYBE = {"machine", "intensity_source"}, {"rank", "intensity_g_per_kwh", "pue"}


def read_ledger(ledger: Path) -> list[dict]:
    """Every whole row of the ledger, in order; [] when there is none. A line torn by a kill is left out.

    Raises:
        DamagedFile: a line is whole and is no row.
    """
    rows = []
    if Path(ledger).exists():
        for number, line in enumerate(Path(ledger).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if wrong := _wrong(row):
                raise DamagedFile(f"{ledger} is damaged, line {number}: {wrong}. Restore it from a copy")
            rows.append(row)
    return rows


def _wrong(row: Any) -> str:
    """What makes this no row of a ledger; nothing where it is one."""
    if not isinstance(row, dict):
        return "not a row of the ledger"
    for names, kind in ((_TEXT, str), (_COUNTED, int | float)):
        if found := [name for name in names if not isinstance(row.get(name), kind)]:
            return f"{', '.join(sorted(found))} missing, or of another kind"
    maybe = ((_TEXT_MAYBE, str), (_NUMBER_MAYBE, int | float))
    if found := [name for names, kind in maybe for name in names & row.keys() if not isinstance(row[name], kind)]:
        return f"{', '.join(sorted(found))} of another kind"
    try:
        _time(row)
    except ValueError:
        return f"time {row['time']!r}"
    return "" if np.isfinite([row[name] for name in _COUNTED]).all() else "not a finite number"


def sessions(rows: Iterable[dict]) -> list[dict]:
    """Each session's last row: what it spent, without what an earlier session of its machine has counted already.

    Each session measures the whole machine, so that of two at the same time (an evaluation beside training) the one
    that began first has the energy; `shared_s` says for how long the other ran beside it.
    """
    grouped: dict[str, list[dict]] = {}
    for row in rows:
        grouped.setdefault(row["session"], []).append(row)
    whole = [sorted(group, key=lambda row: row["duration_s"]) for group in grouped.values()]
    begun = [(_start(group[0]), group) for group in whole]
    counted_until: dict[str, float] = {}
    found = []
    for start, group in sorted(begun, key=lambda item: item[0]):
        last = {**group[-1], "shared_s": 0.0}
        if "machine" in last:
            until, end = counted_until.get(last["machine"], start), _time(last)
            if until > start:
                times = [start, *map(_time, group)]
                for key in _COUNTED:
                    last[key] -= float(np.interp(until, times, [0.0, *(row[key] for row in group)]))
                last["shared_s"] = group[-1]["duration_s"] - last["duration_s"]
            counted_until[last["machine"]] = max(until, end)
        if last.get("rank"):
            # machines that work side by side spend energy each, and the time once
            last |= {"duration_s": 0.0, "shared_s": 0.0}
        found.append(last)
    return found


def rows_since(rows: Iterable[dict], stage: str, since: str = "") -> list[dict]:
    """The rows of a stage; `since` (ISO time, UTC) leaves out the sessions that began before."""
    own = [row for row in rows if row["stage"] == stage]
    first = {row["session"]: row for row in reversed(own)}
    # a second for the times of older ledgers, which are whole seconds
    after = _seconds(since) - 1 if since else -np.inf
    return [row for row in own if _start(first[row["session"]]) >= after]


def stage_energy(ledger: Path, stage: str, since: str = "") -> tuple[float, float, float]:
    """kWh, kg and seconds of a stage over its sessions, one under way included; zeros without a ledger.

    `since` (ISO time, UTC) leaves out the sessions that began before: on a folder that was moved aside.
    """
    rows = read_ledger(ledger)
    wanted = {row["session"] for row in rows_since(rows, stage, since)}
    own = [row for row in sessions(rows) if row["session"] in wanted]
    energy_kwh, emissions_kg, duration_s = (
        float(sum(row[key] for row in own)) for key in ("energy_kwh", "emissions_kg", "duration_s")
    )
    return energy_kwh, emissions_kg, duration_s


def stage_totals(ledger: Path | Iterable[dict], by: Sequence[str] = ("stage",)) -> pd.DataFrame:
    """A row per stage of a ledger or of its rows, over all sessions; measured energy apart from modelled.

    Energy, and with it watts, holds the PUE that was set. Watts are energy over time.
    """
    last, by = sessions(read_ledger(ledger) if isinstance(ledger, Path) else ledger), list(by)
    names = [*by, "sessions", *_SUMMED, "mean_watts", "gpu_watts", "intensity_g_per_kwh", "pue", *_TEXTS]
    if not last:
        return pd.DataFrame(columns=names)
    rows = pd.DataFrame([{"intensity_source": "not recorded", "pue": np.nan, **row} for row in last])
    for kind in ("measured", "modelled"):
        rows[f"{kind}_kwh"] = sum(
            rows[f"{part}_kwh"].where(rows[f"{part}_method"].str.startswith(kind), 0.0) for part in PARTS
        )
    stages = rows.groupby(by, sort=False)
    totals = stages[_SUMMED].sum()
    totals.insert(0, "sessions", stages.size())
    # codecarbon's own power figures are averages over samples: energy over time is the mean
    seconds = totals["duration_s"].where(totals["duration_s"] > 0)
    totals["mean_watts"], totals["gpu_watts"] = (totals[f"{part}_kwh"] * 3.6e6 / seconds for part in ("energy", "gpu"))
    energy_kwh = totals["energy_kwh"].where(totals["energy_kwh"] > 0)
    totals["intensity_g_per_kwh"] = totals["emissions_kg"] / energy_kwh * 1000
    totals["pue"] = stages["pue"].mean()
    for name in _TEXTS:
        totals[name] = stages[name].agg(lambda values: ", ".join(dict.fromkeys(filter(None, values))))
    return totals.reset_index()[names]


def paper_rows() -> list[dict]:
    """The last rows of the authors' own CodeCarbon logs as rows of a ledger, a stage per size."""
    rows = []
    for log in paper.table("codecarbon_final").to_dict("records"):
        row = {"session": log["size"], "stage": log["size"], "country_iso_code": "DEU", "pue": 1.0}
        row |= {key: log[key] for key in ("duration_s", "energy_kwh", "emissions_kg", "intensity_g_per_kwh")}
        row |= {f"{part}_kwh": log[f"{part}_energy_kwh"] for part in PARTS}
        row |= {"cpu_method": "modelled (constant)", "ram_method": "modelled (constant, from the memory's size)"}
        row |= {"gpu_method": "measured (NVML)"}
        rows.append(row | {"intensity_source": f"the paper's logs, CodeCarbon {log['codecarbon_version']}"})
    return rows


def _seconds(time: str) -> float:
    parsed = datetime.fromisoformat(time)
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def _time(row: dict) -> float:
    return _seconds(row["time"])


def _start(row: dict) -> float:
    return _time(row) - row["duration_s"] if "time" in row else 0.0
