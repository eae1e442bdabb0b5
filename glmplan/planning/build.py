"""From an evaluated layout to a plan: the rank ledgers, the settings and the words around them."""

from __future__ import annotations

from dataclasses import dataclass

from glmplan import __version__
from glmplan.facts.engine_profile import QuantizationOption
from glmplan.facts.gpu import Gpu
from glmplan.facts.support import support_of
from glmplan.model.tensors import all_groups
from glmplan.planning.evaluate import Evaluation
from glmplan.planning.layout import Seat
from glmplan.planning.plan import (
    Plan,
    PlanItem,
    PlanLayout,
    PlanNode,
    PlanPort,
    PlanRank,
    PlanRejection,
    PlanSettings,
    PlanStage,
    PlanWeights,
    WorstRank,
)
from glmplan.planning.ports import attention_options, choose_attention, kinds, quantization_for, sm_name
from glmplan.planning.request import KernelPort
from glmplan.planning.search import Found, Rejection, largest_context, seats_by_host
from glmplan.units import format_bytes


@dataclass(frozen=True)
class Context:
    """What a plan says about its inputs beside the search; working out every rejection's change takes time."""

    inventory_origin: str
    file_bytes: int | None
    advice: tuple[str, ...] = ()
    with_changes: bool = True
    counted: bool = False


def build_plan(found: Found, context: Context) -> Plan:
    """The plan of the best layout, or of the one that lacks least when none fits."""
    chosen = found.best or found.nearest
    if chosen is None:
        raise AssertionError("a search that neither fits nor misses was refused earlier")
    candidate, target = chosen.candidate, chosen.candidate.target
    tokens = chosen.pool_tokens if found.best else candidate.tokens_per_rank
    ranks = _ranks(chosen, tokens)
    worst = max(ranks, key=lambda rank: (rank.shortfall_bytes, rank.total_bytes / rank.capacity_bytes))
    return Plan(
        glmplan_version=__version__,
        fits=found.best is not None,
        smallest_count=candidate.layout.gpus if context.counted and found.best is not None else None,
        summary=_summary(found, chosen),
        engine=target.engine.id,
        engine_family=target.engine.family,
        engine_version=target.engine.version,
        model=target.model_name,
        checkpoint=target.checkpoint_name,
        model_path=target.model_path,
        inventory_origin=context.inventory_origin,
        layout=_layout(chosen),
        stages=_stages(chosen),
        nodes=_nodes(chosen, tokens),
        ports=_ports(chosen),
        settings=_settings(chosen, tokens),
        weights=_weights(chosen, context),
        worst_rank=WorstRank(
            pp_rank=worst.pp_rank, tp_rank=worst.tp_rank, host=worst.host, gpu_index=worst.gpu_index,
            fill=round(worst.total_bytes / worst.capacity_bytes, 4),
        ),
        ranks=ranks,
        kv_cache_tokens=tokens * candidate.layout.dp * candidate.layout.dcp if found.best else 0,
        kv_bytes_per_token=sum(cell.allocated for cell in candidate.cells[: None if candidate.mtp else -1]),
        max_context_tokens=_max_context(found, chosen),
        warnings=_warnings(chosen),
        advice=context.advice,
        rejected=tuple(_rejection(rejection, context.with_changes) for rejection in found.rejected),
        shortfall_bytes=max(rank.shortfall_bytes for rank in ranks),
    )  # fmt: skip


def _max_context(found: Found, chosen: Evaluation) -> int:
    if found.best is None:
        return largest_context(chosen.candidate)
    held = chosen.pool_tokens * chosen.candidate.layout.dcp
    limit = chosen.candidate.target.config.max_position_embeddings
    longest = largest_context(chosen.candidate, cuts=chosen.cuts)
    return min(max(longest, chosen.candidate.request.context_tokens), max(held, 0), limit)


