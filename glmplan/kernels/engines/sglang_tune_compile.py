"""How are the tiles of one Triton kernel compiled ahead, many at once, and what is raised by those that do not fit?

A launch in the engine's own code compiles and runs nothing while `compiling_only` holds (triton.AsyncCompileMode, in 3.6.0
and 3.8.0). Where compiling ahead does not work, each tile is compiled when it is timed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

COMPILERS = 8


class Ahead:
    """The kernel `name` of `module`; given up at its first failure."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name, self.works = module, name, True

    def compile(self, launch: Callable[[], object]) -> None:
        """Whatever `launch` launches of the kernel, in parallel."""
        if not self.works:
            return
        try:
            with self.compiling_only():
                launch()
        except Exception as error:
            self.works = False
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"Compiling one by one, because compiling ahead failed: {reason}", file=sys.stderr, flush=True)

    @contextmanager
    def compiling_only(self) -> Iterator[None]:
        """What does not compile says so when it is run."""
        import triton

        kernel = getattr(self.module, self.name)
        with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as threads:
            setattr(self.module, self.name, _Compiled(kernel))
            try:
                with triton.AsyncCompileMode(threads, ignore_errors=True):
                    yield
            finally:
                setattr(self.module, self.name, kernel)


class _Compiled:
    """kernel[grid](...) that compiles only."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **words: self.kernel.warmup(*arguments, grid=grid, **words)


def beyond_limits(error: Exception) -> bool:
    """Whether this tile is too large for the GPU or its compiler, which is no error of the search.

    MLIR's passes raise a plain RuntimeError.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    too_large = isinstance(error, (OutOfResources, PTXASError, CompilationError))
    return too_large or (isinstance(error, RuntimeError) and "PassManager" in str(error))
