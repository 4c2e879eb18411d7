"""A training run under way: the model with its optimizer, what was counted since the last record, and the files."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType

from ttl_utils import checkpoints
from ttl_utils.copies import Copies
from ttl_utils.devices import Peak, gpu_readings
from ttl_utils.errors import ParameterError, TTLError
from ttl_utils.explain import explain_not_finite
from ttl_utils.health import Health
from ttl_utils.lean import make_lean
from ttl_utils.loss import Learner
from ttl_utils.model import Hardware, checkpoint_activations
from ttl_utils.progress import Progress
from ttl_utils.records import Records
from ttl_utils.schema import Optimisation
from ttl_utils.step import Step, make_optimizer, train_step

# seconds without data after which a run says that it waits
STALLED_S = 60.0


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
    # by the usual convention (model.flops_per_token), and what the device can do: for the share of peak
    flops_per_token: float | None = None
    peak: Peak = Peak(None, "unknown device")
    # a checkpoint of another run to go on from, and what this run's own checkpoints say of their schedule and data
    start: Path | None = None
    lineage: dict = field(default_factory=dict)
    # a run's name, and its parameters for the trackers
    run: str = ""
    config: dict = field(default_factory=dict)


def make_accelerator(hardware: Hardware, log_with: list[str] | None = None, folder: Path | None = None) -> Accelerator:
    """Accelerate, with the processes and the trackers that were asked for, or an error."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1:
        # Accelerate keeps a process's first device and precision; in a notebook the next cell may want others
        AcceleratorState._reset_state(reset_partial_state=True)
    missing = set(LoggerType.list()) - set(map(str, get_available_trackers()))
    for name in log_with or ():
        # Accelerate itself leaves such a one out, with a line in a log
        if name in missing or name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            what = "is not installed" if name in LOGGER_TYPE_TO_CLASS else f"is no tracker of Accelerate's ({known})"
            raise ParameterError(f"log_with: {name!r} {what}")
    # the other processes wait while the first one evaluates, which may take longer than the default ten minutes
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        mixed_precision=hardware.mixed_precision,
        cpu=hardware.device == "cpu",
        kwargs_handlers=[patience],
        log_with=log_with or None,
        project_dir=folder and str(folder),
    )
    if accelerator.num_processes != asked:
        raise TTLError(
            f"{asked} processes were asked for and Accelerate runs {accelerator.num_processes}: on a CPU, set "
            "ACCELERATE_USE_CPU=true and start with torchrun"
        )
    return accelerator


