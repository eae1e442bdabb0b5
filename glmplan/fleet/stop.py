"""Stop a deployment on every host, with proof: no process of it left, and the GPUs' memory given back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmplan.facts.base import Frozen
from glmplan.fleet.hosts import Fleet

GRACE_S = 10.0
MOST_S = 75.0
"""Beside the grace: a start that is under way, killing, the record, and the GPUs' memory from a driver that hangs."""


class HostStop(Frozen):
    """One host after a stop. `survivors` are processes that outlived SIGKILL; `error` says why it is unknown.

    `gpu_memory_freed` is NVML's word: None where the node used no GPU or has no driver.
    """

    host: str
    stopped: bool
    was: str | None = None
    killed: int = 0
    survivors: tuple[str, ...] = ()
    gpu_memory_freed: bool | None = None
    error: str | None = None
    next_step: str = ""


def stop_all(fleet: Fleet, name: str, hosts: Sequence[str] | None = None, grace_s: float = GRACE_S) -> tuple[HostStop, ...]:
    """Stop the deployment on the hosts (all by default); never raises for a host, it says so in its line."""
    wanted = {host: {"deployment": name, "grace_s": grace_s} for host in (fleet.names if hosts is None else hosts)}
    if not wanted:
        return ()
    outcomes = fleet.ask_all("stop", wanted, timeout_s=grace_s + MOST_S)
    found = []
    for host in wanted:
        outcome = outcomes[host]
        if outcome.result is None:
            assert outcome.error is not None
            error = outcome.error
            found.append(HostStop(host=host, stopped=False, error=error.message, next_step=error.next_step))
        else:
            found.append(_host(host, outcome.result))
    return tuple(found)


def _host(host: str, result: dict[str, Any]) -> HostStop:
    freed = [gpu["freed"] for gpu in result.get("gpus") or [] if gpu.get("freed") is not None]
    return HostStop(
        host=host,
        stopped=bool(result["stopped"]),
        was=result.get("was"),
        killed=int(result.get("killed") or 0),
        survivors=tuple(f"{one['pid']} {one.get('command') or '?'}" for one in result.get("survivors") or ()),
        gpu_memory_freed=all(freed) if freed else None,
    )
