"""Hosts that exist on paper: scripted answers after a given latency, for fleets larger than any test machine.

Seen through `Transport` they behave as real hosts do (the same contract tests run on this machine, over SSH and here):
answers travel as bytes, failures of the node program and of the connection are the real exceptions, `timeout_s` counts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glmplan.node.bundle import ANSWER_LINE
from glmplan.transport.base import Completed, HostName
from glmplan.transport.errors import ConnectionFailedError, ConnectionLostError, TimedOutError
from glmplan.transport.node import BOOTSTRAP
from glmplan.transport.options import SshOptions

Answer = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]]
"""An operation's result, or what makes it from the request; it raises NodeError for the operation's failure."""

Program = Callable[[Sequence[str], bytes], Completed]

Fate = Literal["up", "down", "silent", "lost"]
"""up; refuses connections; accepts and never answers; breaks while a command runs."""


@dataclass
class FakeHost:
    """What one host does. `latency_s` is a command's round trip, connecting included; `took_s` its work on top of that."""

    latency_s: float = 0.0
    fate: Fate = "up"
    answers: Mapping[str, Answer] = field(default_factory=dict)
    programs: Mapping[str, Program] = field(default_factory=dict)
    took_s: float = 0.0


class FakeFleet:
    """Many of them, by name; `open` stands where `open_transport` does. `asked` lists (host, operation) in order."""

    def __init__(self, hosts: Mapping[str, FakeHost]) -> None:
        self.hosts = dict(hosts)
        self.asked: list[tuple[str, str]] = []
        self.most_at_once = 0
        self._busy = 0
        self._lock = threading.Lock()

    def open(self, host: HostName, options: SshOptions | None = None) -> FakeTransport:
        """A transport to one of them."""
        return FakeTransport(host, self.hosts[host.text], options or SshOptions(), self)

    def enter(self, name: str, operation: str) -> None:
        """Note that a command begins."""
        with self._lock:
            self.asked.append((name, operation))
            self._busy += 1
            self.most_at_once = max(self.most_at_once, self._busy)

    def leave(self) -> None:
        """Note that it ended."""
        with self._lock:
            self._busy -= 1


class FakeTransport:
    """One host of paper."""

    def __init__(self, name: HostName, host: FakeHost, options: SshOptions, fleet: FakeFleet | None = None) -> None:
        self.name = name.text
        self._host, self._options, self._fleet = host, options, fleet

    def run(self, argv: Sequence[str], stdin: bytes = b"", timeout_s: float = 30.0) -> Completed:
        """A scripted program, or the node program's scripted operation."""
        is_node = len(argv) > 3 and argv[2] == BOOTSTRAP
        if self._fleet is not None:
            self._fleet.enter(self.name, argv[3] if is_node else argv[0])
        try:
            self._meet(timeout_s)
            if is_node:
                return self._operation(argv[3], stdin)
            program = self._host.programs.get(argv[0])
            if program is None:
                return Completed(127, b"", f"sh: {argv[0]}: not found\n".encode())
            return program(argv, stdin)
        finally:
            if self._fleet is not None:
                self._fleet.leave()

    def close(self) -> None:
        """Nothing is held."""

    def _meet(self, timeout_s: float) -> None:
        host = self._host
        if host.fate == "silent":
            time.sleep(self._options.connect_timeout_s)
            raise TimedOutError(self.name, self._options.connect_timeout_s)
        time.sleep(host.latency_s)
        if host.fate == "down":
            raise ConnectionFailedError(
                f"{self.name} cannot be connected to: Connection refused.", f"Try `ssh {self.name} true`."
            )
        time.sleep(min(host.took_s, timeout_s))
        if host.took_s > timeout_s:
            raise TimedOutError(self.name, timeout_s)
        if host.fate == "lost":
            raise ConnectionLostError(self.name, "connection reset by peer")

    def _operation(self, operation: str, stdin: bytes) -> Completed:
        size, _, rest = stdin.partition(b"\n")
        request = json.loads(rest[int(size) :])
        answer = self._host.answers.get(operation)
        if answer is None:
            return Completed(2, b"", f"glmplan node: no operation {operation!r}\n".encode())
        try:
            result = answer(request) if callable(answer) else answer
            found: dict[str, Any] = {"ok": True, "result": result}
        except Exception as error:
            kind = getattr(error, "kind", type(error).__name__)
            words = {"message": str(error), "next_step": getattr(error, "next_step", "")}
            found = {"ok": False, "error": {"kind": kind, **words}}
        return Completed(0 if found["ok"] else 1, f"\n{ANSWER_LINE}\n{json.dumps(found)}\n".encode(), b"")
