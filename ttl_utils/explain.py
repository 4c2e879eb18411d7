"""What is saved where a run must stop: a number that is not finite, and what was around it."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttl_utils.files import write_bytes, write_json

if TYPE_CHECKING:
    import torch


def explain_not_finite(
    folder: Path,
    step: int,
    losses: list[float],
    first_bad: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor] | None,
    records: list[dict],
) -> Path:
    """Save what explains a number that is not finite in `not_finite-step-NNNNNNN/`, whole or not at all.

    `losses` are those of the steps up to `step`, `batch` is that of the step `first_bad`. report.json describes each
    tensor of weights, gradients and moments; batch.safetensors holds the token ids.
    """
    from safetensors.torch import save

    final = folder / f"not_finite-step-{step:07}"
    partial = folder / f".{final.name}.partial"
    report = {
        "step": step,
        "first_bad_step": first_bad,
        "losses": {str(step - len(losses) + number): loss for number, loss in enumerate(losses, start=1)},
        "learning_rate": optimizer.param_groups[0]["lr"],
        "tensors": _describe(model, optimizer),
        "records": records[-50:],
    }
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_json(partial / "report.json", _plain(report))
        if batch is not None:
            # labels may be the ids themselves, which safetensors refuses
            copies = {key: value.detach().cpu().clone().contiguous() for key, value in batch.items()}
            write_bytes(partial / "batch.safetensors", save(copies))
        # the same step was not finite in an earlier try
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _describe(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Of each tensor the share that is not finite; norm and largest absolute value of what is."""
    import torch

    named = {}
    for name, weights in model.named_parameters():
        moments = {key: value for key, value in optimizer.state.get(weights, {}).items() if key != "step"}
        named |= {name: weights, f"{name}/gradient": weights.grad}
        named |= {f"{name}/{key}": value for key, value in moments.items()}
    named = {name: tensor for name, tensor in named.items() if tensor is not None}
    figures = []
    for tensor in named.values():
        values = tensor.detach().float()
        finite = values.isfinite()
        values = values.where(finite, 0).abs()
        largest = values.max()
        # scaled: squares of large values would overflow
        norm = largest * (values / largest.clamp(min=1e-30)).norm()
        figures.append(torch.stack([(~finite).float().mean(), norm, largest]))
    # one synchronisation for all of them
    rows = zip(named, torch.stack(figures).tolist(), strict=True)
    return {
        name: {"finite": share == 0, "norm": norm, "largest": largest, "share_not_finite": share}
        for name, (share, norm, largest) in rows
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
