"""The real pipeline through papermill, at a scale far below nano."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.tiny import Tiny
from ttl_utils.run import STAGES

ROOT = Path(__file__).resolve().parent.parent
METRICS = {
    "01_data": "documents_in documents_kept characters instruction_share",
    "02_tokenizer": "vocab_size tokens_per_word train_tokens test_tokens bytes_per_stored_token",
    "03_pretraining": "parameters steps tokens train_loss validation_loss validation_perplexity bits_per_byte "
    "tokens_per_second energy_kwh emissions_kg duration_s",
    "04_evaluation": "perplexity bits_per_byte harness downstream",
    "05_chat": "validation_loss_before validation_loss_after useful_tokens_per_second padding_share",
    "06_carbon_report": "energy_kwh emissions_kg car_km",
}


class Command:
    """`ttl` and papermill in a process of their own, in one outputs folder."""

    def __init__(self, tiny: Tiny, outputs: Path):
        self.file, self.outputs = tiny.file, outputs
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in ("TTL_MIRROR", "HF_TOKEN")},
            "TTL_CACHE": str(tiny.cache),
            "TTL_OUTPUTS": str(outputs),
            "HF_HUB_OFFLINE": "1",
        }

    def ttl(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return self.python("-m", "ttl_utils", *arguments, **environment)

    def papermill(self, notebook: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        source, target = ROOT / "notebooks" / notebook, self.outputs / f"plain-{notebook}"
        return self.python("-m", "papermill", str(source), str(target), *arguments, cwd=cwd)

    def python(self, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    @property
    def run(self) -> Path:
        return self.outputs / "tiny"


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The six notebooks, run once; to read only."""
    command = Command(tiny, tmp_path_factory.mktemp("whole"))
    done = command.ttl("run", tiny.file)
    assert done.returncode == 0, done.stdout + done.stderr
    return command


@pytest.fixture
def copied(whole: Command, tiny: Tiny, tmp_path: Path) -> Command:
    """The finished run, to change."""
    shutil.copytree(whole.outputs, tmp_path / "outputs")
    return Command(tiny, tmp_path / "outputs")


def test_metrics_have_the_agreed_names(whole: Command) -> None:
    metrics = json.loads((whole.run / "metrics.json").read_text())
    assert list(metrics) == list(STAGES)
    for stage, names in METRICS.items():
        assert set(names.split()) <= set(metrics[stage]), stage
    trained = metrics["03_pretraining"]
    assert abs(trained["initial_validation_loss"] - trained["uniform_loss"]) < 0.3
    assert trained["validation_loss"] < trained["initial_validation_loss"] - 0.3
    assert metrics["05_chat"]["validation_loss_after"] < metrics["05_chat"]["validation_loss_before"]
    assert metrics["04_evaluation"]["perplexity"] == pytest.approx(
        # over the first held-out tokens only, at this size
        trained["validation_perplexity"],
        rel=0.05,
    )
    assert 0 <= metrics["01_data"]["instruction_share"] <= 1


def test_the_agreed_files_are_there(whole: Command) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in STAGES:
        assert (whole.run / stage / "manifest.json").is_file()
    assert (whole.run / "energy.jsonl").is_file()
    run = json.loads((whole.run / "run.json").read_text())
    assert {"code", "versions", "machine", "parameters", "stages"} <= set(run) and set(run["stages"]) == set(STAGES)
    newest = sorted((whole.run / "03_pretraining" / "checkpoints").glob("step-*"))[-1]
    for folder in (whole.run / "03_pretraining" / "model", newest, whole.run / "05_chat" / "model"):
        assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
        assert AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"


def test_executed_notebooks_are_free_of_noise(whole: Command) -> None:
    for stage in STAGES:
        notebook = nbformat.read(whole.run / "notebooks" / f"{stage}.ipynb", as_version=4)
        figures = 0
        for cell in notebook.cells:
            outputs = cell.get("outputs", [])
            assert len(outputs) <= 4, (stage, cell.source)
            for output in outputs:
                assert output.get("name") != "stderr", (stage, output)
                assert "warning" not in str(output.get("text", "")).lower(), (stage, output)
                figures += "image/png" in output.get("data", {})
        assert figures, f"{stage} shows no figure"


def test_every_figure_has_its_data(whole: Command) -> None:
    figures = {path.stem for path in (whole.run / "figures").glob("*.png")}
    assert len(figures) >= 8
    assert figures == {path.stem for path in (whole.run / "figures").glob("*.csv")}


