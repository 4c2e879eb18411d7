"""Energy and emissions: a ledger that survives kills, totals per stage, and what they amount to."""

from __future__ import annotations

import difflib
import json
import logging
import os
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import codecarbon
import pandas as pd
from codecarbon.input import DataSource
from codecarbon.output_methods.base_output import BaseOutput

from ttl_utils.errors import TTLError

# g/kWh: the German average behind the final rows of the paper's own CodeCarbon logs, the same in both
PAPER_INTENSITY = 365.477
# kg per km: the paper's car ride (section 4.2), 185 km for its two runs' 5.67 + 41.29 kg, the chat run's
# 2.5 kg left out; the 0.409 kg a mile of CodeCarbon's dashboard (US EPA) gives the same 185 km
CAR_KG_PER_KM = (5.67 + 41.29) / 185

_PARTS = ("cpu", "gpu", "ram")
_METHODS = [f"{part}_method" for part in _PARTS]
_SUMMED = ["duration_s", *(f"{part}_kwh" for part in _PARTS), "energy_kwh", "emissions_kg"]
_SUMMED += ["measured_kwh", "modelled_kwh"]
# codecarbon's own timer takes no lock: a sample of ours during one of its would count the interval twice.
# so it never fires (46 days, about the longest wait Windows allows) and a thread of ours samples instead
_NEVER_S = 4_000_000


class EnergySession(BaseOutput):
    """One session's energy so far, as of the last sample: `energy_kwh`, `emissions_kg`, `duration_s`."""

    def __init__(self, ledger: Path | None = None, columns: dict | None = None) -> None:
        self.energy_kwh = self.emissions_kg = self.duration_s = 0.0
        self._ledger, self._columns, self._marks = ledger, columns or {}, {}
        self._tracker: codecarbon.OfflineEmissionsTracker | None = None
        self._lock = threading.Lock()
        self._write = self._final = self._sampled = False
        self._sampled_at = 0.0
        self._error: BaseException | None = None

    def mark(self, **fields: object) -> None:
        """Add fields (step, tokens_done) to the rows still to be written."""
        self._marks = {**self._marks, **fields}

    def sample(self, *, write: bool = False) -> float:
        """Measure now, at most once a second, and return the kWh so far; about 1 ms, from any thread."""
        with self._lock:
            # codecarbon loses the time a measurement takes from what it models: do not ask at every step
            if self._tracker is not None and (write or time.monotonic() - self._sampled_at >= 1):
                self._write, self._sampled_at = write, time.monotonic()
                self._sampled = self._tracker.flush() is not None
        return self.energy_kwh

    def out(self, total: object, delta: object) -> None:
        """Take CodeCarbon's cumulative figures: it calls this inside `flush()` and `stop()`."""
        self.energy_kwh, self.emissions_kg = total.energy_consumed, total.emissions
        self.duration_s = total.duration
        if self._write or self._final:
            row = {
                **self._marks,
                **self._columns,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "duration_s": total.duration,
                **{f"{part}_kwh": getattr(total, f"{part}_energy") for part in _PARTS},
                "energy_kwh": total.energy_consumed,
                "emissions_kg": total.emissions,
                "country_iso_code": total.country_iso_code,
                **_methods(self._tracker),
                "codecarbon_version": total.codecarbon_version,
                "final": self._final,
            }
            # default: a mark may be a numpy or torch number
            _append(self._ledger, json.dumps(row, default=float))

    def _hush(self, record: logging.LogRecord) -> bool:
        # codecarbon swallows its exceptions into its log: keep the last one, print nothing
        if record.exc_info and record.exc_info[1] is not None:
            self._error = record.exc_info[1]
        return False


