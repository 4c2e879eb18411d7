"""The ledger read back: no interval counted twice, none lost beyond a sample, over kills of real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.driver import Driver
from ttl_utils import checkpoints, ledger, paper, report
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.params import load_params
from ttl_utils.records import read_records
from ttl_utils.run import Run

DAWN = datetime(2026, 1, 1, tzinfo=UTC)
INTERVAL_S = 0.5
# in the forked child: the real meter, its own clock beside it, and steps that take a while
METER = """
import importlib, time, codecarbon
from ttl_utils import carbon, session
importlib.reload(carbon)
step, log = session.Session.step, open({log!r}, "a", buffering=1)

class Tracker(codecarbon.OfflineEmissionsTracker):
    def start(self):
        super().start()
        # finding the meters comes before
        print("start", time.time() - time.perf_counter() + self._start_time, file=log)

    def stop(self):
        print("stop", time.time(), file=log)
        return super().stop()

def slow(self, *given):
    time.sleep(0.04)
    return step(self, *given)

codecarbon.OfflineEmissionsTracker, session.Session.step = Tracker, slow
"""


def rows_of(session, begun_s, lasting_s, watts=100.0, stage="03_pretraining", every_s=10.0, **more):
    """A session's rows: one at its start, one every few seconds, one at its end; constant power."""
    found, at = [], [0.0]
    while at[-1] < lasting_s:
        at.append(min(at[-1] + every_s, lasting_s))
    for seconds in at:
        kwh = watts * seconds / 3.6e6
        row = {"session": session, "stage": stage, "rank": 0, "machine": "m", "duration_s": seconds, "energy_kwh": kwh}
        row |= {"time": (DAWN + timedelta(seconds=begun_s + seconds)).isoformat(timespec="milliseconds")}
        row |= {"cpu_kwh": kwh / 4, "gpu_kwh": kwh / 2, "ram_kwh": kwh / 4, "emissions_kg": kwh * 0.4, "pue": 1.0}
        row |= {"cpu_method": "modelled (x)", "gpu_method": "measured (NVML)", "ram_method": "modelled (y)"}
        found.append(row | {"country_iso_code": "DEU", "intensity_source": "a source"} | more)
    return found


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "energy.jsonl"


class TestKills:
    """Stage 03 killed three times and finished."""

    @pytest.fixture(scope="class")
    def made(self, tiny, tmp_path_factory, request):
        if not hasattr(os, "fork"):
            pytest.skip("these processes are forked")
        outputs = tmp_path_factory.mktemp("outputs")
        driver = Driver(outputs, tiny.cache)
        done = request.getfixturevalue("tiny_done").folder
        shutil.copytree(done, outputs / "base", ignore=shutil.ignore_patterns(".locks"))
        settings = {"max_steps": 64, "logging_steps": 2, "save_steps": 8, "eval_steps": 32, "eval_tokens": 256}

        def start():
            values = {"file": tiny.file, "run": "killed", "base": "base", "pretraining": settings}
            log = str(outputs / "killed.times")
            return driver.start({**values, "carbon": {"measure_power_s": INTERVAL_S}}, 1, METER.format(log=log))

        walls, curves, stage = [], [], outputs / "killed" / "03_pretraining"
        for at in (16, 32, 48, None):
            pid = start()
            # just when a checkpoint stands, with most of an interval to the next sample
            place = stage / "checkpoints" / checkpoints.name_of(at or 0)
            status = driver.until(pid, place.is_dir)
            if at:
                assert status is None, driver.said()
                os.kill(pid, signal.SIGKILL)
                killed = datetime.now(UTC).timestamp()
                assert driver.until(pid) == -signal.SIGKILL
                curves.append(read_records(stage / "metrics.jsonl"))
                # what the checkpoint says was spent is on disk already
                spent = ledger.stage_energy(outputs / "killed" / "energy.jsonl", "03_pretraining")[0]
                newest = checkpoints.list_checkpoints(stage / "checkpoints")[-1]
                assert spent >= read_json(newest / "state.json")["energy_kwh"] - 1e-12
            else:
                assert status == 0, driver.said()
            times = [line.split() for line in (outputs / "killed.times").read_text().splitlines()]
            began = [float(time) for word, time in times if word == "start"][-1]
            walls.append((began, killed if at else float(times[-1][1])))
        driver.close()
        return outputs, walls, curves

    def test_the_duration_is_the_processes_own(self, made):
        outputs, walls, _ = made
        rows = ledger.read_ledger(outputs / "killed" / "energy.jsonl")
        last = ledger.sessions(rows)
        assert len(last) == 4 and [row["final"] for row in last] == [False, False, False, True]
        for row, (began, ended) in zip(last, walls, strict=True):
            lost = (ended - began) - row["duration_s"]
            # a sample takes a moment itself
            assert -0.1 < lost < INTERVAL_S + 0.25
        totals = ledger.stage_totals(rows).iloc[0]
        assert totals.duration_s == pytest.approx(sum(end - start for start, end in walls), abs=4 * (INTERVAL_S + 0.25))
        # of a session only the last row counts, and no two sessions share a moment
        newest = {row["session"]: row["energy_kwh"] for row in rows}
        assert len(rows) > 12 and totals.energy_kwh == pytest.approx(sum(newest.values()), rel=1e-12)
        ends = [datetime.fromisoformat(row["time"]).timestamp() for row in last]
        for row, end, before in zip(last[1:], ends[1:], ends[:-1], strict=True):
            assert end - row["duration_s"] > before - 0.05 and row["shared_s"] == 0

    def test_what_a_checkpoint_cost_never_jumps_back(self, made):
        outputs, _, curves = made
        stage = outputs / "killed" / "03_pretraining"
        records = read_records(stage / "metrics.jsonl")
        spent = [row["energy_kwh"] for row in records]
        assert spent == sorted(spent)
        total = read_json(stage / "metrics.json")["energy_kwh"]
        assert spent[-1] <= total + 1e-9
        # steps that were done again are paid for twice, and counted once
        for curve in curves:
            row = curve[-1]
            again = next(new for new in records if new["step"] == row["step"] and ("loss" in new) == ("loss" in row))
            assert again["energy_kwh"] >= row["energy_kwh"] - 1e-9
        for folder in checkpoints.list_checkpoints(stage / "checkpoints"):
            state = read_json(folder / "state.json")
            after = [row["energy_kwh"] for row in records if row["step"] > state["step"]]
            assert all(kwh >= state["energy_kwh"] - 1e-9 for kwh in after)


