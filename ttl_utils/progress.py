"""Progress of long work: one line that updates in place, in a notebook or a terminal, and a status file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Counts `done` of `total` and shows it, at most every `every_s` seconds.

    Where: a line of the cell's one output in a notebook; one line with a carriage return on a terminal; a line now and
    then in a log file. `status` is a JSON file that other processes may read while the work goes on.
    """

    def __init__(self, label: str, total: int | None, status: Path | None = None, done: int = 0, every_s: float = 1.0):
        self.label, self.total, self.status, self.done = label, total, status, done
        self.first, self.started = done, time.monotonic()
        self.every_s = every_s if in_notebook() or sys.stderr.isatty() else 10 * every_s
        self.next_show = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if not error[0]:
            self.show(final=True)
            if not in_notebook() and sys.stderr.isatty():
                print(file=sys.stderr)

    def update(self, done: int, note: str = "") -> bool:
        """Set how much is done; returns True when the line was shown anew."""
        self.done = done
        if time.monotonic() < self.next_show:
            return False
        self.show(note)
        return True

    def line(self, note: str = "", final: bool = False) -> str:
        elapsed = time.monotonic() - self.started
        text = f"{self.label}: {self.done:,}"
        if self.total:
            text += f" of {self.total:,}"
        if note:
            text += f" · {note}"
        if final:
            return f"{text} · took {clock(elapsed)}"
        if self.total and self.done > self.first:
            left = elapsed * (self.total - self.done) / (self.done - self.first)
            text += f" · {clock(left)} left"
        return text

    def show(self, note: str = "", final: bool = False) -> None:
        self.next_show = time.monotonic() + self.every_s
        text = self.line(note, final)
        if self.status:
            partial = self.status.with_suffix(".partial")
            partial.write_text(json.dumps({"line": text, "done": self.done, "total": self.total, "time": time.time()}))
            # Windows replaces no file that another process reads at this moment: the next line will do
            with contextlib.suppress(PermissionError):
                os.replace(partial, self.status)
        if in_notebook():
            _in_cell(self, text)
        elif sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


# of the cell that runs: its number, its output, and a line for each of its pieces of work
_cell: dict[str, Any] = {"number": None}


def _in_cell(work: Progress, text: str) -> None:
    """Show a line of this cell's one output, below those of the work before it."""
    from IPython import get_ipython
    from IPython.display import display

    if _cell["number"] != (number := get_ipython().execution_count):
        _cell.update(number=number, lines={}, handle=None)
    _cell["lines"][work] = text
    shown = _Text("\n".join(_cell["lines"].values()))
    if _cell["handle"] is None:
        _cell["handle"] = display(shown, display_id=True)
    else:
        _cell["handle"].update(shown)


class _Text:
    """Shown without the quotes that a plain string would get."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text
