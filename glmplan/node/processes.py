"""Which processes run on this host and to which deployment they belong, from /proc.

A process is named by its pid and its start time in clock ticks since boot, so that a reused pid is never taken for it.
A deployment's processes are those that carry its state folder in GLMPLAN_STATE (also after setsid), those of the worker's
session and process group, and the descendants of all these. A zombie without live threads counts as ended.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "GLMPLAN_STATE"
"""Environment variable of every process of a deployment: its state folder, which is unique on a host."""


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat. `name`: of the program, its first 15 bytes."""

    pid: int
    name: str
    parent: int
    group: int
    session: int
    start_ticks: int
    ended: bool


def boot_id() -> str:
    """A name of this boot; empty where the kernel tells none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_process(pid: int) -> Process | None:
    """A process that exists, zombies included."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    end = text.rindex(b")")
    fields = text[end + 2 :].split()
    threads = int(fields[17])
    ended = fields[0] in (b"Z", b"X", b"x") and threads <= 1
    name = text[text.index(b"(") + 1 : end].decode(errors="replace")
    return Process(pid, name, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]), ended)


def all_processes() -> list[Process]:
    """Every process of this host that has not ended."""
    found = [read_process(int(name)) for name in os.listdir("/proc") if name.isdigit()]
    return [process for process in found if process is not None and not process.ended]


def is_alive(record: dict[str, Any]) -> bool:
    """Whether the process of a record {"pid", "start_ticks", "boot_id"} still runs."""
    pid = record.get("pid")
    if not isinstance(pid, int) or record.get("boot_id") != boot_id():
        return False
    process = read_process(pid)
    return process is not None and not process.ended and process.start_ticks == record.get("start_ticks")


def kill(record: dict[str, Any]) -> None:
    """End the process of a record, if it still runs."""
    if is_alive(record):
        with suppress(ProcessLookupError):
            os.kill(record["pid"], signal.SIGKILL)


def record_of(pid: int) -> dict[str, Any]:
    """What names a process for `is_alive` later."""
    process = read_process(pid)
    return {"pid": pid, "start_ticks": process.start_ticks if process else None, "boot_id": boot_id()}


def of_deployment(place: Path, worker: dict[str, Any]) -> list[Process]:
    """All processes of a deployment but its supervisor; `worker` is its record, empty when there is none."""
    processes = all_processes()
    group = _group(worker)
    own = {p.pid for p in processes if _belongs(p, f"{MARK}={place}".encode(), group)}
    supervisor = worker.get("supervisor", {})
    roots = own | ({supervisor["pid"]} if is_alive(supervisor) else set())
    grown = True
    while grown:
        more = {p.pid for p in processes if p.parent in roots} - roots
        roots, own, grown = roots | more, own | more, bool(more)
    return [p for p in processes if p.pid in own and p.pid != os.getpid() and p.pid != supervisor.get("pid")]


def _group(worker: dict[str, Any]) -> int | None:
    """The worker's process group and session, unless this boot or its pid is another's by now."""
    pid = worker.get("pid")
    if not isinstance(pid, int) or worker.get("boot_id") != boot_id():
        return None
    leader = read_process(pid)
    return None if leader is not None and leader.start_ticks != worker.get("start_ticks") else pid


def _belongs(process: Process, mark: bytes, group: int | None) -> bool:
    environment = _environment(process.pid)
    if environment:
        return mark in environment
    return group is not None and group in (process.group, process.session) and user_id(process.pid) == os.geteuid()


def _environment(pid: int) -> list[bytes]:
    """What the process was started with; empty when another user's, or overwritten by a process title."""
    try:
        return [word for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if word]
    except OSError:
        return []


def user_id(pid: int) -> int | None:
    """The user that a process runs as."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def started_s(process: Process) -> float | None:
    """When it started, as Unix time."""
    try:
        line = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) + process.start_ticks / os.sysconf("SC_CLK_TCK")


def send(processes: list[Process], number: signal.Signals) -> None:
    """Signal each of them that is still the same process."""
    for process in processes:
        now = read_process(process.pid)
        if now is not None and now.start_ticks == process.start_ticks:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)
