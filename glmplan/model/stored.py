"""True tensor bytes instead of rules: names of a checkpoint's tensors mapped to roles.

Names follow the published checkpoints (model.md). A name that no role fits is counted as replicated, so nothing is
lost from the total, and is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from glmplan.facts.model_config import ModelConfig
from glmplan.model.tensors import Role, all_groups
from glmplan.model.weights import StoredBytes, Weights

_SCALE = re.compile(r"\.(weight_scale_inv|weight_scale|scales|qzeros|weight_zero_point)$")
_SCALAR = re.compile(r"\.(weight_scale_2|input_scale|weight_shape|weight_global_scale|input_global_scale|g_idx)$")
_VALUE = re.compile(r"\.(weight|weight_packed|qweight|bias)$")
_LAYER = re.compile(r"^(?:model\.)?layers\.([0-9]+)\.(.+)$")

_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"self_attn\.indexer\.wq_b$", Role.INDEXER_WQ_B),
        (r"self_attn\.indexer\.wk$", Role.INDEXER_WK),
        (r"self_attn\.indexer\.weights_proj$", Role.INDEXER_WEIGHTS_PROJ),
        (r"self_attn\.indexer\.k_norm$", Role.INDEXER_NORM),
        (r"self_attn\.q_a_proj$", Role.Q_A),
        (r"self_attn\.q_b_proj$", Role.Q_B),
        (r"self_attn\.kv_a_proj_with_mqa$", Role.KV_A),
        (r"self_attn\.kv_b_proj$", Role.KV_B),
        (r"self_attn\.o_proj$", Role.O_PROJ),
        (r"mlp\.experts\.", Role.ROUTED_EXPERTS),
        (r"mlp\.shared_experts\.", Role.SHARED_EXPERT),
        (r"mlp\.gate\.e_score_correction_bias$", Role.ROUTER_BIAS),
        (r"mlp\.gate$", Role.ROUTER),
        (r"mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)$", Role.DENSE_MLP),
        (r"eh_proj$", Role.EH_PROJ),
        (r"(layernorm|norm)$", Role.NORM),
    )
)
_OUTER = {
    "model.embed_tokens": Role.EMBEDDING,
    "embed_tokens": Role.EMBEDDING,
    "lm_head": Role.LM_HEAD,
    "model.norm": Role.FINAL_NORM,
    "norm": Role.FINAL_NORM,
}


def _split(name: str, size: int) -> tuple[str, StoredBytes]:
    """The module of a tensor name and its bytes as values, scales or scalars."""
    for pattern, stored in ((_SCALE, StoredBytes(0, size)), (_SCALAR, StoredBytes(0, 0, size))):
        if pattern.search(name):
            return pattern.sub("", name), stored
    return _VALUE.sub("", name), StoredBytes(size)


def weights_from_tensors(config: ModelConfig, bytes_by_name: Mapping[str, int], origin: str) -> tuple[Weights, list[str]]:
    """Weights by place and role, and the names that no role fits."""
    layers: list[dict[Role, StoredBytes]] = [{} for _ in range(config.num_hidden_layers + 1)]
    outer: dict[Role, StoredBytes] = {role: StoredBytes() for role in set(_OUTER.values())}
    unknown: list[str] = []
    for name, size in bytes_by_name.items():
        module, stored = _split(name, size)
        found = _LAYER.match(module)
        place, role = outer, _OUTER.get(module)
        if found:
            number = int(found[1])
            place = layers[min(number, config.num_hidden_layers)]
            role = next((r for pattern, r in _ROLES if pattern.search(found[2])), None)
        if role is None:
            unknown.append(name)
            role = Role.NORM if found else Role.FINAL_NORM
        place[role] = place.get(role, StoredBytes()) + stored
    return Weights(outer, tuple(layers[:-1]), layers[-1], origin), unknown


def missing_modules(config: ModelConfig, bytes_by_name: Mapping[str, int]) -> list[str]:
    """Modules that the config calls for and no tensor name belongs to; a checkpoint may leave the whole MTP layer out."""
    have = {_split(name, 0)[0] for name in bytes_by_name}
    mtp = f"model.layers.{config.num_hidden_layers}."
    with_mtp = config.num_nextn_predict_layers > 0 and any(name.startswith(mtp) for name in have)
    wanted: list[str] = []
    for group in all_groups(config, with_mtp):
        if group.role is Role.ROUTED_EXPERTS:
            wanted += [group.module.replace(".experts.0.", f".experts.{expert}.") for expert in range(group.count)]
        else:
            wanted.append(group.module)
    return [name for name in wanted if name not in have]


def scaled_to_total(weights: Weights, total_bytes: int, origin: str) -> Weights:
    """Rule weights whose routed experts absorb the difference to a known total, spread over the layers."""
    difference = total_bytes - weights.total_bytes
    places = [*weights.layers, weights.mtp]
    experts = [place.get(Role.ROUTED_EXPERTS, StoredBytes()).values for place in places]
    whole = sum(experts)
    changed, given, seen = [], 0, 0
    for place, values in zip(places, experts, strict=True):
        seen += values
        share = difference * seen // whole - given if whole else 0
        given += share
        stored = place.get(Role.ROUTED_EXPERTS)
        if stored is None:
            changed.append(dict(place))
            continue
        changed.append({**place, Role.ROUTED_EXPERTS: StoredBytes(stored.values + share, stored.scales, stored.scalars)})
    return Weights(weights.outer, tuple(changed[:-1]), changed[-1], origin)
