"""The chunked loss is plain cross-entropy: values, gradients, 16 bits, what is ignored; and holds few logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ttl_utils import loss as lo
from ttl_utils.loss import IGNORED, Learner, linear_cross_entropy, summed_loss

torch.set_num_threads(1)
VOCAB, WIDTH = 50, 16


class Watch(TorchDispatchMode):
    """Shapes of the matrix products, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []
        self.largest = 0
        self.casts: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.numel())
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                self.products.append(tuple(made.shape))
            if function.overloadpacket is torch.ops.aten._to_copy:
                self.casts.append(tuple(made.shape))
        return made


def drawn(tokens: int, ignored: float = 0.3, dtype=torch.float64, seed: int = 0):
    """Hidden states, an output layer and targets, some of them ignored."""
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=source, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=source, dtype=dtype).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,), generator=source)
    targets[torch.rand(tokens, generator=source) < ignored] = IGNORED
    return hidden, weight, targets


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORED, reduction="sum")


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    shape = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=tied, **shape))


def tiny_batch(rows: int = 3, length: int = 20) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 5:9] = IGNORED
    return {"input_ids": ids, "labels": labels}


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [value.grad.clone() for value in model.parameters()]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    per_chunk=st.integers(1, 45),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
    factor=st.sampled_from([1.0, 0.125, 1000.0]),
    all_rows=st.booleans(),
)
def test_it_is_plain_cross_entropy(tokens, per_chunk, ignored, seed, factor, all_rows):
    inputs = drawn(tokens, ignored, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lo, "CHUNK", per_chunk * VOCAB)
        if all_rows:
            # as on a GPU
            patch.setattr(lo, "_rows", lambda targets: torch.arange(len(targets)))
        ours = linear_cross_entropy(*inputs)
        found = torch.autograd.grad(ours * factor, inputs[:2])
    expected = plain(*inputs)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(found, torch.autograd.grad(expected * factor, inputs[:2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * factor)


def test_far_logits_stay_finite():
    hidden, weight, targets = drawn(8, 0.0, torch.float32)
    inputs = (hidden.detach() * 1e3).requires_grad_(), weight, targets
    assert linear_cross_entropy(*inputs).item() == pytest.approx(plain(*inputs).item(), rel=1e-6)


def test_it_holds_no_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(lo, "CHUNK", 32 * VOCAB)
    inputs = drawn(200, 0.0)
    with Watch() as watch:
        linear_cross_entropy(*inputs).backward()
    assert watch.largest == max(200 * WIDTH, 32 * VOCAB)


def test_what_is_ignored_is_not_computed(monkeypatch):
    monkeypatch.setattr(lo, "CHUNK", 32 * VOCAB)
    hidden, weight, targets = drawn(100)
    learned = int((targets != IGNORED).sum())
    with Watch() as watch:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert sum(shape[0] for shape in watch.products if shape[1] == VOCAB) == learned
    assert (hidden.grad[targets == IGNORED] == 0).all()


def test_without_gradients_there_is_one_product_a_chunk(monkeypatch):
    monkeypatch.setattr(lo, "CHUNK", 25 * VOCAB)
    inputs = drawn(100, 0.0)
    with torch.no_grad(), Watch() as watch:
        value = linear_cross_entropy(*inputs)
    assert len(watch.products) == 4 and not value.requires_grad
    # a frozen output layer costs none for its own gradient
    with Watch() as watch:
        linear_cross_entropy(inputs[0], inputs[1].detach(), inputs[2]).backward()
    assert len(watch.products) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_for_the_products_alone(dtype):
    hidden, weight, targets = drawn(64, 0.3, torch.float32)
    exact = plain(hidden, weight, targets)
    with torch.autocast("cpu", dtype):
        usual, ours = plain(hidden, weight, targets), linear_cross_entropy(hidden, weight, targets)
    assert ours.dtype == torch.float32
    expected = torch.autograd.grad(exact, (hidden, weight))
    theirs = torch.autograd.grad(usual, (hidden, weight))
    # as a scaler does; a power of two changes no digit
    found = torch.autograd.grad(ours * 1024, (hidden, weight))
    for true, other, own in zip(expected, theirs, found, strict=True):
        assert own.dtype == torch.float32
        assert (own / 1024 - true).norm() <= 1.1 * (other - true).norm()
    assert abs(ours - exact) <= 1.1 * abs(usual - exact) + 1e-3


def test_the_output_layer_is_cast_once(monkeypatch):
    monkeypatch.setattr(lo, "CHUNK", 8 * VOCAB)
    inputs = drawn(64, 0.0, torch.float32)
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(*inputs)
    assert watch.casts.count((VOCAB, WIDTH)) + watch.casts.count((WIDTH, VOCAB)) == 1


def test_a_model_in_16_bits_is_scored_in_32():
    model, batch = tiny_llama(), tiny_batch()
    exact = summed_loss(model, batch).item()
    with torch.no_grad():
        value = summed_loss(model.to(torch.bfloat16), batch)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_learns_the_same(tied, monkeypatch):
    monkeypatch.setattr(lo, "CHUNK", 7 * VOCAB)
    model, batch = tiny_llama(tied), tiny_batch()
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    expected = model(**batch).loss * learned
    ours = summed_loss(model, batch)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(gradients(model, ours), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_micro_batches_add_up_and_runs_agree_bit_for_bit():
    model, batch = tiny_llama(), tiny_batch()
    whole = gradients(model, summed_loss(model, batch))
    again = gradients(model, summed_loss(model, batch))
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    model.zero_grad()
    for row in range(3):
        summed_loss(model, {key: value[row : row + 1] for key, value in batch.items()}).backward()
    for one, value in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(one, value.grad, rtol=1e-4, atol=1e-5)


def test_positions_reach_the_model():
    model, batch = tiny_llama(), tiny_batch()
    positions = torch.arange(20).remainder(7).expand(3, -1)
    apart = summed_loss(model, batch | {"position_ids": positions})
    assert apart.item() != pytest.approx(summed_loss(model, batch).item(), rel=1e-6)


def test_ddp_sees_one_forward(tmp_path):
    model, batch = tiny_llama(), tiny_batch()
    expected = gradients(model, summed_loss(model, batch))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        spread = torch.nn.parallel.DistributedDataParallel(Learner(model))
        found = gradients(spread, spread(**batch))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_of_another_kind_is_asked_for_its_logits():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=2)).eval()
    batch = tiny_batch()
    expected = model(**batch).loss * int((batch["labels"][:, 1:] != IGNORED).sum())
    assert summed_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)
