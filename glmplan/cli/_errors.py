"""Exceptions as words: one table from exception to exit code, one place that prints them."""

from __future__ import annotations

import sys

from glmplan.errors import GlmplanError


def exit_code_of(error: Exception) -> int | None:
    """The exit code of an error a user can meet; None for a defect of glmplan, which keeps its traceback."""
    if isinstance(error, GlmplanError):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        return 141
    return 1 if isinstance(error, (OSError, MemoryError)) else None


def report(error: Exception) -> None:
    """Print the sentence and the next step on stderr."""
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        return
    message = error.message if isinstance(error, GlmplanError) else str(error) or type(error).__name__
    next_step = error.next_step if isinstance(error, GlmplanError) else ""
    print(f"glmplan: {message}", file=sys.stderr)
    if next_step:
        print(f"  next: {next_step}", file=sys.stderr)
