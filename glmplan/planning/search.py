"""Which layouts an inventory allows, which of them fit, and why the others do not.

Layouts come in tiers, and a tier is looked at only when the ones before it cannot carry the request: first one TP
group per node (whole nodes when there are several), because a request waits for pipeline stages one after the other;
then several stages on a node, or parts of nodes; then attention-DP, EP and decode-context parallelism. Inside a tier
(`fewest-gpus`): fewest GPUs, fewest stages, most KV tokens. `latency` uses as many GPUs as it can in the fewest
stages; `kv-tokens` looks at every tier and takes the most KV tokens. What is pinned is looked at whatever its tier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from glmplan.errors import UsageError
from glmplan.facts.engine_profile import AttentionOption, QuantizationOption
from glmplan.facts.gpu import Gpu
from glmplan.facts.host import Host, Inventory
from glmplan.planning.evaluate import Candidate, Evaluation, layer_cells
from glmplan.planning.layout import Layout, Seat, seat_ranks, shape_problem
from glmplan.planning.ports import attention_options, choose_attention, kinds, quantization_for, require_support
from glmplan.planning.request import Request, Target
from glmplan.planning.stages import Cuts
from glmplan.units import format_bytes

MAX_STAGES = 32
CONTEXT_LADDER = tuple(1_048_576 >> step for step in range(8))


@dataclass(frozen=True, slots=True)
class Rejection:
    """A layout that was not chosen: one reason with numbers, and the nearest change where one is known.

    `candidate` is given where memory was the reason: the change is then worked out when it is asked for.
    """

    layout: Layout
    reason: str
    fixed_change: str = ""
    shortfall_bytes: int = 0
    candidate: Candidate | None = None

    @property
    def change(self) -> str:
        """The nearest change that would make the layout fit."""
        if self.fixed_change or self.candidate is None:
            return self.fixed_change
        return nearest_change(self.candidate)


@dataclass
class Found:
    """What a search saw."""

    request: Request
    bench: Bench | None = None
    best: Evaluation | None = None
    rejected: list[Rejection] = field(default_factory=list)

    @property
    def nearest(self) -> Evaluation | None:
        """Of the layouts that do not fit, the one that lacks least; later tiers must lack clearly less."""
        assert self.bench is not None
        hosts, request = self.bench.hosts, self.request
        misses = [r for r in self.rejected if r.candidate is not None or r.shortfall_bytes]
        misses.sort(key=lambda r: (r.shortfall_bytes * (1 + 2 * tier(r.layout, hosts, request)), r.layout.pp))
        for miss in misses:
            candidate = miss.candidate or next(self.bench.candidates(miss.layout), None)
            evaluation = candidate.evaluate() if candidate is not None else None
            if evaluation is not None:
                return evaluation
        return None


def usable_hosts(inventory: Inventory) -> list[Host]:
    """Hosts with at least one GPU; MIG slices and empty inventories are refused by name."""
    for host in inventory.hosts:
        for gpu in host.gpus:
            if gpu.mig:
                raise UsageError(
                    f"GPU {gpu.index} of {host.name} ({gpu.name}) is split by MIG; a rank needs a whole GPU.",
                    f"Turn MIG off on it: sudo nvidia-smi -i {gpu.index} -mig 0",
                )
    hosts = [host for host in inventory.hosts if host.gpus]
    if not hosts:
        raise UsageError("The inventory has no GPUs.", 'Name some: --gpus "8x rtx-4090-48g".')
    return hosts


def search(inventory: Inventory, target: Target, request: Request) -> Found:
    """The best layout of the inventory for the request, and the reasons against the rest."""
    hosts = usable_hosts(inventory)
    gpus = [gpu for host in hosts for gpu in host.gpus]
    require_support(target.engine, target.scheme, request.kv_dtype, gpus, request.kernel_port)
    bench = Bench(hosts, target, request)
    found = Found(request, bench)
    fitting: list[Evaluation] = []
    if request.objective == "kv-tokens":
        bench.least_gpus = 3 * max(layout.gpus for layout in layouts(hosts, target, request)) // 4
    everything = [(lay, tier(lay, hosts, request)) for lay in layouts(hosts, target, request)]
    for level in TIERS:
        for layout in (lay for lay, its in everything if its == level):
            if fitting and request.objective == "fewest-gpus" and layout.gpus > fitting[0].candidate.layout.gpus:
                fewest = fitting[0].candidate.layout.gpus
                found.rejected.append(Rejection(layout, f"uses {layout.gpus} GPUs where {fewest} suffice"))
                continue
            _judge(layout, bench, found, fitting)
        if fitting and request.objective != "kv-tokens":
            simpler = fitting[0].candidate.layout
            for layout in (lay for lay, its in everything if its > level):
                found.rejected.append(Rejection(layout, f"not needed: the simpler {simpler} carries the request"))
            break
    _settle(found, fitting, request)
    return found


def _settle(found: Found, fitting: list[Evaluation], request: Request) -> None:
    fitting.sort(key=lambda e: _preference(e, request))
    if fitting:
        found.best = fitting[0]
        found.rejected += [_outranked(other, fitting[0]) for other in fitting[1:]]


TIERS = (0, 1, 2)


def tier(layout: Layout, hosts: list[Host], request: Request) -> int:
    """How natural a layout is; see the module's first lines."""
    pins = request.pins
    if not layout.plain and (pins.dp, pins.ep, pins.dcp) == (None, None, None):
        return 2
    if layout.pp in (layout.nodes, pins.pp) or (request.allow_cross_node_tp and layout.pp < layout.nodes):
        smallest = sorted((len(host.gpus) for host in hosts), reverse=True)[layout.nodes - 1]
        whole = layout.nodes == 1 or layout.gpus_per_node * 2 > smallest or pins.tp == layout.tp
        return 0 if whole else 1
    return 1


