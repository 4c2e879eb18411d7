"""Planning: counts exact, the paper's runs from their own throughput, memory as autograd keeps it, budgets."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ttl_utils import budget, costs, devices, memory, planning
from ttl_utils.errors import ParameterError
from ttl_utils.lean import make_lean
from ttl_utils.model import checkpoint_activations
from ttl_utils.params import Params, load_params
from ttl_utils.schema import Model

A100 = devices.find_gpu("A100-40GB")


def size(name: str = "160m", **sections: dict) -> Params:
    return load_params({"size": name, **sections})


def with_shape(params: Params, **shape: int) -> Params:
    model = params.model.model_copy(update=shape)
    return dataclasses.replace(params, values=params.values.model_copy(update={"model": model}))


def test_parameters_tokens_and_flops_are_the_papers():
    for name, count, tokens in (("160m", 162_417_408, 3_751_936_000), ("460m", 468_239_360, 9_830_400_000)):
        table = planning.sizing_table(size(name)).set_index("figure")
        assert table.value["parameters"] == count
        assert table.value.filter(like="parameters, ").sum() == count
        assert table.share.sum() == pytest.approx(1)
        assert table.value["tokens"] == tokens
    assert table.value["FLOPs per token, convention"] == 6 * count + 12 * 24 * 1024 * 2048


# Chinchilla


def test_the_law_gives_the_papers_expected_losses():
    table = planning.chinchilla_table("x", 1, 1)
    assert table["law as printed"][:2].round(2).tolist() == [3.50, 3.03]
    assert table["law, Hoffmann's exponent"][:2].round(2).tolist() == [3.20, 2.80]
    assert table["20-tokens rule"][1] == 9_364_787_200


@given(st.floats(1e15, 1e24), st.sampled_from([0.32, 0.34]), st.floats(0.5, 2))
def test_no_other_split_of_the_compute_has_a_lower_loss(flops, exponent, factor):
    parameters, tokens = planning.chinchilla_optimum(flops, exponent)
    assert 6 * parameters * tokens == pytest.approx(flops)
    best = planning.chinchilla_loss(parameters, tokens, exponent)
    assert planning.chinchilla_loss(parameters * factor, tokens / factor, exponent) >= best * (1 - 1e-12)


# the paper's runs


def test_the_papers_runs_come_out_of_their_own_throughput():
    table = planning.paper_runs().set_index(["run", "at its"])
    logs = {"160m": (139_415, 15.52, 5.67), "460m": (1_009_910, 112.97, 41.29)}
    for run, (seconds, energy_kwh, emissions_kg) in logs.items():
        row = table.loc[run, "mean"]
        assert row.hours * 3600 == pytest.approx(seconds, rel=0.03)
        assert row.kWh == pytest.approx(energy_kwh, rel=0.03)
        assert row.kg == pytest.approx(emissions_kg, rel=0.03)
        assert row[["hours, log", "kWh, log", "kg, log"]].tolist() == pytest.approx(
            [seconds / 3600, energy_kwh, emissions_kg], rel=0.001
        )
    # the 36 hours of the text fit the peak throughput
    assert table.loc["160m", "peak"].hours == pytest.approx(36, rel=0.03)


def test_the_projection_of_the_paper_is_the_paper():
    row = planning.projection(size(), A100).iloc[0]
    assert row.hours == pytest.approx(38.73, rel=0.001) and row.share == pytest.approx(0.104, abs=0.001)
    # both runs at the paper's price cost the paper's budget
    both = row.USD + planning.projection(size("460m"), A100).iloc[1].USD
    assert both == pytest.approx(500, rel=0.001)


def test_what_is_given_replaces_what_is_assumed():
    row = planning.projection(size(), A100, usd_per_hour=2.0, utilisation=0.5)
    assert len(row) == 1 and row.share[0] == 0.5 and row.USD[0] == pytest.approx(2 * row.hours[0])
    half = planning.projection(size(carbon={"pue": 1.5, "carbon_intensity_g_per_kwh": 100.0}), A100, utilisation=0.5)
    assert half.kWh[0] == pytest.approx(1.5 * row.kWh[0])
    assert half.kg[0] == pytest.approx(half.kWh[0] / 10)
    brazil = size(carbon={"country_iso_code": "BRA", "carbon_intensity_g_per_kwh": None})
    assert 50 < costs.intensity(brazil) < 200


def test_no_price_is_made_up():
    assert planning.projection(size(), devices.find_gpu("H100-SXM")).USD.isna().all()


def test_ours_stays_empty_and_the_anchors_stand():
    table = planning.throughput_table()
    assert set(table.ours) == {"not measured"}
    assert table["paper, peak"].dropna().tolist() == [29_491] and table.Tucano.dropna().tolist() == [132_400]
    assert sorted(table.GPU.unique()) == ["A100-40GB", "H100-SXM"]


# memory


def kept(model: Model, precision: str, attention: str, checkpointing: bool) -> tuple[float, int]:
    """What autograd keeps of the layers' forward pass: bytes per token, and bytes of 16-bit copies of weights."""
    keys = set(Model.model_fields) - {"rope_theta", "initializer_range"}
    config = LlamaConfig(vocab_size=500, **{key: getattr(model, key) for key in keys})
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = make_lean(LlamaForCausalLM(config)).train()
    if checkpointing:
        checkpoint_activations(llama)
    shapes = {tuple(shape) for p in llama.parameters() for shape in (p.shape, p.shape[::-1])}
    ids = torch.zeros(3, model.max_position_embeddings, dtype=torch.long)
    activations: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) not in shapes:
            activations[storage.data_ptr()] = storage
        elif tensor.dtype == torch.bfloat16:
            copies[storage.data_ptr()] = storage
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        hidden = llama.model(ids, use_cache=False).last_hidden_state
    # the loss keeps the gradient of it; see loss_bytes
    activations[hidden.data_ptr()] = hidden.untyped_storage()
    per_token, copied = (sum(storage.nbytes() for storage in found.values()) for found in (activations, copies))
    return per_token / ids.numel(), copied


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("key_value", [4, 2])
def test_activations_are_what_autograd_keeps(precision, attention, key_value):
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": key_value, "max_position_embeddings": 64}
    params = with_shape(size("nano"), **shape)
    measured, copied = kept(params.model, precision, attention, checkpointing=False)
    formula = memory.activation_bytes(params.model, 64, precision, attention, False)
    assert formula == pytest.approx(measured, rel=0.02)
    assert memory.memory_by_part(params, precision)["16-bit copies of weights"] == pytest.approx(copied)
    # with checkpointing a layer keeps its input, until its turn comes and it is computed again: one at a time
    outside, _ = kept(params.model, precision, attention, checkpointing=True)
    assert memory.activation_bytes(params.model, 64, precision, attention, True) == pytest.approx(
        outside + (formula - 2 * 4 * 128) / 3, rel=0.02
    )


