"""Every error a user can meet: one sentence with the value and the limit, one next step, one exit code."""

from __future__ import annotations


class GlmplanError(Exception):
    """Base of all errors shown to users.

    `message` says what is wrong with its value and limit; `next_step` says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step


class UsageError(GlmplanError):
    """Options or files that cannot be understood, or that contradict each other."""

    exit_code = 2


class DoesNotFitError(GlmplanError):
    """The request needs more memory than the GPUs have."""

    exit_code = 3


class UnsupportedError(GlmplanError):
    """No engine version known here runs this GPU or this checkpoint."""

    exit_code = 4


class UnreachableError(GlmplanError):
    """A host did not answer, or its key was refused."""

    exit_code = 5


class ProbeError(GlmplanError):
    """The hardware of a host could not be read."""

    exit_code = 1


class NotHealthyError(GlmplanError):
    """A launch did not become healthy, or a running deployment is not."""

    exit_code = 6


class WrongAnswersError(GlmplanError):
    """The server runs, but its answers are wrong."""

    exit_code = 7