def test_no_handle_or_link_is_shown(whole: Command) -> None:
    for path in (whole.run / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
                assert not re.search(r"https?://|(?<!\w)@\w", text), (path.name, text[:200])


def test_running_again_reuses_everything_and_says_so(whole: Command) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.run.glob("0*/**/*") if path.is_file()}
    started = time.monotonic()
    again = whole.ttl("run", whole.file)
    assert again.returncode == 0, again.stderr
    assert all(re.search(rf"{stage}: finished .* reused", again.stdout) for stage in STAGES), again.stdout
    assert "run 'tiny' is complete" in again.stdout
    assert time.monotonic() - started < 60
    assert before == {path: path.stat().st_mtime_ns for path in whole.run.glob("0*/**/*") if path.is_file()}


def test_a_report_that_is_asked_for_otherwise_is_made(copied: Command) -> None:
    changed = copied.ttl("run", copied.file, "--set", "evaluation.inference=null", "--from", "04", "--to", "05")
    assert changed.returncode == 0, changed.stderr
    assert "04_evaluation: finished" in changed.stdout and "04_evaluation: running" in changed.stdout
    text = (copied.run / "notebooks" / "04_evaluation.ipynb").read_text()
    assert "evaluation.inference is null" in text


def test_a_deleted_stage_is_made_again_and_the_others_are_reused(copied: Command) -> None:
    fingerprint = json.loads((copied.run / "02_tokenizer" / "manifest.json").read_text())["outputs"]
    shutil.rmtree(copied.run / "02_tokenizer")
    again = copied.ttl("run", copied.file)
    assert again.returncode == 0, again.stdout + again.stderr
    for stage in ("01_data", "03_pretraining", "04_evaluation", "05_chat"):
        assert re.search(rf"{stage}: finished .* reused", again.stdout), again.stdout
    assert "02_tokenizer: running" in again.stdout
    assert json.loads((copied.run / "02_tokenizer" / "manifest.json").read_text())["outputs"] == fingerprint
    # the report tells of the ledger, which grew: the earlier one is kept
    assert (copied.run / "06_carbon_report.old-1" / "report.md").is_file()


def test_a_finished_stage_is_never_remade_silently(copied: Command) -> None:
    changed = copied.ttl("run", copied.file, "--set", "pretraining.learning_rate=0.01")
    assert changed.returncode != 0
    assert "pretraining.learning_rate: " in changed.stderr and "-> 0.01" in changed.stderr
    assert "--force" in changed.stderr and "Traceback" not in changed.stderr
    moved = copied.ttl("run", copied.file, "--set", "pretraining.max_steps=2", "--from", "03", "--to", "03", "--force")
    assert moved.returncode == 0, moved.stderr
    assert (copied.run / "03_pretraining.old-1" / "manifest.json").is_file()
    assert json.loads((copied.run / "03_pretraining" / "metrics.json").read_text())["steps"] == 2


def test_a_variant_uses_the_base_runs_stages(copied: Command) -> None:
    made = copied.ttl(
        "run", copied.file, "--run", "other", "--base", "tiny", "--set", "pretraining.max_steps=2", "--to", "03"
    )
    assert made.returncode == 0, made.stderr
    assert "02_tokenizer of run 'tiny'" in made.stdout
    assert "01_data, 02_tokenizer, 03_pretraining finished in " in made.stdout and "is complete" not in made.stdout
    assert not (copied.outputs / "other" / "02_tokenizer").exists()
    assert json.loads((copied.outputs / "other" / "03_pretraining" / "metrics.json").read_text())["steps"] == 2


def test_plain_papermill_from_another_folder_has_no_warning(copied: Command, tmp_path: Path) -> None:
    done = copied.papermill("03_pretraining.ipynb", "-f", copied.file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower() and "unknown parameter" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("-y", "{pretraining: {max_stepz: 5}}"), "max_steps"),
        (("-p", "sizee", "nano"), "'size'"),
        (("-y", "{pretraining: {learning_rate: 6e-4}}"), "0.0006"),
        (("-y", "{model: {num_attention_heads: 3}}"), "num_attention_heads"),
    ],
)
def test_bad_parameters_stop_with_one_message(copied: Command, arguments: tuple[str, ...], named: str) -> None:
    before = sorted(copied.run.rglob("*"))
    done = copied.papermill("03_pretraining.ipynb", "-f", copied.file, *arguments)
    assert done.returncode != 0
    assert named in done.stderr and "ParameterError" in done.stderr
    assert "ttl_utils/params.py" not in done.stderr, "our internals are no help"
    assert sorted(copied.run.rglob("*")) == before


