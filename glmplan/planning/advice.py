"""What would make a request fit: each suggestion was searched and does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from glmplan.errors import GlmplanError
from glmplan.facts.host import Host, Inventory
from glmplan.planning.request import Request, Target
from glmplan.planning.search import Found, largest_context, search

MOST_NODES = 64


def more_nodes(inventory: Inventory, count: int) -> Inventory:
    """The inventory with `count` hosts: its own, then idle copies of its last one."""
    hosts = list(inventory.hosts[:count])
    model = inventory.hosts[-1]
    idle = tuple(gpu.model_copy(update={"memory_in_use_bytes": 0}) for gpu in model.gpus)
    while len(hosts) < count:
        hosts.append(Host(name=f"{model.name}-{len(hosts)}", gpus=idle))
    return Inventory(origin=inventory.origin, hosts=tuple(hosts))


def suggestions(inventory: Inventory, found: Found, others: Iterable[Target]) -> Iterator[str]:
    """Sentences, nearest change first: a shorter context, another checkpoint, more nodes."""
    nearest = found.nearest
    if nearest is None:
        return
    target, request = nearest.candidate.target, found.request
    context = largest_context(nearest.candidate, request.concurrency)
    if context >= 2048:
        yield f"--context {context} fits these GPUs as {nearest.candidate.layout}."
    if request.mtp_steps and not request.allow_pipeline_mtp:
        fits = _fits(inventory, target, replace(request, allow_pipeline_mtp=True))
        if fits is not None:
            yield f"--allow-pipeline-mtp (experimental in this engine) fits these GPUs as {fits}."
    if request.mtp_steps:
        fits = _fits(inventory, target, replace(request, mtp_steps=0))
        if fits is not None:
            yield f"--mtp off fits these GPUs as {fits}."
    for other in others:
        fits = _fits(inventory, other, request)
        if fits is not None:
            yield f"--checkpoint {other.checkpoint_name} fits these GPUs as {fits}."
    yield from _fuller_node(inventory, target, request)
    have, last = len(inventory.hosts), inventory.hosts[-1]
    room = sum(gpu.memory_usable_bytes for gpu in last.gpus)
    if nearest.candidate.least_shortfall(0) and not nearest.candidate.has_room:
        return
    least = target.weights.total_bytes // room - 1
    for count in range(max(have + 1, least), MOST_NODES + 1):
        fits = _fits(more_nodes(inventory, count), target, replace(request, pins=replace(request.pins, nodes=count)))
        if fits is not None:
            more, each = count - have, len(inventory.hosts[-1].gpus)
            gpus = f"{each} such GPUs" if each > 1 else "one such GPU"
            yield f"{more} more node{'s' if more > 1 else ''} with {gpus} ({count} in all) would fit it as {fits}."
            return


def _fuller_node(inventory: Inventory, target: Target, request: Request) -> Iterator[str]:
    """The one host with more of its GPUs, up to eight."""
    host = inventory.hosts[0]
    if len(inventory.hosts) > 1 or request.pins.nodes not in (None, 1):
        return
    idle = host.gpus[-1].model_copy(update={"memory_in_use_bytes": 0})
    for size in (size for size in (2, 4, 8) if size > len(host.gpus)):
        added = [idle.model_copy(update={"index": 1000 + n}) for n in range(size - len(host.gpus))]
        fuller = Inventory(hosts=(host.model_copy(update={"gpus": (*host.gpus, *added)}),))
        fits = _fits(fuller, target, request)
        if fits is not None:
            yield f"{size} such GPUs in the node would fit it as {fits}."
            return


def _fits(inventory: Inventory, target: Target, request: Request) -> str | None:
    try:
        best = search(inventory, target, request).best
    except GlmplanError:
        return None
    return None if best is None else str(best.candidate.layout)
