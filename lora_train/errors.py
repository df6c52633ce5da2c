"""The two ways a run ends badly: the user's input is wrong, or the run itself failed."""

from __future__ import annotations


class LoraTrainError(Exception):
    """An error that is shown as a message, without a traceback.

    Args:
        message: what is wrong, where, what was found and what is allowed; lower case, no full stop.
        hint: the line that mends it, or how to go on.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UserError(LoraTrainError, ValueError):
    """Input that the user can mend: a key, a file, a combination of options."""

    exit_status = 2


class RunError(LoraTrainError, RuntimeError):
    """A run that cannot go on (NaN loss, full disk). The last good checkpoint stays."""


class EndedByAnother(LoraTrainError):
    """The end of a process because another one of the run failed, which has said why.

    Args:
        status: exit status of that one.
    """

    def __init__(self, status: int) -> None:
        super().__init__("another process of the run failed")
        self.exit_status = status