# what is no row


WHOLE = rows_of("a", 0, 5)[-1]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("123", "not a row"),
        ("null", "not a row"),
        ('["a"]', "not a row"),
        ('{"session": "x"}', "cpu_kwh, cpu_method|country_iso_code, cpu_method"),
        (json.dumps({**WHOLE, "energy_kwh": "1.5"}), "energy_kwh missing, or of another kind"),
        (json.dumps({**WHOLE, "gpu_method": None}), "gpu_method missing, or of another kind"),
        (json.dumps({**WHOLE, "machine": []}), "machine of another kind"),
        (json.dumps({**WHOLE, "time": "soon"}), "time 'soon'"),
        (json.dumps({**WHOLE, "emissions_kg": float("nan")}), "not a finite number"),
    ],
)
def test_a_whole_line_that_is_no_row_is_named(tmp_path, line, told):
    path = write(tmp_path, [WHOLE, WHOLE])
    with path.open("a") as file:
        # torn by a kill, and left out
        file.write(json.dumps(WHOLE)[:40] + "\n" + line + "\n")
    with pytest.raises(DamagedFile, match=rf"energy\.jsonl is damaged, line 4: .*({told})"):
        ledger.read_ledger(path)
    path.write_text(path.read_text().replace(line + "\n", ""))
    assert len(ledger.read_ledger(path)) == 2


# two sessions at the same time on one machine


def test_of_two_sessions_at_once_the_earlier_has_the_energy():
    training, beside = rows_of("a", 0, 100), rows_of("b", 40, 90, stage="04_evaluation")
    for rows in (training + beside, beside + training):
        totals = ledger.stage_totals(rows).set_index("stage")
        assert totals.loc["03_pretraining", "energy_kwh"] == pytest.approx(100 * 100 / 3.6e6)
        assert totals.loc["04_evaluation", "energy_kwh"] == pytest.approx(100 * 30 / 3.6e6)
        assert totals.loc["04_evaluation", ["duration_s", "shared_s"]].tolist() == pytest.approx([30, 60])
        assert totals.loc["04_evaluation", "mean_watts"] == pytest.approx(100)


def test_machines_do_not_share_their_time():
    rows = rows_of("a", 0, 100) + rows_of("b", 0, 100, machine="n", rank=8)
    totals = ledger.stage_totals(rows).iloc[0]
    assert totals.energy_kwh == pytest.approx(2 * 100 * 100 / 3.6e6) and totals.duration_s == pytest.approx(100)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=6), st.randoms())
def test_a_machine_s_energy_is_that_of_the_time_it_was_watched(spans, order):
    groups = [rows_of(str(number), *span) for number, span in enumerate(spans)]
    rows = [row for group in groups for row in group]
    order.shuffle(groups)
    watched = {second for begun, lasting in spans for second in range(begun, begun + lasting)}
    for each in (rows, [row for group in groups for row in group]):
        totals = ledger.stage_totals(each).iloc[0]
        assert totals.duration_s == pytest.approx(len(watched), abs=1e-3)
        assert totals.energy_kwh == pytest.approx(len(watched) * 100 / 3.6e6, rel=1e-4)
        assert totals.measured_kwh + totals.modelled_kwh == pytest.approx(totals.energy_kwh)


# folders set aside, other runs, and the paper