def _summary(found: Found, chosen: Evaluation) -> str:
    candidate, layout = chosen.candidate, chosen.candidate.layout
    load = f"{candidate.request.context_tokens:,} tokens x {candidate.request.concurrency}"
    if found.best is not None:
        return f"fits: {layout} ({layout.gpus} GPUs), {chosen.kv_cache_tokens:,} KV tokens for {load}"
    short = max(chosen.shortfalls)
    if short == 0:
        return f"does not fit: {layout} holds {chosen.pool_tokens:,} KV tokens a rank for {load}"
    return f"does not fit: {layout} is {format_bytes(short)} short on pp_rank {chosen.worst_stage} for {load}"


def _ranks(chosen: Evaluation, tokens: int) -> tuple[PlanRank, ...]:
    candidate = chosen.candidate
    node_of = {seats[0].host.name: rank for rank, seats in enumerate(seats_by_host(candidate))}
    found = []
    for stage, seats in enumerate(candidate.seats):
        ledger, cell = candidate.ledger(stage), chosen.stage_cells(stage)
        rows = tokens + candidate.slack
        kv = candidate.engine.kv_format(candidate.option.kv_format)
        weights = [
            PlanItem(name=i.name, bytes=i.bytes, group=i.group, kind=i.kind, source=i.source)
            for i in ledger.stage_items(chosen.cuts[stage], chosen.cuts[stage + 1], candidate.mtp)
        ]
        cache = [
            PlanItem(name="MLA KV cache", bytes=cell.mla * rows, group="kv_cache", source=kv.source),
            PlanItem(
                name="index-K cache", bytes=cell.index_k * rows, group="kv_cache",
                source=f"128 e4m3 and one F32 scale a token on {candidate.engine.index_cache_layers} layers",
            ),
        ]  # fmt: skip
        for tp_rank, seat in enumerate(seats):
            runtime = [
                PlanItem(name=i.name, bytes=i.bytes, group=i.group, source=i.source)
                for i in candidate.reserve_items(stage, seat.gpu)
            ]
            found.append(_rank(stage, tp_rank, node_of[seat.host.name], seat, [*weights, *cache, *runtime]))
    return tuple(found)


def _rank(stage: int, tp_rank: int, node_rank: int, seat: Seat, items: list[PlanItem]) -> PlanRank:
    total = sum(item.bytes for item in items)
    return PlanRank.model_construct(
        pp_rank=stage,
        tp_rank=tp_rank,
        node_rank=node_rank,
        host=seat.host.name,
        gpu_index=seat.gpu.index,
        gpu=seat.gpu.label,
        items=tuple(items),
        weights_bytes=sum(item.bytes for item in items if item.group == "weights"),
        kv_cache_bytes=sum(item.bytes for item in items if item.group == "kv_cache"),
        total_bytes=total,
        capacity_bytes=seat.gpu.capacity_bytes,
        shortfall_bytes=max(total - seat.gpu.capacity_bytes, 0),
    )


def _layout(chosen: Evaluation) -> PlanLayout:
    layout = chosen.candidate.layout
    return PlanLayout(
        tp_size=layout.tp, pp_size=layout.pp, dp_size=layout.dp, ep_size=layout.ep, dcp_size=layout.dcp,
        nodes=layout.nodes, gpus=layout.gpus, gpus_per_node=layout.gpus_per_node,
        stages=tuple(last - first for first, last in zip(chosen.cuts, chosen.cuts[1:], strict=False)),
    )  # fmt: skip


def _stages(chosen: Evaluation) -> tuple[PlanStage, ...]:
    candidate, found = chosen.candidate, []
    order = [seats[0].host.name for seats in seats_by_host(candidate)]
    for stage, seats in enumerate(candidate.seats):
        first, last = chosen.cuts[stage], chosen.cuts[stage + 1]
        hosts = tuple(dict.fromkeys(seat.host.name for seat in seats))
        found.append(
            PlanStage(
                pp_rank=stage,
                first_layer=first,
                last_layer=last - 1,
                layers=last - first,
                begins_on="full" if candidate.target.config.indexer_full[first] else "shared",
                hosts=hosts,
                node_ranks=tuple(order.index(host) for host in hosts),
                weights_bytes=chosen.stage_weights(stage),
                kv_bytes_per_token=chosen.stage_cells(stage).allocated,
            )
        )
    return tuple(found)


