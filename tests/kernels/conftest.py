"""Kernel tests run in Triton's interpreter on the CPU; the switch must be set before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
NEED_NEITHER = ("test_verify.py",)
collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if MISSING and path.name not in NEED_NEITHER]

if not MISSING:
    import torch

    # The suite runs in parallel processes, and the shapes are small.
    torch.set_num_threads(2)


def pytest_report_header() -> str:
    """Says when the kernel tests are left out, because a missing file would not be noticed."""
    return f"kernel tests left out: {' and '.join(MISSING)} not installed" if MISSING else "kernel tests: Triton interpreter"
