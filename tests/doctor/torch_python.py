"""A Python with PyTorch for tests: GLMPLAN_TEST_TORCH_PYTHON, or the one that runs the tests."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest


def torch_python() -> str:
    """The interpreter's path."""
    return os.environ.get("GLMPLAN_TEST_TORCH_PYTHON", sys.executable)


def _has_torch() -> bool:
    return "GLMPLAN_TEST_TORCH_PYTHON" in os.environ or importlib.util.find_spec("torch") is not None


needs_torch = pytest.mark.skipif(
    not _has_torch(), reason="needs PyTorch: make test-kernels installs it, or set GLMPLAN_TEST_TORCH_PYTHON"
)
