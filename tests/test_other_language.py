"""Another corpus and country by one override file: the six stages on Galician text made by code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.galego import write_galego
from tests.tiny import SMALLER
from ttl_utils.chat import fine_tune_chat
from ttl_utils.corpus import documents, prepare_corpus
from ttl_utils.files import read_json
from ttl_utils.params import _merged, bundled, load_params
from ttl_utils.pretraining import pretrain
from ttl_utils.run import STAGES, Run
from ttl_utils.tokenizer import prepare_tokenizer

EXAMPLE = bundled("params") / "examples" / "galego.yaml"
SPANISH = "El puerto de la ciudad vieja estaba lleno de barcos y nadie sabía hacia dónde los llevaría el viento mañana."


def by_command(stage: str, folder: Path, where: dict[str, str]) -> None:
    command = [sys.executable, "-m", "ttl_utils", "run", "galego.yaml", "--from", stage, "--to", stage]
    done = subprocess.run(command, cwd=folder, env=os.environ | where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def galego(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text, and the example cut down to seconds, all six stages made from it.

    Their notebooks take most of the time: only those of 04 and 06, which have most to leave out, are run.
    """
    folder = tmp_path_factory.mktemp("galego")
    write_galego(folder / "texts" / "galego", paragraphs=240, conversations=60)
    with (folder / "texts" / "galego" / "prosa.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n{SPANISH}\n")
    values = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    for section, smaller in SMALLER.items():
        # its prompts are Portuguese, and not this test's
        smaller = {key: value for key, value in smaller.items() if key != "prompts"}
        values[section] = _merged(values.get(section, {}), smaller)
    values["evaluation"]["generation"] |= {"samples": 1, "max_new_tokens": 4}
    values["file"] = "galego.yaml"
    (folder / "galego.yaml").write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8")
    where = {"TTL_OUTPUTS": str(folder / "outputs"), "TTL_CACHE": str(folder / "no-wheels")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in where.items():
            patch.setenv(name, value)
        run = Run(load_params({"file": "galego.yaml"}))
        for make in (prepare_corpus, prepare_tokenizer, pretrain):
            make(run)
        by_command("04", folder, where)
        fine_tune_chat(run)
        by_command("06", folder, where)
    return folder


@pytest.fixture
def run(galego: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TTL_OUTPUTS", str(galego / "outputs"))
    monkeypatch.chdir(galego)
    return Run(load_params({"file": str(galego / "galego.yaml")}))


def test_the_example_needs_no_other_file() -> None:
    params = load_params({"file": "params/examples/galego.yaml"})
    assert params.run_name == "galego" and params.data.language == "gl" and params.carbon.country_iso_code == "ESP"
    # the sources are its own; what it does not name is nano's
    assert all(source.files for source in params.data.sources)
    assert params.model == load_params({"size": "nano"}).model


def test_all_six_stages_are_made(run: Run) -> None:
    assert run.name == "galego" and all(run.stage(name).finished for name in STAGES)
    assert {path.stem for path in (run.folder / "notebooks").glob("*.ipynb")} == {"04_evaluation", "06_carbon_report"}
    assert set(read_json(run.folder / "metrics.json")) == set(STAGES)


def test_the_corpus_is_the_files_and_no_other_language(run: Run) -> None:
    stage = run.stage("01_data")
    texts = [row for side in ("train", "test") for row in documents(stage, "corpus", side)]
    assert {row["source"] for row in texts} == {"prosa", "conversas"}
    assert not any(SPANISH in row["text"] for row in texts)
    (prose,) = [source for source in stage.metrics()["sources"] if source["source"] == "prosa"]
    assert prose["documents_in"] == 241 and prose["documents_kept"] >= 220
    assert prose["rejected"] == {"language": 1}


def test_it_learned(run: Run) -> None:
    metrics = read_json(run.folder / "metrics.json")
    rows = [json.loads(line) for line in (run.stage("03_pretraining").folder / "metrics.jsonl").open()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert losses[-1] < losses[0]
    assert metrics["04_evaluation"]["perplexity"] > 1


def test_what_is_portuguese_alone_is_off(run: Run) -> None:
    metrics = run.stage("04_evaluation").metrics()
    assert not metrics["harness"] and not metrics["downstream"]


def test_the_country_is_spain(run: Run) -> None:
    from ttl_utils.ledger import stage_totals

    # CodeCarbon's figure for Spain, and not the paper's 365.477 for Germany
    grams = stage_totals(run.folder / "energy.jsonl").intensity_g_per_kwh
    assert grams.min() > 50 and grams.max() < 300
