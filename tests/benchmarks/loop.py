"""The training loop beside bare PyTorch and Hugging Face's Trainer: `python -m tests.benchmarks.loop --shape nano`.

All of them train the same weights in one process, in turns of a few steps, so that other work on the machine slows
them alike; a ratio is taken within a round. The loop reads its data from a memory-mapped file, writes its records and
has its energy measured; the others find their data in memory and do nothing else. Checkpoints and evaluations are left
out of all. fp32 on the CPU; the 160m shape takes 1 x 2048 tokens a step and about 6 GiB of memory. The shape tiny
leaves little of a step but what each way adds to it: a difference in milliseconds that holds for the other shapes too.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tests.benchmarks.common import Vocabulary, median_and_interval, shape_params, table, write_tokens
from ttl_utils import carbon, session
from ttl_utils.blocks import TokenBlocks
from ttl_utils.loss import Learner
from ttl_utils.model import Hardware, flops_per_token, new_model
from ttl_utils.pretraining import block_steps
from ttl_utils.session import Loop, Session
from ttl_utils.step import Step, make_optimizer
from ttl_utils.training import train

OURS, BARE, PLAIN, TRAINER = (
    "the loop",
    "bare PyTorch, our model code",
    "bare PyTorch, plain transformers",
    "Hugging Face Trainer",
)
# rounds, and steps of a turn
TURNS = {"nano": (40, 10), "160m": (12, 1), "tiny": (100, 20)}
DATA, RECORDS, ENERGY = "data", "records, progress, status file", "energy samples (their own thread)"

Turn = Callable[[], tuple[float, float]]


class Enough(Exception):
    """Ends the loop before it writes a checkpoint."""


def now() -> tuple[float, float]:
    """Seconds, and the CPU seconds of all threads."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float], ended: tuple[float, float] | None = None) -> tuple[float, float]:
    ended = ended or now()
    return ended[0] - started[0], ended[1] - started[1]


def bare(steps: list[Step], optimizer: torch.optim.Optimizer, loss_of: Callable[[dict, int], torch.Tensor]) -> Turn:
    def turn() -> tuple[float, float]:
        started = now()
        for step in steps:
            for batch in step.micro_batches:
                loss_of(batch, step.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        return since(started)

    return turn


class Clock(TrainerCallback):
    """The Trainer's steps without its preparations."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = now()


def hugging_face(model: Any, steps: list[Step], optimizer: Any, settings: Any, folder: Path) -> Turn:
    batches = [batch for step in steps for batch in step.micro_batches]
    rows = [dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=len(steps[0].micro_batches),
        max_steps=len(steps),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        # 0: no clipping
        max_grad_norm=settings.max_grad_norm or 0.0,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)

    def turn() -> tuple[float, float]:
        trainer.train()
        return since(clock.started, clock.ended)

    return turn


def share_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Give `model` the parameters of `other`: the memory of one."""
    for name, parameter in other.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)


