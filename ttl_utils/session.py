"""A training run under way: the model with its optimizer, what was counted since the last record, and the files."""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ttl_utils import checkpoints
from ttl_utils.copies import Copies, without_token
from ttl_utils.devices import Peak, gpu_readings
from ttl_utils.distributed import check_same, is_sharded, local, make_accelerator, prepare
from ttl_utils.errors import TTLError
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
# seconds between the moments at which several processes ask each other whether to stop: torchrun and Slurm wait 30
AGREE_S = 5.0


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


class Session:
    """A training run under way: the model with its optimizer, what was counted since the last record, and the files."""

    def __init__(self, model: Any, tokenizer: Any, get_step: Callable[[int, Accelerator], Step], loop: Loop):
        settings = loop.settings
        self.loop, self.plain, self.tokenizer, self.get_step = loop, make_lean(model), tokenizer, get_step
        self.accelerator = make_accelerator(loop.hardware, settings.log_with, loop.folder / "trackers")
        self.main = self.accelerator.is_main_process
        self.folder = loop.folder / "checkpoints"
        if not is_sharded(self.accelerator):
            model.to(self.accelerator.device)
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        self.plain_optimizer = make_optimizer(model, settings)
        state = {"step": 0, "tokens": 0, "interval_losses": []}
        with self.accelerator.main_process_first():
            newest = checkpoints.newest_whole(self.folder, settings.resume_from_checkpoint) or loop.start
        if newest is not None:
            state = checkpoints.load_checkpoint(newest, model, self.plain_optimizer)
            _say_resumed(state, loop.hardware, newest)
        asked = {"max_steps": loop.max_steps, **settings.model_dump(), **loop.lineage}
        check_same(self.accelerator, {"step": state["step"], **asked})
        self.learner, self.optimizer, self.gather = prepare(
            self.accelerator, Learner(model), self.plain_optimizer, settings.compile
        )
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.first_step, self.tokens, self.losses = state["step"], state["tokens"], state["interval_losses"]
        self.fresh: list[torch.Tensor] = []  # losses still on the device
        self.interval_tokens, self.interval_s, self.waited_s = 0, 0.0, 0.0
        self.logged, self.agree_every, self.elsewhere_kwh = self.first_step, 1, 0.0
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
        self.lock, self.closed, self.tracker_failed = threading.RLock(), threading.Event(), False
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
            self._tell_trackers(self.accelerator.end_training)

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
            row = {"step": step, "tokens": self.tokens, **values, "energy_kwh": round(self.energy_kwh, 9)}
            found = self.health.see(row)
            self.records.add(row)
            for finding in found:
                print(finding)
            if self.loop.settings.log_with:
                numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
                self._tell_trackers(lambda: self.accelerator.log(numbers, step))

    def _tell_trackers(self, tell: Callable[[], None]) -> None:
        """A tracker's server may fail: it is said once, and training goes on."""
        try:
            tell()
        except Exception as error:
            if not self.tracker_failed:
                print(f"log_with: a tracker failed ({without_token(error)}); training goes on")
            self.tracker_failed = True

    def log(self, step: int) -> None:
        losses = self._gather_losses(step)
        mean = math.fsum(losses) / len(losses)
        elapsed = self.interval_s + time.monotonic() - self.resumed_at
        speed = self.interval_tokens / elapsed
        self._gather_figures(step, elapsed)
        values = {"loss": round(mean, 6), "loss_std": round(statistics.pstdev(losses), 6), "learning_rate": self.rate}
        share = self._share_of_peak(speed)
        values |= {"tokens_per_second": round(speed, 1), "share_of_peak": share and round(share, 4)}
        values |= {"data_share": round(self.waited_s / elapsed, 4), **gpu_readings()}
        self.record(step, **values)
        peak = f"{share:.1%} of peak" if share else self.loop.peak.source
        self.progress.update(
            step,
            f"{step / self.loop.max_steps:.1%} · loss {mean:.3f} · perplexity {math.exp(min(mean, 99)):,.1f} · "
            f"rate {self.rate:.2e} · {speed:,.0f} tokens/s · {peak} · {self.energy_kwh:.4f} kWh",
        )
        self.losses = []
        self.interval_tokens, self.interval_s, self.waited_s = 0, 0.0, 0.0
        self.resumed_at = time.monotonic()

    @property
    def energy_kwh(self) -> float:
        """Of all sessions and machines; that of other machines as of the last log."""
        return self.loop.energy_before + self.loop.energy.energy_kwh + self.elsewhere_kwh

    def _gather_figures(self, step: int, elapsed: float) -> None:
        """What the other machines spent, and in how many steps to ask each other again whether to stop."""
        if self.accelerator.num_processes > 1:
            spent = 0.0 if self.main else self.loop.energy.energy_kwh
            figures = torch.tensor([spent, elapsed / (step - self.logged)], device=self.accelerator.device)
            # on all processes the same sums, so that all ask at the same steps
            self.elsewhere_kwh, step_s = self.accelerator.reduce(figures, "sum").tolist()
            self.agree_every = max(1, int(AGREE_S * self.accelerator.num_processes / step_s))
        self.logged = step

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
        self.gather(moments=True)
        if self.main:
            self.record(step, not_finite=f"{what}, first at step {first:,}")
            parts = self.get_step(first - 1, self.accelerator).micro_batches
            batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            optimizer, rows = self.plain_optimizer, self.records.rows
            try:
                made = explain_not_finite(
                    self.loop.folder, step, self.losses, first, self.plain, optimizer, batch, rows
                )
                print(f"what explains it was saved in {made}")
            except OSError as error:
                # a full disk must not hide why the run stops
                print(f"what explains it could not be saved: {error}")
        # a launcher ends all processes soon after the first that stops
        self.accelerator.wait_for_everyone()
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
        # so that none stops while the first one writes: a launcher would soon end that one too
        self.accelerator.wait_for_everyone()
        self.resumed_at = time.monotonic()

    def evaluate(self, step: int) -> None:
        with self._clock_stopped():
            if self.loop.evaluate is None:
                return
            self.gather()
            if self.main:
                home = self.plain.device
                self.plain.to(self.accelerator.device).eval()
                with torch.no_grad(), self.accelerator.autocast():
                    found = self.loop.evaluate(self.plain, step)
                self.plain.train().to(home)
                self.record(step, **found)

    def agree(self, reason: str, step: int, logged: bool) -> str:
        """Why to stop now, or "": several processes stop at the same step, at a log or one of those in between."""
        if self.accelerator.num_processes == 1:
            return reason
        if not logged and step % self.agree_every:
            return ""
        asked = torch.tensor(float(bool(reason)), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum").item() == 0:
            return ""
        return reason or "another process was interrupted"

    def save(self, step: int) -> None:
        with self._clock_stopped():
            losses = self._gather_losses(step)
            # all processes stop together, whichever holds the shard
            finite = torch.stack([local(weights).isfinite().all() for weights in self.learner.parameters()])
            if self.accelerator.reduce((~finite.all()).float(), "sum").item():
                self._not_finite("weights", step, step)
            self.gather(moments=True)
            if not self.main:
                return
            # on disk before the checkpoint is: after a kill the count goes on from no less
            self.loop.energy.sample(write=True)
            hardware, scaler = self.loop.hardware, self.accelerator.scaler
            state = {
                "tokens": self.tokens,
                "interval_losses": losses,
                "energy_kwh": self.energy_kwh,
                "device": hardware.device,
                "precision": hardware.precision,
                "attention": hardware.attention,
                "scaler": scaler.state_dict() if scaler is not None else None,
                **self.loop.lineage,
            }
            settings = self.loop.settings
            made = checkpoints.save_checkpoint(
                self.folder, step, self.plain, self.tokenizer, self.plain_optimizer, state
            )
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
