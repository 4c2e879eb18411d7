"""Llama's small modules in faster and leaner forms, of the same parameter names and the same results within rounding.

PyTorch keeps every intermediate of a chain of elementwise operations for the backward pass. Here each chain is one
operation that keeps its inputs alone, and computes the rest again: cheap beside the matrix products around it.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch.nn.functional import linear, silu
from transformers.models.llama import modeling_llama as llama


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = (gradient * normed).flatten(0, -2)
        # sums as products with a vector: the fastest reductions there are
        for_weight = product.new_ones(len(product)) @ product
        mean = (product @ (weight / x.shape[-1]).to(product.dtype)).view_as(scale)
        for_x = (gradient * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return for_x, for_weight, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (i, i + half) of the last dimension, as transformers' rotate_half does; one copy, not five."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


class _Down(torch.autograd.Function):
    """The output layer of silu(gate) * up, whose input is not kept either."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up, weight = ctx.saved_tensors
        active = silu(gate)
        for_weight = gradient.flatten(0, -2).t() @ (active * up).flatten(0, -2)
        product = gradient @ weight.to(gradient.dtype)
        for_up = active.mul_(product)
        return torch.ops.aten.silu_backward(product.mul_(up), gate), for_up, for_weight


class LeanNorm(llama.LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanMLP(llama.LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Down.apply(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


class LeanAttention(llama.LlamaAttention):
    # llama's own forward, with our rotation where it looks for its own
    forward = FunctionType(
        llama.LlamaAttention.forward.__code__,
        {**vars(llama), "apply_rotary_pos_emb": _rotate},
        "forward",
        llama.LlamaAttention.forward.__defaults__,
        llama.LlamaAttention.forward.__closure__,
    )


_LEAN = {llama.LlamaRMSNorm: LeanNorm, llama.LlamaMLP: LeanMLP, llama.LlamaAttention: LeanAttention}


def make_lean(model: Any) -> Any:
    """Change the modules' classes in place; parameters, hooks and names stay."""
    for module in model.modules():
        other_form = type(module) is llama.LlamaMLP and (module.config.hidden_act != "silu" or module.config.mlp_bias)
        if type(module) in _LEAN and not other_form:
            module.__class__ = _LEAN[type(module)]
    return model


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """On a CPU, keep what is freed until the end: else the system takes it, and hands it out anew, in every step.

    Large tensors come from maps of their own, zeroed page by page as they are first written. Nothing where the C
    library is not glibc (macOS, Windows, musl).
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    try:
        yield
    finally:
        # glibc's defaults
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(trim_threshold, 128 * 1024)
        libc.malloc_trim(0)
