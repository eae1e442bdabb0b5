"""What a check says: a verdict with its evidence and the command that repairs it, and the report of all of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from glmplan.facts.base import Frozen

Status = Literal["ok", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail", "skip")
FLEET = "all hosts"
"""The `host` of a finding about several hosts together."""


class Verdict(NamedTuple):
    """One sentence of evidence; `repair` is a command, or what to do, wherever the status is warn or fail."""

    status: Status
    evidence: str
    repair: str = ""


def ok(evidence: str) -> Verdict:
    """All is well, and this is how it is known."""
    return Verdict("ok", evidence)


def warn(evidence: str, repair: str) -> Verdict:
    """It will run, worse than it could; or it could not be told apart from a fault."""
    return Verdict("warn", evidence, repair)


def fail(evidence: str, repair: str) -> Verdict:
    """It will not start, or answer wrongly."""
    return Verdict("fail", evidence, repair)


def skip(reason: str) -> Verdict:
    """Not judged, and why."""
    return Verdict("skip", reason)


class Finding(Frozen):
    """A verdict of one check about one host, or about all hosts together (`host` is "all hosts")."""

    check: str
    title: str
    host: str
    status: Status
    evidence: str
    repair: str = ""


class Report(Frozen):
    """What `glmplan doctor` answers. `unreachable` hosts have a failed finding of the check "reachable"."""

    schema_version: Literal[1] = 1
    hosts: tuple[str, ...]
    unreachable: tuple[str, ...] = ()
    deep: bool = False
    plan: str | None = None
    elapsed_s: float
    findings: tuple[Finding, ...]

    def count(self, status: Status) -> int:
        """Findings of a status."""
        return sum(finding.status == status for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """5 when a host was not reached, else 1 when anything failed, else 0."""
        if self.unreachable:
            return 5
        return 1 if self.count("fail") else 0
