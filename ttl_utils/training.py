"""The one training loop, for pretraining and for chat, on Accelerate."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator

from ttl_utils.errors import TTLError
from ttl_utils.lean import kept_memory
from ttl_utils.session import Loop, Session
from ttl_utils.step import Step, learning_rate


def train(model: Any, tokenizer: Any, get_step: Callable[[int, Accelerator], Step], loop: Loop) -> list[dict]:
    """Run to `max_steps`, from the newest whole checkpoint if there is one; returns the records.

    `get_step(step, accelerator)` must be a pure function of the step: then a run that was killed and goes on ends
    with the same weights, bit for bit on a CPU, as one that was left alone.

    Raises:
        TTLError: the loss is not a number, or the run was interrupted or ran out of its `max_hours`.
    """
    settings = loop.settings
    kept = kept_memory() if loop.hardware.device == "cpu" else contextlib.nullcontext()
    with Session(model, tokenizer, get_step, loop) as session, clean_stop(settings.max_hours) as stop, kept:
        if not session.records.rows:
            session.evaluate(session.first_step)
        for step in range(session.first_step, loop.max_steps):
            done, last = step + 1, step + 1 == loop.max_steps
            session.step(session.data(step), learning_rate(settings, step, loop.max_steps))
            logged = done % settings.logging_steps == 0 or last
            if logged:
                session.log(done)
            if loop.eval_steps and (done % loop.eval_steps == 0 or last):
                session.evaluate(done)
            stopping = session.agree(stop(), done, logged)
            if done % settings.save_steps == 0 or last or stopping:
                session.save(done)
            if stopping and not last:
                # a launcher ends all processes soon after the first that stops
                session.copies.close()
                session.accelerator.wait_for_everyone()
                raise TTLError(f"{loop.label}: {stopping}; step {done:,} is saved, run again to go on from there")
    return session.records.rows


@contextlib.contextmanager
def clean_stop(max_hours: float | None = None) -> Iterator[Callable[[], str]]:
    """A function that says why to stop, or "": a signal came, or the hours are over.

    SIGTERM, an interrupt, and USR1, which Slurm sends before a job's time is up, end the loop at a whole step with
    a checkpoint. A second interrupt ends it at once: then the newest checkpoint is where the next run goes on.
    """
    reason, end = [""], time.monotonic() + (max_hours or math.inf) * 3600

    def ask(number: int, *_: object) -> None:
        if reason[0]:
            # a launcher passes on a signal that its processes may have had from elsewhere already
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        reason[0] = f"it was interrupted ({signal.Signals(number).name})"
        print("stopping after this step, with a checkpoint; interrupt again to stop at once")

    def stop() -> str:
        if not reason[0] and time.monotonic() > end:
            reason[0] = f"max_hours ({max_hours:g}) are over"
        return reason[0]

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = ("SIGTERM", "SIGINT", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