def test_the_parts_of_memory():
    parts = memory.memory_by_part(size(), "fp32")
    assert parts["weights"] == parts["gradients"] == parts["optimizer"] / 2 == 4 * 162_417_408
    assert parts["16-bit copies of weights"] == 0
    table = memory.memory_table(size(), A100).set_index("part").GiB
    assert table.iloc[:-2].sum() == pytest.approx(table["in all"])
    assert table["logits alone, were they not in chunks"] > 2 * table["loss, logits in chunks"]
    checkpointed = size(pretraining={"gradient_checkpointing": True})
    assert memory.needed(checkpointed, "bf16") < 0.6 * memory.needed(size(), "bf16")


@pytest.mark.parametrize("gpu", devices.gpus().index)
def test_rows_that_fit_do_fit_and_twice_as_many_do_not(gpu):
    card, params = devices.find_gpu(gpu), size("460m", pretraining={"tokens_per_step": 2**21})
    rows, precision = memory.rows_that_fit(params, card), memory.precision_of(params, card)
    assert memory.needed(params, precision, rows) <= 0.9 * card.memory_gib < memory.needed(params, precision, 2 * rows)


def test_the_papers_runs_fit_its_card_and_no_t4_has_bf16():
    table = planning.cards(size("460m")).set_index("GPU")
    assert table["rows fit"]["A100-40GB"] >= 2
    assert table.precision[["T4", "L4"]].tolist() == ["fp16", "bf16"]
    asked = planning.cards(size(pretraining={"precision": "bf16"})).set_index("GPU")
    assert asked.precision["T4"] == "no bf16" and math.isnan(asked["GiB needed"]["T4"])
    with pytest.raises(ParameterError, match="a T4 has none"):
        costs.speed(size(pretraining={"precision": "bf16"}), devices.find_gpu("T4"), 0.5)


# budgets


@pytest.mark.parametrize(
    ("text", "amount"),
    [("500 USD", (500, "USD")), ("US$500", (500, "USD")), ("$ 499.99", (499.99, "USD")), ("40kg", (40, "kg"))],
)
def test_a_budget_is_read(text, amount):
    assert budget.read_budget(text) == amount


