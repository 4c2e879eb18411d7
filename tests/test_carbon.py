"""The energy ledger: totals over sessions and kills, silence, intensities, equivalents."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ttl_utils import carbon as cb
from ttl_utils import costs, equivalents, paper
from ttl_utils.errors import TTLError
from ttl_utils.ledger import read_ledger, stage_energy, stage_totals

GERMANY = SimpleNamespace(country_iso_code="DEU", carbon_intensity_g_per_kwh=None, pue=1.0, measure_power_s=0.1)


def germany(**changes):
    return SimpleNamespace(**{**vars(GERMANY), **changes})


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "run" / "energy.jsonl"


def row(session, stage, cpu, gpu, ram, *, seconds=10.0, grams=400.0, gpu_method="measured (NVML)", time="2026-01-02"):
    energy_kwh = cpu + gpu + ram
    return {
        "session": session,
        "stage": stage,
        "time": time,
        "duration_s": seconds,
        "cpu_kwh": cpu,
        "gpu_kwh": gpu,
        "ram_kwh": ram,
        "energy_kwh": energy_kwh,
        "emissions_kg": energy_kwh * grams / 1000,
        "intensity_g_per_kwh": grams,
        "country_iso_code": "DEU",
        "cpu_method": "modelled (CPU load and rated power)",
        "gpu_method": gpu_method,
        "ram_method": "modelled (constant, from the memory's size)",
    }


def write(ledger, *rows):
    ledger.parent.mkdir(parents=True)
    ledger.write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_two_sessions_add_up_and_rows_are_cumulative(ledger):
    with cb.track(ledger, "03_pretraining", GERMANY) as first:
        time.sleep(0.45)
    with cb.track(ledger, "03_pretraining", GERMANY) as second:
        second.mark(step=np.int64(7))
        time.sleep(0.25)
    rows = read_ledger(ledger)
    mine = [each for each in rows if each["session"] == rows[0]["session"]]
    assert len(mine) >= 4 and [each["final"] for each in mine].count(True) == 1 and mine[-1]["final"]
    kwh = [each["energy_kwh"] for each in mine]
    assert kwh == sorted(kwh) and kwh[-1] == first.energy_kwh > 0
    assert rows[-1]["step"] == 7 and "step" not in mine[-1]
    energy_kwh, emissions_kg, duration_s = stage_energy(ledger, "03_pretraining")
    assert energy_kwh == pytest.approx(first.energy_kwh + second.energy_kwh, rel=1e-12)
    assert emissions_kg == pytest.approx(first.emissions_kg + second.emissions_kg, rel=1e-12)
    assert duration_s == pytest.approx(first.duration_s + second.duration_s) and 0.7 <= duration_s < 5
    assert stage_energy(ledger, "05_chat") == (0.0, 0.0, 0.0)


def test_sampling_often_counts_no_time_twice(ledger):
    watts = []
    for seconds in (60, 0.06):
        with cb.track(ledger, "01_data", germany(measure_power_s=seconds)) as session:
            before = session.energy_kwh
            time.sleep(1.1)
            for _ in range(20):
                assert session.sample() > before
        last = read_ledger(ledger)[-1]
        # memory: a constant number of watts
        watts.append(last["ram_kwh"] * 3.6e6 / last["duration_s"])
    assert watts[1] == pytest.approx(watts[0], rel=0.2) and watts[0] > 0


def test_a_killed_session_counts_up_to_its_last_sample(ledger):
    code = (
        "import sys, time; from pathlib import Path; from types import SimpleNamespace as N\n"
        "from ttl_utils.carbon import track\n"
        f"c = N(**{vars(GERMANY)!r})\n"
        "with track(Path(sys.argv[1]), '03_pretraining', c): time.sleep(60)\n"
    )
    root = str(Path(cb.__file__).parents[1])
    child = subprocess.Popen([sys.executable, "-c", code, str(ledger)], env={**os.environ, "PYTHONPATH": root})
    deadline = time.monotonic() + 60
    while len(read_ledger(ledger)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.wait()
    killed = read_ledger(ledger)
    assert len(killed) >= 3 and not killed[-1]["final"] and killed[-1]["energy_kwh"] > 0
    with cb.track(ledger, "03_pretraining", GERMANY) as session:
        time.sleep(0.1)
    energy_kwh = stage_energy(ledger, "03_pretraining")[0]
    assert energy_kwh == pytest.approx(killed[-1]["energy_kwh"] + session.energy_kwh, rel=1e-12)
    assert stage_totals(ledger).loc[0, "sessions"] == 2


def test_a_torn_last_line_harms_neither_reader_nor_next_session(ledger):
    write(ledger, row("a", "01_data", 1, 0, 1))
    with ledger.open("a") as file:
        file.write('{"session": "a", "stage": "01_da')
    assert stage_energy(ledger, "01_data")[0] == 2
    with cb.track(ledger, "01_data", GERMANY) as session:
        pass
    assert stage_energy(ledger, "01_data")[0] == pytest.approx(2 + session.energy_kwh, rel=1e-15)
    assert len(read_ledger(ledger)) == 3  # the whole row, the first and the final of the new session


def test_intensity_is_the_country_s_unless_it_is_forced(ledger):
    for grams, expected in ((None, cb.country_intensity("DEU")), (cb.PAPER_INTENSITY, 365.477)):
        with cb.track(ledger, "01_data", germany(carbon_intensity_g_per_kwh=grams)) as session:
            time.sleep(0.1)
        assert session.emissions_kg == pytest.approx(session.energy_kwh * expected / 1000, rel=1e-9)
        last = read_ledger(ledger)[-1]
        assert last["country_iso_code"] == "DEU" and last["intensity_g_per_kwh"] == expected
        source = "the paper's logs" if grams else "CodeCarbon .*, national mix of 20"
        assert re.match(source, last["intensity_source"]) and read_ledger(ledger)[0]["machine"]
    # Quebec, codecarbon's own fallback, is near 3.6 g
    assert 200 < cb.country_intensity("DEU") < 600 and 50 < cb.country_intensity("BRA") < 200


def test_settings_of_the_user_s_codecarbon_do_not_change_the_figures(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = {"cloud_provider": "gcp", "cloud_region": "northamerica-northeast1", "region": "quebec"}
    settings |= {"tracking_mode": "process", "pue": "9", "output_methods": "csv", "save_to_file": "true"}
    watts = []
    for user in ({}, settings):
        for key, value in user.items():
            monkeypatch.setenv(f"CODECARBON_{key}".upper(), value)
        with cb.track(ledger, "01_data", GERMANY) as session:
            time.sleep(0.3)
        last = read_ledger(ledger)[-1]
        watts.append(last["ram_kwh"] / last["duration_s"])
        assert last["country_iso_code"] == "DEU"
    assert session.emissions_kg == pytest.approx(session.energy_kwh * cb.country_intensity("DEU") / 1000)
    assert watts[1] == pytest.approx(watts[0], rel=0.3)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [ledger]


def test_pue_multiplies_the_energy(ledger):
    watts = []
    for pue in (1.0, 2.0):
        with cb.track(ledger, "01_data", germany(pue=pue)):
            time.sleep(0.3)
        last = read_ledger(ledger)[-1]
        watts.append(last["ram_kwh"] / last["duration_s"])
    assert watts[1] == pytest.approx(2 * watts[0], rel=0.1)


@pytest.mark.parametrize("code", ["DEX", "Germany", "deu", None])
def test_an_unknown_country_is_named(ledger, code):
    tracking = cb.track(ledger, "01_data", germany(country_iso_code=code))
    with pytest.raises(TTLError, match=f"country_iso_code: {code!r}.*DEU"), tracking:
        pass
    assert not ledger.exists()


def test_a_ledger_that_cannot_be_written_is_an_error_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TTLError, match=r"01_data.*energy\.jsonl.*(Exists|NotADirectory)"):  # noqa: SIM117
        with cb.track(tmp_path / "file" / "energy.jsonl", "01_data", GERMANY):
            pass


def test_nothing_is_printed_and_no_file_is_left(ledger, tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _forget_hardware()  # the messages come with the first detection of a process
    with (
        cb.track(ledger, "01_data", GERMANY),
        cb.track(ledger.with_name("other.jsonl"), "02_tokenizer", GERMANY),
    ):
        time.sleep(0.15)
    assert capfd.readouterr() == ("", "") and not list(recwarn)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["energy.jsonl", "other.jsonl"]


def _forget_hardware():
    from codecarbon.core.hardware_cache import clear_cache

    clear_cache()


def test_only_a_machine_s_first_rank_records(ledger, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with cb.track(ledger, "03_pretraining", GERMANY) as session:
        session.mark(step=1)
        assert session.sample() == session.emissions_kg == session.duration_s == 0
    assert not ledger.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with cb.track(ledger, "03_pretraining", GERMANY):
        pass
    assert ledger.exists()


def test_an_error_in_the_block_still_writes_the_last_row(ledger):
    with pytest.raises(KeyError), cb.track(ledger, "01_data", GERMANY):
        raise KeyError("x")
    assert read_ledger(ledger)[-1]["final"]


def test_totals_per_stage(ledger):
    write(
        ledger,
        row("a", "03_pretraining", 1, 5, 2),
        row("a", "03_pretraining", 2, 10, 4, seconds=3600),
        row("c", "05_chat", 1, 0, 1, gpu_method="none"),
        row("b", "03_pretraining", 1, 2, 1, seconds=3600, grams=200),
    )
    totals = stage_totals(ledger).set_index("stage")
    assert list(totals.index) == ["03_pretraining", "05_chat"]
    pretraining = totals.loc["03_pretraining"]
    assert pretraining["sessions"] == 2 and pretraining["energy_kwh"] == 20
    assert pretraining["measured_kwh"] == 12 and pretraining["modelled_kwh"] == 8
    assert pretraining["mean_watts"] == pytest.approx(10_000)
    assert pretraining["intensity_g_per_kwh"] == pytest.approx((16 * 400 + 4 * 200) / 20)
    assert totals.loc["05_chat", "measured_kwh"] == 0 and totals.loc["05_chat", "modelled_kwh"] == 2
    assert stage_totals(ledger.with_name("none.jsonl")).columns.equals(stage_totals(ledger).columns)


def test_measured_and_modelled_make_the_energy_of_this_machine(ledger):
    with cb.track(ledger, "01_data", GERMANY):
        time.sleep(0.2)
    total = stage_totals(ledger).loc[0]
    assert total["energy_kwh"] > 0
    assert total["measured_kwh"] + total["modelled_kwh"] == pytest.approx(total["energy_kwh"], rel=1e-9)
    assert total["cpu_kwh"] + total["gpu_kwh"] + total["ram_kwh"] == pytest.approx(total["energy_kwh"])


@pytest.mark.parametrize(
    ("hardware", "key", "method"),
    [
        (type("CPU", (), {"_mode": "intel_rapl"}), "cpu_method", "measured (RAPL)"),
        (type("CPU", (), {"_mode": "constant"}), "cpu_method", "modelled"),
        (type("GPU", (), {}), "gpu_method", "measured (NVML)"),
        (type("AppleSiliconChip", (), {"chip_part": "GPU"}), "gpu_method", "measured (powermetrics)"),
    ],
)
def test_methods_say_what_is_measured(hardware, key, method):
    tracker = SimpleNamespace(_hardware=[hardware()], _conf={"gpu_model": "1 x NVIDIA A100"})
    methods = cb._methods(tracker)
    assert methods[key].startswith(method)
    assert sorted(methods.values()).count("none") == 2


def test_the_paper_s_car_ride():
    assert cb.car_km(5.67 + 41.29) == pytest.approx(185)
    # the same ride by the factor of CodeCarbon's dashboard, 0.409 kg a mile
    assert cb.car_km(0.409) == pytest.approx(1.609344, rel=2e-3)
    table = equivalents.equivalents(46.96, 128.5).set_index("equivalent")
    assert table.loc["car ride", "amount"] == pytest.approx(185)
    assert table["source"].str.len().min() > 5
    on_energy = table["factor_unit"].str.startswith("kWh")
    assert (table.loc[on_energy, "amount"] * table.loc[on_energy, "factor"]).tolist() == pytest.approx([128.5] * 2)


def test_small_amounts_have_small_units():
    table = equivalents.equivalents(0.001, 0.0028).set_index("equivalent")
    assert table.loc["car ride", ["unit", "amount"]].tolist() == ["m", pytest.approx(1000 * cb.car_km(0.001))]
    assert table.loc["a 10 W lamp", ["unit", "amount"]].tolist() == ["minutes", pytest.approx(0.28 * 60)]


def test_other_overheads_start_from_the_runs_own():
    table = equivalents.overheads(12.0, 1.2, 400.0).set_index("pue")
    assert table.energy_kwh.round(6).to_dict() == {1.0: 10.0, 1.2: 12.0, 1.58: 15.8}
    assert table.emissions_kg[1.0] == pytest.approx(4.0) and table.source.str.contains("20|paper").all()


def test_projections_scale_with_the_share_of_the_peak():
    table = equivalents.utilisation()
    logged = table[table.share_of == "logged"].set_index("run")
    assert logged.loc["160m", "energy_kwh"] == pytest.approx(15.521335) and (table.share_of_peak <= 1).all()
    assert logged.kwh_per_billion_tokens.round(2).to_dict() == {"160m": 4.14, "460m": 11.49}
    product = (table.energy_kwh * table.share_of_peak).groupby(table.run)
    assert (product.max() / product.min()).tolist() == pytest.approx([1, 1])
    gpus = equivalents.gpus(costs.paper_params("160m"), 15.521335)
    own = gpus[gpus.gpu == costs.PAPER_GPU]
    # the planner, given the paper's own share, comes back to the log
    assert own.energy_kwh.iloc[0] == pytest.approx(15.52, rel=0.01) and own.times_ours.iloc[0] == pytest.approx(
        1, rel=0.01
    )
    assert set(gpus.gpu) == set(equivalents.GPUS)


def test_the_paper_s_intensity_is_that_of_its_logs():
    assert paper.table("codecarbon_final").intensity_g_per_kwh.tolist() == [cb.PAPER_INTENSITY] * 2


def test_what_if_names_its_sources():
    table = equivalents.grids(128.495).set_index("grid")
    assert table.loc["Germany, as in the paper", "emissions_kg"] == pytest.approx(46.96, abs=0.005)
    assert table.loc["world average", "emissions_kg"] == pytest.approx(128.495 * 0.475)
    assert table.loc["Brazil", "emissions_kg"] < table.loc["Germany", "emissions_kg"]
    assert table["source"].str.contains("CodeCarbon").all()


def test_what_was_spent_on_a_folder_that_was_moved_aside_is_in_the_bill_and_not_in_the_new_stage(ledger):
    before = row("a", "03_pretraining", 1, 0, 1, time="2026-01-01T10:00:00+00:00")
    write(ledger, before, row("b", "03_pretraining", 2, 0, 1, time="2026-01-01T11:00:00+00:00"))
    assert stage_energy(ledger, "03_pretraining", "2026-01-01T10:30:00+00:00")[0] == 3
    assert stage_totals(ledger).energy_kwh.sum() == 5
