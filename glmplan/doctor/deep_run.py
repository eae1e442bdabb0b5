"""The slow parts on all hosts: kernels on each GPU, copies inside each host, one all-reduce over everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from glmplan.doctor.network import network_variables
from glmplan.doctor.schedule import LEAST_FREE_BYTES, Ranks, ranks_of
from glmplan.doctor.seen import Deep, Seen, system
from glmplan.errors import GlmplanError, ProbeError
from glmplan.facts.host import Host
from glmplan.kernels.packed import packed_text
from glmplan.units import MIB

if TYPE_CHECKING:
    from glmplan.doctor.examine import Visit
    from glmplan.transport.fanout import Outcome

    Ask = Callable[[str, Mapping[str, dict[str, Any]], float], dict[str, Outcome[dict[str, Any]]]]

KERNELS_FREE_BYTES = 8 * 2**30
"""GPU memory the kernel checks may take: their cases, and buffers larger together than the L2 cache."""
KERNELS_S = 420.0
COPIES_S = 120.0
RANKS_S = 150.0
JOIN_S = 60.0
"""How long ranks wait for each other: PyTorch's own start from a cold disk differs by tens of seconds."""
MARGIN_S = 30.0
COPY_BYTES = 128 * MIB
SIZES_BYTES = {"nccl": (8, 64 * 1024, 1 * MIB, 256 * MIB), "gloo": (8, 64 * 1024, 1 * MIB, 16 * MIB)}
LINK_BYTES = {"nccl": 128 * MIB, "gloo": 16 * MIB}


def run_deep(ask: Ask, seen: Seen, visit: Visit) -> Deep:
    """Run the parts that chosen checks need, one after the other, each on all hosts at once."""
    answers: dict[str, Mapping[str, dict[str, Any] | GlmplanError]] = {}
    if visit.needs("copies") and (wanted := _copies(seen, visit)):
        visit.tell("copies between GPUs ...")
        answers["copies"] = _part(ask, wanted, COPIES_S)
    if visit.needs("ranks"):
        ranks = ranks_of(seen)
        visit.tell(f"all-reduce of {ranks.world_size} ranks with {ranks.backend} ...")
        answers["ranks"] = _part(ask, _ranks(ask, seen, visit, ranks), RANKS_S)
    if visit.needs("kernels") and (wanted := _kernels(seen, visit)):
        visit.tell("kernels on every GPU (minutes: they are compiled first) ...")
        answers["kernels"] = _part(ask, wanted, KERNELS_S)
    return Deep(answers)


def _part(ask: Ask, requests: Mapping[str, dict[str, Any]], timeout_s: float) -> dict[str, dict[str, Any] | GlmplanError]:
    outcomes = ask("deep", requests, timeout_s + MARGIN_S)
    return {
        name: outcome.result if outcome.result is not None else outcome.error or ProbeError("no answer")
        for name, outcome in outcomes.items()
    }


def _request(part: str, host: Host, seen: Seen, visit: Visit, timeout_s: float) -> dict[str, Any]:
    engine = seen.engine(host)
    pythons = [*visit.engine_pythons, *([engine.python] if engine else [])]
    pythons += [one.python for one in system(host).engines if one.torch_version]
    return {"part": part, "pythons": list(dict.fromkeys(pythons)), "environment": {}, "timeout_s": timeout_s}


def _roomy(host: Host, seen: Seen, needed_bytes: int) -> list[int]:
    return [gpu.index for gpu in seen.gpus(host) if gpu.available_bytes >= needed_bytes]


def _kernels(seen: Seen, visit: Visit) -> dict[str, dict[str, Any]]:
    found = {}
    for host in seen.hosts:
        if indexes := _roomy(host, seen, KERNELS_FREE_BYTES):
            request = _request("kernels", host, seen, visit, KERNELS_S)
            found[host.name] = {**request, "gpu_indexes": indexes, "package": packed_text()}
    return found


def _copies(seen: Seen, visit: Visit) -> dict[str, dict[str, Any]]:
    found = {}
    for host in seen.hosts:
        indexes = _roomy(host, seen, LEAST_FREE_BYTES)
        if len(indexes) > 1:
            request = _request("copies", host, seen, visit, COPIES_S)
            found[host.name] = {**request, "gpu_indexes": indexes, "copy_bytes": COPY_BYTES}
    return found


def _ranks(ask: Ask, seen: Seen, visit: Visit, ranks: Ranks) -> dict[str, dict[str, Any]]:
    head = ranks.hosts[0]
    link = seen.link(head)
    address = (link.address if link else None) or head.address or "127.0.0.1"
    common = {
        "backend": ranks.backend,
        "address": address,
        "tcp_port": _rendezvous(ask, seen, head, address),
        "world_size": ranks.world_size,
        "sizes_bytes": list(SIZES_BYTES[ranks.backend]),
        "link_bytes": LINK_BYTES[ranks.backend],
        "join_s": JOIN_S,
        "rounds": [[list(pair) for pair in pairs] for pairs in ranks.rounds],
    }
    found = {}
    for host, first, count, indexes in zip(ranks.hosts, ranks.first, ranks.counts, ranks.gpu_indexes, strict=True):
        request = _request("ranks", host, seen, visit, RANKS_S)
        request["environment"] = network_variables(host, seen)
        found[host.name] = {**request, **common, "first_rank": first, "local_ranks": count, "gpu_indexes": list(indexes)}
    return found


def _rendezvous(ask: Ask, seen: Seen, head: Host, address: str) -> int:
    """The launch's own port, which the firewall is meant to let in, or another where that one is taken."""
    wanted = seen.endpoints.rendezvous_port
    binds = [{"address": address, "port": wanted}, {"address": address, "port": 0}]
    outcome = ask("ports", {head.name: {"binds": binds}}, MARGIN_S)[head.name]
    if outcome.result is None:
        return wanted
    return next((int(one["port"]) for one in outcome.result["ports"] if one["free"]), wanted)
