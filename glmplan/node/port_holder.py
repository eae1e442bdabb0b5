"""Which process listens on a TCP port here, as far as /proc tells.

Other users' processes are seen by root only. Source: proc(5), /proc/net/tcp.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

from .procfs import pids, process

PASSING_S = 9.0
"""An interrupted visit leaves a listener for 8 s."""
LISTENING = "0A"  # include/net/tcp_states.h: TCP_LISTEN


def holder(port: int) -> dict[str, Any]:
    """`pid`, `owner` and `command` of the process that listens on a port; None where /proc hides it."""
    inodes = _listening_inodes(port)
    found = next((pid for pid in pids() if _holds(pid, inodes)), None) if inodes else None
    if found is None:
        return {"pid": None, "owner": None, "command": None}
    seen = process(found)
    return {name: seen[name] for name in ("pid", "owner", "command")}


def wait_for_passing(port: int) -> bool:
    """Wait while nothing but a listener of `doctor` holds the port; whether one did."""
    deadline, waited = time.monotonic() + PASSING_S, False
    while _is_passing(port) and time.monotonic() < deadline:
        waited = True
        time.sleep(0.1)
    return waited


def _is_passing(port: int) -> bool:
    """Whether a listener of `doctor` holds the port: it lets go by itself in seconds."""
    pid = holder(port)["pid"]
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            words = stream.read().split(b"\0")
    except OSError:
        return False
    return words[-2:] == [b"listen", b""] and any(b"glmplan_bundle" in word for word in words)


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError), open(table, encoding="ascii") as stream:
            for line in list(stream)[1:]:
                cells = line.split()
                if cells[3] == LISTENING and int(cells[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{cells[9]}]")
    return inodes


def _holds(pid: int, inodes: set[str]) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        return any(os.readlink(f"{folder}/{number}") in inodes for number in os.listdir(folder))
    except OSError:
        return False
