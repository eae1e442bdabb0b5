"""The one exception of the node program."""

from __future__ import annotations


class NodeError(Exception):
    """An expected failure: `kind` is for programs, the two sentences are for people."""

    def __init__(self, kind: str, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.next_step = kind, message, next_step
