"""Follow a start: poll every node, read its log, and say when all are ready or which failed first, and how.

The followed state is of the hosts, not of this connection: a link that drops for less than `lost_after_s` costs nothing,
because the workers go on and the log is read from where it was left. Clocks here are this machine's monotonic seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glmplan.errors import UnreachableError
from glmplan.fleet.deadline import Eta, LoadWork, Pulse, eta
from glmplan.fleet.deployment import Deployment
from glmplan.fleet.diagnosis import GpuMemory, NodeEvidence, State
from glmplan.fleet.hosts import Fleet
from glmplan.fleet.phases import LogLine, NodeProgress, ranks_of_node
from glmplan.kernels.engines import PortLine, parse_port_line
from glmplan.transport.fanout import Outcome

POLL_S = 1.0
POLL_TIMEOUT_S = 15.0
LOST_AFTER_S = 60.0
"""A host that does not answer for this long is lost: twice the usual spanning-tree or bond fail-over of 30 s."""
LOG_BYTES = 262_144
TAIL_PIECES = 16
"""Of a log that grew while nobody read it, so many pieces are read from its end: 4 MiB."""

_STATES: dict[str, State] = {
    "running": "running", "exited": "exited", "gone": "gone", "rebooted": "rebooted", "absent": "absent",
}  # fmt: skip

FailureKind = Literal["exited", "gone", "rebooted", "stopped", "lost", "stalled", "deadline", "refused"]


@dataclass
class NodeView:
    """One node as last seen. `gpus` are the plan's; `processes` counts what runs of the deployment, `compilers` names
    those of them that compile."""

    host: str
    node_rank: int
    progress: NodeProgress
    work: LoadWork
    pulse: Pulse
    state: str = "starting"
    exit_status: int | None = None
    signal: int | None = None
    dead_for_s: float = 0.0
    log_offset: int = 0
    log_size: int = 0
    log_age_s: float | None = None
    gpus: dict[int, GpuMemory] = field(default_factory=dict)
    port_lines: list[PortLine] = field(default_factory=list)
    processes: int = 0
    compilers: tuple[str, ...] = ()
    events: tuple[dict[str, Any], ...] = ()
    answered_s: float = 0.0
    silent: str | None = None

    def eta(self, gpu_indexes: tuple[int, ...], now_s: float) -> Eta:
        """Time left on this node, from files read or from the growth of its GPUs' memory."""
        grown = {
            rank: self.gpus[index].used_bytes or 0
            for rank, index in zip(self.progress.ranks, gpu_indexes, strict=False)
            if index in self.gpus
        }
        return eta(self.progress, self.work, grown, now_s)

    @property
    def memory_bytes(self) -> int:
        """GPU memory of this deployment on the node."""
        return sum(gpu.used_bytes or 0 for gpu in self.gpus.values())

    def evidence(self, kernel_log: tuple[str, ...] = ()) -> NodeEvidence:
        """What a diagnosis needs of this node."""
        return NodeEvidence(
            node_rank=self.node_rank,
            host=self.host,
            lines=tuple(self.progress.lines),
            state="unreachable" if self.silent else _STATES.get(self.state, "running"),
            exit_status=self.exit_status,
            signal=self.signal,
            gpus=tuple(self.gpus.values()),
            kernel_log=kernel_log,
            was_ready=self.progress.ready,
        )


@dataclass(frozen=True)
class Failure:
    """Why following ended without a healthy start; `host` is where it shows first."""

    kind: FailureKind
    host: str
    node_rank: int
    message: str
    exit_status: int | None = None
    signal: int | None = None


@dataclass(frozen=True)
class Limits:
    """When to give up, in seconds. `stall_s` None: by phase and disk, as `fleet.deadline` works it out."""

    deadline_s: float
    stall_s: float | None = None
    lost_after_s: float = LOST_AFTER_S
    poll_s: float = POLL_S


@dataclass(frozen=True)
class Snapshot:
    """What a table shows after one poll."""

    elapsed_s: float
    nodes: tuple[NodeView, ...]
    new_lines: tuple[tuple[str, LogLine], ...]


