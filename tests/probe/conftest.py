"""The stand-in NVML as the tests of this folder use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_nvml_build import LIBRARY, environment

Environment = Callable[[str | Path], dict[str, str]]


@pytest.fixture(scope="session")
def nvml_library(nvml_folder: Path) -> Path:
    """The built library."""
    return nvml_folder / LIBRARY


@pytest.fixture(scope="session")
def fake_nvml(nvml_folder: Path) -> Environment:
    """A function: name of a recorded facts file -> environment of a subprocess that sees those GPUs."""
    return lambda facts: environment(nvml_folder, facts)
