"""Kernel tests run in Triton's interpreter on the CPU; the switch must be set before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
NEED_NEITHER = ("test_verify.py",)
collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if MISSING and path.name not in NEED_NEITHER]

if not MISSING:
    import torch
    from triton.runtime import interpreter

    # The suite runs in parallel processes, and the shapes are small.
    torch.set_num_threads(2)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """Loop bounds read from memory are arrays of one element in Triton 3.6's interpreter, and NumPy warns of int() of
        those since 1.25 and refuses it since 2.4. Triton 3.7 does this itself."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


def pytest_report_header() -> str:
    """Says when the kernel tests are left out, because a missing file would not be noticed."""
    return f"kernel tests left out: {' and '.join(MISSING)} not installed" if MISSING else "kernel tests: Triton interpreter"