def tier_of(candidate: Candidate) -> int:
    """The tier of a candidate's layout on its own hosts."""
    hosts = {seat.host.name: seat.host for stage in candidate.seats for seat in stage}
    return tier(candidate.layout, list(hosts.values()), candidate.request)


def _preference(found: Evaluation, request: Request) -> tuple[int, ...]:
    layout = found.candidate.layout
    tokens = -found.kv_cache_tokens
    if request.objective == "kv-tokens":
        return tokens, layout.gpus, layout.pp
    if request.objective == "latency":
        return layout.pp, -layout.gpus, tokens
    return layout.gpus, layout.pp, tokens


def _outranked(other: Evaluation, best: Evaluation) -> Rejection:
    mine, its = other.candidate.layout, best.candidate.layout
    if mine.gpus > its.gpus:
        reason = f"fits, but uses {mine.gpus} GPUs where {its} uses {its.gpus}"
    elif mine.pp > its.pp:
        reason = f"fits, but has {mine.pp} pipeline stages where {its} has {its.pp}"
    elif other.kv_cache_tokens < best.kv_cache_tokens:
        reason = f"fits, but holds {other.kv_cache_tokens:,} KV tokens where {its} holds {best.kv_cache_tokens:,}"
    else:
        reason = f"fits, but {its} comes first by the objective"
    return Rejection(mine, reason)


def layouts(hosts: list[Host], target: Target, request: Request) -> list[Layout]:
    """Every layout the hosts could seat, fewest GPUs first; pins that contradict each other are refused."""
    found = sorted(
        set(_shapes(hosts, target, request)), key=lambda lay: (lay.gpus, not lay.plain, lay.pp, lay.dp, lay.ep, lay.dcp)
    )
    if not found:
        _explain_pins(hosts, target, request)
    return found


def _shapes(hosts: list[Host], target: Target, request: Request) -> Iterator[Layout]:
    parallel, pins = target.engine.parallel, request.pins
    counts = sorted((len(host.gpus) for host in hosts), reverse=True)
    for nodes in range(1, len(hosts) + 1):
        if not pins.allows(nodes=nodes):
            continue
        most = counts[nodes - 1]
        for tp in parallel.tp_sizes:
            for pp in _stage_counts(nodes, tp, most, request, target):
                if pins.allows(tp=tp, pp=pp):
                    yield from _with_extras(Layout(tp, pp, nodes), target, request)