def test_a_missing_stage_is_named_with_its_command(tiny: Tiny, tmp_path: Path) -> None:
    command = Command(tiny, tmp_path)
    done = command.ttl("run", tiny.file, "--from", "03")
    assert done.returncode != 0
    assert "02_tokenizer" in done.stderr and "--to 02" in done.stderr and "Traceback" not in done.stderr


def test_an_unreachable_index_is_one_message(tiny: Tiny, tmp_path: Path) -> None:
    command = Command(tiny, tmp_path)
    index = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    done = command.ttl("run", tiny.file, "--to", "01", TTL_CACHE=str(tmp_path / "empty"), **index)
    assert done.returncode != 0
    assert "package index" in done.stderr and "dante-corpora" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "tiny" / "01_data" / "manifest.json").exists()
    again = command.ttl("run", tiny.file, "--to", "01")
    assert again.returncode == 0, again.stderr


def test_pretraining_without_a_notebook_gives_the_same_weights(copied: Command) -> None:
    weights = copied.run / "03_pretraining" / "model" / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(copied.run / "03_pretraining")
    done = copied.ttl("pretrain", copied.file)
    assert done.returncode == 0, done.stderr
    assert weights.read_bytes() == before


def test_status_and_plan(whole: Command) -> None:
    status = whole.ttl("status", "tiny")
    assert status.returncode == 0 and status.stdout.count("finished") == len(STAGES)
    assert whole.ttl("status", "nothing").returncode != 0
    every = whole.ttl("status")
    assert every.returncode == 0 and every.stdout == status.stdout
    for size, count in (("160m", "162,417,408"), ("460m", "468,239,360")):
        assert count in whole.ttl("plan", size).stdout
    brazil = whole.ttl("plan", "160m", "--country", "BRA", "--budget", "40 kg CO2e")
    assert brazil.returncode == 0 and "(BRA)" in brazil.stdout and "40 kg CO2e pays" in brazil.stdout
    # lines are wrapped
    plan = " ".join(whole.ttl("plan", "160m").stdout.split())
    assert "365.5 g/kWh (as carbon.carbon_intensity_g_per_kwh says)" in plan
    assert whole.ttl("run", "nanno").returncode != 0


def test_runs_are_compared_and_a_missing_one_is_named(whole: Command) -> None:
    compared = whole.ttl("compare", "tiny")
    assert compared.returncode == 0, compared.stderr
    assert (whole.outputs / "comparisons" / "tiny" / "figures" / "curves.png").is_file()
    missing = whole.ttl("compare", "tiny", "tinny")
    assert missing.returncode != 0 and "'tinny'" in missing.stderr and "tiny" in missing.stderr


def test_published_tokens_take_the_place_of_the_corpus(whole: Command, tiny: Tiny, tmp_path: Path) -> None:
    """Tokens and their tokenizer are imported, nothing is read to learn from, and the notebooks say so."""
    made = whole.run / "02_tokenizer"
    folder = tmp_path / "mirror" / "some" / "tokens" / "data"
    folder.mkdir(parents=True)
    for side in ("train", "test"):
        ids = np.concatenate([np.fromfile(path, "<u2") for path in sorted((made / "tokens").glob(f"{side}-*.bin"))])
        rows = [{"input_ids": row.tolist()} for row in np.split(ids.astype(np.int32), range(64, len(ids), 64))]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{side}-00000-of-00001.parquet")
    values = yaml.safe_load(Path(tiny.file).read_text(encoding="utf-8"))
    values["data"]["sources"] = [source for source in values["data"]["sources"] if source["use"] != "corpus"]
    tokens = {"dataset": "some/tokens", "train_split": "train", "test_split": "test", "column": "input_ids"}
    values["tokenizer"] |= {"source": str(made), "tokens": tokens}
    file = tmp_path / "imported.yaml"
    file.write_text(yaml.safe_dump(values | {"file": str(file)}, allow_unicode=True), encoding="utf-8")
    outputs = tmp_path / "outputs"
    where = {"TTL_MIRROR": str(tmp_path / "mirror"), "TTL_OUTPUTS": str(outputs)}
    done = whole.ttl("run", str(file), "--to", "02", **where)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((outputs / "tiny" / "metrics.json").read_text())
    before = json.loads((whole.run / "metrics.json").read_text())
    assert metrics["01_data"]["documents_in"] == 0
    for name in ("train_tokens", "test_tokens", "train_bytes", "test_bytes", "vocab_size"):
        assert metrics["02_tokenizer"][name] == before["02_tokenizer"][name]
