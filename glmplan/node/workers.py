"""The workers of this host: start one, ask how it is, stop it, list them all, forget a dead one.

Everything is read from the state folder and /proc, so that any later connection, or a controller that was started again,
knows as much as the one that started the worker. Sizes in bytes, times as Unix seconds.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import launcher, state, worker_gpus
from .errors import NodeError
from .processes import Process, all_processes, boot_id, is_alive, kill, of_deployment, send
from .procfs import process
from .worker_log import read_log

LOCK_S = 45.0
"""A start holds the lock for seconds, and reading the GPUs takes the longest; below what the caller of a start waits."""
STOP_LOCK_S = launcher.START_S + 5.0
"""The supervisor of a start that is under way is up by then, or given up; only slow GPU readings last longer."""
KILL_S = 8.0
"""After SIGKILL a process that stays is stuck in the kernel."""
RECORD_S = 5.0
"""A supervisor writes the end of its worker down within this time, also on a busy host."""
COMPILERS = frozenset(("nvcc", "cicc", "ptxas", "ptxas-blackwell", "cudafe++", "cc1plus", "ninja"))
"""Short names of the programs by which engines, FlashInfer and Triton compile kernels at a first start."""
GPU_FREE_S = 8.0
"""The driver frees a dead process's memory within this time; `gpu_free_s` of a request can shorten it."""


def start(request: dict[str, Any]) -> dict[str, Any]:
    """Start the worker of a plan, or adopt the one that runs."""
    wanted = launcher.order(request)
    with state.writing(state.home()):
        state.make_folder(state.home())
        (state.home() / "lock").touch(mode=0o600)
    with state.lock(LOCK_S) as lock:
        if lock is None:
            raise NodeError("busy", f"Another start or stop on this host has not ended within {LOCK_S:g} s.", "Try again.")
        return _adopt(wanted) or _start(wanted, lock)


def _adopt(wanted: launcher.Order) -> dict[str, Any] | None:
    """The running worker of the same plan; another plan of this name that still has processes is refused."""
    place = wanted.place
    told, worker, found = _seen(place)
    if found == "running" and told.get("digest") == wanted.digest:
        if told.get("node_rank") != wanted.node_rank:
            raise NodeError(
                "usage",
                f"This host is node {told.get('node_rank')} of {wanted.deployment} already, and node {wanted.node_rank} was "
                "asked for: two names mean one machine.",
                "Name each machine once.",
            )
        state.add_event(place, "adopted", owner=wanted.owner)
        return {"state": "adopted", "pid": worker.get("pid"), "log": str(place / "log"), "started_s": told["started_s"],
                "owner": told.get("owner")}  # fmt: skip
    left = of_deployment(place, worker)
    if found == "running" or left:
        pid = worker.get("pid") or (left[0].pid if left else None)
        what = "runs with another plan" if found == "running" else "has ended but left processes"
        raise NodeError(
            "busy",
            f"{wanted.deployment} of {told.get('owner') or 'an unknown owner'} {what} (pid {pid}, "
            f"started {_clock(told.get('started_s'))}).",
            f"Stop it: glmplan stop {wanted.deployment}.",
        )
    return None


def _start(wanted: launcher.Order, lock: int) -> dict[str, Any]:
    environment = launcher.worker_environment(wanted)
    argv = launcher.worker_argv(wanted, environment)
    _require_free_gpus(wanted)
    _require_own_ports(wanted)
    launcher.require_free_ports(wanted.tcp_ports)
    gpus = worker_gpus.readings({"gpu_indexes": wanted.gpu_indexes}, set())
    started_s = time.time()
    try:
        launcher.write_state(wanted, started_s, gpus)
        found = launcher.supervise(wanted, argv, environment, lock)
    except NodeError:
        _end(wanted.place, 0.0)
        state.remove(wanted.place)
        raise
    return {"state": "started", "pid": found["pid"], "log": str(wanted.place / "log"), "started_s": started_s}