@contextmanager
def track(ledger: Path, stage: str, carbon: object, *, measure_s: float | None = None) -> Iterator[EnergySession]:
    """Measure the machine while the block runs; append a row to `ledger` at every interval and at the end.

    Rows are cumulative within a session: a stage's total is the sum over sessions of each one's last row, and
    a kill loses one interval at most. `carbon` has `country_iso_code`, `carbon_intensity_g_per_kwh` (None:
    the country's), `pue` and `measure_power_s`, which `measure_s` replaces. Ranks other than a machine's
    first record nothing, since each would measure the whole machine again.
    """
    if os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
        yield EnergySession()
        return
    # always forced, the country's own figure too: then nothing else can decide it
    intensity = country_intensity(carbon.country_iso_code)
    if carbon.carbon_intensity_g_per_kwh is not None:
        intensity = carbon.carbon_intensity_g_per_kwh
    columns = {"session": uuid.uuid4().hex, "stage": stage, "rank": int(os.environ.get("RANK", "0"))}
    columns |= {"intensity_g_per_kwh": intensity, "pue": carbon.pue}
    session = EnergySession(Path(ledger), columns)
    # a filter, not a level: the first messages come before log_level applies
    log = logging.getLogger("codecarbon")
    log.addFilter(session._hush)
    done = threading.Event()
    sampler = threading.Thread(
        target=_keep_sampling, args=(session, done, measure_s or carbon.measure_power_s), daemon=True
    )
    try:
        # what a user's .codecarbon.config or environment could change in the figures is set here
        tracker = session._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code=carbon.country_iso_code,
            cloud_provider=None,
            cloud_region=None,
            force_carbon_intensity_g_co2e_kwh=intensity,
            pue=carbon.pue,
            tracking_mode="machine",
            measure_power_secs=_NEVER_S,
            api_call_interval=-1,
            output_methods=[],
            output_handlers=[session],
            output_dir=tempfile.gettempdir(),
            emissions_endpoint=False,
            electricitymaps_api_token="",
            allow_multiple_runs=True,
            log_level="warning",
        )
        tracker.start()
        session.sample(write=True)
        if not session._sampled:
            tracker.stop()
            raise TTLError(
                f"energy of stage {stage} cannot be tracked in {ledger}: {session._error!r}. "
                "Check that the folder can be written and that CodeCarbon works here."
            )
        sampler.start()
        try:
            yield session
        finally:
            done.set()
            sampler.join()
            with session._lock:
                session._final = True
                written = tracker.stop() is not None
                session._tracker = None
            if not written:
                lost = f"energy of stage {stage}: the last row is missing from {ledger} ({session._error!r})"
                warnings.warn(lost, stacklevel=3)
    finally:
        log.removeFilter(session._hush)


def country_intensity(country_iso_code: str) -> float:
    """Grams of CO2 equivalent per kWh of a country's grid, from CodeCarbon's data files; no network."""
    countries = DataSource().get_global_energy_mix_data()
    # codecarbon itself takes the world average for a code it does not know, in silence
    if country_iso_code not in countries:
        near = difflib.get_close_matches(str(country_iso_code).upper(), countries) or ["DEU", "BRA"]
        raise TTLError(
            f"carbon.country_iso_code: {country_iso_code!r} is not a country CodeCarbon has figures for. "
            f"Give a three-letter ISO code in capitals, such as {', '.join(near)}."
        )
    return float(countries[country_iso_code]["carbon_intensity"])


def read_ledger(ledger: Path) -> list[dict]:
    """Every whole row of the ledger, in order; [] when there is none. A line torn by a kill is left out."""
    rows = []
    if Path(ledger).exists():
        for line in Path(ledger).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def stage_energy(ledger: Path, stage: str, since: str = "") -> tuple[float, float, float]:
    """kWh, kg and seconds of a stage over its sessions, one under way included; zeros without a ledger.

    `since` (ISO time, UTC) leaves out what was spent before: on a folder that was moved aside.
    """
    rows = [row for row in _last_rows(ledger) if row["stage"] == stage and row["time"] >= since]
    energy_kwh, emissions_kg, duration_s = (
        float(sum(row[key] for row in rows)) for key in ("energy_kwh", "emissions_kg", "duration_s")
    )
    return energy_kwh, emissions_kg, duration_s