def test_what_went_into_a_folder_that_was_moved_aside_is_in_the_bill_and_marked(tiny_run):
    run = tiny_run()
    rows = rows_of("a", 0, 60) + rows_of("b", 100, 30) + rows_of("c", 200, 10, stage="03_search")
    path = write(run.folder, rows)
    begun = (DAWN + timedelta(seconds=95)).isoformat(timespec="seconds")
    write_json(run.stage("03_pretraining").folder / "stage.json", {"started": begun, "identity": {}})
    bill = report.bill(run).set_index("stage")
    assert bill.loc["03_pretraining", "energy_kwh"] == pytest.approx(90 * 100 / 3.6e6)
    assert bill.loc["03_pretraining", "set_aside_kwh"] == pytest.approx(60 * 100 / 3.6e6)
    assert bill.loc["03_search", "set_aside_kwh"] == 0 and bill.share_of_energy.sum() == pytest.approx(1)
    assert ledger.stage_energy(path, "03_pretraining", begun)[2] == pytest.approx(30)


def test_a_session_that_ended_in_the_second_in_which_the_new_folder_began_is_not_its(tmp_path):
    path = write(tmp_path, rows_of("a", 58, 2.4) + rows_of("b", 60.9, 30))
    begun = (DAWN + timedelta(seconds=60)).isoformat(timespec="seconds")
    assert ledger.stage_energy(path, "03_pretraining", begun)[2] == pytest.approx(30)


def test_stages_of_a_base_are_read_from_its_ledger_and_own_work_on_them_from_the_own(tiny_prepared, tiny):
    base = tiny_prepared()
    write(base.folder, rows_of("a", 0, 50, stage="01_data") + rows_of("b", 60, 70, stage="03_pretraining"))
    run = Run(load_params({"file": tiny.file, "run": "variant", "base": base.name}))
    own = rows_of("c", 200, 5, stage="01_data") + rows_of("d", 300, 40) + rows_of("e", 400, 9, stage="06_carbon_report")
    write(run.folder, own)
    bill = report.bill(run)
    assert list(zip(bill.stage, bill.run, bill.duration_s.round(3), strict=True)) == [
        ("01_data", base.name, 50),
        ("01_data", "variant", 5),
        ("03_pretraining", "variant", 40),
    ]


def test_two_runs_at_once_count_the_machine_once_in_one_bill(tiny_prepared, tiny):
    base = tiny_prepared()
    write(base.folder, rows_of("a", 0, 100, stage="01_data") + rows_of("b", 200, 50, stage="02_tokenizer"))
    run = Run(load_params({"file": tiny.file, "run": "variant", "base": base.name}))
    write(run.folder, rows_of("c", 40, 90) + rows_of("d", 200, 10, machine="another"))
    rows = report.bill(run).set_index(["stage", "run"])
    # watched from 0 to 130 and from 200 to 250, and another machine for 10 s
    assert rows.energy_kwh.sum() == pytest.approx((130 + 50 + 10) * 100 / 3.6e6)
    assert rows.shared_s["03_pretraining", "variant"] == pytest.approx(60)
    # each alone carries the whole machine
    assert ledger.stage_energy(run.folder / "energy.jsonl", "03_pretraining")[2] == pytest.approx(100)


def test_what_a_base_put_aside_is_marked_too(tiny_prepared, tiny):
    base = tiny_prepared()
    begun = datetime.fromisoformat(read_json(base.folder / "01_data" / "stage.json")["started"])
    after = (begun - DAWN).total_seconds()
    spent = [
        ("a", after - 500, 60, "01_data"),
        ("b", after + 0.5, 20, "01_data"),
        ("c", after + 90, 5, "03_pretraining"),
    ]
    write(base.folder, [row for *span, stage in spent for row in rows_of(*span, stage=stage)])
    run = Run(load_params({"file": tiny.file, "run": "variant", "base": base.name}))
    write(run.folder, rows_of("d", after + 1e6, 30) + rows_of("e", after - 900, 7, stage="01_data"))
    rows = report.bill(run).set_index(["stage", "run"])
    assert rows.set_aside_kwh["01_data", base.name] == pytest.approx(60 * 100 / 3.6e6)
    assert rows.set_aside_kwh.sum() == pytest.approx(60 * 100 / 3.6e6)


@pytest.mark.parametrize("rows", [[], rows_of("a", 0, 5, stage="01_data")])
def test_a_ledger_without_pretraining_is_no_bill(tiny_run, rows):
    run = tiny_run()
    write(run.folder, rows)
    with pytest.raises(TTLError, match=r"energy\.jsonl.*03_pretraining"):
        report.bill(run)


def test_the_authors_logs_give_the_papers_totals():
    totals = ledger.stage_totals(ledger.paper_rows()).set_index("stage")
    found = totals.loc[list(paper.SIZES), ["energy_kwh", "emissions_kg", "gpu_watts"]]
    assert found.round({"energy_kwh": 2, "emissions_kg": 2, "gpu_watts": 0}).to_numpy().tolist() == [
        [15.52, 5.67, 327],
        [112.97, 41.29, 329],
    ]
    assert totals.measured_kwh.tolist() == totals.gpu_kwh.tolist()
    assert totals.duration_s.tolist() == [139415.493, 1009909.607]
