"""Does this pipeline stage begin on a layer that has no top-k of its own and gets none?

SGLang 0.5.13.post1 begins every stage without top-k (srt/models/deepseek_v2.py:2437) and sends only hidden states and
residuals on (:2481), so a stage must begin on a layer with an indexer. Left alone it would fail on its first batch, after
all weights are read.
"""

from __future__ import annotations

from typing import Any

from glmplan.errors import UnsupportedError

PARTITION = "SGLANG_PP_LAYER_PARTITION"


def require_own_topk(runner: Any, version: str) -> None:
    """Raise UnsupportedError where this rank's first layer shares the top-k of a layer on an earlier stage."""
    if runner.pp_size < 2:
        return
    from sglang.srt.distributed.utils import get_pp_indices

    config = runner.model_config.hf_config
    try:
        first, _ = get_pp_indices(config.num_hidden_layers, runner.pp_rank, runner.pp_size)
    except ValueError:
        return  # a partition that does not add up: the engine's own words name it
    if first == 0 or not shares_topk(config, first):
        return
    own = [layer for layer in range(1, config.num_hidden_layers) if not shares_topk(config, layer)]
    near = [*[layer for layer in own if layer < first][-1:], *[layer for layer in own if layer > first][:1]]
    where = f"Begin it on layer {' or '.join(map(str, near))} ({PARTITION} counts layers per stage)."
    raise UnsupportedError(
        f"Pipeline stage {runner.pp_rank} begins on layer {first}, which shares the top-k of an earlier layer, and "
        f"SGLang {version} does not send it between stages.",
        where if near else "Use one stage.",
    )


def shares_topk(config: Any, layer: int) -> bool:
    """Whether a layer reuses the top-k of an earlier one, by the engine's rule (deepseek_v2.py:1564-1591)."""
    pattern = getattr(config, "index_topk_pattern", None)
    if pattern is not None:
        return bool(pattern[layer] == "S")
    offset, every = getattr(config, "index_skip_topk_offset", None), getattr(config, "index_topk_freq", 1)
    return bool(max(layer - (1 if offset is None else offset - 1), 0) % every)
