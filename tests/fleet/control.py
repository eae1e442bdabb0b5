"""A controller for tests: the real program as a subprocess, against hosts of tests.netns, with its own state folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.netns import Network

STAND_IN = ("--gpus", "6x b200", "--nodes", "3", "--context", "32k")
"""Two ranks on each of three nodes: as few processes as a pipeline with tensor parallelism has."""


@dataclass(frozen=True)
class Ran:
    """What a command printed, its exit code and how long it took."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass
class Controller:
    """Runs `glmplan` as a user at the controller would."""

    hosts: Network
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GLMPLAN_")}
        own = {"GLMPLAN_SSH_CONFIG": str(self.hosts.ssh_config), "XDG_STATE_HOME": str(self.folder), "COLUMNS": "140"}
        return {**kept, **own, **self.environment, **extra}

    def run(self, *words: str, timeout_s: float = 90.0, **extra: str) -> Ran:
        """One command to its end."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "glmplan", *words], env=self._environment(extra), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    def launch(self, *words: str, hosts: str | None = None, **extra: str) -> Ran:
        """A rehearsal on all hosts, with faults by GLMPLAN_REHEARSE_FAULT."""
        return self.run("launch", "--rehearse", "--hosts", hosts or self.hosts.names, *STAND_IN, *words, **extra)

    def launching(self, *words: str, **extra: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """A rehearsal under way."""
        return self.program("launch", "--rehearse", "--hosts", self.hosts.names, *STAND_IN, *words, **extra)

    @contextmanager
    def program(self, *words: str, **extra: str) -> Iterator[subprocess.Popen[str]]:
        """A command under way; it is killed at the end if it still runs."""
        process = subprocess.Popen(
            [sys.executable, "-m", "glmplan", *words], env=self._environment(extra), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def left(self) -> dict[str, dict[int, str]]:
        """What still runs on the hosts that are up; an empty dict is what every test wants at its end."""
        found = {name: self.hosts.pids(name) for name, host in self.hosts.hosts.items() if host.init is not None}
        return {name: pids for name, pids in found.items() if pids}


def wait_until(what: str, condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


def workers(hosts: Network, name: str, words: Sequence[str] = ("standin",)) -> dict[int, str]:
    """The stand-in's processes on a host."""
    return {pid: line for pid, line in hosts.pids(name).items() if all(word in line for word in words)}


@pytest.fixture
def controller(three_hosts: Network, tmp_path: Path) -> Iterator[Controller]:
    """A controller of its own per test; every test must leave the hosts empty."""
    found = Controller(three_hosts, tmp_path)
    yield found
    left = found.left()
    for name in three_hosts.hosts:
        if three_hosts[name].init is None or left.get(name):
            three_hosts.reboot(name)
    assert left == {}
