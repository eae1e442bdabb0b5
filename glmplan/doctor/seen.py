"""Everything a check may look at: the hosts' facts, the plan, and what was tried between hosts.

Pure data: `doctor.examine` fills it, checks read it. Seconds are wall time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glmplan.engines.base import Endpoints
from glmplan.errors import GlmplanError
from glmplan.facts.gpu import Gpu
from glmplan.facts.host import Host
from glmplan.facts.system import EngineEnvironment, System
from glmplan.planning.network import HostLink, is_local
from glmplan.planning.plan import Plan, PlanNode, PlanRank


@dataclass(frozen=True)
class PortTry:
    """One port that the plan needs on a host. `problem` is None when it is free, "taken", or the system's words."""

    purpose: str
    address: str
    port: int
    problem: str | None = None
    holder: str = ""


@dataclass(frozen=True)
class PathTry:
    """One connection from a host to a listener on another. `problem` is None where the greeting came back."""

    source: str
    target: str
    address: str
    port: int
    ephemeral: bool
    problem: str | None = None
    connect_s: float | None = None


@dataclass(frozen=True)
class Deep:
    """What the slow parts gave: part -> host -> the node program's answer, or the error that came instead."""

    answers: Mapping[str, Mapping[str, dict[str, Any] | GlmplanError]] = field(default_factory=dict)

    def of(self, part: str, host: str) -> dict[str, Any] | GlmplanError | None:
        """The answer of one host; None where the part did not run."""
        return self.answers.get(part, {}).get(host)


@dataclass(frozen=True)
class Seen:
    """The facts of a visit. `hosts` are those that answered, in the order given."""

    hosts: tuple[Host, ...]
    plan: Plan | None = None
    endpoints: Endpoints = field(default_factory=Endpoints)
    names: tuple[str, ...] = ()
    unreachable: Mapping[str, GlmplanError] = field(default_factory=dict)
    links: tuple[HostLink, ...] = ()
    ports: Mapping[str, tuple[PortTry, ...]] = field(default_factory=dict)
    paths: tuple[PathTry, ...] = ()
    problems: Mapping[str, GlmplanError] = field(default_factory=dict)
    deep: Deep = field(default_factory=Deep)

    def node(self, host: Host) -> PlanNode | None:
        """The plan's node on a host: by name where the plan names these hosts, else by position."""
        if self.plan is None:
            return None
        asked = self.names or tuple(each.name for each in self.hosts)
        nodes = {node.host: node for node in self.plan.nodes}
        if set(nodes) & set(asked):
            return nodes.get(host.name)
        position = asked.index(host.name)
        return self.plan.nodes[position] if position < len(self.plan.nodes) else None

    def gpus(self, host: Host) -> tuple[Gpu, ...]:
        """The GPUs that would be used: the plan's, or all."""
        node = self.node(host)
        return host.gpus if node is None else tuple(gpu for gpu in host.gpus if gpu.index in node.gpu_indexes)

    def ranks(self, host: Host) -> tuple[PlanRank, ...]:
        """The plan's ranks on a host."""
        node = self.node(host)
        if self.plan is None or node is None:
            return ()
        return tuple(rank for rank in self.plan.ranks if rank.node_rank == node.node_rank)

    def engine(self, host: Host) -> EngineEnvironment | None:
        """The Python that would serve: of the plan's version, else of its family, else the first with an engine."""
        found = system(host).engines
        with_engine = [one for one in found if one.engine is not None]
        if self.plan is None:
            return with_engine[0] if with_engine else None
        family = [one for one in with_engine if one.engine == self.plan.engine_family]
        wanted = released(self.plan.engine_version)
        return next((one for one in family if released(one.engine_version) == wanted), family[0] if family else None)

    def link(self, host: Host) -> HostLink | None:
        """How the other hosts reach this one."""
        return next((link for link in self.links if link.host == host.name), None)

    @property
    def together(self) -> bool:
        """Whether hosts have to work with each other."""
        return len(self.names or self.hosts) > 1


UNKNOWN = System()


def system(host: Host) -> System:
    """The host's surroundings, all unknown where nothing was read."""
    return host.system or UNKNOWN


def released(version: str | None) -> str:
    """A version without the tag of its build: 0.33.0 for 0.33.0+cu129."""
    return (version or "").partition("+")[0]


def on(host: Host, command: str) -> str:
    """A shell command to run on a host, as the user would type it here."""
    return command if is_local(host.name) else f"on {host.name}: {command}"
