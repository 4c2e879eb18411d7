"""Scores as tables and figures: what is compared with what was published, and what is not."""

from __future__ import annotations

import pandas as pd
import pytest

from ttl_utils import figures_evaluation, paper, score_tables
from ttl_utils.params import load_params
from ttl_utils.run import Run

AUTHORS = {"model": "nicholasKluge/TeenyTinyLlama-160m"}


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("TTL_OUTPUTS", str(tmp_path))
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    return tmp_path


def run(**given) -> Run:
    return Run(load_params(given))


def score(value: float, stderr: float | None = 0.01, **more) -> dict:
    row = {"status": "done", "num_fewshot": 3, "metric": "acc", "value": value, "stderr": stderr, "samples": 100}
    return row | {"truncated": 0, "chance": 0.25, "constant_answer": 0.3, "from_mirror": False, "limit": None} | more


def tuned(accuracy: float, **more) -> dict:
    epoch = {"epoch": 1, "accuracy": accuracy, "macro_f1": accuracy}
    found = {**epoch, "last_epoch": epoch, "constant_answer": {"accuracy": 0.5, "macro_f1": 1 / 3}}
    return found | {"test_examples": 400, "stderr": 0.02, "from_mirror": False} | more


METRICS = {
    "harness": {
        "paper/arc_pt": score(0.2615),
        "leaderboard/arc_pt": score(0.2615),
        "paper/hellaswag_pt": {"status": "not run", "reason": "the hub cannot be reached"},
        "paper/m_mmlu_pt": score(0.2811 + 0.03),
        "paper/truthfulqa_pt_mc2": score(0.4112 + 0.05),
        "ttl_enem": score(0.1875, from_mirror=True),
        "ttl_bluex": score(0.2184, limit=10),
        "ttl_assin2_sts": score(-0.02, None, chance=None, constant_answer=None),
    },
    "downstream": {
        "assin2": tuned(0.8578, baselines={"encoder": {"status": "not run", "reason": "gated"}}),
        "hatebr": {"status": "not run", "reason": "no such set"},
        "agnews": tuned(0.9, seeds=[1, 2], accuracy_std=0.01, baselines={"encoder": tuned(0.95)}),
    },
}


def verdicts(**evaluation) -> pd.DataFrame:
    return score_tables.against_published(run(size="160m", evaluation=evaluation), METRICS).set_index(["table", "task"])


def test_verdicts_count_in_standard_errors():
    table = verdicts(**AUTHORS)
    four = table.loc["table 4"]
    assert four.loc["paper/arc_pt", "verdict"] == "reproduced"
    assert four.loc["paper/m_mmlu_pt", "verdict"] == "close"
    assert four.loc["paper/truthfulqa_pt_mc2", "verdict"] == "differs"
    assert four.loc["paper/truthfulqa_pt_mc2", "difference (points)"] == pytest.approx(5)
    assert table.loc[("table 5", "assin2"), "verdict"] == "reproduced"
    assert table.loc[("table 5", "agnews"), "verdict"] == "close"


def test_what_is_not_the_same_is_not_judged():
    table = verdicts(**AUTHORS)
    # a mirror's copy, a part of the questions, and answers that are ranked where theirs were generated
    for task in ("ttl_enem", "ttl_bluex", "ttl_assin2_sts"):
        row = table.loc[("portuguese benchmarks", task)]
        assert row.verdict == "not comparable" and pd.isna(row["difference (points)"]) and row.ours
    assert table.loc[("table 4", "leaderboard/arc_pt"), "verdict"] == "not comparable"
    ours = score_tables.against_published(run(size="nano"), METRICS)
    assert set(ours.verdict) == {"not comparable", "not run"}


def test_what_was_not_run_says_why():
    table = verdicts(**AUTHORS)
    row = table.loc[("table 4", "paper/hellaswag_pt")]
    assert row.verdict == "not run" and row.note == "the hub cannot be reached" and pd.isna(row.ours)
    assert table.loc[("table 5", "hatebr"), "note"] == "no such set"
    assert table.loc[("table 5", "imdb"), "note"] == "not among this run's parameters"


