"""What is called of SGLang to time its fused experts, without a running engine around it.

`moe_align_block_size` and `invoke_fused_moe_kernel` need nothing else; looking up the default asks only whether inference is
to be deterministic, which is answered here.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from glmplan.kernels.engines.sglang_expert_tables import LOOKUP
from glmplan.kernels.engines.sglang_tables import BLOCK, Config
from glmplan.kernels.engines.sglang_tune_compile import Ahead
from glmplan.kernels.engines.sglang_tune_experts import Experts

FUSED = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe"


class Engine:
    """Its functions, the lookup of its default, and its kernel compiled ahead."""

    def __init__(self) -> None:
        fused: Any = import_module(FUSED)
        self.lookup: Any = import_module(LOOKUP)
        self.align, self.invoke = fused.moe_align_block_size, fused.invoke_fused_moe_kernel
        self.kernels: Any = import_module(self.invoke.__module__)
        plain = SimpleNamespace(enable_deterministic_inference=False)
        if hasattr(self.lookup, "get_exec"):
            self.lookup.get_exec = lambda: SimpleNamespace(deterministic=plain)
        else:
            self.lookup.get_global_server_args = lambda: plain
        self.ahead = Ahead(self.kernels, "fused_moe_kernel")

    def file_name(self, shape: Experts) -> str:
        return str(self.lookup.get_config_file_name(shape.experts, shape.n, "fp8_w8a8", [BLOCK, BLOCK]))

    def default(self, shape: Experts, rows: int) -> tuple[Config, Config, bool]:
        """What it would use for `up` and `down`, and whether through TMA."""
        first, second = (shape.experts, 2 * shape.n, shape.hidden), (shape.experts, shape.hidden, shape.n)
        config, (down, _) = self.lookup.try_get_optimal_moe_config(
            first, second, shape.top_k, "fp8_w8a8", rows, block_shape=[BLOCK, BLOCK], return_down_config=True
        )
        up = dict(config)
        down = dict(down or config)
        through_tma = [one.pop("USE_TMA", False) for one in (up, down)]
        return up, down, any(through_tma)
