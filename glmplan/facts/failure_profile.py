"""The schema of `profiles/failures/*.toml`: what a log line of a failed engine means and what repairs it.

A signature is a literal or a regular expression of one line of the worker's log, or of the kernel's. `during` limits it to
phases of the start (the words of `glmplan.fleet.log_lines.Phase`) or to `run`, which is everything after `ready`; without it
any time counts. `role` is `cause`, or `effect` for lines that only say that something else broke; the higher `weight` wins
between causes. `needs_kill`: it counts only where a process of the node was killed with signal 9. Named groups of a pattern
fill {words} of `cause` and `repair`; `pid2` stands for `pid` in another branch.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from glmplan.facts.base import Frozen

When = Literal["starting", "joining", "loading", "loaded", "allocated", "capturing", "captured", "run"]


class FailureSignature(Frozen):
    """One known failure."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    literal: str | None = None
    pattern: str | None = None
    where: Literal["log", "kernel"] = "log"
    during: tuple[When, ...] = ()
    role: Literal["cause", "effect"] = "cause"
    weight: int = Field(default=50, ge=0, le=100)
    needs_kill: bool = False
    cause: str = Field(min_length=10)
    repair: str = Field(min_length=10)
    source: str = Field(min_length=3)

    @model_validator(mode="after")
    def _one_way_to_match(self) -> FailureSignature:
        if (self.literal is None) == (self.pattern is None):
            raise ValueError("a signature has either a literal or a pattern")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"the pattern of signature {self.id} is no regular expression: {error}") from None
        return self

    def match(self, line: str) -> re.Match[str] | None:
        """The match in a line."""
        return re.search(re.escape(self.literal) if self.literal is not None else self.pattern or "", line)


class FailureProfile(Frozen):
    """The signatures of one engine family, or of what all share."""

    schema_version: Literal[1]
    family: Literal["sglang", "vllm", "common"]
    source: str
    signatures: tuple[FailureSignature, ...]
