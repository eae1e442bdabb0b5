"""What a rank needs besides weights and KV cache: activations, logits, CUDA graphs, indexer scratch.

Bytes. These are upper estimates built from the shapes the engines allocate, not from a fit to single deployments:
MoE scratch is the `[tokens * topk, hidden]` BF16 buffer of the fused-MoE kernels plus its `[tokens * topk, inter]`
partner; attention holds the query, absorbed query, output and indexer query of one layer. Checked against records 1
(1.13 GiB peak activation at 8,192 tokens) and 27. Left out: the allocator's own rounding, which the margin line covers.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmplan.facts.engine_profile import AttentionOption, EngineProfile
from glmplan.facts.model_config import ModelConfig
from glmplan.units import MIB

BF16 = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What sizes the workspaces: batch rows, context and how the layer is divided."""

    chunk_tokens: int
    context_tokens: int
    tp_size: int
    attention_tp: int
    graph_rows: int
    draft: bool
    sampling_rows: int
    tokens_per_request: int = 1
    moe_scratch_percent: int = 100


def moe_scratch_bytes(config: ModelConfig, shape: Shape) -> int:
    """The fused-MoE kernel's intermediate buffers for one chunk."""
    inter = config.moe_intermediate_size // shape.tp_size
    per_token = config.num_experts_per_tok * (max(2 * inter, config.hidden_size) + inter) * BF16
    return shape.chunk_tokens * per_token * shape.moe_scratch_percent // 100


def attention_scratch_bytes(config: ModelConfig, shape: Shape) -> int:
    """Query, absorbed query, output and indexer tensors of one layer for one chunk."""
    heads = config.num_attention_heads // shape.attention_tp
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    per_head = config.head_dim + latent + config.kv_lora_rank + config.v_head_dim
    indexer = config.index_n_heads * config.index_head_dim * (BF16 + 1) + 4 * config.index_topk
    return shape.chunk_tokens * (heads * per_head * BF16 + indexer + config.q_lora_rank * BF16)


def residual_bytes(config: ModelConfig, shape: Shape) -> int:
    """Hidden state, residual, normed copy and the layer's output for one chunk."""
    return shape.chunk_tokens * 4 * config.hidden_size * BF16


def sampling_bytes(config: ModelConfig, shape: Shape) -> int:
    """BF16 logits gathered over TP and their F32 copy, last stage only."""
    return shape.sampling_rows * config.vocab_size * (BF16 + 4)


def activation_bytes(engine: EngineProfile, config: ModelConfig, shape: Shape, option: AttentionOption) -> int:
    """The peak of one forward pass over a chunk.

    vLLM serves MoE, indexer and prefill workspaces from one arena and so pays the largest of them
    (`v1/attention/backends/mla/indexer.py:916`); SGLang's indexer scratch is its own line.
    """
    moe = moe_scratch_bytes(config, shape)
    attention = attention_scratch_bytes(config, shape)
    if engine.family == "sglang":
        return residual_bytes(config, shape) + max(moe, attention)
    arena = max(moe, engine.reserve.indexer_logits_bytes or 0, *_vllm_prefill_arenas(engine, shape, option))
    topk_buffer = shape.chunk_tokens * config.index_topk * 4 * (2 if shape.draft else 1)
    return residual_bytes(config, shape) + attention + arena + topk_buffer


def _vllm_prefill_arenas(engine: EngineProfile, shape: Shape, option: AttentionOption) -> tuple[int, int]:
    factor = 5 if shape.context_tokens <= 262_144 else 2
    gathered_keys = shape.context_tokens * 8 * factor * engine.index_row_bytes
    flashmla = factor * shape.context_tokens * 1152 if option.prefill == "FLASHMLA_SPARSE" else 0
    return gathered_keys, flashmla


def graph_bytes(engine: EngineProfile, shape: Shape) -> int:
    """CUDA-graph private pools; the draft model's graphs come on top."""
    if shape.graph_rows == 0:
        return 0
    rows = engine.reserve.graph_bytes_per_row * shape.graph_rows
    draft = rows * engine.reserve.graph_draft_percent // 100 if shape.draft else 0
    return engine.reserve.graph_base_bytes + rows + draft


def decode_scratch_bytes(shape: Shape, option: AttentionOption) -> int:
    """What the torch fallback of the indexer gathers for one row of the page table; nothing for real kernels."""
    return option.decode_scratch_bytes_per_context_token * shape.context_tokens


def indexer_scratch_bytes(
    engine: EngineProfile, shape: Shape, option: AttentionOption, outside_bytes: int, capacity_bytes: int
) -> int:
    """SGLang's prefill MQA logits, cut into rows so that they take a share of what is free (`logits_free_percent`).

    The engine budgets 4 bytes an element where a fallback allocates more, so the true share is larger. With everything
    else outside the pool being `outside_bytes`, a share f of the free memory is f / (1 - f) of it.
    """
    if engine.family != "sglang":
        return 0
    size = option.logits_bytes_per_element
    whole = shape.chunk_tokens * shape.context_tokens * size
    share = option.logits_free_percent * size
    limit = max(outside_bytes * share // (400 - share), 8_000_000 * size)
    return min(whole, limit, capacity_bytes * 3 // 10) + option.prefill_key_bytes_per_context_token * shape.context_tokens


def request_table_bytes(engine: EngineProfile, shape: Shape) -> int:
    """SGLang's int32 slot of every token of every running request (`srt/mem_cache/memory_pool.py` ReqToTokenPool)."""
    rows = shape.sampling_rows // shape.tokens_per_request + 1
    return rows * shape.context_tokens * 4 if engine.family == "sglang" else 0


def margin_bytes(capacity_bytes: int) -> int:
    """Fragmentation and what the estimates miss: 512 MiB and 1 % of the card, our own rule."""
    return 512 * MIB + capacity_bytes // 100
