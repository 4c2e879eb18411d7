"""The one training loop, for pretraining and for chat, on Accelerate."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy

from ttl_utils import checkpoints
from ttl_utils.errors import TTLError
from ttl_utils.model import Hardware
from ttl_utils.progress import Progress
from ttl_utils.schema import Optimisation

IGNORED = -100


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
        fused=True,
    )


def summed_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over the learned labels, in nats."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    # without a cache and without a mask, position_ids that start again keep packed documents apart
    logits = model(**inputs, use_cache=False).logits  # (batch, seq, vocab)
    # shift the labels, not the logits: no copy of the largest tensor
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@dataclass
class Loop:
    """What a training run needs besides its data; `folder` gets checkpoints/, metrics.jsonl and status.json."""

    settings: Optimisation
    hardware: Hardware
    max_steps: int
    folder: Path
    energy: Any
    energy_before: float = 0.0
    label: str = "training"
    eval_steps: int | None = None
    evaluate: Callable[[torch.nn.Module, int], dict] | None = None
    on_record: Callable[[list[dict]], None] | None = None


def make_accelerator(hardware: Hardware) -> Accelerator:
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1:
        # Accelerate keeps a process's first device and precision; in a notebook the next cell may want others
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=hardware.mixed_precision, cpu=hardware.device == "cpu")
    if accelerator.num_processes != asked:
        raise TTLError(
            f"{asked} processes were asked for and Accelerate runs {accelerator.num_processes}: on a CPU, set "
            "ACCELERATE_USE_CPU=true and start with torchrun"
        )
    return accelerator


@contextlib.contextmanager
def clean_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM or an interrupt sets, so that the loop ends at a whole step with a checkpoint."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(model: Any, tokenizer: Any, get_step: Callable[[int, Accelerator], Step], loop: Loop) -> list[dict]:
    """Run to `max_steps`, from the newest whole checkpoint if there is one; returns the records.

    `get_step(step, accelerator)` must be a pure function of the step: then a run that was killed and goes on ends
    with the same weights, bit for bit on a CPU, as one that was left alone.

    Raises:
        TTLError: the loss is not a number, or the run was interrupted.
    """
    settings, hardware = loop.settings, loop.hardware
    accelerator = make_accelerator(hardware)
    main = accelerator.is_main_process
    model.to(accelerator.device)
    optimizer = make_optimizer(model, settings)
    folder = loop.folder / "checkpoints"
    with accelerator.main_process_first():
        newest = checkpoints.newest_whole(folder)
    state = {"step": 0, "tokens": 0, "interval_loss": 0.0, "interval_steps": 0}
    if newest is not None:
        state = checkpoints.load_checkpoint(newest, model, optimizer)
        _say_resumed(state, hardware, newest)
    wrapped = torch.compile(model) if settings.compile else model
    wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
    if accelerator.scaler is not None and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])
    records = Records(loop.folder / "metrics.jsonl", state["step"], loop.on_record, main)
    interval_loss = torch.tensor(state["interval_loss"], device=accelerator.device)
    tokens, interval_steps, pause = state["tokens"], state["interval_steps"], 0.0

    def record(step: int, **values: float) -> None:
        if main:
            kwh = round(loop.energy_before + loop.energy.energy_kwh, 9)
            records.add({"step": step, "tokens": tokens, **values, "energy_kwh": kwh})

    def evaluate(step: int) -> None:
        accelerator.wait_for_everyone()
        if loop.evaluate is not None and main:
            model.eval()
            with torch.no_grad(), accelerator.autocast():
                found = loop.evaluate(model, step)
            model.train()
            record(step, **found)

    def save(step: int) -> None:
        accelerator.wait_for_everyone()
        if not main:
            return
        _check_finite("loss", interval_loss, step, folder)
        for name, weights in model.named_parameters():
            _check_finite(name, weights, step, folder)
        loop.energy.sample()
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        checkpoints.save_checkpoint(
            folder,
            step,
            accelerator.unwrap_model(wrapped, keep_torch_compile=False),
            tokenizer,
            optimizer.optimizer,
            {
                "tokens": tokens,
                "interval_loss": interval_loss.item(),
                "interval_steps": interval_steps,
                "energy_kwh": loop.energy_before + loop.energy.energy_kwh,
                "device": hardware.device,
                "precision": hardware.precision,
                "attention": hardware.attention,
                "scaler": scaler,
            },
        )
        checkpoints.thin_out(folder, settings.resumable_checkpoints)

    model.train()
    if state["step"] == 0:
        evaluate(0)
    interval_start, interval_tokens = time.monotonic(), 0
    status = loop.folder / "status.json" if main else None
    with clean_stop() as stop, Progress(loop.label, loop.max_steps, status, state["step"]) as bar:
        for step in range(state["step"], loop.max_steps):
            rate = learning_rate(settings, step, loop.max_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            data = get_step(step, accelerator)
            for number, batch in enumerate(data.micro_batches):
                last = number == len(data.micro_batches) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
                    # the mean over all learned tokens of the step; DDP averages over processes, so undo that
                    with accelerator.autocast():
                        loss = summed_loss(wrapped, batch) * (accelerator.num_processes / data.targets)
                    accelerator.backward(loss)
                interval_loss += loss.detach()
                interval_tokens += batch["input_ids"].numel() * accelerator.num_processes
                tokens += batch["input_ids"].numel() * accelerator.num_processes
            if settings.max_grad_norm is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            done, interval_steps = step + 1, interval_steps + 1
            logged = done % settings.logging_steps == 0 or done == loop.max_steps
            if logged:
                # the one synchronisation of the interval
                mean = accelerator.reduce(interval_loss, "mean").item() / interval_steps
                _check_finite("loss", torch.tensor(mean), done, folder)
                speed = interval_tokens / (time.monotonic() - interval_start - pause)
                record(done, loss=round(mean, 6), learning_rate=rate, tokens_per_second=round(speed, 1))
                bar.update(done, f"loss {mean:.3f} · {speed:,.0f} tokens/s")
                interval_loss.zero_()
                interval_start, interval_tokens, interval_steps, pause = time.monotonic(), 0, 0, 0.0
            away = time.monotonic()
            if loop.eval_steps and (done % loop.eval_steps == 0 or done == loop.max_steps):
                evaluate(done)
            stopping = stop.is_set()
            if accelerator.num_processes > 1:
                # all stop at the same step, and agree where they wait for each other anyway
                asked = torch.tensor(float(stopping), device=accelerator.device)
                stopping = logged and accelerator.reduce(asked, "sum").item() > 0
            if done % settings.save_steps == 0 or done == loop.max_steps or stopping:
                save(done)
            pause += time.monotonic() - away
            if stopping and done < loop.max_steps:
                raise TTLError(f"{loop.label} was interrupted; step {done:,} is saved, run again to go on from there")
        bar.done = loop.max_steps
    return records.rows


def _check_finite(name: str, value: torch.Tensor, step: int, folder: Path) -> None:
    if not value.isfinite().all():
        newest = next((path.name for path in reversed(checkpoints.list_checkpoints(folder))), "none yet")
        raise TTLError(
            f"the {name} is not finite by step {step:,}: training has diverged; nothing of it was saved (newest "
            f"checkpoint: {newest}). Lower the learning rate, lengthen the warm-up, set max_grad_norm, or use fp32"
        )


def _say_resumed(state: dict, hardware: Hardware, path: Path) -> None:
    print(f"going on from {path.name} ({state['tokens']:,} tokens seen)")
    for name in ("device", "precision", "attention"):
        if state[name] != getattr(hardware, name):
            print(
                f"{name} was {state[name]} and is {getattr(hardware, name)} now: the run goes on, "
                "no longer bit for bit the same"
            )


class Records:
    """`metrics.jsonl`: one line a record; what lies after the checkpoint resumed from is dropped, to be made again."""

    def __init__(self, path: Path, step: int, on_record: Callable[[list[dict]], None] | None, main: bool = True):
        self.path, self.on_record = path, on_record
        self.rows = [row for row in read_records(path) if row["step"] <= step and step > 0]
        if not main:
            return
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(partial, path)

    def add(self, row: dict) -> None:
        same = self.rows and self.rows[-1]["step"] == row["step"]
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.on_record and not same:
            self.on_record(self.rows)


def read_records(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; one that is being written is not whole yet."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