def views(deployment: Deployment, works: Sequence[LoadWork], now_s: float) -> tuple[NodeView, ...]:
    """Fresh views of the deployment's nodes; `works` in node-rank order."""
    plan = deployment.plan
    return tuple(
        NodeView(
            host,
            rank,
            NodeProgress(
                deployment.log_family,
                ranks_of_node(plan, rank), plan.layout.tp_size, head=rank == 0, now_s=now_s,
            ),
            works[rank],
            Pulse(now_s),
            answered_s=now_s,
        )
        for rank, host in enumerate(deployment.hosts)
    )  # fmt: skip


def poll_once(fleet: Fleet, deployment: Deployment, nodes: Iterable[NodeView], now_s: float) -> list[tuple[str, LogLine]]:
    """Ask every node once and take in what it says; returns the new log lines."""
    nodes = tuple(nodes)
    wanted = {
        node.host: {"deployment": deployment.name, "log_offset": node.log_offset, "max_bytes": LOG_BYTES} for node in nodes
    }
    outcomes = fleet.ask_all("poll", wanted, timeout_s=POLL_TIMEOUT_S)
    lines: list[tuple[str, LogLine]] = []
    for node in nodes:
        lines += [(node.host, line) for line in _take(node, outcomes[node.host], now_s)]
    return lines


def _take(node: NodeView, outcome: Outcome[dict[str, Any]], now_s: float) -> tuple[LogLine, ...]:
    if outcome.result is None:
        node.silent = outcome.error.message if outcome.error else "no answer"
        if outcome.error is not None and not isinstance(outcome.error, UnreachableError):
            node.answered_s = now_s
        return ()
    found = outcome.result
    node.silent, node.answered_s = None, now_s
    node.state, node.exit_status, node.signal = found["state"], found.get("exit_status"), found.get("signal")
    node.dead_for_s = found["time_s"] - found["ended_s"] if found.get("ended_s") else 0.0
    node.log_offset, node.log_age_s = found["log_offset"], found.get("log_age_s")
    node.log_size = found.get("log_size") or node.log_offset
    node.gpus = {
        gpu["index"]: GpuMemory(gpu["index"], gpu.get("used_bytes"), gpu.get("in_use_bytes"), gpu.get("total_bytes"))
        for gpu in found.get("gpus") or ()
    }
    node.processes, node.compilers = found.get("processes") or 0, tuple(found.get("compilers") or ())
    node.events = tuple(found.get("events") or ())
    node.pulse.beat(now_s, node.log_offset, {index: gpu.used_bytes or 0 for index, gpu in node.gpus.items()})
    lines = node.progress.feed(found.get("log") or "", now_s)
    if node.state not in ("running", "starting") and node.log_offset >= node.log_size:
        lines += node.progress.finish(now_s)
    node.port_lines += [told for told in (parse_port_line(line.text) for line in lines) if told is not None]
    return lines


def all_ready(nodes: Iterable[NodeView], family: str) -> bool:
    """The head has finished; so have the others that say when they do (a headless vLLM node does not)."""
    nodes = tuple(nodes)
    if not nodes[0].progress.ready:
        return False
    others = nodes[1:] if family == "sglang" else ()
    return all(node.progress.ready for node in others) and all(node.state == "running" for node in nodes)


def failure(nodes: Iterable[NodeView], limits: Limits, elapsed_s: float, now_s: float) -> Failure | None:
    """What is wrong now, the root before its consequences: a dead worker before silence, silence before time."""
    nodes = tuple(nodes)
    dead = [node for node in nodes if node.state in ("exited", "gone", "rebooted", "absent")]
    if dead:
        return _death(min(dead, key=_blame))
    for node in nodes:
        if node.silent and now_s - node.answered_s > limits.lost_after_s:
            return Failure("lost", node.host, node.node_rank, f"{node.host} is lost: {node.silent}")
    if elapsed_s > limits.deadline_s:
        slow = min(nodes, key=lambda node: node.progress.phase)
        return Failure(
            "deadline", slow.host, slow.node_rank,
            f"{slow.host} is still {slow.progress.phase.label} after {elapsed_s:.0f} s; "
            f"{limits.deadline_s:.0f} s were allowed.",
        )  # fmt: skip
    return _stall(nodes, limits, now_s)


def failure_of_running(nodes: Iterable[NodeView], limits: Limits, now_s: float) -> Failure | None:
    """A death or a lost host; a server that runs has no deadline and may be silent."""
    return failure(nodes, replace(limits, deadline_s=float("inf"), stall_s=float("inf")), 0.0, now_s)