def _others_that_run(wanted: launcher.Order) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What was ordered of every other deployment that runs here, and its worker."""
    for place in state.folders(of_all_nodes=True):
        told, worker, found = _seen(place)
        if place != wanted.place and found == "running":
            yield told, worker


def _require_free_gpus(wanted: launcher.Order) -> None:
    """Refuse GPUs on which another deployment or anybody else's process works."""
    for told, worker in _others_that_run(wanted):
        shared = sorted(set(told.get("gpu_indexes", [])) & set(wanted.gpu_indexes))
        if not shared:
            continue
        raise NodeError(
            "busy",
            f"GPU {shared[0]} works for {told['deployment']} of {told.get('owner') or 'an unknown owner'} "
            f"(pid {worker.get('pid')}, started {_clock(told.get('started_s'))}).",
            f"Stop it (glmplan stop {told['deployment']}), or use other GPUs.",
        )
    worker_gpus.require_no_foreign(wanted.gpu_indexes)


def _require_own_ports(wanted: launcher.Order) -> None:
    """Refuse ports of another deployment that runs, also while its worker has not come to listening yet."""
    for told, worker in _others_that_run(wanted):
        shared = [one for one in wanted.tcp_ports if any(_same_port(one, other) for other in told.get("tcp_ports", []))]
        if not shared:
            continue
        raise NodeError(
            "port-taken",
            f"TCP port {str(shared[0]).lstrip(':')} belongs to {told['deployment']} of "
            f"{told.get('owner') or 'an unknown owner'} (pid {worker.get('pid')}, started {_clock(told.get('started_s'))}).",
            f"Stop it (glmplan stop {told['deployment']}), or choose another port.",
        )


def _same_port(one: object, other: object) -> bool:
    """Whether two entries of `tcp_ports` meet: equal ports on one address, or on any."""
    (address, _, port), (other_address, _, other_port) = str(one).rpartition(":"), str(other).rpartition(":")
    return port == other_port and (
        address == other_address or not {address, other_address}.isdisjoint({"", "0.0.0.0", "::"})
    )


def condition(place: Path, worker: dict[str, Any]) -> str:
    """`running`, `exited`, `gone` (died without a record), `rebooted` or `absent`."""
    if not (place / "start.json").exists():
        return "absent"
    if "ended_s" in worker:
        return "exited"
    if worker.get("boot_id", boot_id()) != boot_id():
        return "rebooted"
    alive = is_alive(worker) or is_alive(worker.get("starter", {})) or is_alive(worker.get("supervisor", {}))
    return "running" if alive else "gone"


