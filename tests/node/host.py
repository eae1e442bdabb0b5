"""A host for tests: the node program run as a process of its own, with a state folder of its own."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmplan.transport.base import parse_hosts
from glmplan.transport.local import LocalTransport
from glmplan.transport.node import call

OWNER = "alice@laptop"
PORTS = range(22_000, 29_000)
"""Below the ports that the kernel gives out by itself, and none of glmplan's own defaults."""


class Host:
    """Operations on one node of this machine; `end` leaves no process behind."""

    def __init__(self, home: Path, name: str = "local#0", python: str = "python3") -> None:
        self.transport = LocalTransport(parse_hosts(name)[0])
        self.transport._environment["XDG_STATE_HOME"] = str(home)
        self.state = home / "glmplan" / name.replace("#", "-")
        self.python = python
        self._names: set[str] = set()

    def ask(self, operation: str, timeout_s: float = 120.0, **request: Any) -> dict[str, Any]:
        return call(self.transport, operation, request, timeout_s=timeout_s, python=self.python)

    def start(self, *argv: str, deployment: str = "d", **more: Any) -> dict[str, Any]:
        self._names.add(deployment)
        request = {"deployment": deployment, "digest": "one", "owner": OWNER, "argv": list(argv), **more}
        return self.ask("start", **request)

    def shell(self, script: str, **more: Any) -> dict[str, Any]:
        return self.start("bash", "-c", script, **more)

    def poll(self, deployment: str = "d", **more: Any) -> dict[str, Any]:
        return self.ask("poll", deployment=deployment, **more)

    def stop(self, deployment: str = "d", grace_s: float = 20.0, **more: Any) -> dict[str, Any]:
        return self.ask("stop", deployment=deployment, grace_s=grace_s, **more)

    def end(self) -> None:
        for name in self._names:
            with suppress(Exception):
                self.stop(name, grace_s=0.0, gpu_free_s=0.0)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What the condition says once it is true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on, and that no other test is given while this process runs: a name says whose it is."""
    while True:
        port, name = random.SystemRandom().choice(PORTS), socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0glmplan-test-port-{port}")
            with socket.socket() as probe:
                probe.bind((address, port))
        except OSError:
            name.close()
            continue
        name.detach()
        return port