def stage_totals(ledger: Path) -> pd.DataFrame:
    """A row per stage, summed over its sessions, measured energy apart from modelled (both with the PUE)."""
    texts = ["country_iso_code", *_METHODS]
    last = _last_rows(ledger)
    if not last:
        names = ["stage", "sessions", *_SUMMED, "mean_watts", "intensity_g_per_kwh", *texts]
        return pd.DataFrame(columns=names)
    rows = pd.DataFrame(last)
    for kind in ("measured", "modelled"):
        rows[f"{kind}_kwh"] = sum(
            rows[f"{part}_kwh"].where(rows[f"{part}_method"].str.startswith(kind), 0.0) for part in _PARTS
        )
    stages = rows.groupby("stage", sort=False)
    totals = stages[_SUMMED].sum()
    totals.insert(0, "sessions", stages.size())
    # codecarbon's own power figures are averages over samples: energy over time is the mean
    totals["mean_watts"] = totals["energy_kwh"] * 3.6e6 / totals["duration_s"]
    totals["intensity_g_per_kwh"] = totals["emissions_kg"] / totals["energy_kwh"] * 1000
    for name in texts:
        totals[name] = stages[name].agg(lambda values: ", ".join(dict.fromkeys(values)))
    return totals.reset_index()


def car_km(emissions_kg: float) -> float:
    """Kilometres by car for the same emissions, at the paper's own ratio (section 4.2)."""
    return emissions_kg / CAR_KG_PER_KM


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
    return pd.DataFrame(rows, columns=["equivalent", "amount", "unit", "factor", "factor_unit", "source"])


def what_if(energy_kwh: float, countries: Sequence[str] = ("DEU", "BRA")) -> pd.DataFrame:
    """Emissions of the same energy on other grids: the paper's, some countries', the world's average."""
    data, files = DataSource(), f"CodeCarbon {codecarbon.__version__}"
    grids = [("Germany, as in the paper", PAPER_INTENSITY, "the paper's CodeCarbon 2.3.2 logs, final rows")]
    for code in countries:
        intensity, mix = country_intensity(code), data.get_global_energy_mix_data()[code]
        grids.append((mix["country_name"], intensity, f"{files}, national mix of {mix['year']}"))
    world = float(data.get_carbon_intensity_per_source_data()["world_average"])
    grids.append(("world average", world, f"{files}, after the IEA's status report of 2019"))
    rows = [(grid, grams, energy_kwh * grams / 1000, source) for grid, grams, source in grids]
    return pd.DataFrame(rows, columns=["grid", "intensity_g_per_kwh", "emissions_kg", "source"])


def _keep_sampling(session: EnergySession, done: threading.Event, interval_s: float) -> None:
    while not done.wait(interval_s):
        session.sample(write=True)


def _append(ledger: Path, line: str) -> None:
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("a+b") as file:
        # a kill may have left a line without its end: start on a new one
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")


def _last_rows(ledger: Path) -> list[dict]:
    rows = {row["session"]: row for row in read_ledger(ledger)}.values()
    # machines that work side by side spend energy each, and the time once
    return [row | {"duration_s": 0.0} if row.get("rank") else row for row in rows]


def _methods(tracker: codecarbon.OfflineEmissionsTracker) -> dict[str, str]:
    """Which of CodeCarbon's figures are measured here and which are modelled."""
    cpu = {
        "intel_rapl": "measured (RAPL)",
        "windows_emi": "measured (Windows energy meter)",
        "intel_power_gadget": "measured (Power Gadget)",
        "cpu_load": "modelled (CPU load and rated power)",
    }
    methods = {f"{part}_method": "none" for part in _PARTS}
    # private, but codecarbon names its methods nowhere else than in its log
    for hardware in tracker._hardware:
        kind = type(hardware).__name__
        if kind == "CPU":
            methods["cpu_method"] = cpu.get(hardware._mode, "modelled (constant share of rated power)")
        elif kind == "RAM":
            methods["ram_method"] = "modelled (constant, from the memory's size)"
        elif kind == "GPU":
            meter = "AMD SMI" if "AMD" in str(tracker._conf.get("gpu_model")) else "NVML"
            methods["gpu_method"] = f"measured ({meter})"
        else:
            # Apple's and Raspberry's chips read their own meters
            meter = "powermetrics" if kind == "AppleSiliconChip" else "power management chip"
            methods[f"{hardware.chip_part.lower()}_method"] = f"measured ({meter})"
    return methods
