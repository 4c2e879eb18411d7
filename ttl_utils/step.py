"""One optimizer step: its data, the learning rate, AdamW, and the step itself."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ttl_utils.schema import Optimisation

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Step:
    """The data of one optimizer step on this process.

    `micro_batches`: dicts of tensors (batch, seq) for the model, with `labels` aligned to `input_ids`.
    `targets`: how many labels are learned in this step on all processes together; the loss is their mean.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    targets: int


def learning_rate(settings: Optimisation, step: int, max_steps: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then the schedule down to 0 at `max_steps`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * ((step + 1) / settings.warmup_steps)
    if settings.lr_scheduler_type == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    if settings.lr_scheduler_type == "linear":
        return settings.learning_rate * (1 - done)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: torch.nn.Module, settings: Optimisation) -> torch.optim.AdamW:
    """AdamW (paper, table 3). `decay_norms: true` is what the authors' code did: its exclusion list matched nothing."""
    decayed = [p for p in model.parameters() if p.ndim >= 2 or settings.decay_norms]
    plain = [p for p in model.parameters() if not (p.ndim >= 2 or settings.decay_norms)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=settings.optim == "adamw_torch_fused",
    )


def train_step(
    learner: torch.nn.Module, optimizer: Any, accelerator: Accelerator, data: Step, max_grad_norm: float | None
) -> torch.Tensor:
    """One optimizer step over its micro-batches; returns the mean loss of the learned tokens, on the device.

    `learner(**batch)` is the loss summed over a micro-batch's learned labels (`loss.Learner`).
    """
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(data.micro_batches, start=1):
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
        last = number == len(data.micro_batches)
        # gradients travel between processes once a step, with the last micro-batch
        with contextlib.nullcontext() if last else accelerator.no_sync(learner):
            with accelerator.autocast():
                # the mean over all learned tokens of the step; DDP averages over processes, so undo that
                loss = learner(**batch) * (accelerator.num_processes / data.targets)
            accelerator.backward(loss)
        total += loss.detach()
    if max_grad_norm is not None:
        accelerator.clip_grad_norm_(learner.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total