def test_every_published_score_stands_in_the_table():
    table = verdicts()
    for size in paper.SIZES:
        assert table.loc[("table 4", "paper/arc_pt"), f"paper {size}"] == paper.headline(size)["harness_arc"].value
        assert table.loc[("table 5", "imdb"), f"paper {size}"] == paper.headline(size)["downstream_imdb"].value
    assert len(table) == 2 * len(score_tables.TABLE_4) + len(score_tables.PORTUGUESE) + len(score_tables.TABLE_5)


def test_a_mirrors_copy_of_the_authors_weights_is_not_theirs(tmp_path, monkeypatch):
    assert score_tables.comparable_size(run(size="nano", evaluation=AUTHORS)) == "160m"
    (tmp_path / "mirror" / AUTHORS["model"]).mkdir(parents=True)
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))
    assert score_tables.comparable_size(run(size="nano", evaluation=AUTHORS)) is None
    assert score_tables.comparable_size(run(size="160m", evaluation={"model": "somebody/else"})) is None
    assert score_tables.comparable_size(run(size="160m")) == "160m"


def test_tables_and_figures_hold_what_was_run(outputs):
    harness = score_tables.harness(METRICS).set_index("task")
    assert list(harness.index) == list(METRICS["harness"])
    assert harness.loc["paper/hellaswag_pt", "reason"] == "the hub cannot be reached"
    downstream = score_tables.downstream(METRICS)
    assert list(zip(downstream.set, downstream.model, strict=True)) == [
        *[("assin2", "ours"), ("assin2", "encoder"), ("hatebr", "ours"), ("agnews", "ours"), ("agnews", "encoder")]
    ]
    table = score_tables.scores(METRICS).set_index("task")
    assert table.loc["paper/arc_pt"].tolist() == pytest.approx([26.15, 1, 30])
    assert pd.isna(table.loc["ttl_assin2_sts", "constant"]) and "paper/hellaswag_pt" not in table.index
    figure = figures_evaluation.scores(run(size="nano"), table.reset_index())
    assert figure.axes[0].get_xlim()[0] < -2, "a negative correlation is seen"
    assert (outputs / "nano" / "figures" / "04_scores.csv").is_file()


def test_scores_over_checkpoints_are_drawn_and_printed(outputs):
    rows = [
        {
            "step": 10 * n,
            "tokens": 1000 * n,
            "perplexity": 30.0 - n,
            "bits_per_byte": 2.0,
            "scores": {"arc": score(0.2)},
        }
        for n in (1, 2)
    ]
    rows[1]["scores"]["oab"] = {"status": "not run", "reason": "gone"}
    table = score_tables.checkpoint_table(rows)
    assert table.arc.tolist() == ["20.0 +- 1.0"] * 2 and table.oab.tolist()[1] == "not run"
    figure = figures_evaluation.over_checkpoints(run(size="nano"), rows)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert "arc" in labels and "arc, chance" in labels and "ARC, 460m, published" in labels
    assert len(pd.read_csv(outputs / "nano" / "figures" / "04_checkpoints.csv")) == 2
    for row in rows:
        row["scores"] = {"arc": {"status": "not run", "reason": "gone", "value": None, "stderr": None}}
    figures_evaluation.over_checkpoints(run(size="nano"), rows)
    assert score_tables.checkpoint_table(rows).arc.tolist() == ["not run"] * 2


def test_a_model_without_checkpoints_shows_its_texts():
    texts = {"news": {"bits_per_byte": 1.5}, "spanish": {"status": "not run", "reason": "gated"}}
    figure = figures_evaluation.perplexity(run(size="nano"), [], texts)
    assert len(figure.axes) == 1 and [bar.get_width() for bar in figure.axes[0].patches] == [1.5]
