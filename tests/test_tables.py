"""What notebooks show beside the paper: only what is the paper's, and a verdict only where one is due."""

from __future__ import annotations

import pytest

from ttl_utils import tables
from ttl_utils.files import write_json
from ttl_utils.params import load_params
from ttl_utils.run import Run


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


def test_a_run_on_a_mirrors_stand_in_does_not_compare(outputs):
    folder = outputs / "160m" / "01_data"
    write_json(folder / "manifest.json", {})
    for mirrored, size in ((False, "160m"), (True, None)):
        write_json(folder / "metrics.json", {"sources": [{"from_mirror": mirrored}]})
        assert tables.is_paper_configuration(run(size="160m")) == size


def test_the_papers_column_holds_only_what_the_paper_says():
    shown = tables.parameters(run(size="nano").params, "model", "pretraining", "chat").data.set_index("parameter")
    assert shown.loc["model.hidden_size", "paper, 160m"] == "768"
    assert shown.loc["pretraining.decay_norms", "paper, 460m"] == "true, in effect"
    for ours in ("pretraining.device", "pretraining.prompts", "chat.temperature"):
        assert shown.loc[ours, "paper, 460m"] == ""
    assert shown.loc["chat.num_train_epochs", "paper, 160m"] == "", "the smaller model was not tuned to chat"
    # a key that was renamed would vanish from the table in silence
    known = {*run(size="nano").params.flat(), "model"}
    assert set(tables.PUBLISHED) | set(tables.PAPER_DIFFERS) <= known
