"""How a model is divided over GPUs: the sizes, and which GPU is which rank.

SGLang's rank map is used for both engines (0.5.23 `srt/entrypoints/engine.py` `_calculate_rank_ranges`): with N nodes and
P stages, `max(P // N, 1)` stages share a node and a stage spans `max(N // P, 1)` nodes. Only P % N == 0 or N % P == 0
covers all ranks; other shapes start and then hang.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmplan.facts.gpu import Gpu
from glmplan.facts.host import Host
from glmplan.facts.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """`tp` x `pp` ranks on `nodes` nodes; `dp` attention groups, `ep` expert groups and `dcp` context groups inside TP."""

    tp: int
    pp: int
    nodes: int
    dp: int = 1
    ep: int = 1
    dcp: int = 1

    @property
    def gpus(self) -> int:
        """Ranks, one per GPU."""
        return self.tp * self.pp

    @property
    def gpus_per_node(self) -> int:
        """GPUs used on every node."""
        return self.gpus // self.nodes

    @property
    def attention_tp(self) -> int:
        """TP ranks that share one attention-DP batch."""
        return self.tp // self.dp

    @property
    def stages_per_node(self) -> int:
        """Stages that lie on one node."""
        return max(self.pp // self.nodes, 1)

    @property
    def plain(self) -> bool:
        """Whether only TP and PP are used."""
        return self.dp == self.ep == self.dcp == 1

    def __str__(self) -> str:
        extras = [f"{name}{size}" for name, size in (("DP", self.dp), ("EP", self.ep), ("DCP", self.dcp)) if size > 1]
        where = [f"on {self.nodes} nodes"] if self.nodes > 1 else []
        return " ".join([f"TP{self.tp}xPP{self.pp}", *extras, *where])


@dataclass(frozen=True, slots=True)
class Seat:
    """One GPU of one host, holding one rank."""

    host: Host
    gpu: Gpu


def shape_problem(config: ModelConfig, layout: Layout, block: int) -> str | None:
    """Why the model cannot be divided this way; `block` is the width that quantised tiles must keep whole."""
    tp, heads = layout.tp, config.num_attention_heads
    if tp % layout.dp or heads % layout.attention_tp:
        return f"{heads} heads do not divide over {tp} TP ranks with {layout.dp} attention groups"
    if config.n_routed_experts % layout.ep or tp % layout.ep:
        return f"{config.n_routed_experts} experts do not divide over {layout.ep} expert groups"
    width = config.moe_intermediate_size * layout.ep
    if width % tp or (width // tp) % block:
        return f"an expert's width {config.moe_intermediate_size} / TP {tp} breaks blocks of {block}"
    if config.vocab_size % tp:
        return f"the vocabulary of {config.vocab_size:,} does not divide over TP {tp}"
    if layout.pp > config.num_hidden_layers:
        return f"{layout.pp} stages are more than {config.num_hidden_layers} layers"
    return None


def seat_ranks(layout: Layout, chosen: list[tuple[Host, list[Gpu]]]) -> tuple[tuple[Seat, ...], ...]:
    """The seats of each stage in TP order, for nodes given in node-rank order."""
    per_node = layout.gpus_per_node
    flat = [[Seat(host, gpu) for gpu in gpus[:per_node]] for host, gpus in chosen]
    if layout.nodes <= layout.pp:
        return tuple(
            tuple(seats[stage * layout.tp : (stage + 1) * layout.tp])
            for seats in flat
            for stage in range(layout.stages_per_node)
        )
    nodes_per_stage = layout.nodes // layout.pp
    return tuple(
        tuple(seat for seats in flat[stage * nodes_per_stage : (stage + 1) * nodes_per_stage] for seat in seats)
        for stage in range(layout.pp)
    )
