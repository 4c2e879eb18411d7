"""Measuring energy and emissions into a ledger that survives kills; `ledger` reads it."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import platform
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import codecarbon
from codecarbon.input import DataSource
from codecarbon.output_methods.base_output import BaseOutput

from ttl_utils.errors import TTLError
from ttl_utils.ledger import PARTS

# g/kWh: the German average behind the final rows of the paper's own CodeCarbon logs, the same in both
PAPER_INTENSITY = 365.477
# kg per km: the paper's car ride (section 4.2), 185 km for its two runs' 5.67 + 41.29 kg, the chat run's
# 2.5 kg left out; the 0.409 kg a mile of CodeCarbon's dashboard (US EPA) gives the same 185 km
CAR_KG_PER_KM = (5.67 + 41.29) / 185

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
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "duration_s": total.duration,
                **{f"{part}_kwh": getattr(total, f"{part}_energy") for part in PARTS},
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
    intensity, source = _intensity(carbon)
    columns = {"session": uuid.uuid4().hex, "stage": stage, "rank": int(os.environ.get("RANK", "0"))}
    columns |= {"machine": hashlib.sha256(platform.node().encode()).hexdigest()[:12]}
    columns |= {"intensity_g_per_kwh": intensity, "intensity_source": source, "pue": carbon.pue}
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
    return grid(country_iso_code)[1]


def grid(country_iso_code: str) -> tuple[str, float, str]:
    """A country's name, grams of CO2 equivalent per kWh, and the source with its year."""
    countries = DataSource().get_global_energy_mix_data()
    # codecarbon itself takes the world average for a code it does not know, in silence
    if country_iso_code not in countries:
        near = difflib.get_close_matches(str(country_iso_code).upper(), countries) or ["DEU", "BRA"]
        raise TTLError(
            f"carbon.country_iso_code: {country_iso_code!r} is not a country CodeCarbon has figures for. "
            f"Give a three-letter ISO code in capitals, such as {', '.join(near)}."
        )
    mix = countries[country_iso_code]
    source = f"CodeCarbon {codecarbon.__version__}, national mix of {mix['year']}"
    return mix["country_name"], float(mix["carbon_intensity"]), source


def car_km(emissions_kg: float) -> float:
    """Kilometres by car for the same emissions, at the paper's own ratio (section 4.2)."""
    return emissions_kg / CAR_KG_PER_KM


def _intensity(carbon: object) -> tuple[float, str]:
    """Grams per kWh of a run, and where the figure is from."""
    _, grams, source = grid(carbon.country_iso_code)
    given = carbon.carbon_intensity_g_per_kwh
    if given is None:
        return grams, source
    paper = "the paper's logs (Germany, CodeCarbon 2.3.2)"
    return given, paper if given == PAPER_INTENSITY else "given in section carbon"


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


def _methods(tracker: codecarbon.OfflineEmissionsTracker) -> dict[str, str]:
    """Which of CodeCarbon's figures are measured here and which are modelled."""
    cpu = {
        "intel_rapl": "measured (RAPL)",
        "windows_emi": "measured (Windows energy meter)",
        "intel_power_gadget": "measured (Power Gadget)",
        "cpu_load": "modelled (CPU load and rated power)",
    }
    methods = {f"{part}_method": "none" for part in PARTS}
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
