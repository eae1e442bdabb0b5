"""Measured memory of a deployment in place of the estimate, for a plan that asks for the very same.

A measurement counts only where engine, checkpoint, GPU, layout and everything that sizes a workspace are equal; then what a
rank held beside weights, KV cache and graphs replaces the estimated workspaces. Weights and KV cache are exact and are never
replaced; the margin stays. Without a measurement nothing changes, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmplan.planning.ledger import LineItem

GRAPH_ITEM = "CUDA graphs"
NCCL_ITEM = "NCCL buffers"
MEASURED_ITEM = "activations and workspaces"
KEPT_ITEMS = ("CUDA context", NCCL_ITEM, "RoPE table", "request table", GRAPH_ITEM)
"""Lines that keep their own bytes beside the measured rest."""


@dataclass(frozen=True, slots=True)
class RuntimeKey:
    """Everything that runtime memory depends on."""

    engine: str
    model: str
    checkpoint: str
    gpu: str
    tp_size: int
    pp_size: int
    dp_size: int
    ep_size: int
    dcp_size: int
    gpus_per_node: int
    kv_format: str
    prefill_backend: str
    decode_backend: str
    chunk_tokens: int
    context_tokens: int
    graph_max_bs: int
    max_running_requests: int
    mtp_steps: int


@dataclass(frozen=True, slots=True)
class MeasuredStage:
    """The fullest rank of a stage: all runtime memory, and the graphs' part where the engine states it."""

    runtime_bytes: int
    graph_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MeasuredRuntime:
    """One measured deployment; `stages` in pp_rank order, `source` says where and when."""

    key: RuntimeKey
    stages: tuple[MeasuredStage, ...]
    source: str


def applied(items: list[LineItem], found: Sequence[MeasuredRuntime], key: RuntimeKey, stage: int) -> list[LineItem]:
    """The items with measured bytes, where a measurement has this key; else the items as they are."""
    measured = next((one for one in found if one.key == key and len(one.stages) == key.pp_size), None)
    if measured is None:
        return items
    take, source = measured.stages[stage], measured.source
    fixed = [_with_graphs(item, take, source) for item in items if item.group != "runtime" or item.name in KEPT_ITEMS]
    rest = take.runtime_bytes - sum(item.bytes for item in fixed if item.group == "runtime")
    if rest < 0:
        fixed = [_lessened(item, -rest, source) if item.name == NCCL_ITEM else item for item in fixed]
    fixed.append(LineItem(MEASURED_ITEM, max(rest, 0), "runtime", source))
    return [item for item in fixed if item.bytes]


def _with_graphs(item: LineItem, take: MeasuredStage, source: str) -> LineItem:
    if item.name != GRAPH_ITEM or take.graph_bytes is None:
        return item
    return LineItem(item.name, take.graph_bytes, item.group, source)


def _lessened(item: LineItem, by: int, source: str) -> LineItem:
    return LineItem(item.name, max(item.bytes - by, 0), item.group, source)
