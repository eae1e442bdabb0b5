"""What /proc says about this host and its processes. Whatever cannot be read is None or empty, never an exception."""

from __future__ import annotations

import os
import pwd
from contextlib import suppress
from typing import Any

KIB = 1024


def read_text(path: str) -> str | None:
    """A small file of the system, without the white space around it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read().strip()
    except (OSError, ValueError):
        return None


def read_int(path: str) -> int | None:
    """A file that holds one decimal number."""
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def memory() -> dict[str, int]:
    """The byte counts of /proc/meminfo by name."""
    rows = [line.replace(":", "").split() for line in (read_text("/proc/meminfo") or "").splitlines()]
    return {row[0]: int(row[1]) * KIB for row in rows if row[2:] == ["kB"]}


def owner(pid: int) -> str | None:
    """The user of a process: the name, or the number where it has none."""
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def process(pid: int, used_bytes: int | None = None) -> dict[str, Any]:
    """A process with its user and its short command; whole command lines may hold secrets."""
    return {
        "pid": pid,
        "used_bytes": used_bytes,
        "owner": owner(pid),
        "command": read_text(f"/proc/{pid}/comm") or None,
    }


def pids() -> list[int]:
    """All processes that this user can see."""
    try:
        return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    except OSError:
        return []


def command_line(pid: int) -> list[str]:
    """The words a process was started with."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            words = stream.read().split(b"\0")
    except OSError:
        return []
    return [word.decode(errors="replace") for word in words if word]


def variable(pid: int, name: str) -> str | None:
    """One environment variable of a process, as it was started; only one's own processes show theirs."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            entries = stream.read().split(b"\0")
    except OSError:
        return None
    prefix = name.encode() + b"="
    found = next((entry for entry in entries if entry.startswith(prefix)), None)
    return None if found is None else found[len(prefix) :].decode(errors="replace")
