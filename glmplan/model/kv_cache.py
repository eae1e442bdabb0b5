"""How many bytes one token takes in the KV cache of a rank.

MLA KV rows are replicated over TP ranks and divided only by pipeline stages, attention-DP batch or decode-context
parallelism. Beside the rows stand the index-K rows of the lightning indexer: 128 e4m3 bytes and one F32 scale a token.
`allocated` is what the pool takes, `budgeted` what the engine counts when it divides its memory by it: they differ in
SGLang 0.5.13.post1 with packed FP8 rows (788 against 708 bytes a layer; pool_configurator.py:118, memory_pool.py:1843).
"""

from __future__ import annotations

from dataclasses import dataclass

from glmplan.facts.engine_profile import EngineProfile, KvFormat
from glmplan.facts.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class KvCell:
    """Bytes per token of one layer range."""

    mla: int
    index_k: int
    budgeted: int

    @property
    def allocated(self) -> int:
        """Bytes the pool really takes for one token."""
        return self.mla + self.index_k

    def __add__(self, other: KvCell) -> KvCell:
        return KvCell(self.mla + other.mla, self.index_k + other.index_k, self.budgeted + other.budgeted)


def layer_cell(config: ModelConfig, engine: EngineProfile, kv: KvFormat, layer: int) -> KvCell:
    """Bytes per token of one layer; the MTP layer is number `num_hidden_layers` and always holds an index row."""
    is_mtp = layer >= config.num_hidden_layers
    has_index = is_mtp or engine.index_cache_layers == "all" or config.indexer_full[layer]
    index = engine.index_row_bytes if has_index else 0
    budget_row = kv.row_bytes if kv.budget_row_bytes is None else kv.budget_row_bytes
    return KvCell(kv.row_bytes, index, budget_row + index)


def range_cell(config: ModelConfig, engine: EngineProfile, kv: KvFormat, first: int, last: int, mtp: bool) -> KvCell:
    """Bytes per token of layers `first <= l < last`, and of the MTP layer when asked."""
    cell = KvCell(0, 0, 0)
    for layer in range(first, last):
        cell = cell + layer_cell(config, engine, kv, layer)
    return cell + layer_cell(config, engine, kv, config.num_hidden_layers) if mtp else cell
