"""Stage 06: the bill, its tables and pages, from a ledger and a curve that tests write."""

from __future__ import annotations

import contextlib
import json
import re
import time
from datetime import UTC, datetime

import nbformat
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_forecast import records
from tests.test_ledger import rows_of, write
from ttl_utils import carbon, pipeline, report, report_page, table_files, units
from ttl_utils.commands import main
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.params import load_params
from ttl_utils.run import Run

WATTS = 100.0
STEPS = 12


def make(tiny, outputs, patch):
    """A finished stage 03 of 12 steps and 120 s at 100 W, 30 s of them on two evaluations and a start."""
    patch.setenv("TTL_OUTPUTS", str(outputs))
    patch.setattr(carbon, "track", lambda *_, **__: contextlib.nullcontext(carbon.EnergySession()))
    run = Run(load_params({"file": tiny.file, "pretraining": {"max_steps": STEPS, "eval_steps": 6}}))
    stage = run.stage("03_pretraining")
    kwh = WATTS / 3.6e6
    rows = records(STEPS, 7.5 * kwh, 10 * kwh, eval_steps=6, logging_steps=1)
    for at, row in enumerate(rows):
        row |= {"tokens": row["step"] * 256}
        if "validation_loss" in row:
            row["perplexity"] = [500.0, 60.0, 40.0][at // 7]
    stage.folder.mkdir(parents=True)
    (stage.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun = datetime(2026, 1, 1, tzinfo=UTC).isoformat(timespec="seconds")
    for each in (stage, run.stage("01_data")):
        write_json(each.folder / "stage.json", {"identity": stage.identity(), "started": begun})
    write_json(stage.folder / "checkpoints" / "step-0000006" / "state.json", {"step": 6, "energy_kwh": 66 * kwh})
    write(
        run.folder,
        rows_of("a", 0, 50, stage="01_data", every_s=1) + rows_of("b", 60, 120, every_s=1, intensity_g_per_kwh=400.0),
    )
    metrics = {"energy_kwh": 120 * kwh, "emissions_kg": 120 * kwh * 0.4, "duration_s": 120.0, "tokens": STEPS * 256}
    stage.finish(metrics, {"curve": [stage.folder / "metrics.jsonl"]})
    return run


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    return make(tiny, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """The run and its stage 06, to read."""
    with pytest.MonkeyPatch.context() as patch:
        run = make(tiny, tmp_path_factory.mktemp("outputs"), patch)
        return run, report.carbon_report(run)


def test_the_figures_add_up(made):
    run, stage = made
    metrics = stage.metrics()
    kwh = WATTS / 3.6e6
    assert metrics["energy_kwh"] == pytest.approx(170 * kwh) and metrics["duration_s"] == pytest.approx(170)
    assert metrics["emissions_kg"] == pytest.approx(170 * kwh * 0.4)
    assert metrics["car_km"] == pytest.approx(carbon.car_km(metrics["emissions_kg"]))
    assert metrics["measured_kwh"] == pytest.approx(metrics["energy_kwh"] / 2)
    assert metrics["kwh_per_billion_tokens"] == pytest.approx(120 * kwh / (STEPS * 256) * 1e9)
    assert metrics["of_other_runs_kwh"] == metrics["set_aside_kwh"] == 0
    shares = {row["stage"]: row["share_of_energy"] for row in metrics["stages"]}
    assert shares == pytest.approx({"01_data": 50 / 170, "03_pretraining": 120 / 170})
    points = pd.DataFrame(metrics["checkpoints"])
    assert points.step.tolist() == [0, 6, 12] and points.checkpoint_kwh.dropna().tolist() == [pytest.approx(66 * kwh)]
    assert points.emissions_kg.tolist() == pytest.approx((points.energy_kwh * 0.4).tolist())
    # the whole is known from the first record of a step
    (first, *_) = metrics["forecast"]
    assert first["step"] == 1 and first["energy_kwh"] == pytest.approx(120 * kwh)
    assert first["energy_error"] == pytest.approx(0, abs=1e-6) and first["duration_error"] == pytest.approx(0, abs=1)
    assert read_json(run.folder / "metrics.json")["06_carbon_report"] == metrics


def test_the_pages_hold_the_tables_and_ask_for_nothing(made):
    run, stage = made
    text, page = ((stage.folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    metrics = stage.metrics()
    found = report_page.tables(run, metrics)
    for name, (frame, caption) in found.items():
        assert table_files.markdown(units.readable(frame)) in text and caption in text, name
        for kind in ("md", "csv", "tex"):
            assert (run.folder / "tables" / f"{name}.{kind}").is_file()
    assert "**not comparable**" in text and "not comparable" in page
    assert len(re.findall("data:image/png;base64,", page)) == text.count("![") == 4
    assert not re.search(r"""(?:src|href)=["']?(?!["']?data:)|url\(|@import|<script""", page)
    # and three of contradictions
    assert page.count("<table>") == len(found) + 3
    # every number with its unit, none as a share of peak above 100; the files hold the data under their own names
    for name, (frame, _) in found.items():
        shown = units.readable(frame)
        assert all("(" in head for head in shown if "energy" in head)
        for head in shown.columns.intersection(["share of peak (%)"]):
            assert shown[head].between(0, 100).all()
        saved = pd.read_csv(run.folder / "tables" / f"{name}.csv")
        assert list(saved) == list(frame)
    assert metrics["kg_per_billion_tokens"] == pytest.approx(120 * WATTS / 3.6e6 * 0.4 / (STEPS * 256) * 1e9)
    assert f"{metrics['kg_per_billion_tokens']:.3g} kg per billion tokens" in text


def test_contradictions_stand_where_they_touch(made):
    text = (made[1].folder / "report.md").read_text(encoding="utf-8")
    sections = {part.split("\n")[0]: part for part in text.split("\n## ")}
    assert "115.69 kWh" in sections["Perplexity against energy"] and "41.31 kg" in sections["Perplexity against energy"]
    assert "47.7 W" in sections["The authors' logs through the same code"]
    assert "North Rhine-Westphalia" in sections["What if"]
    logs = sections["The authors' logs through the same code"]
    assert all(figure in logs for figure in ("15.52", "112.97", "5.67", "41.29", "327.00", "328.92"))


def test_a_forecast_is_there_while_the_run_is_under_way(run, capsys):
    stage = run.stage("03_pretraining")
    (stage.folder / "manifest.json").unlink()
    lines = (stage.folder / "metrics.jsonl").read_text().splitlines()
    (stage.folder / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    found = report.forecast_table(run)
    assert found.step.tolist() == [1, 2] and found.energy_error.isna().all()
    assert found.energy_kwh.tolist() == pytest.approx([120 * WATTS / 3.6e6] * 2)
    assert found.duration_s.tolist() == pytest.approx([120] * 2, rel=0.01)
    # the status says so too
    run.record()
    write_json(stage.folder / "status.json", {"line": "steps: 2 of 12", "time": time.time()})
    assert main(["status", run.name]) == 0
    assert "steps: 2 of 12 (as of 0:00 ago); forecast for all of it: 3.33 Wh" in capsys.readouterr().out


@pytest.mark.parametrize("missing", report.NEEDED)
def test_a_metric_that_is_missing_is_named_and_no_half_stage_stays(run, missing):
    path = run.stage("03_pretraining").folder / "metrics.json"
    write_json(path, {name: value for name, value in read_json(path).items() if name != missing})
    with pytest.raises(DamagedFile, match=f"metrics.json is damaged: {missing} missing"):
        report.carbon_report(run)
    assert not (run.folder / "06_carbon_report").exists()


@pytest.mark.parametrize("under_way", [False, True])
def test_without_a_ledger_there_is_no_report_and_no_forecast(run, under_way):
    (run.folder / "energy.jsonl").unlink()
    if under_way:
        (run.stage("03_pretraining").folder / "manifest.json").unlink()
    for make_it in (report.forecast_table, *([] if under_way else [report.carbon_report])):
        with pytest.raises(TTLError, match=r"energy\.jsonl has no row of 03_pretraining"):
            make_it(run)
    assert not (run.folder / "06_carbon_report").exists()


def test_the_tables_are_told_anew_in_portuguese(made, capsys, monkeypatch):
    run, _ = made
    monkeypatch.setenv("TTL_OUTPUTS", str(run.folder.parent))
    monkeypatch.setattr("ttl_utils.redraw.redraw", lambda *given: [run.figures / "x.png"])
    assert main(["figures", run.name, "--language", "pt"]) == 0
    count = len(list((run.folder / "tables").glob("*.csv")))
    assert f"{count} tables as Markdown, LaTeX and CSV in {run.folder / 'tables' / 'pt'}" in capsys.readouterr().out
    english, portuguese = ((run.folder / "tables" / place / "06_stages.md").read_text() for place in (".", "pt"))
    assert "| etapa | sessões |" in portuguese and "| stage | sessions |" in english
    assert "| 03_pretraining | 1 | 120 | 100 | 3.33 |" in english
    assert "| 03_pretraining | 1 | 120 | 100 | 3,33 |" in portuguese
    for name in ("06_stages", "06_table6"):
        first, again = ((run.folder / "tables" / place / f"{name}.csv").read_text() for place in (".", "pt"))
        assert first == again


def test_stages_of_another_run_and_work_beside_another_are_named(made):
    run, metrics = made[0], made[1].metrics()
    metrics["stages"][0] |= {"run": "other", "shared_s": 3.0}
    metrics |= {"of_other_runs_kwh": metrics["stages"][0]["energy_kwh"], "set_aside_kwh": 1e-6}
    frame = units.readable(report_page.tables(run, metrics)["06_stages"][0])
    assert {"run", "beside another (s)", "on folders set aside (Wh)"} <= set(frame)


def test_a_run_on_a_base_that_has_its_report(made, tiny):
    base, kwh = made[0], WATTS / 3.6e6
    same = {"max_steps": STEPS, "eval_steps": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTL_OUTPUTS", str(base.folder.parent))
        patch.setattr(carbon, "track", lambda *_, **__: contextlib.nullcontext(carbon.EnergySession()))
        variant = Run(load_params({"file": tiny.file, "run": "variant", "base": base.name, "pretraining": same}))
        stage = report.carbon_report(variant)
        other = {"max_steps": STEPS, "learning_rate": 0.01}
        other = Run(load_params({"file": tiny.file, "run": "other", "base": base.name, "pretraining": other}))
        assert not other.stage("03_pretraining").from_base and not other.stage("06_carbon_report").from_base
        assert variant.stage("03_pretraining").from_base
    assert stage.folder.parent == variant.folder
    metrics = stage.metrics()
    assert {row["run"] for row in metrics["stages"]} == {base.name}
    assert metrics["of_other_runs_kwh"] == metrics["energy_kwh"] == pytest.approx(120 * kwh)
    assert "| stage | run |" in (stage.folder / "report.md").read_text(encoding="utf-8")


def test_an_executed_notebook_as_a_page_asks_for_nothing():
    cells = [
        nbformat.v4.new_markdown_cell("# A title\n\n$x$ and ![](data:image/png;base64,AA==)"),
        nbformat.v4.new_code_cell(
            "print(1)", outputs=[nbformat.v4.new_output("stream", text="mine\n")], execution_count=1
        ),
    ]
    page = pipeline.notebook_page(nbformat.v4.new_notebook(cells=cells))
    assert "A title" in page and "mine" in page
    assert not re.search(r"""<script|(?:src|href)=["']?https?:|url\(["']?https?:|@import""", page)


# units


@pytest.mark.parametrize(
    ("value", "ending", "text"),
    [
        (112.974, "_kwh", "113 kWh"),
        (0.0017387, "_kwh", "1.74 Wh"),
        (2e-5, "_kwh", "20 mWh"),
        (0.0, "_kwh", "0 mWh"),
        (41.29, "_kg", "41.3 kg"),
        (0.000635, "_kg", "0.635 g"),
        (224.5, "_s", "224 s"),
        (139415.0, "_s", "38.7 h"),
        (7100.0, "_s", "7,100 s"),
    ],
)
def test_a_quantity_in_text(value, ending, text):
    assert units.quantity(value, ending) == text


@given(st.floats(1e-9, 1e6))
def test_units_keep_the_value(kwh):
    frame = units.readable(pd.DataFrame({"energy_kwh": [kwh, kwh / 7], "intensity_g_per_kwh": [1.0, 2.0]}))
    (head, other) = frame.columns
    factor = {"kWh": 1, "Wh": 1000, "mWh": 1e6}[re.search(r"\((\w+)\)", head)[1]]
    assert frame[head].tolist() == pytest.approx([kwh * factor, kwh / 7 * factor])
    assert frame[head].max() >= 0.1 or "mWh" in head
    assert other == "intensity (g/kWh)" and frame[other].tolist() == [1, 2]


def test_columns_of_one_kind_share_a_unit_and_rates_have_their_own():
    frame = pd.DataFrame({"energy_kwh": [1.5], "cpu_kwh": [0.001], "kwh_per_point": [2e-6], "share": [0.5]})
    assert units.readable(frame).iloc[0].to_dict() == pytest.approx(
        {
            "energy (kWh)": 1.5,
            "CPU (kWh)": 0.001,
            "energy per perplexity point (mWh)": 2.0,
            "share of the steps (%)": 50,
        }
    )
