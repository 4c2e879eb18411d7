"""The published figures: arithmetic cross-checks, contradictions, and the comparison's verdicts."""

from __future__ import annotations

import math
import re
from importlib.resources import files

import pytest

from ttl_utils import paper
from ttl_utils.errors import TTLError


def by_size(name: str):
    return paper.table(name).set_index("size")


# figures


def test_every_file_has_a_source_and_every_source_a_file():
    folder = files("ttl_utils").joinpath("published")
    names = {entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv")}
    sources = paper._read("sources")["name"]
    assert names - {"sources"} == set(sources) and sources.is_unique
    for name in sources:
        table = paper.table(name)
        assert len(table) and table.attrs["source"]
        assert not table.select_dtypes("number").isna().to_numpy().any()


def test_a_caller_cannot_change_the_published_table():
    table = paper.table("table1_tokenizers")
    table.loc[0, "tokens"] = 1
    assert paper.table("table1_tokenizers").loc[0, "tokens"] == 9937


@pytest.mark.parametrize(("size", "parameters"), [("160m", 162_417_408), ("460m", 468_239_360)])
def test_parameter_count_follows_from_table_2(size, parameters):
    row = by_size("table2_architecture").loc[size]
    h, i, layers = row.hidden_size, row.intermediate_size, row.num_hidden_layers
    # two untied embeddings; attention, gated MLP and two norms a layer; the last norm
    assert 2 * row.vocab_size * h + layers * (4 * h * h + 3 * h * i + 2 * h) + h == parameters
    assert paper.headline(size)["parameters"].value == parameters


@pytest.mark.parametrize("size", paper.SIZES)
def test_headline_agrees_with_the_tables_it_is_taken_from(size):
    head = {name: figure.value for name, figure in paper.headline(size).items()}
    training, final = by_size("table3_training").loc[size], by_size("codecarbon_final").loc[size]
    last = by_size("evaluation_log").loc[size].iloc[-1]
    assert head["steps"] == training.max_steps
    assert head["tokens"] == training.max_steps * training.tokens_per_step
    assert head["tokens_per_second"] == pytest.approx(head["tokens"] / final.duration_s, rel=1e-5)
    assert head["tokens_per_word"] == pytest.approx(9937 / 7400, abs=1e-4)
    assert head["vocab_size"] == by_size("table2_architecture").loc[size, "vocab_size"]
    for name in ("energy_kwh", "emissions_kg", "duration_s"):
        assert head[name] == final[name]
    assert (head["validation_loss"], head["validation_perplexity"]) == (last.loss, last.perplexity)
    assert head["perplexity"] == last.perplexity
    assert head["train_loss"] == by_size("train_loss_smoothed").loc[size, "loss"].iloc[-1]
    for prefix, name in (("harness_", "table4_harness"), ("downstream_", "table5_downstream")):
        row = paper.table(name).set_index("model").loc[f"TTL-{size}"]
        ours = {key.removeprefix(prefix): value for key, value in head.items() if key.startswith(prefix)}
        assert len(ours) == row.drop("english", errors="ignore").size
        assert all(row[key] == value for key, value in ours.items())


def test_token_totals():
    assert paper.headline("160m")["tokens"].value == 458_000 * 8192
    assert paper.headline("460m")["tokens"].value == 1_200_000 * 8192


def test_both_runs_together():
    parts, both = [paper.headline(size) for size in paper.SIZES], paper.headline("both")
    for name, figure in both.items():
        assert figure.value == pytest.approx(sum(part[name].value for part in parts), rel=1e-6)
    assert both["car_km"].value == 185


def test_perplexity_is_e_to_the_loss_once_the_cut_decimals_are_allowed_for():
    log = paper.table("evaluation_log")
    rest = log["perplexity"].map(math.log) - log["loss"]
    # cut at two decimals, never rounded up (perplexity itself is rounded in its fourth digit)
    assert rest.between(-5e-4, 0.0101).all() and rest.max() > 0.005


def test_tokens_are_steps_times_8192():
    for name in ("evaluation_log", "table6_energy_460m"):
        table = paper.table(name)
        assert (table["tokens"] == table["step"] * 8192).all()


def test_printed_token_labels_are_right_but_for_the_first():
    table = paper.table("table6_energy_460m")
    # cut, like the losses, not rounded
    labels = [f"{tokens // 10**8 / 10:.1f}B" for tokens in table["tokens"]]
    assert labels[1:] == list(table["tokens_printed"])[1:]
    assert (table["tokens_printed"][0], labels[0]) == ("8.1M", "0.8B")


def test_codecarbon_rows_add_up():
    table = paper.table("codecarbon_final")
    parts = table[["cpu_energy_kwh", "gpu_energy_kwh", "ram_energy_kwh"]].sum(axis=1)
    assert parts.sub(table["energy_kwh"]).abs().max() < 2e-6
    intensity = 1000 * table["emissions_kg"] / table["energy_kwh"]
    assert intensity.sub(table["intensity_g_per_kwh"]).abs().max() < 1e-3
    watts = table["gpu_energy_kwh"] / table["duration_s"] * 3.6e6
    assert list(watts.round()) == [327, 329]


def test_table_6_is_the_evaluation_log_but_for_its_last_emissions():
    log = by_size("evaluation_log").loc["460m"].reset_index(drop=True)
    table = paper.table("table6_energy_460m")
    for name in ("step", "perplexity", "energy_kwh"):
        assert (log[name] == table[name]).all()
    apart = log["emissions_kg"] != table["emissions_kg"]
    assert list(table["step"][apart]) == [1_200_000]


@pytest.mark.parametrize("name", ["table4_harness", "table5_downstream", "portuguese_benchmarks"])
def test_averages_are_the_means_of_their_rows(name):
    table = paper.table(name).set_index("model")
    scores = table.drop(columns=["average", "english"], errors="ignore")
    wrong = scores.mean(axis=1).sub(table["average"]).abs() > 0.0126
    assert list(table.index[wrong]) == (["Gpt2-small"] if name == "table4_harness" else [])


def test_curves_run_to_the_end_in_order():
    table = by_size("train_loss_smoothed")
    for size in paper.SIZES:
        steps = table.loc[size, "step"]
        assert steps.is_monotonic_increasing and steps.iloc[-1] == paper.headline(size)["steps"].value - 1
    arc = paper.table("arc_460m")
    assert len(arc) == 13 and arc["arc"].iloc[-1] == paper.headline("460m")["harness_arc"].value


def test_corpus_sources_hold_both_kinds():
    kinds = paper.table("corpus_sources")["kind"].value_counts()
    assert dict(kinds) == {"text": 6, "instructions": 5}


# contradictions


def test_conflicts_really_differ_and_are_complete():
    rows = paper.conflicts()
    assert (rows["figure_a"] != rows["figure_b"]).all()
    assert (rows.drop(columns="metric") != "").all(axis=None)
    assert not rows.duplicated(["size", "figure_a", "figure_b"]).any()
    assert set(rows["size"]) == {*paper.SIZES, "both"}
    metrics = {name for cell in rows["metric"] for name in cell.split()}
    assert metrics <= set(paper.table("headline")["metric"])


def figures(topic: str, size: str, source: str) -> list[tuple[float, ...]]:
    """First number of each side, for the rows of a topic and size whose first source starts so."""
    rows = paper.conflicts(topic)
    rows = rows[(rows["size"] == size) & rows["source_a"].str.startswith(source)]
    numbers = rows[["figure_a", "figure_b"]].map(lambda cell: re.search(r"\d[\d,.]*", cell)[0].replace(",", ""))
    return list(numbers.astype(float).itertuples(index=False, name=None))


def test_computed_conflicts():
    small, large = paper.headline("160m"), paper.headline("460m")
    assert figures("duration", "160m", "sections") == [(36, round(small["duration_s"].value / 3600, 1))]
    assert figures("throughput", "160m", "section") == [(29491, round(small["tokens_per_second"].value))]
    assert figures("throughput", "460m", "section 3.5") == [(29491, round(large["tokens_per_second"].value))]
    assert figures("throughput", "460m", "section 4.1") == [(80, round(60 / (9937 / 7400)))]
    past = 1_200_000 - 20 * large["parameters"].value / 8192
    assert figures("scaling law", "460m", "section 4.1") == [(75000, round(past, -3))]
    for size, head in (("160m", small), ("460m", large)):
        loss = 406.4 / head["parameters"].value ** 0.32 + 410.7 / head["tokens"].value ** 0.28 + 1.69
        predicted = (round(loss, 2), head["validation_loss"].value)
        assert figures("scaling law", size, "computed") == [predicted]
    loss = 406.4 / 460e6**0.32 + 410.7 / 9.3e9**0.28 + 1.69
    two, e = round(2**loss, 2), round(math.exp(loss), 2)
    assert figures("perplexity", "both", "authors' repository") == [(two, e)]
    tokens = paper.table("table1_tokenizers").set_index("tokenizer")["tokens"]
    more = round(100 * (tokens["Sabiá-7B"] / tokens["TTL"] - 1))
    assert figures("tokenizer", "both", "section 3.3") == [(66, more)]


# comparison


PUBLISHED_KWH = 15.521335


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (PUBLISHED_KWH, "reproduced"),
        (PUBLISHED_KWH * 1.10, "reproduced"),
        (PUBLISHED_KWH * 0.90, "reproduced"),
        (PUBLISHED_KWH * 1.1001, "close"),
        (PUBLISHED_KWH * 1.30, "close"),
        (PUBLISHED_KWH * 0.6999, "differs"),
        (PUBLISHED_KWH * 1.3001, "differs"),
        (math.nan, "differs"),
        (None, "not run"),
    ],
)
def test_verdicts_at_their_boundaries(ours, verdict):
    assert paper.headline("160m")["energy_kwh"].tolerance == 10
    row = paper.compare({"energy_kwh": ours}, "160m", comparable=True).iloc[0]
    assert row["verdict"] == verdict and row["paper"] == PUBLISHED_KWH
    if ours is not None and not math.isnan(ours):
        assert row["difference"] == pytest.approx(100 * (ours / PUBLISHED_KWH - 1))