class Session:
    """A training run under way: the model with its optimizer, what was counted since the last record, and the files."""

    def __init__(self, model: Any, tokenizer: Any, get_step: Callable[[int, Accelerator], Step], loop: Loop):
        settings = loop.settings
        self.loop, self.plain, self.tokenizer, self.get_step = loop, make_lean(model), tokenizer, get_step
        self.accelerator = make_accelerator(loop.hardware, settings.log_with, loop.folder / "trackers")
        self.main = self.accelerator.is_main_process
        self.folder = loop.folder / "checkpoints"
        model.to(self.accelerator.device)
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        optimizer = make_optimizer(model, settings)
        state = {"step": 0, "tokens": 0, "interval_losses": []}
        with self.accelerator.main_process_first():
            newest = checkpoints.newest_whole(self.folder, settings.resume_from_checkpoint) or loop.start
        if newest is not None:
            state = checkpoints.load_checkpoint(newest, model, optimizer)
            _say_resumed(state, loop.hardware, newest)
        learner = Learner(model)
        self.learner, self.optimizer = self.accelerator.prepare(
            torch.compile(learner) if settings.compile else learner, optimizer
        )
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.first_step, self.tokens, self.losses = state["step"], state["tokens"], state["interval_losses"]
        self.fresh: list[torch.Tensor] = []  # losses still on the device
        self.interval_tokens, self.interval_s, self.waited_s = 0, 0.0, 0.0
        self.records = Records(loop.folder / "metrics.jsonl", self.first_step, loop.on_record, self.main)
        self.health = Health(vocab_size=len(tokenizer), warmup_steps=settings.warmup_steps)
        for row in self.records.rows:
            self.health.see(row)
        self.copies = Copies(
            settings.copy_to if self.main else None,
            loop.folder,
            loop.run,
            settings.resumable_checkpoints,
            settings.save_total_limit,
        )
        status = loop.folder / "status.json" if self.main else None
        self.progress = Progress(loop.label, loop.max_steps, status, self.first_step)
        self.lock, self.closed = threading.RLock(), threading.Event()
        self.waiting: tuple[int, float] | None = None
        self.resumed_at = time.monotonic()
        model.train()

    def __enter__(self) -> Session:
        if self.loop.settings.log_with:
            config = {key: value for key, value in self.loop.config.items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("ttl", config, {"wandb": {"name": self.loop.run}})
        threading.Thread(target=self._watch_data, daemon=True).start()
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        self.progress.__exit__(*error)
        self.copies.close()
        if self.loop.settings.log_with:
            self.accelerator.end_training()

    def data(self, step: int) -> Step:
        self.waiting = (step, started := time.monotonic())
        found = self.get_step(step, self.accelerator)
        self.waiting = None
        self.waited_s += time.monotonic() - started
        return found

    def _watch_data(self) -> None:
        """A disk or a mounted drive may hang: then the run says so, once, and waits on."""
        said = None
        while not self.closed.wait(min(1.0, STALLED_S / 4)):
            waiting = self.waiting
            if waiting is None or waiting == said or (waited := time.monotonic() - waiting[1]) < STALLED_S:
                continue
            said = waiting
            self.record(waiting[0], stalled_s=round(waited, 1))

    def step(self, data: Step, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate = rate
        max_grad_norm = self.loop.settings.max_grad_norm
        self.fresh.append(train_step(self.learner, self.optimizer, self.accelerator, data, max_grad_norm))
        tokens = sum(batch["input_ids"].numel() for batch in data.micro_batches) * self.accelerator.num_processes
        self.tokens += tokens
        self.interval_tokens += tokens

    def record(self, step: int, **values: Any) -> None:
        if not self.main:
            return
        with self.lock:
            energy_kwh = round(self.loop.energy_before + self.loop.energy.energy_kwh, 9)
            row = {"step": step, "tokens": self.tokens, **values, "energy_kwh": energy_kwh}
            found = self.health.see(row)
            self.records.add(row)
            for finding in found:
                print(finding)
            if self.loop.settings.log_with:
                numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
                self.accelerator.log(numbers, step)

    def log(self, step: int) -> None:
        losses = self._gather_losses(step)
        mean = math.fsum(losses) / len(losses)
        elapsed = self.interval_s + time.monotonic() - self.resumed_at
        speed = self.interval_tokens / elapsed
        values = {"loss": round(mean, 6), "loss_std": round(statistics.pstdev(losses), 6), "learning_rate": self.rate}
        share = self._share_of_peak(speed)
        values |= {"tokens_per_second": round(speed, 1), "share_of_peak": share and round(share, 4)}
        values |= {"data_share": round(self.waited_s / elapsed, 4), **gpu_readings()}
        self.record(step, **values)
        kwh = self.loop.energy_before + self.loop.energy.energy_kwh
        peak = f"{share:.1%} of peak" if share else self.loop.peak.source
        self.progress.update(
            step,
            f"{step / self.loop.max_steps:.1%} · loss {mean:.3f} · perplexity {math.exp(min(mean, 99)):,.1f} · "
            f"rate {self.rate:.2e} · {speed:,.0f} tokens/s · {peak} · {kwh:.4f} kWh",
        )
        self.losses = []
        self.interval_tokens, self.interval_s, self.waited_s = 0, 0.0, 0.0
        self.resumed_at = time.monotonic()

    def _share_of_peak(self, speed: float) -> float | None:
        if not self.loop.peak.flops_per_second or not self.loop.flops_per_token:
            return None
        # several processes on a CPU share it
        devices = 1 if self.loop.hardware.device == "cpu" else self.accelerator.num_processes
        return speed * self.loop.flops_per_token / (self.loop.peak.flops_per_second * devices)

    def _gather_losses(self, step: int) -> list[float]:
        """The losses of the steps since the last record: the one synchronisation of the interval."""
        if self.fresh:
            self.losses += self.accelerator.reduce(torch.stack(self.fresh), "mean").tolist()
            self.fresh = []
        if not all(map(math.isfinite, self.losses)):
            bad = next(number for number, loss in enumerate(self.losses) if not math.isfinite(loss))
            self._not_finite("loss", step, step - len(self.losses) + bad + 1)
        return self.losses

    def _not_finite(self, what: str, step: int, first: int) -> None:
        """Save what explains it and stop; `first` is the step at which it was first seen."""
        if self.main:
            self.record(step, not_finite=f"{what}, first at step {first:,}")
            parts = self.get_step(first - 1, self.accelerator).micro_batches
            batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            optimizer, rows = self.optimizer.optimizer, self.records.rows
            try:
                made = explain_not_finite(
                    self.loop.folder, step, self.losses, first, self.plain, optimizer, batch, rows
                )
                print(f"what explains it was saved in {made}")
            except OSError as error:
                # a full disk must not hide why the run stops
                print(f"what explains it could not be saved: {error}")
        newest = next((path.name for path in reversed(checkpoints.list_checkpoints(self.folder))), "none yet")
        raise TTLError(
            f"the {what} is not finite at step {first:,}: training has diverged; no checkpoint holds it (newest: "
            f"{newest}). Lower the learning rate, lengthen the warm-up, set max_grad_norm, or use fp32"
        )

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

    def agree(self, reason: str, logged: bool) -> str:
        """Why to stop now, or "": several processes stop at the same step, where they wait for each other anyway."""
        if self.accelerator.num_processes == 1:
            return reason
        if not logged:
            return ""
        asked = torch.tensor(float(bool(reason)), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum").item() == 0:
            return ""
        return reason or "another process was interrupted"

    def save(self, step: int) -> None:
        with self._clock_stopped():
            losses = self._gather_losses(step)
            # on all processes, which hold the same weights: they stop together
            finite = torch.stack([weights.isfinite().all() for weights in self.plain.parameters()]).tolist()
            if not all(finite):
                self._not_finite("weights", step, step)
            if not self.main:
                return
            self.loop.energy.sample()
            hardware, scaler = self.loop.hardware, self.accelerator.scaler
            state = {
                "tokens": self.tokens,
                "interval_losses": losses,
                "energy_kwh": self.loop.energy_before + self.loop.energy.energy_kwh,
                "device": hardware.device,
                "precision": hardware.precision,
                "attention": hardware.attention,
                "scaler": scaler.state_dict() if scaler is not None else None,
                **self.loop.lineage,
            }
            optimizer, settings = self.optimizer.optimizer, self.loop.settings
            made = checkpoints.save_checkpoint(self.folder, step, self.plain, self.tokenizer, optimizer, state)
            checkpoints.thin_out(self.folder, settings.resumable_checkpoints, settings.save_total_limit)
            self.copies.send(made)


def _say_resumed(state: dict, hardware: Hardware, path: Path) -> None:
    print(f"going on from {path.name} ({state['tokens']:,} tokens seen)")
    for name in ("device", "precision", "attention"):
        if state[name] != getattr(hardware, name):
            print(
                f"{name} was {state[name]} and is {getattr(hardware, name)} now: the run goes on, "
                "no longer bit for bit the same"
            )
