"""What every byte of a rank is for.

A line item is one purpose with its integer bytes and its source. `sharded` items add up over the TP ranks to what the
checkpoint holds (attention: over the ranks of one attention-DP group); `replicated` items stand on every TP rank; `derived`
items are made at load time and are in no file. Sharding follows SGLang 0.5.23 (`srt/models/deepseek_v2.py:2063-2154`) and
vLLM 0.33.0, which agree for this model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from glmplan.facts.engine_profile import EngineProfile
from glmplan.facts.model_config import ModelConfig
from glmplan.model.tensors import INDEXER_ROLES, Role
from glmplan.model.weights import RoleBytes, StoredBytes, Weights

Group = Literal["weights", "kv_cache", "runtime", "margin", "others"]
Kind = Literal["sharded", "replicated", "derived", ""]


@dataclass(frozen=True, slots=True)
class LineItem:
    """One purpose of memory on a rank."""

    name: str
    bytes: int
    group: Group
    source: str
    kind: Kind = ""


@dataclass(frozen=True, slots=True)
class Split:
    """What divides weights.

    `scale_denominator`: a loader that keeps scales as values / denominator bytes. `shared_tp`: ranks the shared expert is
    divided over, where that is not `tp`.
    """

    tp: int
    attention_tp: int
    ep: int
    scale_denominator: int | None = None
    shared_tp: int | None = None


_LINES: dict[Role, str] = {
    Role.Q_A: "attention, replicated",
    Role.KV_A: "attention, replicated",
    Role.Q_B: "attention, sharded",
    Role.KV_B: "attention, sharded",
    Role.O_PROJ: "attention, sharded",
    Role.ROUTER: "router and norms",
    Role.ROUTER_BIAS: "router and norms",
    Role.NORM: "router and norms",
    Role.FINAL_NORM: "router and norms",
    Role.DENSE_MLP: "dense MLP",
    Role.SHARED_EXPERT: "shared expert",
    Role.ROUTED_EXPERTS: "routed experts",
    Role.EH_PROJ: "MTP projection",
    Role.EMBEDDING: "embedding",
    Role.LM_HEAD: "output head",
} | dict.fromkeys(INDEXER_ROLES, "indexer")

_TP_ROLES = {Role.DENSE_MLP, Role.SHARED_EXPERT, Role.ROUTED_EXPERTS, Role.LM_HEAD}
_ATTENTION_TP_ROLES = {Role.Q_B, Role.KV_B, Role.O_PROJ, Role.EMBEDDING}


def shards(role: Role, split: Split, family: str = "sglang") -> int:
    """Over how many ranks a role's tensors are divided; 1 means replicated."""
    if role is Role.SHARED_EXPERT and split.shared_tp is not None:
        return split.shared_tp
    if role in _TP_ROLES:
        # a data-parallel engine of vLLM has a TP group of its own; only the routed experts span all of them
        return split.tp if family == "sglang" or role is Role.ROUTED_EXPERTS else split.attention_tp
    return split.attention_tp if role in _ATTENTION_TP_ROLES else 1


@dataclass(slots=True)
class _Account:
    """Bytes by (line, kind) while a stage is added up."""

    lines: dict[tuple[str, Kind], int]

    def add(self, line: str, kind: Kind, count: int) -> None:
        if count:
            self.lines[(line, kind)] = self.lines.get((line, kind), 0) + count


