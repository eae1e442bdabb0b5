"""What runs now: the nodes of a deployment, or all deployments of some hosts, asked of the hosts themselves."""

from __future__ import annotations

from typing import Literal

from glmplan.errors import GlmplanError
from glmplan.facts.base import Frozen
from glmplan.fleet.deployment import Deployment
from glmplan.fleet.hosts import Fleet
from glmplan.fleet.launch import head_ask

HEAD_S = 10.0
Word = Literal["serving", "starting", "degraded", "stopped", "unknown"]


class NodeStatus(Frozen):
    """One node as its host tells it. `state` is the node program's word, or "unreachable"."""

    host: str
    node_rank: int
    state: str
    pid: int | None = None
    exit_status: int | None = None
    signal: int | None = None
    started_s: float | None = None
    log_age_s: float | None = None
    processes: int = 0
    gpu_memory_bytes: int | None = None
    note: str = ""


class DeploymentStatus(Frozen):
    """A deployment in one word: serving (every node runs and the head lists its model), starting (every node runs),
    degraded (some nodes do not run), stopped (none does), unknown (a host does not answer)."""

    name: str
    word: Word
    url: str
    rehearsal: bool
    summary: str
    canaries_passed: tuple[str, ...]
    nodes: tuple[NodeStatus, ...]


class Listed(Frozen):
    """A deployment that a host has state of, whoever started it."""

    host: str
    deployment: str
    state: str
    owner: str | None = None
    node_rank: int | None = None
    pid: int | None = None
    gpu_indexes: tuple[int, ...] = ()
    started_s: float | None = None


def status(fleet: Fleet, deployment: Deployment) -> DeploymentStatus:
    """Ask every node, and the head whether it serves."""
    wanted = {host: {"deployment": deployment.name, "log_offset": -1, "max_bytes": 1} for host in deployment.hosts}
    outcomes = fleet.ask_all("poll", wanted, timeout_s=15.0)
    nodes = []
    for rank, host in enumerate(deployment.hosts):
        result, error = outcomes[host].result, outcomes[host].error
        if result is None:
            nodes.append(NodeStatus(host=host, node_rank=rank, state="unreachable", note=error.message if error else ""))
            continue
        used = [gpu["used_bytes"] for gpu in result.get("gpus") or () if gpu.get("used_bytes") is not None]
        other = result.get("digest") not in (None, deployment.digest)
        nodes.append(
            NodeStatus(
                host=host, node_rank=rank, state=result["state"], pid=result.get("pid"),
                exit_status=result.get("exit_status"), signal=result.get("signal"), started_s=result.get("started_s"),
                log_age_s=result.get("log_age_s"), processes=result.get("processes") or 0,
                gpu_memory_bytes=sum(used) if used else None,
                note="runs another plan of the same name" if other else "",
            )
        )  # fmt: skip
    word = _word(fleet, deployment, nodes)
    return DeploymentStatus(
        name=deployment.name, word=word, url=deployment.base_url, rehearsal=deployment.rehearsal,
        summary=deployment.plan.summary, canaries_passed=deployment.canaries_passed, nodes=tuple(nodes),
    )  # fmt: skip


def _word(fleet: Fleet, deployment: Deployment, nodes: list[NodeStatus]) -> Word:
    states = {node.state for node in nodes}
    if "unreachable" in states:
        return "unknown"
    if states == {"running"}:
        return "serving" if _serves(fleet, deployment) else "starting"
    return "degraded" if "running" in states else "stopped"


def _serves(fleet: Fleet, deployment: Deployment) -> bool:
    try:
        code, _ = head_ask(fleet, deployment)("GET", "/v1/models", None, HEAD_S)
    except GlmplanError:
        return False
    return code == 200


def listed(fleet: Fleet) -> tuple[tuple[Listed, ...], dict[str, GlmplanError]]:
    """All deployments of the fleet's hosts, and the hosts that did not answer."""
    outcomes = fleet.ask_all("deployments", None, timeout_s=15.0)
    found, failed = [], {}
    for host in fleet.names:
        outcome = outcomes[host]
        if outcome.result is None:
            assert outcome.error is not None
            failed[host] = outcome.error
            continue
        for one in outcome.result["deployments"]:
            names = ("deployment", "state", "owner", "node_rank", "pid", "started_s")
            found.append(
                Listed(host=host, gpu_indexes=tuple(one.get("gpu_indexes") or ()), **{n: one.get(n) for n in names})
            )
    return tuple(found), failed
