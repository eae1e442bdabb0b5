"""Are the kernels right on this GPU? `python -m glmplan.kernels.verify` prints one line a check.

Each operation lists its own checks in `glmplan/kernels/<op>/verify.py` as `cases(device) -> list[Result]`. Exit code 0 when
all pass, 1 when one fails, 4 without PyTorch, Triton or a CUDA GPU. GLMPLAN_RUN_AS=sm89 checks the code of another SM.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

from glmplan.errors import GlmplanError, UnsupportedError, UsageError
from glmplan.kernels.results import Result

OPS = ("indexer_logits", "topk", "sparse_mla", "kv_quant")
WIDTHS = (15, 34, 11, 11, 11, 4)


def main() -> int:
    try:
        print(_setting())
        return _verify()
    except GlmplanError as error:
        print(f"glmplan: {error.message}", file=sys.stderr)
        if error.next_step:
            print(f"  next: {error.next_step}", file=sys.stderr)
        return error.exit_code


def _setting() -> str:
    """What runs, on what; raises when nothing can run."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"The kernels need {' and '.join(missing)}, not installed.", "pip install 'glmplan[kernels]'")
    import torch
    import triton

    from glmplan.kernels import run_as

    native = run_as.device_sm()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 runs kernels on the CPU and would verify nothing here.", "Unset it.")
    run_as.enable_from_environment()
    if run_as.target_sm() < min(run_as.SMS):
        raise UnsupportedError(f"This GPU is sm_{native}; the kernels need sm_80 or newer.")
    name = torch.cuda.get_device_name()
    return (
        f"{name} (sm_{native}), kernels for sm_{run_as.target_sm()}, torch {torch.__version__}, triton {triton.__version__}"
    )


def _verify() -> int:
    print(_line("op", "format", "error", "limit", "time us", "ok"))
    passed = True
    for op in OPS:
        for result in _results(op):
            passed &= result.ok
            error, limit = f"{result.error:.3g}", f"{result.limit:.3g}"
            print(_line(result.op, result.format, error, limit, f"{result.microseconds:.1f}", "yes" if result.ok else "NO"))
    print("All kernels are right on this GPU." if passed else "Some kernels are WRONG on this GPU: see the lines marked NO.")
    return 0 if passed else 1


def _results(op: str) -> Iterator[Result]:
    """The operation's results; whatever stops it is a failed line and does not hide the other operations."""
    import torch

    try:
        module: Any = importlib.import_module(f"glmplan.kernels.{op}.verify")
        yield from module.cases(torch.device("cuda"))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        print(f"{op}: {reason}", file=sys.stderr)
        yield Result(op, "stopped, see above", float("nan"), 0.0, float("nan"), False)


def _line(*cells: str) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], WIDTHS[:2], strict=True)]
    return " ".join(left + [cell.rjust(width) for cell, width in zip(cells[2:], WIDTHS[2:], strict=True)])


if __name__ == "__main__":
    sys.exit(main())
