"""GPUs through nvidia-smi: recorded output in, the same answer as through NVML out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmplan.node import nvidia_smi
from glmplan.node.errors import NodeError
from tests import fake_nvidia_smi, fake_nvml_build

ROOT = Path(__file__).parents[2]
MIB = 1024**2

READ = """
import json
from glmplan.node.errors import NodeError
from glmplan.node.gpus import read_readable
try:
    found = read_readable(peers=True)
    found["problems"] = [[one.kind, one.message] for one in found["problems"]]
except NodeError as error:
    found = {"kind": error.kind, "message": error.message, "next_step": error.next_step}
print(json.dumps(found))
"""

Read = Callable[[str], dict[str, Any]]


def run(env: dict[str, str]) -> dict[str, Any]:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", READ], env=env, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """What the node program reads where nvidia-smi prints a recorded machine and pynvml is missing."""
    return lambda recorded: run(fake_nvidia_smi.environment(tmp_path, recorded))


@pytest.mark.parametrize("machine", ["two-h200", "eight-4090-48g"])
def test_both_ways_tell_the_same(machine: str, read: Read, tmp_path: Path) -> None:
    smi = read(machine)
    library = tmp_path / "library"
    library.mkdir()
    fake_nvml_build.build(library)
    nvml = run(fake_nvml_build.environment(library, machine))
    assert smi.pop("nvml_version") is None
    assert nvml.pop("nvml_version")
    rounded = [key for key in nvml["gpus"][0] if key.startswith("memory_")]
    for mine, exact in zip(smi["gpus"], nvml["gpus"], strict=True):
        for key in rounded:
            assert abs(mine.pop(key) - exact.pop(key)) <= 2 * MIB, key
    assert smi == nvml


def test_nvlink_and_p2p_are_read_from_the_matrices(read: Read) -> None:
    found = read("two-h200")
    assert found["peers"] == [{"gpu_index": 0, "peer_index": 1, "path": "NV18", "p2p": True}]
    pairs = {(one["gpu_index"], one["peer_index"]): one for one in read("eight-4090-48g")["peers"]}
    assert len(pairs) == 28
    assert (pairs[0, 3]["path"], pairs[3, 4]["path"]) == ("NODE", "SYS")
    assert not any(one["p2p"] for one in pairs.values())


def test_an_old_driver_is_asked_again_without_the_fields_it_lacks(read: Read) -> None:
    found = read("old-driver")
    gpu = found["gpus"][0]
    assert found["cuda_version"] == "11.4"
    assert (gpu["sm"], gpu["memory_reserved_bytes"], gpu["mig"], gpu["ecc"]) == (None, None, True, True)
    assert gpu["memory_in_use_bytes"] == (40536 - 38210) * MIB
    assert gpu["throttle_reasons"] == ["power-cap"]
    assert gpu["nvlink_active"] == 1
    assert [(one["pid"], one["used_bytes"]) for one in gpu["processes"]] == [(4999999, None)]


def test_a_gpu_without_memory_of_its_own_has_the_systems(read: Read) -> None:
    gpu = read("gb10")["gpus"][0]
    assert gpu["unified_memory"] is True
    assert gpu["memory_total_bytes"] > gpu["memory_in_use_bytes"] > 0
    assert gpu["power_limit_w"] is None


def test_a_lost_gpu_does_not_hide_the_others(read: Read) -> None:
    found = read("lost-gpu")
    assert [gpu["index"] for gpu in found["gpus"]] == [0]
    assert found["problems"] == [["gpu-lost", "GPU 1 does not answer: GPU is lost. It fell off the bus or needs a reset."]]


@pytest.mark.parametrize(
    ("machine", "kind", "words"),
    [
        ("no-devices", "no-driver", "reports 0 GPUs"),
        ("not-loaded", "no-driver", "kernel module is not loaded"),
        ("mismatch", "driver-mismatch", "(580.95) does not match"),
        ("bus-lost", "gpu-lost", "GPU is lost"),
    ],
)
def test_a_driver_in_trouble_is_a_kind_and_a_sentence(machine: str, kind: str, words: str, read: Read) -> None:
    found = read(machine)
    assert found["kind"] == kind
    assert words in found["message"]
    assert found["next_step"]


def test_words_of_a_failure_that_nobody_knows_are_passed_on() -> None:
    assert "it printed nothing" in nvidia_smi.start_error("").message
    assert "something new" in nvidia_smi.start_error("something new\nand more").message


def test_a_program_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "nvidia-smi"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nvidia_smi, "TIMEOUT_S", 0.2)
    with pytest.raises(NodeError, match="did not answer within"):
        nvidia_smi.read(None, peers=False)


def test_without_nvidia_smi_there_is_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvidia_smi.shutil, "which", lambda name, path=None: None)
    with pytest.raises(NodeError) as raised:
        nvidia_smi.read(None, peers=False)
    assert raised.value.kind == "no-driver"


@pytest.mark.parametrize("text", ["", "warning, only", "GPU0\n", "\x1b[4mGPU0 GPU1\x1b[0m\nGPU1"])
def test_unfinished_output_is_nothing_found(text: str) -> None:
    assert nvidia_smi.table(["index", "name"], text) == []
    assert nvidia_smi.square(text) == {}
    assert nvidia_smi.processes(text) == {}
    assert nvidia_smi.peer_links(text, text, text) == []


def test_unknown_p2p_is_none() -> None:
    matrix = "GPU0 GPU1\nGPU0 X PIX\nGPU1 PIX X\n"
    assert nvidia_smi.peer_links(matrix, "", "")[0] == {"gpu_index": 0, "peer_index": 1, "path": "PIX", "p2p": None}
