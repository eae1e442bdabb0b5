"""A plan as `vllm serve` command lines, for 0.33.0 and the patched builds.

Nodes are joined without Ray: every node runs the same command with its rank, and those after the first are headless
(0.33.0 `engine/arg_utils.py:2399`). The sparse backend serves prefill and decode alike. `--kv-cache-memory-bytes` holds the
pool to the planned size: the engine's own profiling takes an estimate of the CUDA graphs from it that can be four times what
they use (record 17: 4.94 GiB against 1.23). A node of several stages gets the largest stage's bytes: the engine then cuts
every rank to the fewest blocks of all (`v1/core/kv_cache_planning.py:1580`).
"""

from __future__ import annotations

import json

from glmplan.engines.base import (
    Endpoints,
    NodeCommand,
    head_address,
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
    argv = ["vllm", "serve", plan.model_path, *engine.base_flags]
    argv += ["--tensor-parallel-size", str(layout.tp_size // layout.dp_size)]
    argv += ["--pipeline-parallel-size", str(layout.pp_size)]
    if layout.dp_size > 1:
        argv += [flags["attention_dp"], str(layout.dp_size)]
    if layout.ep_size > 1:
        argv.append("--enable-expert-parallel")
    if layout.dcp_size > 1:
        argv += ["--decode-context-parallel-size", str(layout.dcp_size)]
    if layout.nodes > 1:
        argv += ["--distributed-executor-backend", "mp", "--nnodes", str(layout.nodes)]
        argv += ["--node-rank", str(node.node_rank), "--master-addr", head_address(plan)]
        argv += ["--master-port", str(endpoints.rendezvous_port)]
    argv += ["--max-model-len", str(settings.context_tokens), "--kv-cache-dtype", settings.kv_dtype]
    argv += ["--block-size", "64"]
    if "VLLM_ATTENTION_BACKEND" not in settings.attention_env:
        argv += ["--attention-backend", settings.decode_backend]
    argv += [flags["mem_fraction"], f"{settings.mem_fraction:g}", flags["chunk"], str(settings.chunk_tokens)]
    argv += ["--kv-cache-memory-bytes", str(node.kv_cache_bytes)]
    argv += ["--max-num-seqs", str(settings.max_running_requests)]
    rows = settings.graph_max_bs * (settings.mtp_steps + 1)
    argv += [flags["graph_max_bs"], str(rows)] if rows else [flags["disable_graphs"]]
    argv += node.quantization_flags
    if settings.mtp_steps:
        speculative = {"method": "mtp", "num_speculative_tokens": settings.mtp_steps}
        argv += ["--speculative-config", json.dumps(speculative, separators=(",", ":"))]
    if node.node_rank > 0:
        return [*argv, "--headless"]
    return [*argv, "--host", listen_address(endpoints, node), "--port", str(endpoints.http_port)]


def _environment(plan: Plan, engine: EngineProfile, node: PlanNode) -> dict[str, str]:
    found = {**engine.base_env, **plan.settings.attention_env, **port_environment(plan), **visible_devices(node)}
    found |= node_network(plan, node, "VLLM_HOST_IP")
    if plan.layout.pp_size > 1:
        found[engine.parallel.partition_env] = ",".join(map(str, plan.layout.stages))
    return found