def _stage_counts(nodes: int, tp: int, most: int, request: Request, target: Target) -> Iterator[int]:
    """Stages such that P % N == 0 (TP inside a node) or, where allowed, N % P == 0 (a stage spans nodes)."""
    limit = min(MAX_STAGES, target.config.num_hidden_layers)
    if not target.engine.parallel.pipeline:
        limit = 1
    for per_node in range(1, most // tp + 1):
        if nodes * per_node <= limit:
            yield nodes * per_node
    if request.allow_cross_node_tp and target.engine.parallel.cross_node_tp and nodes > 1:
        for pp in range(1, min(nodes, limit + 1)):
            spans = nodes // pp
            if nodes % pp == 0 and tp % spans == 0 and tp // spans <= most:
                yield pp


def _with_extras(plain: Layout, target: Target, request: Request) -> Iterator[Layout]:
    parallel, pins = target.engine.parallel, request.pins
    powers = [size for size in (1, 2, 4, 8, 16) if plain.tp % size == 0]
    dps = powers if parallel.attention_dp else [1]
    eps = [1, plain.tp] if parallel.expert_parallel and plain.tp > 1 else [1]
    dcps = [size for size in parallel.dcp_sizes if plain.tp % size == 0]
    if parallel.attention_dp and target.engine.family == "vllm" and plain.nodes > 1:
        dps = [1]
    for dp in dps:
        for ep in eps:
            for dcp in dcps:
                if dcp > 1 and dp > 1:
                    continue
                if target.engine.family == "vllm" and dp > 1 and ep == 1:
                    continue
                if pins.allows(dp=dp, ep=ep, dcp=dcp):
                    yield replace(plain, dp=dp, ep=ep, dcp=dcp)


def _explain_pins(hosts: list[Host], target: Target, request: Request) -> None:
    pins = request.pins
    named = [f"{name}={value}" for name in ("tp", "pp", "dp", "ep", "dcp", "nodes") if (value := getattr(pins, name))]
    have = f"{len(hosts)} hosts with {', '.join(str(len(host.gpus)) for host in hosts[:8])} GPUs"
    rule = (
        f"{target.engine.title} takes TP in {', '.join(map(str, target.engine.parallel.tp_sizes))}, and stages must be "
        "a multiple of the nodes" + (" or divide them" if request.allow_cross_node_tp else "")
    )
    if named:
        raise UsageError(
            f"No layout with {', '.join(named)} can be seated on {have}: {rule}.",
            "Change or drop a pin; --allow-cross-node-tp lets one stage span nodes.",
        )
    raise UsageError(f"No layout can be seated on {have}: {rule}.", "Name more GPUs on each host.")


def _block(target: Target) -> int:
    return {"fp8": 128, "w4afp8": 128, "int4": 32, "nvfp4": 16, "mxfp4": 32}.get(target.scheme, 1)


def _legality(layout: Layout, target: Target, request: Request) -> tuple[str, str] | None:
    """Why a layout is not legal at all, as (reason, change)."""
    shape = shape_problem(target.config, layout, _block(target))
    if shape is not None:
        return shape, "choose a smaller TP"
    if request.mtp_steps == 0 or layout.pp == 1:
        return None
    rule = target.engine.mtp.with_pipeline
    if rule == "no":
        return f"{target.engine.title} refuses MTP with {layout.pp} pipeline stages", "turn --mtp off, or use one stage"
    if rule == "opt-in" and not request.allow_pipeline_mtp:
        return (
            f"MTP with {layout.pp} pipeline stages is experimental in {target.engine.title}",
            "add --allow-pipeline-mtp, or turn --mtp off",
        )
    return None


def _judge(layout: Layout, bench: Bench, found: Found, fitting: list[Evaluation]) -> None:
    request = bench.request
    problem = _legality(layout, bench.target, request)
    if problem is not None:
        found.rejected.append(Rejection(layout, *problem))
        return
    if layout.gpus < bench.least_gpus:
        found.rejected.append(Rejection(layout, f"uses {layout.gpus} GPUs, and more hold more KV tokens"))
        return
    short = bench.surely_short(layout)
    if short and tier(layout, bench.hosts, request):
        reason = f"more than {format_bytes(short)} short on every rank ({layout.gpus} GPUs)"
        found.rejected.append(Rejection(layout, reason, "more GPUs or a smaller checkpoint", short))
        return
    candidates = list(bench.candidates(layout))
    hopeful = [c for c in candidates if c.least_shortfall(c.tokens_per_rank + c.slack) == 0]
    evaluations = [e for c in hopeful if (e := c.evaluate()) is not None]
    good = [e for e in evaluations if e.fits]
    if good:
        fitting.append(max(good, key=lambda e: e.kv_cache_tokens))
        fitting.sort(key=lambda e: _preference(e, request))
    elif evaluations:
        found.rejected.append(_miss(min(evaluations, key=lambda e: max(e.shortfalls))))
    elif candidates and not hopeful:
        found.rejected.append(_hopeless(candidates[0]))
    else:
        found.rejected.append(Rejection(layout, *_not_seated(layout, bench.target)))


def _hopeless(candidate: Candidate) -> Rejection:
    """A layout that lacks memory even if its layers could be spread perfectly."""
    short = candidate.least_shortfall(candidate.tokens_per_rank + candidate.slack)
    reason = f"at least {format_bytes(short)} short on every rank ({candidate.layout.gpus} GPUs)"
    return Rejection(candidate.layout, reason, "", short, candidate)


def _not_seated(layout: Layout, target: Target) -> tuple[str, str]:
    if layout.pp > 1 and not target.engine.parallel.relays_topk:
        starts = sum(target.config.indexer_full)
        if layout.pp > starts:
            return (
                f"{layout.pp} stages need as many full layers to begin on; the model has {starts}",
                "use fewer stages",
            )
    if layout.dcp > 1:
        return "no attention backend of these GPUs shards the context", "use dcp=1"
    return (
        f"no {layout.nodes} hosts have {layout.gpus_per_node} GPUs each that share a backend and load weights alike",
        "name GPUs that share a backend, or another --kv-dtype",
    )


def _miss(found: Evaluation) -> Rejection:
    layout, stage = found.candidate.layout, found.worst_stage
    short = found.shortfalls[stage]
    if short == 0:
        have, need = found.pool_tokens, found.candidate.tokens_per_rank
        if found.budget.limit == "mem-fraction":
            reason = f"memory fraction {found.budget.fraction:g} leaves {have:,} KV tokens a rank where {need:,} are needed"
            return Rejection(layout, reason, "raise or drop --mem-fraction", 0, found.candidate)
        reason = f"the engine's pool rule gives {have:,} KV tokens a rank where {need:,} are needed"
        return Rejection(layout, reason, "use GPUs with equal free memory", 0, found.candidate)
    where = f"pp_rank {stage}" if layout.pp > 1 else "every rank"
    reason = f"{format_bytes(short)} short on {where} ({layout.gpus} GPUs)"
    return Rejection(layout, reason, "", short, found.candidate)


def nearest_change(candidate: Candidate) -> str:
    """The smallest change that makes this layout fit: a shorter context (checked), else a bound on the stages."""
    layout = candidate.layout
    found = candidate.evaluate()
    if found is not None and found.memory_tokens > 0:
        context = largest_context(candidate, candidate.request.concurrency, found.cuts)
        if context >= 2048:
            return f"context {context:,}"
    weights = candidate.ledger(0).prefix[-1]
    room = min(seat.gpu.available_bytes for stage in candidate.seats for seat in stage) - sum(
        item.bytes for item in candidate.reserve_items(0, candidate.tightest_gpu(0)) if item.group != "others"
    )
    stages = max(-(-weights // room), layout.pp + 1) if room > 0 else MAX_STAGES + 1
    if stages > MAX_STAGES:
        return "GPUs with more memory"
    return f"no fewer than {stages * layout.tp} such GPUs (TP{layout.tp}), or a smaller checkpoint"


def largest_context(candidate: Candidate, concurrency: int = 1, cuts: Cuts | None = None) -> int:
    """The longest context, in whole pages, that this layout carries for `concurrency` requests; 0 for none.

    Stages are cut anew for each context unless `cuts` fixes them.
    """
    page = candidate.page

    def carries(pages: int) -> bool:
        request = replace(candidate.request, context_tokens=pages * page, concurrency=concurrency)
        other = replace(candidate, request=request)
        if other.least_shortfall(other.tokens_per_rank + other.slack):
            return False
        evaluation = other.evaluate() if cuts is None else Evaluation(other, cuts)
        return evaluation is not None and evaluation.fits

    low, high = 0, candidate.target.config.max_position_embeddings // page
    if not carries(1):
        return 0
    if carries(high):
        return high * page
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if carries(middle) else (low, middle)
    return low * page


class Bench:
    """The GPUs that each attention option could use on each host, and bounds that need no seating."""

    def __init__(self, hosts: list[Host], target: Target, request: Request) -> None:
        self.hosts, self.target, self.request = hosts, target, request
        self.options = attention_options(target.engine, request.kv_dtype, request.kernel_port)
        self.able = {option.id: [(host, self._able(host, option)) for host in hosts] for option in self.options}
        self.least_gpus = 0
        self.roomiest_bytes = max(gpu.available_bytes for host in hosts for gpu in host.gpus)
        self.weights_bytes = sum(stored.values for place in target.weights.layers for stored in place.values())
        self.cell_bytes = min(
            sum(cell.allocated for cell in layer_cells(target, option.kv_format)[:-1]) for option in self.options
        )

    def _able(self, host: Host, option: AttentionOption) -> list[Gpu]:
        """GPUs of a host that run the option and load the checkpoint alike, roomiest first."""
        groups: dict[QuantizationOption, list[Gpu]] = {}
        loads = {(gpu.vendor, gpu.sm): self._loads(option, gpu) for gpu in kinds(host.gpus)}
        for gpu in host.gpus:
            how = loads[(gpu.vendor, gpu.sm)]
            if how is not None:
                groups.setdefault(how, []).append(gpu)
        most = max(groups.values(), key=lambda gpus: (len(gpus), sum(g.available_bytes for g in gpus)), default=[])
        return sorted(most, key=lambda gpu: (-gpu.available_bytes, gpu.index))

    def _loads(self, option: AttentionOption, gpu: Gpu) -> QuantizationOption | None:
        if choose_attention([option], [gpu]) is None:
            return None
        return quantization_for(self.target.engine, self.target.scheme, gpu)

    def surely_short(self, layout: Layout) -> int:
        """Bytes that every rank lacks even on the roomiest GPU, with all weights sharded and no reserves."""
        tokens = self.request.context_tokens * -(-self.request.concurrency // layout.dp) // layout.dcp
        need = self.weights_bytes // layout.gpus + self.cell_bytes * tokens // layout.pp
        return max(need - self.roomiest_bytes, 0)

    def candidates(self, layout: Layout) -> Iterator[Candidate]:
        """Choices of hosts and their order for a layout, one per attention option that its GPUs would get."""
        for option in self.options:
            if layout.dcp > 1 and not option.dcp:
                continue
            able = [(host, gpus) for host, gpus in self.able[option.id] if len(gpus) >= layout.gpus_per_node]
            if len(able) < layout.nodes:
                continue
            chosen = _roomiest(able, layout)
            if choose_attention(self.options, [gpu for _, gpus in chosen for gpu in kinds(gpus)]) is not option:
                continue
            for order in _orders(chosen):
                seats = seat_ranks(layout, order)
                if all(len({self._loads(option, seat.gpu) for seat in stage}) == 1 for stage in seats):
                    yield Candidate(self.target, self.request, layout, seats, option)


def _roomiest(able: list[tuple[Host, list[Gpu]]], layout: Layout) -> list[tuple[Host, list[Gpu]]]:
    """The nodes whose poorest used GPU has most; ties keep the inventory's order."""
    count = layout.gpus_per_node
    ranked = sorted(range(len(able)), key=lambda i: (-able[i][1][count - 1].available_bytes, i))[: layout.nodes]
    return [
        (able[i][0], sorted(able[i][1][:count], key=lambda gpu: (-gpu.capacity_bytes, gpu.index))) for i in sorted(ranked)
    ]


def _orders(chosen: list[tuple[Host, list[Gpu]]]) -> Iterable[list[tuple[Host, list[Gpu]]]]:
    """Node orders worth trying: as listed, and roomiest first or last where nodes differ."""
    room = [min(gpu.available_bytes for gpu in gpus) for _, gpus in chosen]
    yield chosen
    if len(set(room)) > 1:
        order = sorted(range(len(chosen)), key=lambda i: room[i])
        for indexes in (order, order[::-1]):
            if indexes != list(range(len(chosen))):
                yield [chosen[i] for i in indexes]


def seats_by_host(candidate: Candidate) -> list[list[Seat]]:
    """The seats of each node in node-rank order."""
    hosts: dict[str, list[Seat]] = {}
    for stage in candidate.seats:
        for seat in stage:
            hosts.setdefault(seat.host.name, []).append(seat)
    return list(hosts.values())


def search_ladder(inventory: Inventory, target: Target, request: Request, contexts: Iterable[int]) -> Found:
    """The first of several contexts that a first-tier layout carries, else the first any carries, else the last."""
    found: Found | None = None
    simplest: Found | None = None
    for context in contexts:
        found = search(inventory, target, replace(request, context_tokens=context))
        if found.best is not None and tier_of(found.best.candidate) == 0:
            return found
        simplest = simplest or (found if found.best is not None else None)
    assert found is not None
    return simplest or found
