"""A controller for tests: the real program as a subprocess, against hosts of tests.netns, with its own state folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from tests.netns import Network
from tests.netns_wire import wait_for

STAND_IN = ("--gpus", "6x b200", "--nodes", "3", "--context", "32k")
"""Two ranks on each of three nodes: as few processes as a pipeline with tensor parallelism has."""
LONG_S = 240.0
"""For what ends by itself, however busy the machine is."""


@dataclass(frozen=True)
class Ran:
    """What a command printed, its exit code and how long it took."""

    code: int
    out: str
    err: str
    seconds: float

    def ok(self) -> Ran:
        """Itself, if all went well."""
        assert self.code == 0, self.out + self.err
        return self


@contextmanager
def interruptible() -> Iterator[None]:
    """What is started here can be interrupted, also from a shell's job in the background, whose children inherit that
    SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Program:
    """A command under way; what it prints is read as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self._out: list[str] = []
        self._err: list[str] = []
        pairs: tuple[tuple[IO[str], list[str]], ...] = ((process.stdout, self._out), (process.stderr, self._err))
        self._readers = [threading.Thread(target=kept.extend, args=(stream,), daemon=True) for stream, kept in pairs]
        for reader in self._readers:
            reader.start()

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return "".join(self._out)

    @property
    def err(self) -> str:
        """What it has told people so far."""
        return "".join(self._err)

    def says(self, *words: str) -> None:
        """Wait for a line with all these words, on either stream."""

        def said() -> bool:
            ended = self.process.poll() is not None and not any(reader.is_alive() for reader in self._readers)
            if any(all(word in line for word in words) for line in [*self._out, *self._err]):
                return True
            assert not ended, f"it ended without a line with {words}: {self.out}{self.err}"
            return False

        wait_for(f"a line with {words}", said, LONG_S)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Wait for its end and for all that it printed; its exit code."""
        try:
            code = self.process.wait(LONG_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it goes on: {self.out}{self.err}")
        for reader in self._readers:
            reader.join(LONG_S)
        return code


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

    def run(self, *words: str, timeout_s: float = LONG_S, **extra: str) -> Ran:
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

    def launching(self, *words: str, **extra: str) -> AbstractContextManager[Program]:
        """A rehearsal under way."""
        return self.program("launch", "--rehearse", "--hosts", self.hosts.names, *STAND_IN, *words, **extra)

    @contextmanager
    def program(self, *words: str, **extra: str) -> Iterator[Program]:
        """A command under way; it is killed at the end if it still runs."""
        with interruptible():
            process = subprocess.Popen(
                [sys.executable, "-m", "glmplan", *words], env=self._environment(extra), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
        found = Program(process)
        try:
            yield found
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            found.end()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()

    def left(self) -> dict[str, dict[int, str]]:
        """What still runs on the hosts that are up; an empty dict is what every test wants at its end.

        Workers and their supervisors must be gone at once; a visit of the node program may take a moment to end.
        """
        deadline = time.monotonic() + 20
        while True:
            found = {name: self.hosts.pids(name) for name, host in self.hosts.hosts.items() if host.init is not None}
            found = {name: pids for name, pids in found.items() if pids}
            started = any("node.pyz" in line for pids in found.values() for line in pids.values())
            if started or not found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


def workers(hosts: Network, name: str, words: Sequence[str] = ("standin",)) -> dict[int, str]:
    """The stand-in's processes on a host."""
    return {pid: line for pid, line in hosts.pids(name).items() if all(word in line for word in words)}


def a_rank(hosts: Network, name: str) -> int:
    """A rank on a host: a child of the node's own process. Waits until there is one."""
    found: list[int] = []

    def forked() -> bool:
        all_pids = workers(hosts, name)
        found[:] = [pid for pid in all_pids if parent(pid) in all_pids]
        return bool(found)

    wait_for(f"a rank on {name}", forked)
    return found[0]


def parent(pid: int) -> int | None:
    """The parent's pid; None when the process is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def logs(hosts: Network, name: str) -> str:
    """What workers printed on a host."""
    return "".join(path.read_text(errors="replace") for path in hosts[name].state.glob("*/log"))


def all_stopped(text: str, hosts: Sequence[str] = ("h1", "h2", "h3")) -> bool:
    """Whether `stop` proved it for each of these hosts, once each. A node that is stopped takes the others with it, and one
    that is asked late has ended before."""
    told = re.findall(r"^ *(\w+): (?:stopped, |nothing to stop, its worker had ended before)", text, re.MULTILINE)
    return sorted(told) == sorted(hosts) and ": stopped, " in text


def wait_for_workers(hosts: Network) -> None:
    """Until every host runs the stand-in."""
    wait_for("the workers", lambda: all(workers(hosts, name) for name in hosts.hosts))


def wait_for_loading(hosts: Network, name: str) -> None:
    """Until both ranks of a host have met the others and load."""
    wait_for(f"loading on {name}", lambda: logs(hosts, name).count("Load weight begin") == 2, LONG_S)


def wait_for_end(hosts: Network, name: str) -> None:
    """Until nothing of a host's node runs and its end is on record there."""
    wait_for(f"the end of the node on {name}", lambda: not workers(hosts, name))
    wait_for("its record", lambda: all("ended_s" in path.read_text() for path in hosts[name].state.glob("*/worker.json")))


@pytest.fixture
def controller(three_hosts: Network, tmp_path: Path) -> Iterator[Controller]:
    """A controller of its own per test; every test must leave the hosts empty."""
    found = Controller(three_hosts, tmp_path)
    yield found
    left = found.left()
    for name, host in three_hosts.hosts.items():
        if host.init is None or left.get(name):
            three_hosts.reboot(name)
        shutil.rmtree(host.state, ignore_errors=True)
    assert left == {}