def _nodes(chosen: Evaluation, tokens: int) -> tuple[PlanNode, ...]:
    target, found = chosen.candidate.target, []
    for rank, seats in enumerate(seats_by_host(chosen.candidate)):
        quantization = quantization_for(target.engine, target.scheme, seats[0].gpu)
        assert quantization is not None
        names = dict.fromkeys(seat.gpu.label for seat in seats)
        found.append(
            PlanNode(
                node_rank=rank,
                host=seats[0].host.name,
                address=seats[0].host.address,
                network=seats[0].host.network,
                gpu_indexes=tuple(seat.gpu.index for seat in seats),
                gpu=" + ".join(names),
                sm=seats[0].gpu.sm,
                all_gpus_used=len(seats) == len(seats[0].host.gpus),
                quantization_flags=quantization.flags,
                kv_cache_bytes=max(
                    chosen.stage_cells(stage).allocated * (tokens + chosen.candidate.slack)
                    for stage, seated in enumerate(chosen.candidate.seats)
                    if any(seat.host.name == seats[0].host.name for seat in seated)
                ),
            )
        )
    return tuple(found)


def _indexer_why(chosen: Evaluation, sms: str) -> str:
    candidate = chosen.candidate
    if not candidate.option.plugin:
        return f"{candidate.engine.title} has it for {sms}"
    if candidate.request.kernel_port == "force":
        return f"asked for ({sms})"
    return f"stands in for what {candidate.engine.title} lacks on these GPUs ({sms})"


def _why_plugin(chosen: Evaluation) -> str:
    """Which GPUs the released engine cannot serve, or what it would run there instead."""
    candidate = chosen.candidate
    title, gpus = candidate.engine.title, kinds(candidate.gpus)
    if candidate.request.kernel_port == "force":
        return "The kernel port was asked for"
    stock = attention_options(candidate.engine, "auto", "off")
    alone = [sm_name(gpu) for gpu in gpus if choose_attention(stock, [gpu]) is None]
    if alone:
        return f"{title} cannot serve this model on {' and '.join(alone)} by itself"
    instead = choose_attention(attention_options(candidate.engine, candidate.request.kv_dtype, "off"), gpus)
    if instead is not None:
        return f"By itself {title} would run {instead.prefill} with the {instead.indexer}"
    if len(gpus) > 1:
        return f"These GPUs share no sparse attention of {title}"
    return f"{title} has no sparse attention of its own with {candidate.request.kv_dtype} KV cache for {sm_name(gpus[0])}"


def _told_port(chosen: Evaluation) -> KernelPort:
    """What the plugin must be told: by itself it leaves GPUs alone that the engine serves, also beside others."""
    candidate = chosen.candidate
    if not candidate.option.plugin:
        return candidate.request.kernel_port
    usual = attention_options(candidate.engine, "auto")
    alone = [choose_attention(usual, [gpu]) for gpu in kinds(candidate.gpus)]
    return "force" if any(option and not option.plugin for option in alone) else candidate.request.kernel_port


def _ports(chosen: Evaluation) -> tuple[PlanPort, ...]:
    candidate = chosen.candidate
    option, target = candidate.option, candidate.target
    gpus = kinds(candidate.gpus)
    sms = " and ".join(sm_name(gpu) for gpu in gpus)
    attention = option.prefill if option.prefill == option.decode else f"{option.prefill} / {option.decode}"
    support = support_of(candidate.engine.proof, option.kv_format, option.plugin, option.evidence, [gpu.sm for gpu in gpus])
    ports = [
        PlanPort(
            op=op, implementation=implementation, why=why, evidence=support.evidence, proof=support.words,
            plugin=option.plugin, source=option.source,
        )
        for op, implementation, why in (
            ("sparse attention (prefill / decode)", attention, f"{option.why} ({sms})"),
            ("indexer logits", option.indexer, _indexer_why(chosen, sms)),
        )
    ]  # fmt: skip
    loaded: dict[QuantizationOption, list[Gpu]] = {}
    for gpu in kinds(candidate.gpus):
        found = quantization_for(target.engine, target.scheme, gpu)
        assert found is not None
        loaded.setdefault(found, []).append(gpu)
    for found, gpus in loaded.items():
        where = " and ".join(sm_name(gpu) for gpu in gpus)
        ports.append(
            PlanPort(
                op=f"{target.scheme} weights", implementation=found.kernel,
                why=f"how {target.engine.title} loads them on {where}", evidence=found.evidence, source=found.source,
            )
        )  # fmt: skip
    return tuple(ports)


