"""What every transport offers, and how hosts are named on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from glmplan.errors import UsageError


@dataclass(frozen=True)
class Completed:
    """A command that ended by itself."""

    exit_status: int
    stdout: bytes
    stderr: bytes


class Transport(Protocol):
    """A way to one host. Implementations are used by one thread at a time.

    Failures to reach the host raise `glmplan.errors.UnreachableError`; a command that outlives `timeout_s` raises
    `TimedOutError`, a kind of it. A command's own failure is its exit status.
    """

    name: str

    def run(self, argv: Sequence[str], stdin: bytes = b"", timeout_s: float = 30.0) -> Completed:
        """Run a command to its end, with `stdin` as its whole input."""
        ...

    def close(self) -> None:
        """Let go of the host; commands that were started in sessions of their own go on."""
        ...


@dataclass(frozen=True)
class HostName:
    """A host as the user wrote it: `[user@]host[:port]` for SSH, `local`, or `local#0-3` for part of this machine's GPUs.

    `gpu_indexes` is None for all GPUs. Several `local#...` names are nodes of their own on this machine.
    """

    text: str
    is_local: bool = False
    gpu_indexes: tuple[int, ...] | None = None


MOST_HOSTS = 1024


def parse_hosts(text: str) -> tuple[HostName, ...]:
    """`a,b,user@c:2222,local#0-3` as names; empty, doubled or unreadable ones are refused."""
    names = [part.strip() for part in text.split(",")]
    if any(not name for name in names):
        raise UsageError(f"--hosts {text!r} has an empty name.", "Write --hosts a,b,c.")
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise UsageError(f"--hosts names {doubled} twice.", "Name each host once.")
    if len(names) > MOST_HOSTS:
        raise UsageError(f"--hosts names {len(names):,} hosts; {MOST_HOSTS:,} is the limit.", "Name fewer.")
    found = tuple(_host(name) for name in names)
    seen: dict[int, str] = {}
    for host in found:
        for index in host.gpu_indexes or ():
            if index in seen:
                raise UsageError(f"{seen[index]} and {host.text} both use GPU {index}.", "Give each node its own GPUs.")
            seen[index] = host.text
    return found


def _host(name: str) -> HostName:
    if name in ("local", "localhost"):
        return HostName(name, is_local=True)
    if part := re.fullmatch(r"local#([0-9]+)(?:-([0-9]+))?", name):
        first, last = int(part[1]), int(part[2] or part[1])
        if last < first or last > 255:
            raise UsageError(f"{name} is no range of GPUs.", "Write local#0-3.")
        return HostName(name, is_local=True, gpu_indexes=tuple(range(first, last + 1)))
    if name.startswith("-") or not re.fullmatch(
        r"(?:[^@\s,]+@)?(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+)(?::[0-9]{1,5})?", name
    ):
        raise UsageError(f"{name!r} is no host name.", "Write [user@]host[:port], an alias of ~/.ssh/config, or local.")
    return HostName(name)
