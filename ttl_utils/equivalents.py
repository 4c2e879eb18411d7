"""What energy and emissions amount to, and what they would be elsewhere: other grids, data centres, GPUs, shares."""

from __future__ import annotations

from collections.abc import Sequence

import codecarbon
import pandas as pd
from codecarbon.input import DataSource

from ttl_utils import costs, devices, paper
from ttl_utils.carbon import CAR_KG_PER_KM, PAPER_INTENSITY, car_km, grid
from ttl_utils.memory import precision_of
from ttl_utils.params import Params
from ttl_utils.planning import tokens_of

GPUS = ("T4", "L4", "RTX-4090", "A100-40GB", "H100-SXM")
COUNTRIES = ("DEU", "BRA", "FRA", "NOR", "PRT", "USA", "CHN", "IND")
PUES = {
    1.0: "the paper, by CodeCarbon's default: no overhead",
    1.2: "Jean Zay, where BLOOM was trained (Luccioni et al. 2022)",
    1.58: "mean of data centres (Uptime Institute, Global Data Center Survey 2023)",
}


def equivalents(emissions_kg: float, energy_kwh: float) -> pd.DataFrame:
    """What the emissions and the energy amount to, each with its factor and where the factor comes from."""
    # 8,887 g of CO2 per US gallon of petrol; 4.186 kJ/(kg K) x 80 K / 3600 per litre of water
    petrol_kg, water_kwh, lamp_kwh = 8.887 / 3.785411784, 4.186 * 80 / 3600, 0.010
    car = "the paper, section 4.2: 185 km for the 5.67 + 41.29 kg of its two runs"
    petrol = "US EPA: 8,887 g of CO2 per US gallon of petrol burned"
    water = "water heated from 20 to 100 °C"
    rows = [
        ("car ride", car_km(emissions_kg), "km", CAR_KG_PER_KM, "kg per km", car),
        ("petrol burned", emissions_kg / petrol_kg, "litres", petrol_kg, "kg per litre", petrol),
        (water, energy_kwh / water_kwh, "litres", water_kwh, "kWh per litre", "physics: no losses"),
        ("a 10 W lamp", energy_kwh / lamp_kwh, "hours", lamp_kwh, "kWh per hour", "by definition"),
    ]
    smaller = {"km": ("m", 1000), "litres": ("ml", 1000), "hours": ("minutes", 60)}
    for at, (name, amount, unit, *rest) in enumerate(rows):
        if amount < 1:
            rows[at] = (name, amount * smaller[unit][1], smaller[unit][0], *rest)
    return pd.DataFrame(rows, columns=["equivalent", "amount", "unit", "factor", "factor_unit", "source"])


def grids(energy_kwh: float, countries: Sequence[str] = COUNTRIES) -> pd.DataFrame:
    """Emissions of the same energy on other grids: the paper's, some countries', the world's average."""
    rows = [("Germany, as in the paper", PAPER_INTENSITY, "the paper's CodeCarbon 2.3.2 logs, final rows")]
    rows += [grid(code) for code in countries]
    world = float(DataSource().get_carbon_intensity_per_source_data()["world_average"])
    iea = f"CodeCarbon {codecarbon.__version__}, after the IEA's status report of 2019"
    made = pd.DataFrame([*rows, ("world average", world, iea)], columns=["grid", "intensity_g_per_kwh", "source"])
    made.insert(2, "emissions_kg", energy_kwh * made.intensity_g_per_kwh / 1000)
    return made.sort_values("intensity_g_per_kwh", ignore_index=True)


def overheads(energy_kwh: float, pue: float, intensity_g_per_kwh: float) -> pd.DataFrame:
    """The same work in data centres of other overheads: `energy_kwh` was counted with `pue`."""
    rows = [(value, energy_kwh / pue * value, source) for value, source in PUES.items()]
    made = pd.DataFrame(rows, columns=["pue", "energy_kwh", "source"])
    made.insert(2, "emissions_kg", made.energy_kwh * intensity_g_per_kwh / 1000)
    return made


def gpus(params: Params, energy_kwh: float, names: Sequence[str] = GPUS) -> pd.DataFrame:
    """Projected: this pretraining on one GPU, at the shares of its peak that the paper and Tucano reached."""
    rows = []
    for name, gpu in devices.gpus().loc[list(names)].iterrows():
        if not precision_of(params, gpu):
            continue
        for share in costs.paper_and_tucano():
            found = costs.cost(tokens_of(params) / costs.speed(params, gpu, share) / 3600, params, gpu)
            rows.append((name, share, found["hours"] * 3600, found["kWh"], found["kg"], found["kWh"] / energy_kwh))
    columns = ["gpu", "share_of_peak", "duration_s", "energy_kwh", "emissions_kg", "times_ours"]
    return pd.DataFrame(rows, columns=columns)


def utilisation() -> pd.DataFrame:
    """Projected: the paper's logged runs at shares of the peak that others reached, at the same power."""
    logs, anchors = paper.table("codecarbon_final").set_index("size"), costs.anchors()
    rows = []
    for size, own in zip(paper.SIZES, anchors.iloc[:2], strict=True):
        log, tokens = logs.loc[size], paper.headline(size)["tokens"].value
        for name, share in [("logged", own), *anchors.iloc[2:].items()]:
            energy_kwh = log.energy_kwh * own / share
            row = (size, name, share, log.duration_s * own / share, energy_kwh, log.emissions_kg * own / share)
            rows.append((*row, energy_kwh / tokens * 1e9, row[-1] / tokens * 1e9))
    columns = ["run", "share_of", "share_of_peak", "duration_s", "energy_kwh", "emissions_kg"]
    return pd.DataFrame(rows, columns=[*columns, "kwh_per_billion_tokens", "kg_per_billion_tokens"])
