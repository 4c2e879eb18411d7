"""The one kind of error a user is meant to read."""

from __future__ import annotations


class TTLError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do."""

    def _render_traceback_(self) -> list[str]:
        # IPython calls this in place of its own traceback: a notebook shows the message, not our internals
        return [f"{type(self).__name__}: {self}"]


class ParameterError(TTLError):
    """A parameter that is unknown, of the wrong type, or in a combination that cannot work."""


class MissingStage(TTLError):
    """An earlier stage whose output is needed is not finished."""


class StageConflict(TTLError):
    """A stage's folder holds work of another identity, or another process is working in it."""


class SourceError(TTLError):
    """A data source that cannot be reached, or whose bytes are not the expected ones."""


class DamagedFile(TTLError):
    """A file whose content is not what was written."""


def reason(error: Exception) -> str:
    """What a library's error says, in one line that is not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
