"""Which tensors a GLM-5 family checkpoint has: shapes, roles and how many.

Shapes are `[out, in]` as stored. A group stands for `count` tensors of one shape (the routed experts of a layer are
three groups of 256). Shapes and names: model.md's table, which matches the published index of 59,585 tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from glmplan.facts.model_config import ModelConfig


class Role(StrEnum):
    """What a tensor does, which decides how it is quantised and sharded."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    FINAL_NORM = "final_norm"
    NORM = "norm"
    Q_A = "q_a"
    KV_A = "kv_a"
    Q_B = "q_b"
    KV_B = "kv_b"
    O_PROJ = "o_proj"
    INDEXER_WQ_B = "indexer_wq_b"
    INDEXER_WK = "indexer_wk"
    INDEXER_WEIGHTS_PROJ = "indexer_weights_proj"
    INDEXER_NORM = "indexer_norm"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    DENSE_MLP = "dense_mlp"
    SHARED_EXPERT = "shared_expert"
    ROUTED_EXPERTS = "routed_experts"
    EH_PROJ = "eh_proj"


INDEXER_ROLES = frozenset({Role.INDEXER_WQ_B, Role.INDEXER_WK, Role.INDEXER_WEIGHTS_PROJ, Role.INDEXER_NORM})
ATTENTION_ROLES = frozenset({Role.Q_A, Role.KV_A, Role.Q_B, Role.KV_B, Role.O_PROJ})
LINEAR_ROLES = ATTENTION_ROLES | {
    Role.INDEXER_WQ_B,
    Role.INDEXER_WK,
    Role.INDEXER_WEIGHTS_PROJ,
    Role.DENSE_MLP,
    Role.SHARED_EXPERT,
    Role.ROUTED_EXPERTS,
}


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """`count` tensors of one shape. `module` is the checkpoint's module name; `layer` is None outside the layers."""

    module: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None = None
    count: int = 1

    @property
    def parameters(self) -> int:
        """Elements over all tensors of the group."""
        return prod(self.shape) * self.count


def layer_groups(config: ModelConfig, layer: int) -> Iterator[TensorGroup]:
    """The tensors of decoder layer `layer`; the MTP layer is number `num_hidden_layers`."""
    is_mtp = layer >= config.num_hidden_layers
    yield from _attention(config, layer)
    if is_mtp or config.indexer_full[layer]:
        yield from indexer_groups(config, layer)
    if not is_mtp and config.dense_layers[layer]:
        yield from _gated_mlp(config, layer, "mlp", Role.DENSE_MLP, config.intermediate_size)
    else:
        yield from _moe(config, layer)
    if is_mtp:
        hidden, prefix = config.hidden_size, f"model.layers.{layer}"
        yield TensorGroup(f"{prefix}.eh_proj", Role.EH_PROJ, (hidden, 2 * hidden), layer)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield TensorGroup(f"{prefix}.{name}", Role.NORM, (hidden,), layer)


def _attention(config: ModelConfig, layer: int) -> Iterator[TensorGroup]:
    prefix, hidden, heads = f"model.layers.{layer}", config.hidden_size, config.num_attention_heads
    kv_a_width = config.kv_lora_rank + config.qk_rope_head_dim
    kv_b_width = heads * (config.qk_nope_head_dim + config.v_head_dim)
    shapes: tuple[tuple[str, Role, tuple[int, ...]], ...] = (
        ("self_attn.q_a_proj", Role.Q_A, (config.q_lora_rank, hidden)),
        ("self_attn.q_a_layernorm", Role.NORM, (config.q_lora_rank,)),
        ("self_attn.q_b_proj", Role.Q_B, (heads * config.head_dim, config.q_lora_rank)),
        ("self_attn.kv_a_proj_with_mqa", Role.KV_A, (kv_a_width, hidden)),
        ("self_attn.kv_a_layernorm", Role.NORM, (config.kv_lora_rank,)),
        ("self_attn.kv_b_proj", Role.KV_B, (kv_b_width, config.kv_lora_rank)),
        ("self_attn.o_proj", Role.O_PROJ, (hidden, heads * config.v_head_dim)),
        ("input_layernorm", Role.NORM, (hidden,)),
        ("post_attention_layernorm", Role.NORM, (hidden,)),
    )
    for name, role, shape in shapes:
        yield TensorGroup(f"{prefix}.{name}", role, shape, layer)


def indexer_groups(config: ModelConfig, layer: int) -> Iterator[TensorGroup]:
    """The lightning indexer of one layer; `k_norm` is one weight and one bias."""
    prefix, dim = f"model.layers.{layer}.self_attn.indexer", config.index_head_dim
    yield TensorGroup(f"{prefix}.wq_b", Role.INDEXER_WQ_B, (config.index_n_heads * dim, config.q_lora_rank), layer)
    yield TensorGroup(f"{prefix}.wk", Role.INDEXER_WK, (dim, config.hidden_size), layer)
    yield TensorGroup(f"{prefix}.weights_proj", Role.INDEXER_WEIGHTS_PROJ, (config.index_n_heads, config.hidden_size), layer)
    yield TensorGroup(f"{prefix}.k_norm", Role.INDEXER_NORM, (dim,), layer, count=2)


def _moe(config: ModelConfig, layer: int) -> Iterator[TensorGroup]:
    prefix, experts = f"model.layers.{layer}.mlp", config.n_routed_experts
    yield TensorGroup(f"{prefix}.gate", Role.ROUTER, (experts, config.hidden_size), layer)
    yield TensorGroup(f"{prefix}.gate.e_score_correction_bias", Role.ROUTER_BIAS, (experts,), layer)
    width = config.moe_intermediate_size
    yield from _gated_mlp(config, layer, "mlp.experts.0", Role.ROUTED_EXPERTS, width, experts)
    if config.n_shared_experts:
        shared = width * config.n_shared_experts
        yield from _gated_mlp(config, layer, "mlp.shared_experts", Role.SHARED_EXPERT, shared)


def _gated_mlp(config: ModelConfig, layer: int, name: str, role: Role, width: int, count: int = 1) -> Iterator[TensorGroup]:
    prefix, hidden = f"model.layers.{layer}.{name}", config.hidden_size
    yield TensorGroup(f"{prefix}.gate_proj", role, (width, hidden), layer, count)
    yield TensorGroup(f"{prefix}.up_proj", role, (width, hidden), layer, count)
    yield TensorGroup(f"{prefix}.down_proj", role, (hidden, width), layer, count)


def outer_groups(config: ModelConfig) -> Iterator[TensorGroup]:
    """The tensors outside the layers: embedding, final norm and output head."""
    table = (config.vocab_size, config.hidden_size)
    yield TensorGroup("model.embed_tokens", Role.EMBEDDING, table)
    yield TensorGroup("model.norm", Role.FINAL_NORM, (config.hidden_size,))
    yield TensorGroup("lm_head", Role.LM_HEAD, table)


def all_groups(config: ModelConfig, with_mtp: bool = True) -> Iterator[TensorGroup]:
    """Every tensor of the checkpoint."""
    yield from outer_groups(config)
    for layer in range(config.num_hidden_layers + (config.num_nextn_predict_layers if with_mtp else 0)):
        yield from layer_groups(config, layer)