def _add_role(account: _Account, role: Role, stored: StoredBytes, split: Split, family: str) -> None:
    count = shards(role, split, family)
    kind: Kind = "sharded" if count > 1 else "replicated"
    account.add(_LINES[role], kind, -(-stored.values // count))
    account.add(f"block scales, {kind}", kind, -(-stored.scales // count))
    account.add("tensor scalars", "replicated", stored.scalars)
    if split.scale_denominator is not None and stored.scales:
        wider = stored.values // split.scale_denominator - stored.scales
        account.add("scales widened to BF16", "derived", -(-max(wider, 0) // count))


def layer_account(
    config: ModelConfig, engine: EngineProfile, roles: RoleBytes, split: Split, unloaded_indexer: RoleBytes | None
) -> Mapping[tuple[str, Kind], int]:
    """Bytes of one layer on one rank by (line, kind)."""
    account = _Account({})
    for role, stored in roles.items():
        _add_role(account, role, stored, split, engine.family)
    if engine.weights.absorbed_kv_b:
        width = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        account.add("absorbed kv_b (w_kc, w_vc)", "derived", 2 * width * config.kv_lora_rank // split.attention_tp)
    if engine.weights.indexer_wk == "bf16" and Role.INDEXER_WK in roles:
        stored = roles[Role.INDEXER_WK]
        wide = 2 * config.index_head_dim * config.hidden_size
        account.add("indexer keys widened to BF16", "derived", max(wide - stored.total, 0))
    if unloaded_indexer is not None:
        account.add("indexers never loaded", "derived", sum(stored.total for stored in unloaded_indexer.values()))
    return account.lines


class WeightLedger:
    """Bytes per layer on one rank for one engine and split; `prefix[l]` is the sum of layers before l."""

    def __init__(self, config: ModelConfig, engine: EngineProfile, weights: Weights, split: Split) -> None:
        self.config, self.engine, self.weights, self.split = config, engine, weights, split
        indexer = {role: stored for role, stored in weights.layers[0].items() if role in INDEXER_ROLES}
        everywhere = engine.weights.indexer_layers == "all"
        seen: dict[object, Mapping[tuple[str, Kind], int]] = {}
        self.layers: list[Mapping[tuple[str, Kind], int]] = []
        for layer, roles in enumerate(weights.layers):
            extra = indexer if everywhere and not config.indexer_full[layer] else None
            key = (extra is None, tuple(sorted(roles.items(), key=lambda item: item[0])))
            if key not in seen:
                seen[key] = layer_account(config, engine, roles, split, extra)
            self.layers.append(seen[key])
        self.prefix = [0]
        for lines in self.layers:
            self.prefix.append(self.prefix[-1] + sum(lines.values()))

    def mtp_account(self) -> Mapping[tuple[str, Kind], int]:
        """The MTP layer as one line per kind; it shares embedding and head with the model."""
        found: dict[tuple[str, Kind], int] = {}
        lines = layer_account(self.config, self.engine, self.weights.mtp, self.split, None)
        for (_, kind), count in lines.items():
            found[("MTP layer", kind)] = found.get(("MTP layer", kind), 0) + count
        return found

    def ends(self, first: bool, last: bool, mtp: bool) -> Mapping[tuple[str, Kind], int]:
        """What the first and the last stage hold beside their layers."""
        account = _Account({})
        embedding_again = last and not first and mtp and self.engine.mtp.embedding_on_last_stage
        if first:
            _add_role(account, Role.EMBEDDING, self.weights.outer[Role.EMBEDDING], self.split, self.engine.family)
        if embedding_again:
            stored = self.weights.outer[Role.EMBEDDING]
            account.add("embedding for the MTP layer", "derived", -(-stored.total // self.split.attention_tp))
        if last:
            for role in (Role.LM_HEAD, Role.FINAL_NORM):
                _add_role(account, role, self.weights.outer[role], self.split, self.engine.family)
            if mtp:
                for key, count in self.mtp_account().items():
                    account.add(*key, count)
        return account.lines

    def stage_items(self, begin: int, end: int, mtp: bool) -> list[LineItem]:
        """The weight lines of a stage that holds layers `begin <= l < end`."""
        total: dict[tuple[str, Kind], int] = {}
        places = [*self.layers[begin:end], self.ends(begin == 0, end == len(self.layers), mtp)]
        for lines in places:
            for key, count in lines.items():
                total[key] = total.get(key, 0) + count
        return [LineItem(name, count, "weights", self._source(name, kind), kind) for (name, kind), count in total.items()]

    def _source(self, name: str, kind: Kind) -> str:
        if kind == "derived":
            return self.engine.weights.source
        return self.weights.origin
