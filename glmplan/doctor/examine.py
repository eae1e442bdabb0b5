"""A visit to the hosts: read facts, try ports and paths, run the slow parts, and judge what was seen.

Everything is read-only but for a listener of a few seconds on each host, and for memory and temporary files of the deep
parts; a running server is not touched. One host's failure is a finding about that host. Seconds are wall time.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from glmplan.doctor.checks import Check, judge
from glmplan.doctor.deep_run import run_deep
from glmplan.doctor.finding import Report
from glmplan.doctor.seen import PathTry, PortTry, Seen
from glmplan.engines.base import Endpoints, listen_address
from glmplan.errors import GlmplanError, ProbeError
from glmplan.facts.host import Host
from glmplan.facts.profiles import gpu_profiles
from glmplan.planning.network import choose_links
from glmplan.planning.plan import Plan
from glmplan.probe.remote import FactsRequest, to_host
from glmplan.transport.base import HostName
from glmplan.transport.fanout import Outcome, each

LISTEN_S = 8.0
CONNECT_S = 2.0
OPERATION_S = 15.0
DISK_SECONDS = 2.0


class Hosts(Protocol):
    """Open ways to the hosts, as `fleet.hosts.Fleet` keeps them."""

    hosts: tuple[HostName, ...]

    def ask(
        self, name: str, operation: str, request: dict[str, Any] | None = None, timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """One operation of the node program on one host; failures are GlmplanError."""
        ...


@dataclass(frozen=True)
class Visit:
    """What to look at."""

    checks: tuple[Check, ...]
    plan: Plan | None = None
    plan_name: str | None = None
    endpoints: Endpoints = field(default_factory=Endpoints)
    model_path: str | None = None
    engine_pythons: tuple[str, ...] = ()
    engine_folders: tuple[str, ...] = ()
    deep: bool = False
    tell: Callable[[str], None] = lambda _: None

    def needs(self, *needs: str) -> bool:
        """Whether a chosen check needs one of these tried."""
        return any(check.need in needs for check in self.checks)


Ask = Callable[[str, Mapping[str, dict[str, Any]], float], dict[str, Outcome[dict[str, Any]]]]


def examine(hosts: Hosts, visit: Visit) -> Report:
    """The report of a whole visit."""
    began = time.monotonic()
    seen = _facts(hosts, visit)
    ask = _asker(hosts)
    if visit.needs("ports") and seen.hosts:
        seen = replace(seen, ports=_try_ports(ask, seen))
    if visit.needs("paths") and len(seen.hosts) > 1:
        seen = _try_paths(ask, seen)
    if visit.deep and seen.hosts:
        seen = replace(seen, deep=run_deep(ask, seen, visit))
    return Report(
        hosts=seen.names,
        unreachable=tuple(seen.unreachable),
        deep=visit.deep,
        plan=visit.plan_name,
        elapsed_s=round(time.monotonic() - began, 3),
        findings=judge(seen, visit.checks),
    )


def _asker(hosts: Hosts) -> Ask:
    def ask(operation: str, requests: Mapping[str, dict[str, Any]], timeout_s: float) -> dict[str, Outcome[dict[str, Any]]]:
        """The operation on every host named, all at once: the ranks of a collective must meet."""
        outcomes = each(
            list(requests),
            lambda name: hosts.ask(name, operation, requests[name], timeout_s),
            limit=max(len(requests), 1),
            timeout_s=timeout_s + 5.0,
        )
        return {outcome.name: outcome for outcome in outcomes}

    return ask


def _facts(hosts: Hosts, visit: Visit) -> Seen:
    """Facts of every host; those that did not answer are `unreachable`."""
    wanted = FactsRequest(
        model_path=_model_path(visit),
        disk_read=visit.needs("disk"),
        disk_seconds=DISK_SECONDS,
        engine_pythons=visit.engine_pythons,
        engine_folders=visit.engine_folders,
    )
    profiles, by_name = tuple(gpu_profiles()), {host.text: host for host in hosts.hosts}

    def read(name: str) -> Host:
        asked_s = time.time()
        answer = hosts.ask(name, "facts", wanted.message(by_name[name]), wanted.timeout_s)
        return to_host(answer, name, profiles, (asked_s, time.time()))

    outcomes = each(list(by_name), read, timeout_s=wanted.timeout_s + OPERATION_S)
    found = tuple(outcome.result for outcome in outcomes if outcome.result is not None)
    return Seen(
        hosts=found,
        plan=visit.plan,
        endpoints=visit.endpoints,
        names=tuple(by_name),
        unreachable={outcome.name: outcome.error for outcome in outcomes if outcome.error is not None},
        links=choose_links(found) if len(found) > 1 else (),
    )


def _model_path(visit: Visit) -> str | None:
    if not visit.needs("model", "disk"):
        return None
    return visit.model_path or (visit.plan.model_path if visit.plan else None)


def _wanted_ports(seen: Seen, host: Host) -> list[PortTry]:
    """What the launch binds on a host: HTTP on every node, the rendezvous on the first."""
    node, endpoints = seen.node(host), seen.endpoints
    http_host = listen_address(endpoints, node) if node is not None else endpoints.http_host
    link = seen.link(host)
    if node is None and link is not None and (link.address or "").startswith("127."):
        http_host = link.address or http_host
    found = [PortTry("HTTP", "" if http_host in ("0.0.0.0", "::") else http_host, endpoints.http_port)]
    if (node.node_rank == 0) if node is not None else host.name == seen.names[0]:
        found.append(PortTry("rendezvous", "", endpoints.rendezvous_port))
        dp_size = seen.plan.layout.dp_size if seen.plan is not None and seen.plan.engine_family == "sglang" else 1
        if dp_size > 1:
            found += [PortTry("attention-DP", "", endpoints.rendezvous_port + step) for step in range(1, 7)]
    return found


def _try_ports(ask: Ask, seen: Seen) -> dict[str, tuple[PortTry, ...]]:
    wanted = {host.name: _wanted_ports(seen, host) for host in seen.hosts}
    requests = {
        name: {"binds": [{"address": one.address, "port": one.port} for one in tries]} for name, tries in wanted.items()
    }
    found: dict[str, tuple[PortTry, ...]] = {}
    for name, outcome in ask("ports", requests, OPERATION_S).items():
        if outcome.result is not None:
            answers = zip(wanted[name], outcome.result["ports"], strict=True)
            found[name] = tuple(replace(one, problem=got["problem"], holder=_holder(got)) for one, got in answers)
        else:
            found[name] = tuple(replace(one, problem=_words(outcome.error)) for one in wanted[name])
    return found


def _holder(answer: Mapping[str, Any]) -> str:
    if answer.get("pid") is None:
        return ""
    return f"pid {answer['pid']} {answer.get('command') or 'unknown'} of {answer.get('owner') or 'an unknown user'}"


def _words(error: GlmplanError | None) -> str:
    return error.message if error is not None else "no answer"


def _try_paths(ask: Ask, seen: Seen) -> Seen:
    """Every host listens on the rendezvous port and an ephemeral one, then all call all."""
    addresses = {link.host: link.address for link in seen.links if link.address}
    problems: dict[str, GlmplanError] = {
        f"paths:{link.host}": ProbeError(f"not tried: {link.reason}", "See the check interface.")
        for link in seen.links
        if not link.address
    }
    token, port = secrets.token_hex(16), seen.endpoints.rendezvous_port
    listens = {
        name: {
            "address": address, "tcp_ports": [port, 0], "seconds": LISTEN_S,
            "token": token, "callers": len(addresses) - 1,
        }
        for name, address in addresses.items()
    }  # fmt: skip
    listening: dict[str, list[dict[str, Any]]] = {}
    for name, outcome in ask("listen", listens, OPERATION_S).items():
        if outcome.result is not None:
            listening[name] = outcome.result["ports"]
        else:
            problems[f"paths:{name}"] = outcome.error or ProbeError("It did not listen.")
    targets = {
        name: [
            {"name": name, "address": addresses[name], "port": one["port"], "ephemeral": one["asked"] == 0}
            for one in ports
            if one["problem"] in (None, "taken")  # what holds a taken port still shows whether it is reached
        ]
        for name, ports in listening.items()
    }
    return replace(
        seen, paths=_call_all(ask, list(addresses), targets, token, listening), problems={**seen.problems, **problems}
    )


def _call_all(
    ask: Ask,
    sources: Sequence[str],
    targets: Mapping[str, list[dict[str, Any]]],
    token: str,
    listening: Mapping[str, list[dict[str, Any]]],
) -> tuple[PathTry, ...]:
    others = {source: [one for name, ports in targets.items() if name != source for one in ports] for source in sources}
    requests = {source: {"targets": ones, "token": token, "timeout_s": CONNECT_S} for source, ones in others.items()}
    taken = {(name, one["port"]) for name, ports in listening.items() for one in ports if one["problem"] == "taken"}
    found: list[PathTry] = []
    for source, outcome in ask("connect", requests, OPERATION_S).items():
        results = outcome.result["results"] if outcome.result is not None else [{}] * len(others[source])
        for target, got in zip(others[source], results, strict=True):
            problem = got.get("problem") if got else _words(outcome.error)
            if problem == "stranger" and (target["name"], target["port"]) in taken:
                problem = None  # the handshake came through to what listens there
            found.append(
                PathTry(
                    source=source,
                    target=target["name"],
                    address=target["address"],
                    port=target["port"],
                    ephemeral=target["ephemeral"],
                    problem=problem,
                    connect_s=got.get("connect_s") if got else None,
                )
            )
    return tuple(found)