def _stall(nodes: tuple[NodeView, ...], limits: Limits, now_s: float) -> Failure | None:
    """Silence of all nodes at once: one that waits for another is silent for good reason."""
    words = []
    for node in nodes:
        quiet = now_s - node.pulse.alive_s
        if limits.stall_s is None:
            found = node.pulse.stalled(node.progress.phase, node.work, now_s)
        elif quiet > limits.stall_s:
            found = f"no log line and no growth of GPU memory for {quiet:.0f} s; {limits.stall_s:.0f} s are allowed"
        else:
            found = None
        if found is None:
            return None
        words.append(found)
    slow = min(nodes, key=lambda node: (node.progress.phase, node.node_rank))
    return Failure("stalled", slow.host, slow.node_rank, f"{slow.host} stalled: {words[slow.node_rank]}.")


def _blame(node: NodeView) -> tuple[int, float, int]:
    """A worker that was killed or vanished explains the others' exits; then the one that died first."""
    killed = node.signal is not None and node.signal != 15
    kind = 0 if killed or node.state in ("rebooted", "gone", "absent") else 1 if node.exit_status else 2
    return kind, -node.dead_for_s, node.node_rank


def _death(node: NodeView) -> Failure:
    where = f"on {node.host} (node {node.node_rank})"
    if node.state == "exited" and node.signal:
        return Failure(
            "exited", node.host, node.node_rank, f"The worker {where} was ended by signal {node.signal}.", None, node.signal
        )
    if node.state == "exited":
        words = f"The worker {where} ended with exit status {node.exit_status}."
        return Failure("exited", node.host, node.node_rank, words, node.exit_status)
    if node.state == "rebooted":
        return Failure("rebooted", node.host, node.node_rank, f"{node.host} was rebooted: its worker is gone.")
    if node.state == "absent":
        return Failure("stopped", node.host, node.node_rank, f"The deployment is no longer {where}: somebody stopped it.")
    return Failure("gone", node.host, node.node_rank, f"The worker {where} vanished without a record of its end.")


def follow(
    fleet: Fleet,
    deployment: Deployment,
    works: Sequence[LoadWork],
    limits: Limits,
    on_snapshot: Callable[[Snapshot], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[tuple[NodeView, ...], Failure | None, float]:
    """Poll until all nodes are ready, or something failed: the nodes, the failure, the seconds it took."""
    began = clock()
    nodes = views(deployment, works, began)
    while True:
        now = clock()
        lines = poll_once(fleet, deployment, nodes, now)
        elapsed = clock() - began
        on_snapshot(Snapshot(elapsed, nodes, tuple(lines)))
        if all_ready(nodes, deployment.log_family):
            for node in nodes:
                if not node.progress.ready:
                    node.progress.mark_ready(clock())
            return nodes, None, elapsed
        found = failure(nodes, limits, elapsed, clock())
        if found is not None:
            return _settle(fleet, deployment, nodes, clock, on_snapshot, elapsed), found, elapsed
        sleep(limits.poll_s)


def _settle(
    fleet: Fleet,
    deployment: Deployment,
    nodes: tuple[NodeView, ...],
    clock: Callable[[], float],
    on_snapshot: Callable[[Snapshot], None],
    elapsed_s: float,
) -> tuple[NodeView, ...]:
    """One more look at the logs."""
    on_snapshot(Snapshot(elapsed_s, nodes, tuple(catch_up(fleet, deployment, nodes, clock))))
    return nodes


def catch_up(
    fleet: Fleet, deployment: Deployment, nodes: tuple[NodeView, ...], clock: Callable[[], float] = time.monotonic
) -> list[tuple[str, LogLine]]:
    """Read every log to its end, or the end of a long one: the reason is often written just after the first sign."""
    time.sleep(0.3)
    lines: list[tuple[str, LogLine]] = []
    for piece in range(TAIL_PIECES):
        lines += poll_once(fleet, deployment, nodes, clock())
        behind = [node for node in nodes if not node.silent and node.log_offset < node.log_size]
        if not behind:
            break
        for node in behind:
            node.log_offset = max(node.log_offset, node.log_size - (TAIL_PIECES - 1 - piece) * LOG_BYTES)
    return lines
