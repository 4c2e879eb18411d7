"""Cross-entropy of a causal language model, without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy, log_softmax, nll_loss, pad

IGNORED = -100
# logits held at once: 134 MB in float32, 1,048 tokens of 32,000 columns
CHUNK = 2**25


def _rows(targets: torch.Tensor) -> torch.Tensor:
    """Those to compute: what is not learned costs nothing on a CPU; elsewhere their number would be waited for."""
    rows = torch.arange(len(targets), device=targets.device)
    return rows[targets != IGNORED] if targets.device.type == "cpu" else rows


class _LinearCrossEntropy(torch.autograd.Function):
    """Output layer and summed cross-entropy, chunk by chunk; the gradients are made on the way, nothing twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype, learns: bool
    ) -> torch.Tensor:
        # 16 bits for the matrix products alone; logits, softmax and sums have at least 32
        wide = torch.promote_types(dtype, torch.float32)
        matrix = weight.to(dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for_hidden = torch.zeros_like(hidden) if learns and ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=wide) if learns and ctx.needs_input_grad[1] else None
        for part in _rows(targets).split(max(1, CHUNK // len(weight))):
            states, labels = hidden[part].to(dtype), targets[part]
            logits = log_softmax((states @ matrix.t()).to(wide), -1)  # (tokens, vocab)
            total += nll_loss(logits, labels, ignore_index=IGNORED, reduction="sum")
            if for_hidden is None and for_weight is None:
                continue
            learned = (labels != IGNORED)[:, None]
            gradient = logits.exp_()
            gradient.scatter_add_(1, labels[:, None].clamp_min(0), -learned.to(wide))
            gradient = gradient.to(dtype)
            if for_hidden is not None:
                for_hidden[part] = (gradient @ matrix * learned).to(hidden.dtype)
            if for_weight is not None:
                for_weight += gradient.t() @ (states * learned)
            # before the next chunk's are made
            del logits, gradient
        ctx.gradients = for_hidden, for_weight
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # scaled in place, so once: a second backward has none
        (for_hidden, for_weight), ctx.gradients = ctx.gradients, None
        if for_hidden is not None:
            for_hidden.mul_(gradient)
        if for_weight is not None:
            for_weight.mul_(gradient)
        return for_hidden, for_weight, None, None, None


@torch.compiler.disable
def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of `hidden` (tokens, hidden) under an output layer (vocab, hidden), in nats."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, torch.is_grad_enabled())


def summed_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over the learned labels, in nats."""
    from transformers import LlamaForCausalLM

    inputs = {key: value for key, value in batch.items() if key != "labels"}
    # shift the labels, not what they are compared with: no copy of the larger tensor
    targets = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    # without a cache and without a mask, position_ids that start again keep packed documents apart
    if isinstance(model, LlamaForCausalLM):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets)
    # another kind of model may do more to its logits than multiply
    logits = model(**inputs, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")


class Learner(torch.nn.Module):
    """The model with its loss: what DDP, FSDP and compile see is one forward."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return summed_loss(self.model, batch)
