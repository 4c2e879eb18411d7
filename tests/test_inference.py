"""Writing token by token, int8 weights, what is counted, and the report that is read back."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import StaticCache

from ttl_utils import decoding as dec
from ttl_utils import inference as inf
from ttl_utils import quantized as qz
from ttl_utils.blocks import TokenBlocks, TokenWriter
from ttl_utils.errors import MissingStage, ParameterError, TTLError
from ttl_utils.evaluation import evaluate
from ttl_utils.model import Hardware, count_parameters, new_model
from ttl_utils.params import load_params
from ttl_utils.perplexity import perplexity
from ttl_utils.pretraining import pretrain
from ttl_utils.quantized import Int8Linear, Way
from ttl_utils.schema import Inference
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CPU = Hardware("cpu", "fp32", "sdpa")
CONTEXT, VOCABULARY = 64, 512
LOAD = Inference(batch_sizes=[1, 3], prompt_tokens=6, new_tokens=4)
PLAIN = Way("fp32", "fp32", lambda model: model)
INT8 = Way("int8 dynamic", "int8", qz.int8)


@pytest.fixture(scope="module")
def shape(tiny_done):
    # weights larger than usual: what came before matters
    return tiny_done.params.model.model_copy(update={"initializer_range": 0.3})


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture(scope="module")
def model(shape, tokenizer):
    return new_model(shape, tokenizer, seed=1, attention="sdpa").eval()


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    writer = TokenWriter(tmp_path_factory.mktemp("tokens"), "test", shard_tokens=10**6)
    writer.add(np.random.default_rng(0).integers(4, VOCABULARY, 5 * CONTEXT + 9))
    return TokenBlocks(writer.close(), CONTEXT)


@pytest.fixture(scope="module")
def ids():
    return torch.from_numpy(np.random.default_rng(1).integers(4, VOCABULARY, (3, 9)))


@pytest.fixture
def quick(monkeypatch):
    """What is measured of the machine costs a second each time."""
    monkeypatch.setattr(inf, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(inf, "product_rate", lambda way, hardware: 1e9)
    monkeypatch.setattr(inf, "ROUNDS", 2)


def generated(model, ids, new_tokens: int) -> torch.Tensor:
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, eos_token_id=-1, **lengths)
    return found[:, ids.shape[1] :]


# int8


def test_int8_is_close_to_fp32_and_not_the_same(model, ids):
    made = qz.int8(model)
    with torch.no_grad():
        plain, rounded = model(ids).logits, made(ids).logits
    error = (plain - rounded).norm() / plain.norm()
    # a rounding error of 1/127 of the largest value, over a few layers
    assert 1e-4 < error < 0.05
    assert (plain.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.8


def test_every_linear_layer_is_int8_and_the_original_stays(model, ids):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    made = qz.int8(model)
    # 7 a layer, and the output layer
    expected = 7 * model.config.num_hidden_layers + 1
    assert sum(type(module) is torch.nn.Linear for module in model.modules()) == expected
    assert sum(type(module) is Int8Linear for module in made.modules()) == expected
    assert not any(type(module) is torch.nn.Linear for module in made.modules())
    assert [type(module) for module in model.modules()] == kinds
    made(ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # what is not rounded is not held twice
    assert made.model.embed_tokens.weight is model.model.embed_tokens.weight


def test_a_weight_is_its_row_scale_times_a_whole_number(model):
    linear = model.model.layers[0].mlp.down_proj
    saved = Int8Linear(linear).state_dict()
    assert saved["weight"].dtype == torch.int8 and saved["weight"].shape == linear.weight.shape
    scale = linear.weight.abs().amax(dim=1) / 127
    torch.testing.assert_close(saved["scale"], scale)
    assert ((saved["weight"] * scale[:, None] - linear.weight).abs() <= 0.5001 * scale[:, None]).all()
    # each row uses the whole range
    assert (saved["weight"].abs().amax(dim=1) == 127).all()


def test_a_layer_with_a_bias_and_a_row_of_zeros():
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 10)
    with torch.no_grad():
        linear.weight[3] = 0
        hidden = torch.randn(2, 5, 24)
        found, expected = Int8Linear(linear)(hidden), linear(hidden)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)
    assert torch.equal(found[..., 3], linear.bias[3].expand(2, 5))
    other = Int8Linear(torch.nn.Linear(24, 10))
    other.load_state_dict(Int8Linear(linear).state_dict())
    assert torch.equal(other(hidden), found)


def test_saved_int8_weights_are_smaller_and_open_again(model, ids, tmp_path):
    made = qz.int8(model)
    for name, one in (("plain", model), ("int8", made)):
        save_file({key: value.contiguous() for key, value in one.state_dict().items()}, tmp_path / name)
    sizes = {name: (tmp_path / name).stat().st_size for name in ("plain", "int8")}
    # the embedding stays in fp32
    assert sizes["int8"] < 0.6 * sizes["plain"]
    # up to a header
    assert sizes["int8"] == pytest.approx(qz.weight_bytes(made), abs=5000)
    other = qz.int8(new_model_like(model))
    assert not torch.equal(other(ids).logits, made(ids).logits)
    other.load_state_dict(load_file(tmp_path / "int8"))
    assert torch.equal(other(ids).logits, made(ids).logits)


def new_model_like(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    return other


def test_int8_writes_and_is_scored(model, blocks, ids):
    made = qz.int8(model)
    assert torch.equal(generated(made, ids, 5), dec.greedy(made, ids, 5)[0])
    plain, rounded = (perplexity(one, blocks, batch_size=1) for one in (model, made))
    assert rounded["scored_tokens"] == plain["scored_tokens"]
    assert rounded["loss"] != plain["loss"]
    assert rounded["loss"] == pytest.approx(plain["loss"], rel=0.02)


def test_no_warning_reaches_the_user(model):
    # also one that PyTorch gives once in a process
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            qz.int8(model)
    finally:
        torch.set_warn_always(False)


def test_int8_of_another_precision_is_refused(model):
    with pytest.raises(TTLError, match="float32 on the CPU; this one is bfloat16 on cpu"):
        qz.int8(copy.deepcopy(model).to(torch.bfloat16))


def test_inputs_get_seven_bits_where_pairs_overflow(model, monkeypatch):
    linear, hidden = model.model.layers[0].mlp.up_proj, torch.randn(4, model.config.hidden_size)
    monkeypatch.setattr(qz, "_overflows", lambda: False)
    eight = Int8Linear(linear)(hidden)
    monkeypatch.setattr(qz, "_overflows", lambda: True)
    seven = Int8Linear(linear)(hidden)
    assert not torch.equal(seven, eight)
    torch.testing.assert_close(seven, eight, atol=0.1, rtol=0.1)


# 16 bits


def test_positions_keep_their_32_bits(model):
    made = qz._moved("cpu", "bf16", model)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert torch.equal(made.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_slow_bf16_is_refused_with_both_rates(model, monkeypatch):
    seconds = iter([1e-6, 1e-4])
    monkeypatch.setattr(qz, "best_seconds", lambda action, budget: next(seconds))
    with pytest.raises(TTLError, match=r"bf16 runs at 335\.5 GFLOP/s on this CPU, one in fp32 at 33554"):
        qz._bf16(model)
    seconds = iter([1e-6, 2e-6])
    assert qz._bf16(model).dtype == torch.bfloat16


def test_torchao_that_is_not_installed_is_named(model, monkeypatch):
    monkeypatch.setattr(qz, "find_spec", lambda name: None)
    with pytest.raises(TTLError, match="torchao is not installed: pip install torchao"):
        qz.torchao_weights(model, 8)


def test_the_ways_of_each_device(monkeypatch):
    assert [way.name for way in qz.ways(CPU)] == ["fp32", "int8 dynamic", "bf16"]
    assert [way.name for way in qz.ways(Hardware("mps", "fp32", "sdpa"))] == ["fp32", "fp16"]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    found = qz.ways(Hardware("cuda", "bf16", "sdpa"))
    static = "static cache, compiled"
    names = ["tf32", "bf16", f"bf16, {static}", f"int8 weights, {static}", f"int4 weights, {static}"]
    assert [way.name for way in found] == names
    assert [way.compiled for way in found] == [False, False, True, True, True]
    # weights of their own
    asked = []
    monkeypatch.setattr(qz, "_moved", lambda *_: "moved")
    monkeypatch.setattr(qz, "torchao_weights", lambda model, bits: asked.append((model, bits)))
    for way in qz.ways(Hardware("cuda", "bf16", "sdpa"))[3:]:
        way.make(None)
    assert asked == [("moved", 8), ("moved", 4)]


# writing


@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_writes_what_generate_writes(model, ids, batch):
    written, seconds = dec.greedy(model, ids[:batch], 12)
    assert written.shape == (batch, 12) and len(seconds) == 12
    assert min(seconds) > 0
    assert torch.equal(written, generated(model, ids[:batch], 12))
    # it is not one token over and over, which any loop would agree on
    assert len(written[0].unique()) > 3


def test_a_static_cache_is_emptied_and_gives_the_same(model, ids):
    cache, steps = StaticCache(config=model.config, max_cache_len=9 + 12), []

    def step(*args, **kwargs):
        steps.append(args[0].shape)
        return model(*args, **kwargs)

    first = dec.greedy(model, ids, 12, cache, step)[0]
    assert torch.equal(first, dec.greedy(model, ids, 12)[0])
    assert torch.equal(first, dec.greedy(model, ids, 12, cache, step)[0])
    # the prompt is not a step
    assert steps == [(3, 1)] * 22


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone lets a peak be counted anew")
def test_memory_rises_by_what_an_action_holds():
    size = 2**26
    found = dec.memory_growth("cpu", lambda: torch.ones(size // 4).sum())
    assert size * 0.9 < found < size * 2


def test_a_system_that_does_not_tell_its_memory(monkeypatch):
    def refuse(*_):
        raise PermissionError

    done = []
    monkeypatch.setattr(Path, "write_text", refuse)
    assert dec.memory_growth("cpu", lambda: done.append(1)) is None
    assert done == [1]


# what is counted


def test_bytes_of_the_paper_s_160m():
    params = load_params({"size": "160m"})
    with torch.device("meta"):
        model = new_meta(params.model, params.tokenizer.vocab_size)
    assert qz.weight_bytes(model) == 4 * 162_417_408 == 4 * count_parameters(params.model, 32_000)
    assert qz.step_bytes(model) == 4 * (162_417_408 - 32_000 * 768)
    # keys and values, 12 layers of 768 numbers
    assert qz.cache_bytes(model.config, torch.float32) == 2 * 12 * 768 * 4
    assert qz.cache_bytes(model.config, torch.bfloat16) == 2 * 12 * 768 * 2


def new_meta(shape, vocab_size):
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{key: getattr(shape, key) for key in keys}))


def test_bytes_of_int8_of_shared_and_of_grouped_weights(model, shape, tokenizer):
    made, linears = qz.int8(model), [m for m in model.modules() if type(m) is torch.nn.Linear]
    saved = sum(3 * linear.weight.numel() - 4 * linear.out_features for linear in linears)
    assert qz.weight_bytes(made) == qz.weight_bytes(model) - saved
    embedding = 4 * model.config.vocab_size * model.config.hidden_size
    assert qz.step_bytes(made) == qz.weight_bytes(made) - embedding
    changed = {"tie_word_embeddings": True, "num_key_value_heads": 1}
    tied = new_model(shape.model_copy(update=changed), tokenizer, seed=1, attention="sdpa")
    # one matrix for both ends, which a step reads
    assert qz.step_bytes(tied) == qz.weight_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())
    assert 2 * qz.cache_bytes(tied.config, torch.float32) == qz.cache_bytes(model.config, torch.float32)
    # in int8 the output layer has a copy of its own
    rounded = qz.int8(tied)
    assert qz.step_bytes(rounded) == qz.weight_bytes(rounded) - embedding


def test_the_prompt_s_products(model):
    shape, tokens = model.config, 10
    layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    attention = 2 * shape.num_hidden_layers * shape.hidden_size * tokens**2
    head = 2 * shape.vocab_size * shape.hidden_size
    expected = 2 * tokens * (shape.num_hidden_layers * layer + norms) + head + attention
    assert inf._prompt_flops(model, tokens) == expected


def test_a_row_s_rates_follow_from_its_seconds():
    row = {"way": "x", "batch_size": 4, "status": "done", "step_bytes": 10**8, "cache_bytes_per_token": 1000}
    row |= {"first_token_s": [0.5, 0.25, 1.0], "step_s": [0.2, 0.1, 0.4], "product_rate": 2e9, "generate_s": 2.0}
    settings = Inference(batch_sizes=[4], prompt_tokens=100, new_tokens=50)
    plain = {"status": "done", "step_s": [0.4, 0.4, 0.4]}
    found = inf._with_rates(row, settings, {"bandwidth_bytes_per_second": 1e9}, plain, prompt_flops=1e8)
    # 10^8 bytes of weights, and 4 rows of 125 tokens of 1,000 bytes
    read = 10**8 + 500_000
    assert found["prefill_tokens_per_second"] == 4 * 100 / 0.5
    assert found["decode_tokens_per_second"] == pytest.approx(4 / 0.2)
    assert (found["decode_slowest"], found["decode_fastest"]) == pytest.approx((4 / 0.4, 4 / 0.1))
    assert found["limit_tokens_per_second"] == pytest.approx(4 / (read / 1e9))
    assert found["share_of_limit"] == pytest.approx(read / 1e9 / 0.2)
    assert found["prefill_share_of_limit"] == pytest.approx(4 * 1e8 / 0.5 / 2e9)
    assert found["generate_tokens_per_second"] == 4 * 50 / 2.0
    # 2, 4 and 1 times
    assert found["against_plain"] == pytest.approx(2.0)


def test_what_the_machine_can_do_is_measured(monkeypatch):
    monkeypatch.setattr(dec, "BUFFER", 2**24)
    assert 1e8 < dec.read_bandwidth("cpu") < 1e13
    slept = dec.best_seconds(lambda: None, 0)
    assert 0 <= slept < 0.1


# the rows


@pytest.mark.parametrize("free", [2**40, 0])
def test_a_row_for_each_way_and_batch(model, blocks, quick, monkeypatch, free):
    turns = []
    plain = dec.greedy
    names = {id(model): "fp32"}

    def watched(one, ids, *rest):
        turns.append((names.get(id(one), "int8"), len(ids)))
        return plain(one, ids, *rest)

    monkeypatch.setattr(inf, "greedy", watched)
    monkeypatch.setattr(inf, "ways", lambda hardware: [PLAIN, INT8])
    monkeypatch.setattr(inf, "free_memory", lambda device: free)
    rows = inf.measure_inference(model, LOAD, CPU, blocks, 1000)
    assert [(row["way"], row["batch_size"], row["status"]) for row in rows] == [
        (way, batch, "done") for batch in (1, 3) for way in ("fp32", "int8 dynamic")
    ]
    both = [("fp32", 1), ("int8", 1)]
    if free:
        # a first turn, then rounds forth and back
        assert turns[:6] == [*both, *both, *both[::-1]]
    else:
        assert turns[:6] == [("fp32", 1)] * 3 + [("fp32", 3)] * 3
    assert len(turns) == 12
    for row in rows:
        assert len(row["step_s"]) == len(row["first_token_s"]) == 2
        assert row["scored_tokens"] == perplexity(model, blocks, max_tokens=inf.SCORED_TOKENS)["scored_tokens"]
        assert row["decode_slowest"] <= row["decode_tokens_per_second"] <= row["decode_fastest"]
        assert row["generate_tokens_per_second"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= row["weight_bytes"]
    assert rows[0]["against_plain"] == 1
    expected = perplexity(model, blocks, text_bytes=1000, batch_size=1, max_tokens=inf.SCORED_TOKENS)
    assert {name: rows[0][name] for name in expected} == expected
    assert rows[1]["perplexity"] != rows[0]["perplexity"]
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"]


def test_a_way_that_fails_is_a_row_with_the_reason(model, blocks, quick, monkeypatch):
    def missing(_):
        raise TTLError("it is not installed: pip install it")

    def forgetful(model):
        """Runs out of memory at batch 3."""
        other = copy.deepcopy(model)

        def forward(*ids, **rest):
            if len(next(iter((*ids, *rest.values())))) == 3:
                raise torch.OutOfMemoryError("out of memory: 1 GiB\nand a long story")
            return model(*ids, **rest)

        other.forward = forward
        return other

    found = [PLAIN, Way("missing", "int8", missing), Way("forgetful", "fp32", forgetful)]
    monkeypatch.setattr(inf, "ways", lambda hardware: found)
    rows = {(row["way"], row["batch_size"]): row for row in inf.measure_inference(model, LOAD, CPU, blocks, 1000)}
    assert len(rows) == 6
    for batch in (1, 3):
        assert rows["fp32", batch]["status"] == "done"
        row = rows["missing", batch]
        assert (row["status"], row["reason"]) == ("not run", "it is not installed: pip install it")
    assert rows["forgetful", 1]["status"] == "done"
    row = rows["forgetful", 3]
    assert (row["status"], row["reason"]) == ("not run", "OutOfMemoryError: out of memory: 1 GiB")
    table = inf.inference_table(list(rows.values()))
    assert table[table.way == "missing"]["decode tokens/s"].isna().all()
    assert list(table[table.way == "forgetful"].note) == ["", "OutOfMemoryError: out of memory: 1 GiB"]


def test_a_plain_way_that_fails_leaves_the_others(model, blocks, quick, monkeypatch):
    def fails(_):
        raise RuntimeError

    monkeypatch.setattr(inf, "ways", lambda hardware: [Way("fp32", "fp32", fails), INT8])
    rows = inf.measure_inference(model, LOAD, CPU, blocks, 1000)
    assert [(row["status"], row.get("reason")) for row in rows[:2]] == [("not run", "RuntimeError"), ("done", None)]
    assert "against_plain" not in rows[1]
    assert len(inf.inference_table(rows)) == 4


def test_a_load_beyond_the_context_is_refused(model, blocks):
    load = Inference(batch_sizes=[1], prompt_tokens=60, new_tokens=5)
    with pytest.raises(ParameterError, match="prompt_tokens 60 and new_tokens 5 are 65 tokens, and the model reads 64"):
        inf.measure_inference(model, load, CPU, blocks, 1000)


def test_the_table_names_what_it_shows(model, blocks, quick, monkeypatch):
    monkeypatch.setattr(inf, "ways", lambda hardware: [PLAIN])
    rows = inf.measure_inference(model, LOAD, CPU, blocks, 1000)
    table = inf.inference_table(rows).set_index("batch")
    assert table["per sequence"][3] == table["decode tokens/s"][3] / 3
    assert table["weights (GiB)"][1] * 2**30 == qz.weight_bytes(model)
    assert (table["ratio to the first"] == 1).all()
    assert inf.inference_table([]).empty


# the report


@pytest.fixture
def evaluated(tiny_prepared, no_energy):
    def make(**evaluation):
        load = {"batch_sizes": [1], "prompt_tokens": 6, "new_tokens": 3}
        less = {"harness": [], "checkpoint_tasks": [], "downstream": [], "inference": load}
        return tiny_prepared(evaluation=less | evaluation, pretraining={"max_steps": 2, "warmup_steps": 1})

    run = make()
    pretrain(run)
    evaluate(run)
    return make


def test_the_report_is_read_back_and_measured_anew_for_others(evaluated, quick, monkeypatch):
    calls = []
    measure = inf.measure_inference
    monkeypatch.setattr(inf, "ways", lambda hardware: [PLAIN, INT8])
    monkeypatch.setattr(inf, "measure_inference", lambda *args, **rest: (calls.append(1), measure(*args, **rest))[1])
    run = evaluated()
    first = inf.inference_report(run)
    assert calls == [1]
    assert [row["status"] for row in first["rows"]] == ["done", "done"]
    assert run.stage("04_evaluation").metrics()["inference"] == first["rows"]
    assert inf.inference_report(run) == first and calls == [1]
    # other settings
    other = evaluated(inference={"batch_sizes": [2], "prompt_tokens": 6, "new_tokens": 3})
    assert [row["batch_size"] for row in inf.inference_report(other)["rows"]] == [2, 2]
    assert calls == [1, 1]
    # other threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    inf.inference_report(other)
    assert calls == [1, 1, 1]


def test_nothing_is_asked_for(evaluated):
    assert inf.inference_report(evaluated(inference=None)) == {}


def test_a_stage_that_is_not_finished_is_named(tiny_prepared):
    with pytest.raises(MissingStage, match="04_evaluation"):
        inf.inference_report(tiny_prepared())
