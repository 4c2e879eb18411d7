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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
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
    # the other processes wait while the first one evaluates, which may take longer than the default ten minutes
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        mixed_precision=hardware.mixed_precision, cpu=hardware.device == "cpu", kwargs_handlers=[patience]
    )
    if accelerator.num_processes != asked:
        raise TTLError(
            f"{asked} processes were asked for and Accelerate runs {accelerator.num_processes}: on a CPU, set "
            "ACCELERATE_USE_CPU=true and start with torchrun"
        )
    return accelerator


@contextlib.contextmanager
def clean_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM or an interrupt sets, so that the loop ends at a whole step with a checkpoint.

    A second signal ends it at once: then the newest checkpoint is where the next run goes on.
    """
    stop = threading.Event()

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("stopping after this step, with a checkpoint; interrupt again to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_step(
    model: torch.nn.Module, optimizer: Any, accelerator: Accelerator, data: Step, max_grad_norm: float | None
) -> torch.Tensor:
    """One optimizer step over its micro-batches; returns the mean loss of the learned tokens, on the device."""
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(data.micro_batches, start=1):
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
        last = number == len(data.micro_batches)
        # gradients travel between processes once a step, with the last micro-batch
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                # the mean over all learned tokens of the step; DDP averages over processes, so undo that
                loss = summed_loss(model, batch) * (accelerator.num_processes / data.targets)
            accelerator.backward(loss)
        total += loss.detach()
    if max_grad_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(model: Any, tokenizer: Any, get_step: Callable[[int, Accelerator], Step], loop: Loop) -> list[dict]:
    """Run to `max_steps`, from the newest whole checkpoint if there is one; returns the records.

    `get_step(step, accelerator)` must be a pure function of the step: then a run that was killed and goes on ends
    with the same weights, bit for bit on a CPU, as one that was left alone.

    Raises:
        TTLError: the loss is not a number, or the run was interrupted.
    """
    session, settings = Session(model, tokenizer, loop), loop.settings
    if session.first_step == 0:
        session.evaluate(0)
    with clean_stop() as stop, session.progress:
        for step in range(session.first_step, loop.max_steps):
            done, last = step + 1, step + 1 == loop.max_steps
            session.step(get_step(step, session.accelerator), learning_rate(settings, step, loop.max_steps))
            logged = done % settings.logging_steps == 0 or last
            if logged:
                session.log(done)
            if loop.eval_steps and (done % loop.eval_steps == 0 or last):
                session.evaluate(done)
            stopping = session.agree(stop.is_set(), logged)
            if done % settings.save_steps == 0 or last or stopping:
                session.save(done)
            if stopping and not last:
                raise TTLError(f"{loop.label} was interrupted; step {done:,} is saved, run again to go on from there")
    return session.records.rows


class Session:
    """A training run under way: the model with its optimizer, what was counted since the last record, and the files."""

    def __init__(self, model: Any, tokenizer: Any, loop: Loop):
        settings = loop.settings
        self.loop, self.plain, self.tokenizer = loop, model, tokenizer
        self.accelerator = make_accelerator(loop.hardware)
        self.main = self.accelerator.is_main_process
        self.folder = loop.folder / "checkpoints"
        model.to(self.accelerator.device)
        optimizer = make_optimizer(model, settings)
        state = {"step": 0, "tokens": 0, "interval_loss": 0.0, "interval_steps": 0}
        with self.accelerator.main_process_first():
            newest = checkpoints.newest_whole(self.folder)
        if newest is not None:
            state = checkpoints.load_checkpoint(newest, model, optimizer)
            _say_resumed(state, loop.hardware, newest)
        self.model, self.optimizer = self.accelerator.prepare(
            torch.compile(model) if settings.compile else model, optimizer
        )
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.first_step, self.tokens = state["step"], state["tokens"]
        self.interval_loss = torch.tensor(state["interval_loss"], device=self.accelerator.device)
        self.interval_steps, self.interval_tokens, self.interval_s = state["interval_steps"], 0, 0.0
        self.records = Records(loop.folder / "metrics.jsonl", self.first_step, loop.on_record, self.main)
        status = loop.folder / "status.json" if self.main else None
        self.progress = Progress(loop.label, loop.max_steps, status, self.first_step)
        self.resumed_at = time.monotonic()
        model.train()

    def step(self, data: Step, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate = rate
        max_grad_norm = self.loop.settings.max_grad_norm
        self.interval_loss += train_step(self.model, self.optimizer, self.accelerator, data, max_grad_norm)
        tokens = sum(batch["input_ids"].numel() for batch in data.micro_batches) * self.accelerator.num_processes
        self.tokens += tokens
        self.interval_tokens += tokens
        self.interval_steps += 1

    def record(self, step: int, **values: float) -> None:
        if self.main:
            energy_kwh = round(self.loop.energy_before + self.loop.energy.energy_kwh, 9)
            self.records.add({"step": step, "tokens": self.tokens, **values, "energy_kwh": energy_kwh})

    def log(self, step: int) -> None:
        # the one synchronisation of the interval
        mean = self.accelerator.reduce(self.interval_loss, "mean").item() / self.interval_steps
        _check_finite("loss", torch.tensor(mean), step, self.folder)
        speed = self.interval_tokens / (self.interval_s + time.monotonic() - self.resumed_at)
        self.record(step, loss=round(mean, 6), learning_rate=self.rate, tokens_per_second=round(speed, 1))
        self.progress.update(step, f"loss {mean:.3f} · {speed:,.0f} tokens/s")
        self.interval_loss.zero_()
        self.interval_steps, self.interval_tokens, self.interval_s = 0, 0, 0.0
        self.resumed_at = time.monotonic()

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Evaluation and checkpoints are not training: tokens per second leave them out."""
        self.interval_s += time.monotonic() - self.resumed_at
        self.accelerator.wait_for_everyone()
        yield
        self.resumed_at = time.monotonic()

    def evaluate(self, step: int) -> None:
        with self._clock_stopped():
            if self.loop.evaluate is not None and self.main:
                self.plain.eval()
                with torch.no_grad(), self.accelerator.autocast():
                    found = self.loop.evaluate(self.plain, step)
                self.plain.train()
                self.record(step, **found)

    def agree(self, stopping: bool, logged: bool) -> bool:
        """Whether to stop now: several processes stop at the same step, where they wait for each other anyway."""
        if self.accelerator.num_processes == 1 or not logged:
            return stopping and self.accelerator.num_processes == 1
        asked = torch.tensor(float(stopping), device=self.accelerator.device)
        return self.accelerator.reduce(asked, "sum").item() > 0

    def save(self, step: int) -> None:
        with self._clock_stopped():
            if not self.main:
                return
            _check_finite("loss", self.interval_loss, step, self.folder)
            for name, weights in self.plain.named_parameters():
                _check_finite(name, weights, step, self.folder)
            self.loop.energy.sample()
            hardware, scaler = self.loop.hardware, self.accelerator.scaler
            state = {
                "tokens": self.tokens,
                "interval_loss": self.interval_loss.item(),
                "interval_steps": self.interval_steps,
                "energy_kwh": self.loop.energy_before + self.loop.energy.energy_kwh,
                "device": hardware.device,
                "precision": hardware.precision,
                "attention": hardware.attention,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            optimizer = self.optimizer.optimizer
            checkpoints.save_checkpoint(self.folder, step, self.plain, self.tokenizer, optimizer, state)
            checkpoints.thin_out(self.folder, self.loop.settings.resumable_checkpoints)


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
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.on_record:
            self.on_record(self.rows)


def read_records(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; one that is being written is not whole yet."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
