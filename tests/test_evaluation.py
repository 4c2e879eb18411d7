"""Stage 04 as a whole: its parts, what it keeps, another model in place of the run's own, and a run under way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from ttl_utils import evaluation as ev
from ttl_utils.checkpoints import list_checkpoints
from ttl_utils.errors import MissingStage, ParameterError, StageConflict, TTLError
from ttl_utils.files import read_json
from ttl_utils.model import Hardware
from ttl_utils.params import load_params
from ttl_utils.perplexity import perplexity
from ttl_utils.pretraining import pretrain
from ttl_utils.run import Run
from ttl_utils.subject import blocks_of, load_model, subject_of

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CPU = Hardware("cpu", "fp32", "sdpa")
SMALL = {"harness": [], "downstream": [], "checkpoint_tasks": [], "inference": None, "generation": None}


@pytest.fixture
def trained(tiny_prepared, no_energy):
    run = tiny_prepared(evaluation=SMALL)
    pretrain(run)
    return run


def again(run: Run, **evaluation) -> Run:
    """The same run by other parameters of the evaluation."""
    return Run(load_params({"file": run.params.file, "evaluation": SMALL | evaluation}))


@pytest.fixture
def loads(monkeypatch):
    """The checkpoints that were loaded; `loads.fail_at` interrupts before one of them."""

    class Loads(list):
        fail_at = None

    seen, original = Loads(), ev.load_model

    def load(path, *arguments):
        if path.name == seen.fail_at:
            raise KeyboardInterrupt
        seen.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(ev, "load_model", load)
    return seen


def rows_of(run: Run) -> list[dict]:
    blocks, text_bytes = blocks_of(run, subject_of(run))
    return list(ev.perplexity_over_checkpoints(run, blocks, text_bytes, CPU))


NAMES = ["step-0000004", "step-0000008", "step-0000012"]


def test_checkpoints_are_evaluated_once(trained, loads):
    folder = trained.folder / "03_pretraining" / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == NAMES
    loads.fail_at = NAMES[2]
    with pytest.raises(KeyboardInterrupt):
        rows_of(trained)
    assert len(list(ev.scores_folder(trained).glob("perplexity-*.json"))) == 2
    loads.fail_at = None
    rows = rows_of(trained)
    assert loads == NAMES
    assert rows_of(trained) == rows and loads == NAMES

    records = {
        row["step"]: row
        for row in map(json.loads, (folder.parent / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    }
    assert [row["step"] for row in rows] == [4, 8, 12]
    blocks, text_bytes = blocks_of(trained, subject_of(trained))
    for row, name in zip(rows, NAMES, strict=True):
        assert row["tokens"] == records[row["step"]]["tokens"]
        expected = perplexity(load_model(folder / name, CPU), blocks, text_bytes=text_bytes)
        assert row == pytest.approx(
            {"step": row["step"], "tokens": row["tokens"], "energy_kwh": 0.0, **expected}, rel=1e-6
        )


def test_what_was_measured_in_another_precision_or_on_other_text_is_not_taken(trained, loads):
    rows_of(trained)
    blocks, text_bytes = blocks_of(trained, subject_of(trained))
    list(ev.perplexity_over_checkpoints(trained, blocks, text_bytes, Hardware("cpu", "bf16", "sdpa")))
    assert loads == NAMES * 2
    blocks.block_size //= 2
    list(ev.perplexity_over_checkpoints(trained, blocks, text_bytes, CPU))
    assert loads == NAMES * 3


def test_a_damaged_checkpoint_is_named_and_left_out(trained, loads, capsys):
    path = trained.folder / "03_pretraining" / "checkpoints" / NAMES[1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [row["step"] for row in rows_of(trained)] == [4, 12]
    assert "step-0000008 is not evaluated" in capsys.readouterr().out


def test_the_whole_stage(trained, capsys, monkeypatch):
    passes = []
    monkeypatch.setattr(ev, "perplexity", lambda *args, **kwargs: passes.append(1) or perplexity(*args, **kwargs))
    run = again(trained, harness=[{"name": "ttl_smoke_pt"}], checkpoint_tasks=["ttl_smoke_pt"], harness_limit=4)
    stage = ev.evaluate(run)
    metrics = stage.metrics()
    blocks, text_bytes = blocks_of(run, subject_of(run))
    final = perplexity(load_model(trained.folder / "03_pretraining" / "model", CPU), blocks, text_bytes=text_bytes)
    assert {name: metrics[name] for name in final} == pytest.approx(final, rel=1e-6)
    # one for each checkpoint, and none again for the same weights
    assert len(passes) == 3
    assert metrics["model"] == run.name and metrics["origin"] == "this run"
    kept = read_json(stage.folder / "harness.json")
    assert "ttl_smoke_pt" in json.dumps(kept) and metrics["harness"]["ttl_smoke_pt"]["samples"] == 4
    assert ev.evaluate(run).metrics() == metrics
    assert "reused" in capsys.readouterr().out
    # figure 2: the tasks over all checkpoints, kept
    rows = ev.checkpoint_scores(run)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert all(set(row["scores"]) == {"ttl_smoke_pt"} for row in rows)
    assert stage.metrics()["checkpoint_scores"] == rows


def test_without_its_last_checkpoint_the_model_itself_is_scored(trained):
    shutil.rmtree(trained.folder / "03_pretraining" / "checkpoints" / NAMES[2])
    metrics = ev.evaluate(trained).metrics()
    assert [row["step"] for row in metrics["checkpoints"]] == [4, 8]
    assert metrics["perplexity"] < metrics["checkpoints"][-1]["perplexity"]


def test_downstream_sets_are_part_of_the_stage(trained):
    file = load_params({"file": trained.params.file}).evaluation
    run = again(trained, downstream=[item.model_dump() for item in file.downstream])
    found = ev.evaluate(run).metrics()["downstream"]["trust"]
    assert set(found) >= {"accuracy", "macro_f1", "constant_answer", "last_epoch", "stderr"}


def test_what_was_not_run_is_asked_for_again(trained, monkeypatch, capsys):
    reached, original = [False], ev.open_task

    def open_task(item, seed):
        found = original(item, seed)
        return found if reached[0] else replace(found, task=None, reason="no network")

    monkeypatch.setattr(ev, "open_task", open_task)
    monkeypatch.setattr("ttl_utils.harness.open_task", open_task)
    run = again(trained, harness=[{"name": "ttl_smoke_pt"}], harness_limit=4)
    stage = ev.evaluate(run)
    assert stage.metrics()["harness"]["ttl_smoke_pt"]["reason"] == "no network"
    assert ev.evaluate(run).metrics()["harness"]["ttl_smoke_pt"]["status"] == "not run"
    reached[0] = True
    assert ev.evaluate(run).metrics()["harness"]["ttl_smoke_pt"]["status"] == "done"
    assert '"status": "done"' in (stage.folder / "harness.json").read_text()
    # and what was run is left alone
    monkeypatch.setattr(ev, "_harness", None)
    ev.evaluate(run)


def test_an_unknown_task_stops_before_any_work(trained, loads):
    with pytest.raises(TTLError, match="ttl_smoke_pt"):
        ev.evaluate(again(trained, harness=[{"name": "ttl_smoke"}]))
    assert loads == [] and not (trained.folder / "04_evaluation").exists()


def test_the_stage_says_what_is_missing(tiny_prepared, no_energy):
    with pytest.raises(MissingStage, match="03_pretraining .* is not finished"):
        ev.evaluate(tiny_prepared())


def test_another_model_in_place_of_the_runs_own(trained, tmp_path):
    own = ev.evaluate(trained).metrics()
    copied = shutil.copytree(trained.folder / "03_pretraining" / "model", tmp_path / "some model")
    named = Run(
        load_params({"file": trained.params.file, "run": "judge", "evaluation": SMALL | {"model": str(copied)}})
    )
    shutil.copytree(trained.folder / "01_data", named.folder / "01_data")
    metrics = ev.evaluate(named).metrics()
    # neither tokenizer nor training of its own: only the corpus
    assert metrics["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-6)
    assert metrics["origin"] == "folder" and metrics["checkpoints"] == []
    assert ev.checkpoint_scores(named) == []
    # the same weights elsewhere are the same evaluation; other weights are not
    moved = shutil.move(copied, tmp_path / "moved")
    params = {"file": trained.params.file, "run": "judge", "evaluation": SMALL | {"model": str(moved)}}
    assert Run(load_params(params)).stage("04_evaluation").check() == "finished"
    step = trained.folder / "03_pretraining" / "checkpoints" / NAMES[0]
    params["evaluation"] = SMALL | {"model": str(step)}
    with pytest.raises(StageConflict, match="evaluated weights"):
        Run(load_params(params)).stage("04_evaluation").check()


def test_a_run_under_way_is_evaluated(trained, capsys):
    stage = trained.folder / "03_pretraining"
    (stage / "manifest.json").unlink()
    shutil.rmtree(stage / "model")
    shutil.rmtree(stage / "checkpoints" / NAMES[2])
    run = again(trained, harness=[{"name": "ttl_smoke_pt"}], checkpoint_tasks=["ttl_smoke_pt"], harness_limit=4)
    rows = ev.evaluate_under_way(run)
    assert [row["step"] for row in rows] == [4, 8] and all("ttl_smoke_pt" in row["scores"] for row in rows)
    with pytest.raises(ParameterError, match="leave it null"):
        ev.evaluate_under_way(again(trained, model="some/model"))
    shutil.rmtree(stage / "checkpoints")
    with pytest.raises(TTLError, match="no whole checkpoint yet"):
        ev.evaluate_under_way(run)
