"""Attention within each document of a packed row, on a CPU: a mask computes all pairs of the row and hides most."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "by_document"


def by_document(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal, from (batch, heads, seq, dim) to (batch, seq, heads, dim); a document begins where position_ids are 0."""
    rows = []
    for number, positions in enumerate(position_ids.expand(len(query), -1)):
        begins = torch.nonzero(positions == 0).flatten()
        lengths = torch.diff(begins, append=begins.new_tensor([len(positions)])).tolist()
        parts = zip(*(states[number : number + 1].split(lengths, 2) for states in (query, key, value)), strict=True)
        grouped = query.shape[1] != key.shape[1]
        made = [scaled_dot_product_attention(*one, is_causal=True, scale=scaling, enable_gqa=grouped) for one in parts]
        rows.append(torch.cat(made, 2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


# it has no mask of its own: transformers then makes none
AttentionInterface.register(NAME, by_document)


@contextlib.contextmanager
def documents_apart(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention is by document, where it is on a CPU; no text can be generated meanwhile."""
    before = model.config._attn_implementation
    if model.device.type == "cpu" and before == "sdpa":
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
