"""What many hosts are: the node program's `facts` from each of them, at once, as typed hosts with addresses.

A host that cannot be reached or read is an outcome of its own and hides none of the others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from glmplan.errors import ProbeError
from glmplan.facts.base import Frozen
from glmplan.facts.gpu_profile import GpuProfile
from glmplan.facts.host import Host, Inventory
from glmplan.facts.model_config import first_problem
from glmplan.facts.profiles import gpu_profiles
from glmplan.planning.network import with_links
from glmplan.probe.gpus import gpu, problem_error
from glmplan.transport.base import HostName, Transport
from glmplan.transport.node import call

if TYPE_CHECKING:
    from glmplan.transport.fanout import Outcome
    from glmplan.transport.open import SshOptions

FACTS_TIMEOUT_S = 30.0
"""nvidia-smi on a host of eight GPUs without persistence mode takes up to twenty seconds; all else is under two."""
HEADERS_TIMEOUT_S = 90.0
"""Beside that when model files are judged: some hundred headers from a cold network file system."""
CONNECT_SHARE_S = 15.0


class HostFailure(Frozen):
    """A host that told nothing, and why."""

    name: str
    message: str
    next_step: str


class ProbeReport(Frozen):
    """All that a probe of several hosts found."""

    schema_version: Literal[1] = 1
    hosts: tuple[Host, ...]
    failures: tuple[HostFailure, ...] = ()


@dataclass(frozen=True)
class FactsRequest:
    """What to find out beyond the quick facts. `disk_read` measures the folder of `model_path` for `disk_seconds`;
    `engine_folders` is what PYTHONPATH will hold when the engine runs."""

    model_path: str | None = None
    disk_read: bool = False
    disk_seconds: float = 2.0
    engine_pythons: tuple[str, ...] = ()
    engine_folders: tuple[str, ...] = ()

    def message(self, host: HostName) -> dict[str, Any]:
        """The request of the `facts` operation for one host."""
        return {
            "gpu_indexes": None if host.gpu_indexes is None else list(host.gpu_indexes),
            "model_path": self.model_path,
            "disk_read": self.disk_read,
            "disk_seconds": self.disk_seconds,
            "engine_pythons": list(self.engine_pythons),
            "engine_folders": list(self.engine_folders),
        }

    @property
    def timeout_s(self) -> float:
        """Seconds that one host may take to answer."""
        own = HEADERS_TIMEOUT_S if self.model_path else 0.0
        return FACTS_TIMEOUT_S + own + (2 * self.disk_seconds + 2 if self.disk_read else 0.0)


def read_host(
    transport: Transport, host: HostName, request: FactsRequest, profiles: Iterable[GpuProfile] | None = None
) -> Host:
    """One host over an open connection. GPUs that cannot be read are its `gpu_problem`, not an error."""
    python = sys.executable if host.is_local else "python3"
    asked_s = time.time()
    answer = call(transport, "facts", request.message(host), request.timeout_s, python)
    return to_host(answer, host.text, gpu_profiles() if profiles is None else profiles, (asked_s, time.time()))


def to_host(
    answer: Mapping[str, Any], name: str, profiles: Iterable[GpuProfile], asked_s: tuple[float, float] | None = None
) -> Host:
    """The answer of the `facts` operation as a Host; `asked_s` is this machine's time before and after."""
    known = tuple(profiles)
    fields = dict(answer)
    started_s = fields.pop("started_s", None)
    surroundings = dict(fields.pop("system"))
    ended_s = surroundings.get("node_time_s")
    if asked_s is not None and started_s is not None and ended_s is not None:
        offset, error = clock_offset(asked_s, (started_s, ended_s))
        surroundings.update(clock_offset_s=offset, clock_error_s=error)
    try:
        gpus = tuple(gpu(reading, known) for reading in fields.pop("gpus"))
        return Host.model_validate({**fields, "name": name, "gpus": gpus, "system": surroundings})
    except ValidationError as error:
        raise ProbeError(
            f"{name} answered with facts of another shape: {first_problem(error)}.",
            "Report this with the output of `glmplan probe --hosts ... --json`.",
        ) from None


def clock_offset(here_s: tuple[float, float], there_s: tuple[float, float]) -> tuple[float, float]:
    """The other clock less this one, and how far off that may be: half of the time spent on the way.

    `here_s` is when the question left and the answer came, `there_s` when work began and ended on the other clock.
    """
    way_s = max((here_s[1] - here_s[0]) - (there_s[1] - there_s[0]), 0.0)
    offset = ((there_s[0] - here_s[0]) + (there_s[1] - here_s[1])) / 2
    return round(offset, 4), round(way_s / 2, 4)


def probe_hosts(
    hosts: Sequence[HostName],
    options: SshOptions,
    request: FactsRequest | None = None,
    limit: int = 32,
    open_host: Callable[[HostName, SshOptions], Transport] | None = None,
) -> tuple[Outcome[Host], ...]:
    """Facts of every host, in the order given, at most `limit` at once; `open_host` replaces SSH in simulations."""
    from glmplan.transport.fanout import each
    from glmplan.transport.open import open_transport

    wanted = request or FactsRequest()
    profiles = tuple(gpu_profiles())

    def work(host: HostName) -> Host:
        transport = (open_host or open_transport)(host, options)
        try:
            return read_host(transport, host, wanted, profiles)
        finally:
            transport.close()

    return each(hosts, work, limit=limit, timeout_s=wanted.timeout_s + CONNECT_SHARE_S)


def report_of(outcomes: Sequence[Outcome[Host]]) -> ProbeReport:
    """The hosts that answered, with addresses chosen among them, and those that did not."""
    hosts = with_links([outcome.result for outcome in outcomes if outcome.result is not None])
    failures = [
        HostFailure(name=outcome.name, message=outcome.error.message, next_step=outcome.error.next_step)
        for outcome in outcomes
        if outcome.error is not None
    ]
    return ProbeReport(hosts=hosts, failures=tuple(failures))


def inventory_of(hosts: Sequence[Host]) -> Inventory:
    """Probed hosts as an inventory to plan for: every GPU readable, and addresses chosen."""
    for host in hosts:
        if host.gpu_problem is not None:
            raise problem_error(host.gpu_problem, host.name)
    return Inventory(origin="probe", hosts=with_links(hosts))