def test_reais_need_a_rate():
    assert budget.read_budget("R$ 2500", 5.0) == budget.read_budget("2500 brl", 5.0) == (500, "USD")
    with pytest.raises(ParameterError, match="brl_per_usd"):
        budget.read_budget("2500 BRL")


# "2.500" is two thousand and five hundred in Portuguese, and two and a half in English
@pytest.mark.parametrize("text", ["", "500", "USD", "-5 USD", "0 kg", "2.500 BRL", "2,500 USD", "5 EUR", "five USD"])
def test_a_budget_that_cannot_be_read(text):
    with pytest.raises(ParameterError, match="is not an amount"):
        budget.read_budget(text, 5.0)


def proposed(table: pd.DataFrame) -> pd.Series | None:
    rows = table[table.verdict == "proposed"]
    assert len(rows) <= 1
    return None if rows.empty else rows.iloc[0]


def bought(params: Params, text: str, utilisation: float, unique: float = budget.UNIQUE_TOKENS) -> pd.DataFrame:
    return budget.affordable(
        params, A100, budget.hours_for(*budget.read_budget(text), params, A100), utilisation, unique
    )


def test_the_papers_budget_at_the_papers_speed_gives_the_papers_larger_model():
    for text in ("500 USD", "47 kg"):
        row = proposed(bought(size(), text, costs.paper_and_tucano()[0]))
        assert row["hidden x layers"] == "1024 x 24 (460m)"
        assert row.tokens == pytest.approx(10.9e9, rel=0.02)


@settings(deadline=None, max_examples=15)
@given(st.floats(1e-3, 1e6), st.floats(1, 100), st.floats(0.01, 1), st.floats(1e6, 1e13))
def test_more_hours_never_give_a_smaller_model_or_fewer_tokens(hours, factor, utilisation, unique):
    params = size()
    less, more = (budget.affordable(params, A100, h, utilisation, unique) for h in (hours, hours * factor))
    assert (more.tokens >= less.tokens).all()
    before, after = proposed(less), proposed(more)
    if before is not None:
        assert after.parameters >= before.parameters
    for row in (before, after):
        if row is not None:
            assert row["per parameter"] >= 20 and row.epochs <= 4
            assert row.tokens <= row.affordable


def test_too_little_text_and_too_little_memory_are_told():
    assert set(bought(size(), "500 USD", 0.5, unique=1e6).verdict) <= {
        "too little text",
        "too expensive",
        "out of memory",
    }
    rich = budget.affordable(size(), devices.find_gpu("T4"), 1e9, 1.0, 1e15)
    assert rich.verdict.iloc[-1] == "out of memory" and proposed(rich) is not None


@pytest.mark.parametrize("name", ["nano", "40m", "160m", "460m"])
def test_the_ladder_climbs_and_holds_the_files_own_shape(name):
    shapes = budget.ladder(size(name))
    counts = [budget.count(made) for made in shapes.values()]
    assert counts == sorted(set(counts)) and sum("this file" in shape for shape in shapes) == 1
    assert budget.count(size(name)) in counts


# the report


@pytest.mark.parametrize("name", ["nano", "40m", "160m", "460m"])
def test_the_report_fits_a_terminal(name):
    text = planning.report(size(name), budget="2500 BRL", brl_per_usd=5.4, unique_tokens=5e9)
    assert max(map(len, text.splitlines())) <= 100
    assert "projected" in text and "not measured" in text and " nan" not in text
    assert "36 h" in text and "29,491" in text
    assert "Proposed: " in text


def test_the_report_of_another_gpu_needs_its_price_for_money_alone():
    assert "no price known here" in planning.report(size(), gpu="H100-SXM", budget="40 kg", utilisation=0.3)
    with pytest.raises(ParameterError, match="no price of a H100-SXM"):
        planning.report(size(), gpu="H100-SXM", budget="500 USD")
    assert "2.50 USD an hour, as given" in planning.report(size(), gpu="H100-SXM", budget="500 USD", usd_per_hour=2.5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gpu": "A1000"}, "Did you mean"),
        ({"utilisation": 0.0}, "utilisation"),
        ({"utilisation": 51.0}, "utilisation"),
        ({"utilisation": math.nan}, "utilisation"),
        ({"usd_per_hour": -1.0}, "usd_per_hour"),
        ({"unique_tokens": 0.0}, "unique_tokens"),
        ({"brl_per_usd": math.nan, "budget": "5 BRL"}, "brl_per_usd"),
        ({"budget": "a lot"}, "budget"),
    ],
)
def test_what_cannot_be_used_is_named(bad, message):
    with pytest.raises(ParameterError, match=message):
        planning.report(size(), **bad)
