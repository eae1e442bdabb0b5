"""A plan as it is printed, saved and launched from. The JSON Schema of `Plan` is docs/schema/plan.schema.json.

Bytes are integers, tokens are counts, fractions are of a GPU's memory. `fits: false` plans describe the layout that
lacks least. `kv_bytes_per_token` is the whole model's; a rank holds its stage's share. `smallest_count` answers a GPU
named without a count: of 1, 2, 4, ... in one node and then whole nodes, the first that fits.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glmplan.facts.base import Frozen
from glmplan.facts.support import Evidence


class PlanItem(Frozen):
    """One purpose of memory on a rank, with the source of its size."""

    name: str
    bytes: int
    group: Literal["weights", "kv_cache", "runtime", "margin", "others"]
    kind: Literal["sharded", "replicated", "derived", ""] = ""
    source: str


class PlanRank(Frozen):
    """The memory account of one rank. `shortfall_bytes` is what it lacks, 0 where it has enough."""

    pp_rank: int
    tp_rank: int
    node_rank: int
    host: str
    gpu_index: int
    gpu: str
    items: tuple[PlanItem, ...]
    weights_bytes: int
    kv_cache_bytes: int
    total_bytes: int
    capacity_bytes: int
    shortfall_bytes: int


class PlanStage(Frozen):
    """The layers of one pp_rank: `first_layer` to `last_layer` inclusive."""

    pp_rank: int
    first_layer: int
    last_layer: int
    layers: int
    begins_on: Literal["full", "shared"]
    hosts: tuple[str, ...]
    node_ranks: tuple[int, ...]
    weights_bytes: int
    kv_bytes_per_token: int


class PlanLayout(Frozen):
    """Sizes of each parallelism; `stages` are layer counts in order."""

    tp_size: int = Field(ge=1)
    pp_size: int = Field(ge=1)
    dp_size: int = Field(ge=1)
    ep_size: int = Field(ge=1)
    dcp_size: int = Field(ge=1)
    nodes: int = Field(ge=1)
    gpus: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1)
    stages: tuple[int, ...] = Field(min_length=1)


class PlanNode(Frozen):
    """A host inside the plan and the GPUs it gives, in rank order.

    `network` holds the variables that bind NCCL and gloo to the interface of `address`.
    """

    node_rank: int
    host: str
    address: str | None
    network: dict[str, str] = Field(default_factory=dict)
    gpu_indexes: tuple[int, ...]
    gpu: str
    sm: int | None
    all_gpus_used: bool
    quantization_flags: tuple[str, ...]
    kv_cache_bytes: int


class PlanPort(Frozen):
    """Which implementation serves an operation on these GPUs, and why. `plugin`: glmplan's kernels, which the engine lacks.

    `evidence` is proven only where a proof record on these very GPUs says so; `proof` quotes the records, other GPUs' too.
    """

    op: str
    implementation: str
    why: str
    evidence: Evidence
    proof: str = ""
    plugin: bool = False
    source: str


class PlanSettings(Frozen):
    """Every value the engine is told; nothing is left to its defaults.

    `kernel_port` is what the plugin is told: force where a GPU that the engine serves by itself joins one that it does not.
    """

    context_tokens: int
    concurrency: int
    kv_dtype: str
    kv_format: str
    kv_row_bytes: int
    prefill_backend: str
    decode_backend: str
    kernel_port: Literal["auto", "off", "force"] = "auto"
    attention_env: dict[str, str]
    mem_fraction: float = Field(gt=0, lt=1)
    max_total_tokens: int = Field(ge=0)
    chunk_tokens: int
    graph_max_bs: int
    max_running_requests: int
    mtp_steps: int
    disable_shared_experts_fusion: bool
    mixed_memory: bool


class PlanWeights(Frozen):
    """Where the weight bytes come from. `origin` says rule, headers or index; `certainty` how sure a rule is."""

    origin: str
    certainty: str
    tensor_bytes: int
    file_bytes: int | None
    parameters: int
    note: str = ""


class PlanRejection(Frozen):
    """A layout that was not chosen, one reason with numbers, and the nearest change that would make it fit."""

    layout: str
    tp_size: int
    pp_size: int
    dp_size: int
    ep_size: int
    dcp_size: int
    nodes: int
    gpus: int
    reason: str
    change: str
    shortfall_bytes: int


class WorstRank(Frozen):
    """The fullest rank."""

    pp_rank: int
    tp_rank: int
    host: str
    gpu_index: int
    fill: float


class Plan(Frozen):
    """What `glmplan size` answers."""

    schema_version: Literal[1] = 1
    glmplan_version: str
    fits: bool
    smallest_count: int | None = None
    summary: str
    engine: str
    engine_family: Literal["sglang", "vllm"]
    engine_version: str
    model: str
    checkpoint: str
    model_path: str
    inventory_origin: str
    layout: PlanLayout
    stages: tuple[PlanStage, ...]
    nodes: tuple[PlanNode, ...] = Field(min_length=1)
    ports: tuple[PlanPort, ...]
    settings: PlanSettings
    weights: PlanWeights
    worst_rank: WorstRank
    ranks: tuple[PlanRank, ...]
    kv_cache_tokens: int
    kv_bytes_per_token: int
    max_context_tokens: int
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    rejected: tuple[PlanRejection, ...] = ()
    shortfall_bytes: int = Field(ge=0)
