"""The schema of `profiles/engines/*.toml`: what one engine version does with memory, layers and flags.

Everything here was read in the released wheel or the patch the profile names; `source` says where. SM numbers are
compute capabilities times ten (89 is 8.9). AMD GPUs have no SM and are matched by `amd`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glmplan.facts.base import Frozen
from glmplan.facts.support import Claim, ProofRun


class KvFormat(Frozen):
    """One row of MLA KV cache: bytes per token and layer as allocated, and as the engine's budget counts them."""

    id: str
    flag: str
    dtype: Literal["fp8", "bf16", "fp4"]
    row_bytes: int
    budget_row_bytes: int | None = None
    source: str


class AttentionOption(Frozen):
    """A pair of sparse-attention backends and the GPUs that run it. `plugin` marks options that need the kernel port.

    `logits_*`: what the prefill indexer allocates per (query, key) and the share of free memory the engine lets it budget
    at 4 bytes each. `decode_scratch` and `prefill_key` are bytes per token of context; `workspace_bytes` is fixed.
    """

    id: str
    sms: tuple[int, ...]
    amd: bool = False
    kv_format: str
    prefill: str
    decode: str
    indexer: str
    plugin: bool = False
    env: dict[str, str] = Field(default_factory=dict)
    decode_scratch_bytes_per_context_token: int = 0
    prefill_key_bytes_per_context_token: int = 0
    logits_bytes_per_element: int = 4
    logits_free_percent: int = 20
    workspace_bytes: int = 0
    dcp: bool = False
    evidence: Claim
    why: str
    source: str


class QuantizationOption(Frozen):
    """How a checkpoint scheme is loaded on some GPUs.

    `scale_denominator`: scales are kept as values / denominator bytes. `moe_scratch_percent`: what the MoE kernel allocates,
    over one `[tokens * topk, hidden]` BF16 buffer and its partner.
    """

    scheme: str
    sms: tuple[int, ...]
    amd: bool = False
    flags: tuple[str, ...] = ()
    scale_denominator: int | None = None
    moe_scratch_percent: int = 100
    kernel: str
    evidence: Claim
    source: str


class WeightRules(Frozen):
    """How resident weights differ from the checkpoint's."""

    indexer_layers: Literal["full", "all"]
    indexer_wk: Literal["checkpoint", "bf16"]
    absorbed_kv_b: bool
    rope_element_bytes: int
    source: str


class ParallelRules(Frozen):
    """Which sizes of each parallelism the engine runs for this model."""

    tp_sizes: tuple[int, ...]
    pipeline: bool
    attention_dp: bool
    expert_parallel: bool
    dcp_sizes: tuple[int, ...] = (1,)
    relays_topk: bool
    partition_env: str
    cross_node_tp: bool = True
    source: str


class MtpRules(Frozen):
    """Multi-token prediction: draft length, and whether it may run with a pipeline.

    `draft_before_pool`: the draft's weights and cell count when the pool is sized. `draft_embedding_while_sizing`: the
    draft then still holds an embedding of its own, which it later shares.
    """

    supported: bool
    default_steps: int = 3
    with_pipeline: Literal["no", "opt-in", "yes"]
    pipeline_env: dict[str, str] = Field(default_factory=dict)
    embedding_on_last_stage: bool = False
    draft_before_pool: bool = True
    draft_embedding_while_sizing: bool = False
    source: str


class ReserveRules(Frozen):
    """Memory that is neither weights nor KV cache. Bytes are estimates unless the source says measured."""

    cuda_context_bytes: int
    cuda_context_source: str
    nccl_tp_nvlink_bytes: int
    nccl_tp_pcie_bytes: int
    nccl_pp_nvlink_bytes: int
    nccl_pp_pcie_bytes: int
    nccl_amd_bytes: int
    nccl_source: str
    graph_base_bytes: int
    graph_bytes_per_row: int
    graph_draft_percent: int
    graph_source: str
    indexer_logits_bytes: int | None = None
    indexer_source: str
    page_tokens: int = 64
    pool_slack_tokens: int = 64


class EngineProfile(Frozen):
    """One engine version. `proof` comes from the proof records, whatever the file says."""

    schema_version: Literal[1]
    id: str = Field(pattern=r"^[a-z0-9.-]+$")
    family: Literal["sglang", "vllm"]
    version: str
    title: str
    note: str = ""
    source: str
    index_cache_layers: Literal["full", "all"]
    index_row_bytes: int = 132
    parallel: ParallelRules
    weights: WeightRules
    mtp: MtpRules
    reserve: ReserveRules
    chunk_by_memory: tuple[tuple[int, int], ...]
    base_flags: tuple[str, ...]
    base_env: dict[str, str] = Field(default_factory=dict)
    flags: dict[str, str]
    kv_formats: tuple[KvFormat, ...]
    attention: tuple[AttentionOption, ...]
    quantization: tuple[QuantizationOption, ...]
    proof: tuple[ProofRun, ...] = ()

    def kv_format(self, format_id: str) -> KvFormat:
        """The KV format of that id; the profile loader has checked that every option's format exists."""
        return next(found for found in self.kv_formats if found.id == format_id)