def _seen(place: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """start.json, worker.json and the condition; an end that is recorded while we look is not taken for a vanishing."""
    told, worker = state.read_json(place / "start.json"), state.read_json(place / "worker.json")
    found = condition(place, worker)
    if found == "gone":
        worker = state.read_json(place / "worker.json")
        found = condition(place, worker)
    return told, worker, found


def poll(request: dict[str, Any]) -> dict[str, Any]:
    """How a worker is, and what it printed from `log_offset` on (negative: from the end), at most `max_bytes`."""
    place = state.folder(request["deployment"])
    told, worker, found = _seen(place)
    processes = of_deployment(place, worker)
    return {
        "state": found,
        "exit_status": worker.get("exit_status"), "signal": worker.get("signal"), "ended_s": worker.get("ended_s"),
        "pid": worker.get("pid"), "started_s": told.get("started_s"), "digest": told.get("digest"),
        "owner": told.get("owner"), "node_rank": told.get("node_rank"),
        **read_log(place, int(request.get("log_offset", 0)), int(request.get("max_bytes", 1 << 18))),
        "gpus": worker_gpus.readings(told, {p.pid for p in processes}) if request.get("gpus", True) else [],
        "processes": len(processes), "compilers": sorted({p.name for p in processes} & COMPILERS),
        "supervised": is_alive(worker.get("supervisor", {})),
        "events": state.read_events(place), "time_s": time.time(),
    }  # fmt: skip


def stop(request: dict[str, Any]) -> dict[str, Any]:
    """End every process of a deployment, and show that none is left and that its GPU memory is free.

    A start that holds the lock for too long does not protect what runs; but where it may be this deployment's, nothing shows
    that its worker does not come up later, and that is told.
    """
    place = state.folder(request["deployment"])
    with state.lock(STOP_LOCK_S, shared=True) as lock:
        told, _, was = _seen(place)
        if was == "running":
            state.add_event(place, "stopping", grace_s=request.get("grace_s", 10.0))
        ended = _end(place, float(request.get("grace_s", 10.0)))
        survivors = _alive(place)
        _end_supervisor(place)
        free_s = min(float(request.get("gpu_free_s", GPU_FREE_S)), GPU_FREE_S)
        gpus, problem = worker_gpus.after_stop(told, {p.pid for p in ended}, free_s)
    if lock is None and state.lockable() and (was == "absent" or _starting(place)):
        raise NodeError(
            "busy",
            f"A start on this host is still under way after {STOP_LOCK_S:g} s, and its worker may come up after this stop.",
            "Stop it again in a minute.",
        )
    held = [gpu for gpu in gpus if gpu["freed"] is False]
    if was == "running":
        state.add_event(place, "stopped", killed=len(ended), survivors=[p.pid for p in survivors])
    return {
        "stopped": not survivors and not held, "killed": len(ended), "was": was, "gpus": gpus,
        "gpu_problem": problem, "survivors": [process(p.pid) for p in survivors],
    }  # fmt: skip


def _starting(place: Path) -> bool:
    """Whether the program that starts the worker still runs."""
    return is_alive(state.read_json(place / "worker.json").get("starter", {}))


def _alive(place: Path) -> list[Process]:
    return of_deployment(place, state.read_json(place / "worker.json"))


def _end(place: Path, grace_s: float) -> list[Process]:
    """TERM, then KILL, until nothing is left or nothing helps; returns all that were ended or tried."""
    seen: dict[int, Process] = {}
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_S)):
        deadline, told = time.monotonic() + wait_s, set()
        while True:
            alive = _still(place, seen)
            if not alive:
                return list(seen.values())
            send([p for p in alive if p.pid not in told or number == signal.SIGKILL], number)
            told |= {p.pid for p in alive}
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
    return list(seen.values())


def _still(place: Path, seen: dict[int, Process]) -> list[Process]:
    """The deployment's processes, and those seen before that lost their parents since."""
    found = {p.pid: p for p in _alive(place)}
    now = {p.pid: p for p in all_processes()}
    for pid, known in seen.items():
        if pid in now and now[pid].start_ticks == known.start_ticks:
            found[pid] = now[pid]
    seen.update(found)
    return list(found.values())


def _end_supervisor(place: Path) -> None:
    """Let it write its record; a stuck one is killed."""
    deadline = time.monotonic() + RECORD_S
    while is_alive(supervisor := state.read_json(place / "worker.json").get("supervisor", {})):
        if time.monotonic() > deadline:
            return kill(supervisor)
        time.sleep(0.02)


def deployments(request: dict[str, Any]) -> dict[str, Any]:
    """All deployments of this node that have state here."""
    found = []
    for place in state.folders():
        told, worker, condition_now = _seen(place)
        names = ("deployment", "owner", "digest", "node_rank", "gpu_indexes", "tcp_ports", "started_s")
        found.append({**{name: told.get(name) for name in names}, "deployment": place.name, "pid": worker.get("pid"),
                      "state": condition_now, "processes": len(of_deployment(place, worker))})  # fmt: skip
    return {"deployments": found, "time_s": time.time()}


def forget(request: dict[str, Any]) -> dict[str, Any]:
    """Remove the state of a deployment that does not run."""
    place = state.folder(request["deployment"])
    with state.lock(LOCK_S):
        _, worker, found = _seen(place)
        if found == "running" or of_deployment(place, worker):
            raise NodeError("busy", f"{place.name} runs (pid {worker.get('pid')}).", f"Stop it: glmplan stop {place.name}.")
        known = place.exists()
        state.remove(place)
    return {"forgotten": known}


def _clock(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "at an unknown time"