def _settings(chosen: Evaluation, tokens: int) -> PlanSettings:
    candidate, request = chosen.candidate, chosen.candidate.request
    kv = candidate.engine.kv_format(candidate.option.kv_format)
    sms = {gpu.sm or 0 for gpu in candidate.gpus}
    fusion_unsafe = any(sm // 10 in (8, 12) for sm in sms) or candidate.target.scheme == "w4afp8"
    rooms = [gpu.available_bytes for gpu in candidate.gpus]
    return PlanSettings(
        context_tokens=request.context_tokens,
        concurrency=request.concurrency,
        kv_dtype=kv.flag,
        kv_format=kv.id,
        kv_row_bytes=kv.row_bytes,
        prefill_backend=candidate.option.prefill,
        decode_backend=candidate.option.decode,
        kernel_port=_told_port(chosen),
        attention_env=candidate.option.env,
        mem_fraction=chosen.budget.fraction,
        max_total_tokens=tokens,
        chunk_tokens=candidate.shape.chunk_tokens,
        graph_max_bs=request.batch,
        max_running_requests=request.running,
        mtp_steps=request.mtp_steps,
        disable_shared_experts_fusion=fusion_unsafe and candidate.engine.family == "sglang",
        mixed_memory=min(rooms) * 10 < max(rooms) * 9,
    )


def _weights(chosen: Evaluation, context: Context) -> PlanWeights:
    target = chosen.candidate.target
    return PlanWeights(
        origin=target.weights.origin,
        certainty=target.certainty,
        tensor_bytes=target.weights.total_bytes,
        file_bytes=context.file_bytes,
        parameters=sum(group.parameters for group in all_groups(target.config)),
        note=target.weight_note,
    )


def _warnings(chosen: Evaluation) -> tuple[str, ...]:
    candidate, target = chosen.candidate, chosen.candidate.target
    found = []
    if candidate.option.plugin:
        found.append(
            f"{_why_plugin(chosen)}: glmplan's kernels serve the model as a plugin of the engine. glmplan launch brings "
            "them along; without launch, install glmplan beside the engine on every node."
        )
    if candidate.gpus[0].vendor == "amd":
        found.append("AMD GPUs are sized only: glmplan has no launch path or kernels for them.")
    if any(gpu.unified_memory for gpu in candidate.gpus):
        found.append("The GPU shares its memory with the system: whatever else runs there takes from the same bytes.")
    if candidate.option.decode_scratch_bytes_per_context_token:
        found.append(
            "The indexer runs on the engine's torch fallback, which is correct but slow and reads the whole page table "
            "for every token."
        )
    if target.engine.note:
        found.append(f"{target.engine.title} is a {target.engine.note}.")
    if chosen.memory_tokens > 0 and chosen.budget.limit == "engine rule":
        found.append(
            "The engine sizes the pool by the rank with the least free memory, so the other ranks keep some unused."
        )
    if candidate.mtp and candidate.layout.pp > 1 and candidate.engine.mtp.with_pipeline == "opt-in":
        found.append(f"MTP with a pipeline is experimental in {target.engine.title}.")
    return tuple(found)


def _rejection(rejection: Rejection, with_change: bool) -> PlanRejection:
    layout = rejection.layout
    return PlanRejection.model_construct(
        layout=str(layout), tp_size=layout.tp, pp_size=layout.pp, dp_size=layout.dp, ep_size=layout.ep,
        dcp_size=layout.dcp, nodes=layout.nodes, gpus=layout.gpus, reason=rejection.reason,
        change=rejection.change if with_change else rejection.fixed_change,
        shortfall_bytes=rejection.shortfall_bytes,
    )  # fmt: skip
