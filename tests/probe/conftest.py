"""The stand-in NVML, built once for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_nvml_build import build, environment

Environment = Callable[[str | Path], dict[str, str]]


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built library."""
    return build(tmp_path_factory.mktemp("fake-nvml"))


@pytest.fixture(scope="session")
def fake_nvml(nvml_library: Path) -> Environment:
    """A function: name of a recorded facts file -> environment of a subprocess that sees those GPUs."""
    return lambda facts: environment(nvml_library.parent, facts)
