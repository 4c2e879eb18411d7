"""What notebooks show beside the paper: only what is the paper's, and a verdict only where one is due."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from ttl_utils import judged, tables
from ttl_utils.files import write_json
from ttl_utils.params import load_params
from ttl_utils.run import Run

OTHER = {"max_steps": 50, "learning_rate": 0.001, "warmup_steps": 100, "weight_decay": 0.2, "max_grad_norm": 2.0}
OTHER |= {"lr_scheduler_type": "linear", "adam_beta2": 0.95, "adam_epsilon": 1e-6, "isolate_documents": True}


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("TTL_OUTPUTS", str(tmp_path))
    return tmp_path


def run(**given) -> Run:
    return Run(load_params(given))


def test_only_the_papers_own_configuration_and_data_compare():
    assert tables.is_paper_configuration(run(size="160m")) == "160m"
    assert tables.is_paper_configuration(run(size="460m")) == "460m"
    assert tables.is_paper_configuration(run(size="nano")) is None
    assert tables.is_paper_configuration(run(size="160m", pretraining={"max_steps": 50})) is None
    assert tables.is_paper_configuration(run(size="160m", data={"test_share": 0.5})) is None


@pytest.mark.parametrize(
    "given",
    [
        {},
        *({"pretraining": {name: value}} for name, value in OTHER.items()),
        {"pretraining": {"logging_steps": 7, "block_size": 2048}},
        {"model": {"num_hidden_layers": 11}},
        {"tokenizer": {"source": "some/tokenizer"}},
    ],
    ids=str,
)
def test_notebooks_and_verdict_have_one_rule_for_the_papers_configuration(outputs, given):
    made = run(size="160m", run="mine", **given)
    made.record()
    assert tables.is_paper_configuration(made) == judged.load("mine", outputs).size
    assert (tables.is_paper_configuration(made) is None) == (bool(given) and "logging_steps" not in str(given))


def test_emissions_of_another_grid_are_not_judged_in_a_notebook_either():
    ours = {"energy_kwh": 15.5, "emissions_kg": 15.5 * 0.098, "car_km": 5.0}
    table = tables.against_paper(run(size="160m"), ours).set_index("metric")
    assert table.verdict.to_dict() == dict.fromkeys(ours, "not comparable") | {"energy_kwh": "reproduced"}
    assert "another grid (98 g/kWh, the paper's 365.477)" in table.note["emissions_kg"]
    table = tables.against_paper(run(size="160m", carbon={"pue": 1.2}), ours).set_index("metric")
    assert set(table.verdict) == {"not comparable"} and "PUE 1.2" in table.note["energy_kwh"]


def test_a_run_on_a_mirrors_stand_in_does_not_compare(outputs):
    folder = outputs / "160m" / "01_data"
    write_json(folder / "manifest.json", {})
    for mirrored, size in ((False, "160m"), (True, None)):
        write_json(folder / "metrics.json", {"sources": [{"from_mirror": mirrored}]})
        assert tables.is_paper_configuration(run(size="160m")) == size


def test_the_papers_column_holds_only_what_the_paper_says():
    shown = tables.parameters(run(size="nano").params, "model", "pretraining", "chat").data
    shown = pd.DataFrame(
        [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)[1:]],
        columns=["parameter", "value", "paper, 160m", "paper, 460m", "from"],
    ).set_index("parameter")
    assert shown.loc["model.hidden_size", "paper, 160m"] == "768"
    assert shown.loc["pretraining.decay_norms", "paper, 460m"] == "true, in effect"
    for ours in ("pretraining.device", "pretraining.prompts", "chat.temperature"):
        assert shown.loc[ours, "paper, 460m"] == ""
    assert shown.loc["chat.num_train_epochs", "paper, 160m"] == "", "the smaller model was not tuned to chat"
    # a key that was renamed would vanish from the table in silence
    known = {*run(size="nano").params.flat(), "model"}
    assert set(tables.PUBLISHED) | set(tables.PAPER_DIFFERS) <= known
