"""A plan as SGLang command lines, for 0.5.13.post1 and 0.5.23.

Flag spellings per version come from the engine profile; every value the engine would otherwise guess is explicit
(memory fraction, chunk, graph batch, KV dtype, both sparse-attention backends). `--max-total-tokens` holds the pool to
the planned size, which also corrects 0.5.13.post1's budget of 708 bytes for rows of 788.
"""

from __future__ import annotations

from glmplan.engines.base import (
    Endpoints,
    NodeCommand,
    head_address,
    joined,
    listen_address,
    node_network,
    port_environment,
    visible_devices,
)
from glmplan.facts.engine_profile import EngineProfile
from glmplan.planning.plan import Plan, PlanNode


def commands(plan: Plan, engine: EngineProfile, endpoints: Endpoints) -> tuple[NodeCommand, ...]:
    """One command per node, in node-rank order."""
    return tuple(
        NodeCommand(
            node_rank=node.node_rank,
            host=node.host,
            argv=tuple(_argv(plan, engine, endpoints, node)),
            environment=_environment(plan, engine, node),
            http_host=listen_address(endpoints, node),
        )
        for node in plan.nodes
    )


def _argv(plan: Plan, engine: EngineProfile, endpoints: Endpoints, node: PlanNode) -> list[str]:
    layout, settings, flags = plan.layout, plan.settings, engine.flags
    argv = ["python3", "-m", "sglang.launch_server", "--model-path", plan.model_path, *engine.base_flags]
    argv += ["--tp-size", str(layout.tp_size), "--pp-size", str(layout.pp_size)]
    argv += ["--nnodes", str(layout.nodes), "--node-rank", str(node.node_rank)]
    argv += ["--dist-init-addr", joined(head_address(plan), endpoints.rendezvous_port)]
    if layout.dp_size > 1:
        argv += [*flags["attention_dp"].split(), str(layout.dp_size)]
    if layout.ep_size > 1:
        argv += ["--ep-size", str(layout.ep_size)]
    argv += ["--context-length", str(settings.context_tokens), "--kv-cache-dtype", settings.kv_dtype]
    argv += ["--dsa-prefill-backend", settings.prefill_backend, "--dsa-decode-backend", settings.decode_backend]
    argv += [flags["mem_fraction"], f"{settings.mem_fraction:g}", "--max-total-tokens", str(settings.max_total_tokens)]
    argv += [flags["chunk"], str(settings.chunk_tokens), "--max-running-requests", str(settings.max_running_requests)]
    argv += _graphs(plan, engine)
    argv += node.quantization_flags
    if settings.disable_shared_experts_fusion:
        argv.append("--disable-shared-experts-fusion")
    if settings.mtp_steps:
        argv += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(settings.mtp_steps)]
        argv += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(settings.mtp_steps + 1)]
    return [*argv, "--host", listen_address(endpoints, node), "--port", str(endpoints.http_port)]


def _graphs(plan: Plan, engine: EngineProfile) -> list[str]:
    if plan.settings.graph_max_bs == 0:
        return [engine.flags["disable_graphs"], engine.flags["disable_prefill_graphs"]]
    return [engine.flags["graph_max_bs"], str(plan.settings.graph_max_bs), engine.flags["disable_prefill_graphs"]]


def _environment(plan: Plan, engine: EngineProfile, node: PlanNode) -> dict[str, str]:
    found = {**engine.base_env, **plan.settings.attention_env, **port_environment(plan), **visible_devices(node)}
    found |= node_network(plan, node, "SGLANG_HOST_IP")
    if plan.layout.pp_size > 1:
        found[engine.parallel.partition_env] = ",".join(map(str, plan.layout.stages))
        if plan.settings.mtp_steps:
            found |= engine.mtp.pipeline_env
    if plan.settings.mixed_memory:
        found["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
    return found
