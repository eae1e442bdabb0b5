"""Properties try the same examples in every run, however slow the machine is; a stand-in NVML for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in NVML, for `tests.fake_nvml_build.environment`."""
    from tests.fake_nvml_build import build

    return build(tmp_path_factory.mktemp("nvml")).parent
