"""Counts against built models and the paper's numbers, FLOPs by hand, and the choice of hardware with its reasons."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils import model as md
from ttl_utils.errors import ParameterError
from ttl_utils.params import load_params
from ttl_utils.schema import Model

MODEL = load_params({}).model


class Vocabulary:
    """What a configuration asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 3

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def shape(**changes) -> Model:
    return MODEL.model_copy(update={"max_position_embeddings": 16, **changes})


@st.composite
def shapes(draw):
    key_value, groups, head = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    return shape(
        hidden_size=key_value * groups * head,
        intermediate_size=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=key_value * groups,
        num_key_value_heads=key_value,
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(shapes(), st.integers(4, 60))
def test_the_count_is_that_of_a_built_model(asked, vocab_size):
    built = md.new_model(asked, Vocabulary(vocab_size), seed=0, attention="sdpa")
    assert sum(p.numel() for p in built.parameters()) == md.count_parameters(asked, vocab_size)
    by_part = md.parameters_by_part(asked, vocab_size)
    assert by_part["input embedding"] == built.get_input_embeddings().weight.numel()
    norms = [p for name, p in built.named_parameters() if "norm" in name]
    assert by_part["norms"] == sum(p.numel() for p in norms)


@pytest.mark.parametrize(
    ("size", "parameters", "convention", "executed"),
    # the paper's table 2; FLOPs: 6 x parameters + 12 x layers x hidden x context, and
    # 6 x (parameters - 32,000 x hidden) + 6 x layers x hidden x context, worked out apart from the code
    [
        ("160m", 162_417_408, 1_200_996_864, 940_294_656),
        ("460m", 468_239_360, 3_413_415_936, 2_914_818_048),
    ],
)
def test_the_papers_sizes(size, parameters, convention, executed):
    model = load_params({"size": size}).model
    assert md.count_parameters(model, 32_000) == parameters
    assert md.flops_per_token(model, 32_000) == {"convention": convention, "executed": executed}


def test_flops_of_tied_embeddings_leave_no_matrix_out():
    untied, tied = (shape(tie_word_embeddings=tie) for tie in (False, True))
    assert md.flops_per_token(tied, 100)["executed"] == md.flops_per_token(untied, 100)["executed"]
    assert md.flops_per_token(tied, 100)["convention"] < md.flops_per_token(untied, 100)["convention"]


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = md.new_model(shape(), Vocabulary(50), seed=7, attention="sdpa")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = (md.new_model(shape(), Vocabulary(50), seed, "eager") for seed in (7, 8))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert {p.dtype for p in one.parameters()} == {torch.float32}


def test_the_configuration_says_what_was_asked():
    config = md.llama_config(shape(rope_theta=5000.0, rms_norm_eps=1e-5), Vocabulary(50))
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (50, 16, 1e-5)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)


# the choice of hardware, on machines that are not here


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda=(major, bf16), mps=False, flash_attn=False)`."""

    def pretend(cuda=None, mps=False, flash_attn=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        if cuda is not None:
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (cuda[0], 0))
            # as PyTorch: emulation counts as support unless one asks otherwise
            monkeypatch.setattr(
                torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or cuda[1]
            )
        monkeypatch.setattr(md, "find_spec", lambda name: SimpleNamespace() if flash_attn else None)

    before = torch.get_float32_matmul_precision()
    yield pretend
    torch.set_float32_matmul_precision(before)


T4, A100 = (7, False), (8, True)


def choose(**changes):
    asked = {"device": "auto", "precision": "auto", "attention": "auto", **changes}
    return md.choose_hardware(load_params({"pretraining": asked}).pretraining)


@pytest.mark.parametrize(
    ("here", "device", "precision", "attention", "mixed", "reason"),
    [
        ({}, "cpu", "fp32", "sdpa", "no", "no GPU was found"),
        ({"mps": True}, "mps", "fp32", "sdpa", "no", "Apple GPU"),
        ({"cuda": T4}, "cuda", "fp16", "sdpa", "fp16", "no bf16 of its own"),
        ({"cuda": T4, "flash_attn": True}, "cuda", "fp16", "sdpa", "fp16", "needs an Ampere GPU"),
        ({"cuda": A100}, "cuda", "bf16", "sdpa", "bf16", "flash-attn is not installed"),
        ({"cuda": A100, "flash_attn": True}, "cuda", "bf16", "flash_attention_2", "bf16", "flash-attn is installed"),
    ],
)
def test_auto_takes_the_best_there_is_and_says_why(machine, here, device, precision, attention, mixed, reason):
    machine(**here)
    found = choose()
    assert (found.device, found.precision, found.attention) == (device, precision, attention)
    assert found.mixed_precision == mixed
    lines = str(found).splitlines()
    assert [line.split(":")[0] for line in lines] == ["device", "precision", "attention"]
    assert reason in str(found)


def test_tf32_and_bf16_set_the_matrix_product(machine):
    machine(cuda=A100)
    torch.set_float32_matmul_precision("highest")
    assert choose(precision="fp32").precision == "fp32"
    assert torch.get_float32_matmul_precision() == "highest"
    tf32 = choose(precision="tf32")
    assert (tf32.mixed_precision, torch.get_float32_matmul_precision()) == ("no", "high")


def test_what_is_asked_is_taken(machine):
    machine(cuda=A100, flash_attn=True)
    found = choose(device="cpu", precision="bf16", attention="eager")
    assert (found.device, found.precision, found.attention) == ("cpu", "bf16", "eager")
    assert str(found).count("as asked") == 3


@pytest.mark.parametrize(
    ("here", "asked", "message"),
    [
        ({}, {"device": "cuda"}, "'cuda': this machine has none"),
        ({}, {"device": "mps"}, "'mps': this machine has none"),
        ({}, {"precision": "fp16"}, "'fp16' needs a CUDA GPU"),
        ({"mps": True}, {"precision": "tf32"}, "'tf32' needs a CUDA GPU"),
        ({"cuda": T4}, {"precision": "bf16"}, "needs an Ampere GPU or newer; use auto or fp16"),
        ({}, {"attention": "flash_attention_2"}, "it needs a CUDA GPU"),
        ({"cuda": A100}, {"attention": "flash_attention_2"}, "flash-attn is not installed"),
        (
            {"cuda": A100, "flash_attn": True},
            {"attention": "flash_attention_2", "precision": "fp32"},
            "it needs bf16 or fp16",
        ),
    ],
)
def test_what_cannot_be_is_refused(machine, here, asked, message):
    machine(**here)
    with pytest.raises(ParameterError, match=message):
        choose(**asked)
