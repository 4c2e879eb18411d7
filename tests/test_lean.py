"""Lean modules: the same names, files, logits, losses, gradients and samples as transformers' own, and less kept."""

from __future__ import annotations

import copy
import ctypes
import platform

import pytest
import torch
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ttl_utils import lean
from ttl_utils.lean import kept_memory, make_lean
from ttl_utils.loss import Learner
from ttl_utils.model import checkpoint_activations

torch.set_num_threads(1)
VOCAB, CONTEXT = 60, 32


def pair(attention: str = "sdpa", **changes) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A model of transformers, and a lean one of the same weights."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "vocab_size": VOCAB, **changes}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation=attention))
    # norms that differ from channel to channel
    for name, value in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return model, make_lean(copy.deepcopy(model))


def ids(rows: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, VOCAB, (rows, CONTEXT), generator=torch.Generator().manual_seed(seed))


def results(model: LlamaForCausalLM, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """Logits, loss and gradients."""
    model.zero_grad()
    made = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    made.loss.backward()
    return [made.logits, made.loss, *(value.grad for value in model.parameters())]


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_each_derivative_is_right():
    torch.manual_seed(0)
    assert gradcheck(lambda x, weight: lean._Norm.apply(x, weight, 1e-3), (double(2, 3, 8), double(8)))
    assert gradcheck(lean._Down.apply, (double(2, 3, 6), double(2, 3, 6), double(4, 6)))
    angles = torch.randn(2, 1, 5, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    # heads lie between positions, as attention has them
    assert gradcheck(
        lambda x: lean._Rotation.apply(x.transpose(1, 2), angles.cos(), angles.sin()), (double(2, 5, 3, 8),)
    )


def test_each_value_is_transformers():
    model, ours = pair()
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    for one, other in zip(model.modules(), ours.modules(), strict=True):
        if type(other) in (lean.LeanNorm, lean.LeanMLP):
            for dtype in (torch.float32, torch.bfloat16):
                assert torch.equal(one.to(dtype)(x.to(dtype)), other.to(dtype)(x.to(dtype)))
    q, k, angles = (
        torch.randn(2, 5, 3, 8).transpose(1, 2),
        torch.randn(2, 2, 5, 8),
        torch.randn(2, 5, 4).repeat(1, 1, 2),
    )
    for one, other in zip(
        apply_rotary_pos_emb(q, k, angles.cos(), angles.sin()),
        lean._rotate(q, k, angles.cos(), angles.sin()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    # a forward that no longer looks for its rotation there would be right, and slow
    assert "apply_rotary_pos_emb" in lean.LeanAttention.forward.__code__.co_names
    assert lean.LeanAttention.forward.__globals__["apply_rotary_pos_emb"] is lean._rotate


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_results_are_the_same(attention, tied, checkpointing):
    model, ours = (one.train() for one in pair(attention, tie_word_embeddings=tied))
    if checkpointing:
        checkpoint_activations(ours)
    for one, other in zip(results(model, input_ids=ids()), results(ours, input_ids=ids()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_lose_no_more(dtype):
    model, ours = pair()

    def gradients(one: LlamaForCausalLM) -> torch.Tensor:
        return torch.cat([value.float().flatten() for value in results(one, input_ids=ids())[2:]])

    exact = gradients(model)
    with torch.autocast("cpu", dtype):
        theirs, own = gradients(model), gradients(ours)
    assert (own - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_a_model_in_16_bits_stays_in_16_bits():
    model, ours = (one.to(torch.bfloat16) for one in pair())
    for one, other in zip(results(model, input_ids=ids()), results(ours, input_ids=ids()), strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= 0.05 * one.float().norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_row_stay_apart(attention):
    model, ours = pair(attention)
    positions = torch.arange(CONTEXT).remainder(12).expand(3, -1)
    theirs, own = (results(one, input_ids=ids(), position_ids=positions) for one in (model, ours))
    for one, other in zip(theirs, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    changed = ids()
    changed[:, :12] = ids(seed=2)[:, :12]
    with torch.no_grad():
        after = ours(input_ids=changed, position_ids=positions, use_cache=False).logits
    assert torch.equal(after[:, 12:], own[0][:, 12:]) and not torch.equal(after[:, :12], own[0][:, :12])


def test_two_runs_agree_bit_for_bit():
    _, ours = pair()
    first = [value.detach().clone() for value in results(ours, input_ids=ids())]
    assert all(torch.equal(one, other) for one, other in zip(first, results(ours, input_ids=ids()), strict=True))


def test_samples_are_the_same_with_a_cache():
    model, ours = (one.eval() for one in pair())
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompts = ids()[:, :6]
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    expected = model.generate(prompts, attention_mask=mask, **settings)
    assert torch.equal(ours.generate(prompts, attention_mask=mask, **settings), expected)
    assert torch.equal(ours.generate(prompts, attention_mask=mask, use_cache=False, **settings), expected)


def test_files_are_transformers_own(tmp_path):
    model, ours = pair()
    assert list(ours.state_dict()) == list(model.state_dict())
    for name, one in (("plain", model), ("lean", ours)):
        one.save_pretrained(tmp_path / name)
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "lean" / path.name).read_bytes()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "lean")
    assert torch.equal(opened(ids()).logits, model(ids()).logits)


def test_what_is_not_llamas_stays_as_it_is():
    for changes in ({"hidden_act": "gelu"}, {"mlp_bias": True}):
        model, ours = pair(**changes)
        assert type(ours.model.layers[0].mlp) is type(model.model.layers[0].mlp)
        torch.testing.assert_close(ours(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-6)
    linear = torch.nn.Linear(2, 2)
    assert type(make_lean(linear)) is torch.nn.Linear
    # once is enough
    _, ours = pair()
    assert [type(one) for one in make_lean(copy.deepcopy(ours)).modules()] == [type(one) for one in ours.modules()]


def test_less_is_kept_for_the_backward_pass():
    kept = []
    for model in pair(intermediate_size=128):
        sizes: dict[int, int] = {}

        def keep(one: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            return one

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            hidden = model.model(ids(32), use_cache=False).last_hidden_state
        kept.append(sum(sizes.values()))
        del hidden
    assert kept[1] < 0.65 * kept[0]


def test_compile_gives_the_same():
    model, ours = pair(num_hidden_layers=1)
    batch = {"input_ids": ids(), "labels": ids()}
    expected = Learner(model)(**batch)
    compiled = torch.compile(Learner(ours), backend="eager")
    torch.testing.assert_close(compiled(**batch), expected, rtol=1e-5, atol=1e-5)
    compiled(**batch).backward()
    expected.backward()
    for one, other in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)


def test_freed_memory_is_kept_and_given_back_at_the_end(monkeypatch):
    """What it gains is for the benchmark: page faults depend on the machine, and on all that ran before."""
    asked = []

    class Library:
        def mallopt(self, what, value):
            asked.append((what, value))

        def malloc_trim(self, pad):
            asked.append("trimmed")

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    with pytest.raises(ValueError, match="an error"), kept_memory():
        assert asked == [(-4, 0), (-1, -1)]
        raise ValueError("an error")
    assert asked[2:] == [(-4, 65536), (-1, 128 * 1024), "trimmed"]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("no library may be asked"))
    with kept_memory():
        pass
