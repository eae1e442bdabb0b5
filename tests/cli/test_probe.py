"""`glmplan probe` and `size` on what a driver says: the real pynvml over a stand-in library, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fake_nvml_build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built library."""
    folder = tmp_path_factory.mktemp("nvml")
    fake_nvml_build.build(folder)
    return folder


def run(folder: Path, facts: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One glmplan process that sees these facts."""
    environment = fake_nvml_build.environment(folder, facts)
    command = [sys.executable, "-m", "glmplan", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_probe_prints_every_gpu(nvml_folder):
    ran = run(nvml_folder, "eight-4090-48g", "probe")
    assert ran.returncode == 0
    assert ran.stdout.count("rtx-4090-48g") == 8


def test_probe_json_is_the_host_s_facts(nvml_folder):
    host = json.loads(run(nvml_folder, "busy", "probe", "--json").stdout)
    assert any(gpu["processes"] for gpu in host["gpus"])


def test_size_takes_the_local_gpus(nvml_folder):
    plan = json.loads(run(nvml_folder, "eight-4090-48g", "size", "--json").stdout)
    assert plan["inventory_origin"] == "probe"
    assert not plan["fits"]
    assert plan["ranks"][0]["gpu"] == "rtx-4090-48g"


def test_a_mig_slice_is_refused_with_the_command_that_ends_it(nvml_folder):
    ran = run(nvml_folder, "mig", "size")
    assert ran.returncode == 2
    assert "MIG" in ran.stderr
    assert "nvidia-smi -i" in ran.stderr


@pytest.mark.parametrize(("facts", "words"), [("driver-mismatch", "does not match"), ("lost-gpu", "does not answer")])
def test_a_driver_in_trouble_is_one_sentence(nvml_folder, facts, words):
    for command in ("probe", "size"):
        ran = run(nvml_folder, facts, command)
        assert ran.returncode == 1
        assert words in ran.stderr
        assert "Traceback" not in ran.stderr


def test_no_driver_is_one_sentence(glmplan):
    ran = glmplan("probe")
    assert ran.code == 1
    assert "no NVIDIA driver" in ran.err
    assert "--gpus" in ran.err