@contextlib.contextmanager
def watched(owner: Any, name: str, seconds: dict[str, float], label: str) -> Any:
    """Count the seconds spent in a function."""
    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds[label] += time.perf_counter() - started

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def measure(shape: str, rounds: int, burst: int, folder: Path) -> tuple[dict[str, list], dict[str, float]]:
    """(seconds, CPU seconds) of each way's turns, and seconds of the loop's parts over its own turns."""
    params = shape_params(shape)
    settings = params.pretraining.model_copy(
        update={
            # a record in each turn, where a size logs rarely
            "logging_steps": min(params.pretraining.logging_steps, burst),
            "save_steps": 10**9,
            # the weights are shared: they should stay about as they are
            "learning_rate": 1e-6,
        }
    )
    words = Vocabulary(params.tokenizer.vocab_size)
    context = params.model.max_position_embeddings
    paths = write_tokens(folder / "tokens", settings.tokens_per_step * burst * (rounds + 2), len(words))
    run: Any = SimpleNamespace(params=SimpleNamespace(pretraining=settings, pretraining_seed=0))
    data = block_steps(TokenBlocks(paths, context), run)
    steps = [data(step, SimpleNamespace(num_processes=1, process_index=0)) for step in range(burst)]
    model, plain = (new_model(params.model, words, 0, "sdpa").train() for _ in range(2))
    share_weights(plain, model)
    learner, optimizer = Learner(model), make_optimizer(model, settings)
    others = {
        BARE: bare(steps, optimizer, lambda batch, targets: learner(**batch) / targets),
        PLAIN: bare(steps, optimizer, lambda batch, _: plain(**batch, use_cache=False).loss),
        TRAINER: hugging_face(plain, steps, optimizer, settings, folder),
    }
    times: dict[str, list] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    started = now()

    with carbon.track(folder / "energy.jsonl", "benchmark", params.carbon) as energy, contextlib.ExitStack() as stack:

        def get_step(step: int, accelerator: Any) -> Step:
            nonlocal started
            if step % burst == 0:
                if step:
                    times[OURS].append(since(started))
                if len(times[OURS]) > rounds:
                    raise Enough
                # a sample that falls due meanwhile is taken in the loop's own time
                with energy._lock:
                    for name in list(others)[:: 1 if step // burst % 2 else -1]:
                        times[name].append(others[name]())
                if len(times[OURS]) == 1:
                    # the first round warmed up
                    seconds.clear()
                started = now()
            begun = time.perf_counter()
            found = data(step, accelerator)
            seconds[DATA] += time.perf_counter() - begun
            return found

        stack.enter_context(watched(Session, "log", seconds, RECORDS))
        stack.enter_context(watched(energy._tracker, "flush", seconds, ENERGY))
        # what waits for the others is not the data
        stack.callback(setattr, session, "STALLED_S", session.STALLED_S)
        session.STALLED_S = 1e9
        loop = Loop(
            settings=settings,
            hardware=Hardware("cpu", "fp32", "sdpa"),
            max_steps=10**6,
            folder=folder,
            energy=energy,
            flops_per_token=flops_per_token(params.model, len(words))["convention"],
        )
        # findings and progress of a run that does not learn
        hidden = open(folder / "told", "w")  # noqa: SIM115
        stack.callback(hidden.close)
        with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden), contextlib.suppress(Enough):
            train(model, words, get_step, loop)
    return {name: turns[1:] for name, turns in times.items()}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(TURNS), default="nano")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="steps of a turn")
    given = parser.parse_args()
    rounds, burst = given.rounds or TURNS[given.shape][0], given.steps or TURNS[given.shape][1]
    with tempfile.TemporaryDirectory() as folder:
        times, seconds = measure(given.shape, rounds, burst, Path(folder))
    tokens = shape_params(given.shape).pretraining.tokens_per_step
    rows: list[tuple] = [("", "tokens/s", "ms a step", "the loop's rate to it", "95% interval", "by CPU time")]
    for name in (OURS, BARE, PLAIN, TRAINER):
        step_s = median_and_interval([wall / burst for wall, _ in times[name]])[0]
        pairs = list(zip(times[name], times[OURS], strict=True))
        ratio, low, high = median_and_interval([other[0] / ours[0] for other, ours in pairs])
        cpu = median_and_interval([other[1] / ours[1] for other, ours in pairs])[0]
        row = (name, f"{tokens / step_s:,.0f}", f"{step_s * 1e3:,.2f}")
        rows.append(
            (*row, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", f"{cpu:.3f}") if name != OURS else (*row, *[""] * 3)
        )
    threads = torch.get_num_threads()
    table(f"{given.shape}, {tokens:,} tokens a step, {rounds} rounds of {burst} steps, {threads} threads", rows)
    total = sum(wall for wall, _ in times[OURS])
    parts = [(name, f"{seconds[name] / total:.3%}") for name in (DATA, RECORDS, ENERGY)]
    table("Of the loop's time", parts)


if __name__ == "__main__":
    main()
