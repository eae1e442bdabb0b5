"""Does a pipeline stage begin on a layer that has no top-k of its own and gets none?

SGLang 0.5.13.post1 begins every stage without top-k (srt/models/deepseek_v2.py:2437) and sends only hidden states and
residuals on (:2481): such a stage fails on its first batch, after all weights are read. vLLM 0.33.0 would read a buffer
that nothing on that stage has written (vllm/model_executor/models/deepseek_v2.py:1211), and answer wrongly.
"""

from __future__ import annotations

from typing import Any

from glmplan.errors import UnsupportedError


def require_own_topk(config: Any, stage: int, first: int, engine: str, partition: str) -> None:
    """Raise UnsupportedError where layer `first`, on which the stage begins, shares the top-k of an earlier layer.

    `partition` is the engine's variable that counts layers per stage.
    """
    if first == 0 or not shares_topk(config, first):
        return
    own = [layer for layer in range(1, config.num_hidden_layers) if not shares_topk(config, layer)]
    near = [*[layer for layer in own if layer < first][-1:], *[layer for layer in own if layer > first][:1]]
    where = f"Begin it on layer {' or '.join(map(str, near))} ({partition} counts layers per stage)."
    raise UnsupportedError(
        f"Pipeline stage {stage} begins on layer {first}, which shares the top-k of an earlier layer, and {engine} does not "
        "send it between stages.",
        where if near else "Use one stage.",
    )


def shares_topk(config: Any, layer: int) -> bool:
    """Whether a layer reuses the top-k of an earlier one, by the engines' rule.

    SGLang 0.5.13.post1 srt/models/deepseek_v2.py:1564-1591, vLLM 0.33.0 vllm/model_executor/models/deepseek_v2.py:1145-1156.
    """
    pattern = getattr(config, "index_topk_pattern", None)
    if pattern is not None:
        return bool(layer < len(pattern) and pattern[layer] == "S")
    offset, every = getattr(config, "index_skip_topk_offset", None), getattr(config, "index_topk_freq", 1)
    return bool(max(layer - (1 if offset is None else offset - 1), 0) % every)
