"""A saved plan on the hosts that are really there: same GPUs, same memory, or a sentence that says where they differ.

A plan that was made for these very hosts keeps its order; one for declared GPUs takes the hosts in the order given. Every
GPU must have its SM and at least the capacity that the plan counted with.
"""

from __future__ import annotations

from collections.abc import Sequence

from glmplan.errors import DoesNotFitError, UnsupportedError, UsageError
from glmplan.facts.gpu import Gpu
from glmplan.facts.host import Host
from glmplan.planning.plan import Plan, PlanNode
from glmplan.units import format_bytes


def bind(plan: Plan, hosts: Sequence[Host], compare_gpus: bool = True) -> Plan:
    """The plan with the names and addresses of `hosts`, after every GPU was compared.

    Without `compare_gpus` (a rehearsal) the hosts need not have the GPUs, and the plan's indexes stay.
    """
    if len(hosts) != len(plan.nodes):
        raise UsageError(
            f"The plan is for {len(plan.nodes)} host{'s' if len(plan.nodes) > 1 else ''}; --hosts names {len(hosts)}.",
            "Name as many hosts as the plan has nodes, in node-rank order, or plan again.",
        )
    by_name = {host.name: host for host in hosts}
    names = [node.host for node in plan.nodes]
    ordered = [by_name[name] for name in names] if set(names) == set(by_name) else list(hosts)
    if compare_gpus:
        for node, host in zip(plan.nodes, ordered, strict=True):
            _check(plan, node, host)
    renamed = dict(zip(names, (host.name for host in ordered), strict=True))
    nodes = tuple(
        node.model_copy(update={"host": host.name, "address": host.address, "network": host.network})
        for node, host in zip(plan.nodes, ordered, strict=True)
    )
    return plan.model_copy(
        update={
            "nodes": nodes,
            "ranks": tuple(rank.model_copy(update={"host": renamed[rank.host]}) for rank in plan.ranks),
            "stages": tuple(
                stage.model_copy(update={"hosts": tuple(renamed[name] for name in stage.hosts)}) for stage in plan.stages
            ),
            "worst_rank": plan.worst_rank.model_copy(update={"host": renamed[plan.worst_rank.host]}),
        }
    )


def _check(plan: Plan, node: PlanNode, host: Host) -> None:
    gpus = {gpu.index: gpu for gpu in host.gpus}
    for index in node.gpu_indexes:
        gpu = gpus.get(index)
        if gpu is None:
            have = ", ".join(map(str, sorted(gpus))) or "none"
            raise UsageError(
                f"The plan uses GPU {index} of node {node.node_rank}, but {host.name} has {have}.",
                "Plan again for these hosts: glmplan size --hosts ... --save plan.json.",
            )
        _check_gpu(plan, node, host, gpu)


def _check_gpu(plan: Plan, node: PlanNode, host: Host, gpu: Gpu) -> None:
    if node.sm is not None and gpu.sm is not None and gpu.sm != node.sm:
        raise UnsupportedError(
            f"GPU {gpu.index} of {host.name} is sm_{gpu.sm}; the plan chose kernels for sm_{node.sm}.",
            "Plan again for these hosts.",
        )
    rank = next((r for r in plan.ranks if r.node_rank == node.node_rank and r.gpu_index == gpu.index), None)
    if rank is not None and gpu.capacity_bytes < rank.total_bytes:
        raise DoesNotFitError(
            f"GPU {gpu.index} of {host.name} has {format_bytes(gpu.capacity_bytes)}; its rank needs "
            f"{format_bytes(rank.total_bytes)} ({rank.total_bytes - gpu.capacity_bytes:,} bytes more).",
            "Plan again for these hosts.",
        )