def test_a_figure_of_another_text_or_vocabulary_is_shown_and_not_judged():
    row = paper.compare({"validation_perplexity": 16.41}, "160m", comparable=True).iloc[0]
    assert row["verdict"] == "not comparable" and row["paper"] == 16.41 and row["difference"] == 0


def test_counts_are_reproduced_only_when_equal():
    head = paper.headline("460m")
    same = {name: head[name].value for name in ("parameters", "steps", "tokens", "vocab_size")}
    assert set(paper.compare(same, "460m", comparable=True)["verdict"]) == {"reproduced"}
    off = {name: value + 1 for name, value in same.items()}
    assert set(paper.compare(off, "460m", comparable=True)["verdict"]) == {"differs"}


def test_not_comparable_shows_both_sizes_and_draws_no_difference():
    ours = {"train_loss": 2.797, "energy_kwh": None, "tokens_per_second_peak": 5.0}
    table = paper.compare(ours, "nano", comparable=False)
    assert set(table["verdict"]) == {"not comparable"}
    assert table["difference"].isna().all() and "paper" not in table
    assert list(table.loc[0, ["paper 160m", "paper 460m"]]) == [2.797, 2.6561]
    assert math.isnan(table.loc[2, "paper 460m"])
    # a changed 160m is no more comparable than a nano
    assert set(paper.compare(ours, "160m", comparable=False)["verdict"]) == {"not comparable"}


