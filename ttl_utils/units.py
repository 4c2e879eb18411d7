"""Energy, emissions and time in units that fit: watt-hours where kilowatt-hours would be 0.00002."""

from __future__ import annotations

import pandas as pd

# the column's ending -> units, each with its factor, from the largest
UNITS = {
    "_kwh": {"kWh": 1.0, "Wh": 1e3, "mWh": 1e6},
    "_kg": {"kg": 1.0, "g": 1e3, "mg": 1e6},
    "_s": {"h": 1 / 3600, "s": 1.0},
}
NAMES = {
    "energy_kwh": "energy",
    "measured_kwh": "measured",
    "modelled_kwh": "modelled",
    "set_aside_kwh": "on folders set aside",
    "cpu_kwh": "CPU",
    "gpu_kwh": "GPU",
    "ram_kwh": "memory",
    "checkpoint_kwh": "until the checkpoint stood",
    "spent_kwh": "spent by then",
    "kwh_per_point": "energy per perplexity point",
    "kwh_per_percent": "energy per 1% of perplexity",
    "kwh_per_billion_tokens": "kWh per billion tokens",
    "kg_per_billion_tokens": "kg CO2e per billion tokens",
    "emissions_kg": "emissions, CO2e",
    "duration_s": "time",
    "shared_s": "beside another",
    "cpu_method": "CPU, how",
    "gpu_method": "GPU, how",
    "ram_method": "memory, how",
    "mean_watts": "mean power (W)",
    "gpu_watts": "GPU (W)",
    "intensity_g_per_kwh": "intensity (g/kWh)",
    "intensity_source": "source of the intensity",
    "country_iso_code": "country",
    "pue": "PUE",
    "share_of_energy": "share (%)",
    "share_of_peak": "share of peak (%)",
    "share": "share of the steps (%)",
    "energy_error": "error of the energy (%)",
    "duration_error": "error of the time (%)",
    "factor_unit": "unit of the factor",
    "share_of": "share as in",
    "times_ours": "times ours",
    "gpu": "GPU",
    "diminishing": "returns diminish",
}
PERCENT = ("share_of_energy", "share_of_peak", "share")
RATES = ("kwh_per_point", "kwh_per_percent")


def unit(largest: float, ending: str) -> tuple[str, float]:
    """The unit in which the largest of some values is at least 0.1, and its factor; hours from two on."""
    *larger, last = UNITS[ending].items()
    for name, factor in larger:
        if largest * factor >= (2 if name == "h" else 0.1):
            return name, factor
    return last


def quantity(value: float, ending: str) -> str:
    """A value in text: `quantity(0.0024, "_kwh")` is '2.4 Wh'."""
    name, factor = unit(value, ending)
    return f"{value * factor:,.3g} {name}" if value * factor < 1000 else f"{value * factor:,.0f} {name}"


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with names and units that fit in its heads; columns of one kind share a unit, a rate has its own."""
    shown, names = frame.replace({"diminishing": {True: "here", False: ""}}), dict(NAMES)
    groups = [([name for name in frame if name.endswith(ending) and "_per_" not in name], ending) for ending in UNITS]
    for group, ending in [*groups, *(([name], "_kwh") for name in RATES if name in frame)]:
        if group:
            name, factor = unit(frame[group].abs().max(axis=None), ending)
            shown[group] = frame[group] * factor
            names |= {column: f"{NAMES.get(column, column)} ({name})" for column in group}
    for column in frame.columns.intersection(PERCENT):
        shown[column] = 100 * frame[column]
    return shown.rename(columns=names)
