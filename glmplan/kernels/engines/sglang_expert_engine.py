"""What is called of SGLang to time its fused experts, without a running engine around it.

`moe_align_block_size` and `invoke_fused_moe_kernel` need nothing else; looking up the default asks only whether inference is
to be deterministic, which is answered here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from glmplan.kernels.engines.sglang_expert_tables import LOOKUP
from glmplan.kernels.engines.sglang_tables import BLOCK, Config
from glmplan.kernels.engines.sglang_tune_experts import Experts

FUSED = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe"
COMPILERS = 8


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
        self.ahead = True

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

    @contextmanager
    def compiling_only(self) -> Iterator[None]:
        """Launches of the fused kernel compile it in threads and run nothing; what does not compile says so when run."""
        import triton

        kernel = self.kernels.fused_moe_kernel
        with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as threads:
            self.kernels.fused_moe_kernel = _Compiled(kernel)
            try:
                with triton.AsyncCompileMode(threads, ignore_errors=True):
                    yield
            finally:
                self.kernels.fused_moe_kernel = kernel


class _Compiled:
    """kernel[grid](...) that compiles only."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **words: self.kernel.warmup(*arguments, grid=grid, **words)


def limits() -> tuple[type[Exception], ...]:
    """What Triton raises where a tile is too large for the GPU or its compiler."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return (OutOfResources, PTXASError, CompilationError)