def test_metrics_choose_the_rows_and_absent_ones_were_not_run():
    table = paper.compare({"train_loss": 3.0, "bits_per_byte": 1.0}, "160m", True, ["energy_kwh", "bits_per_byte"])
    assert list(table["metric"]) == ["energy_kwh", "bits_per_byte"]
    assert list(table["verdict"]) == ["not run", "not published"]


def test_notes_name_the_contradictions_of_that_size():
    table = paper.compare(dict.fromkeys(["emissions_kg", "parameters"]), "460m", comparable=True)
    assert "41.31 kg" in table["note"][0] and "5.6 kg" not in table["note"][0]
    assert table["note"][1] == ""


def test_empty_comparison_keeps_its_columns():
    assert list(paper.compare({}, "160m", True).columns[:4]) == ["metric", "paper", "ours", "difference"]


# errors and display


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: paper.table("table7"), "table6_energy_460m"),
        (lambda: paper.headline("nano"), "460m"),
        (lambda: paper.conflicts("weather"), "carbon intensity"),
        (lambda: paper.compare({}, "nano", comparable=True), "160m"),
        (lambda: paper.compare({}, "160m", True, ["train_lossy"]), "train_loss,"),
    ],
)
def test_unknown_names_are_user_errors_that_list_the_known(call, names):
    with pytest.raises(TTLError, match=names):
        call()


def test_style_is_readable():
    ours = {"parameters": 162_417_408, "train_loss": 2.8012345678, "energy_kwh": None}
    html = paper.style(paper.compare(ours, "160m", comparable=True)).data
    for text in ("162,417,408", ">2.80<", ">0.151<", "difference (%)", "–", "text-align:right"):
        assert text in html
    assert "2.8012" not in html
    assert "nan" not in html.lower()
    assert ">0.0006<" in paper.style(paper.table("table3_training")).data
    assert "&lt;/s&gt;" in paper.style(paper.conflicts("packing")).data
    assert ">41.10<" in paper.style(paper.table("table4_harness")).data
