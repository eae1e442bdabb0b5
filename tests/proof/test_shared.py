"""Two GPUs told as four: what glmplan reads of them through the real pynvml, and which GPUs the engine then gets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.proof import harness, pipeline
from tests.fake_nvml_build import RECORDED, environment

PROBE = """
import json
from glmplan.node.gpus import read_gpus
print(json.dumps(read_gpus(peers=True)))
"""


def read(nvml_folder: Path, facts: Path, *folders: Path) -> dict[str, Any]:
    paths = os.pathsep.join(map(str, (*folders, harness.ROOT)))
    told = {**environment(nvml_folder, facts), "PYTHONPATH": paths}
    found = subprocess.run([sys.executable, "-c", PROBE], env=told, capture_output=True, text=True, check=True, timeout=60)
    read: dict[str, Any] = json.loads(found.stdout)
    return read


def sleeper(devices: str) -> subprocess.Popen[bytes]:
    """A process that a GPU is used by."""
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": devices}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_two_gpus_are_told_as_four_with_the_second_pair_in_the_other_order(nvml_folder: Path, tmp_path: Path):
    users = {"0,1": sleeper("0,1"), "1,0": sleeper("1,0")}
    try:
        facts = json.loads((RECORDED / "two-h200.json").read_text())
        for gpu in facts["gpus"]:
            gpu["processes"] = [{"pid": one.pid, "used_bytes": 5 << 30} for one in users.values()]
        path = tmp_path / "two.json"
        path.write_text(json.dumps(facts))
        true, told = read(nvml_folder, path), read(nvml_folder, path, pipeline.SHARED)
    finally:
        for one in users.values():
            one.kill()
            one.communicate()
    assert (true["count"], told["count"]) == (2, 4)
    said = told["gpus"]
    assert [gpu["index"] for gpu in said] == [0, 1, 2, 3]
    first, second = (gpu["uuid"] for gpu in true["gpus"])
    assert [gpu["uuid"] for gpu in said] == [first, second, f"{second}-again", f"{first}-again"]
    own = {"index", "uuid", "processes"}
    for index, gpu in enumerate(said):
        real = true["gpus"][(0, 1, 1, 0)[index]]
        assert {key: value for key, value in gpu.items() if key not in own} == {
            key: value for key, value in real.items() if key not in own
        }
        assert [one["pid"] for one in gpu["processes"]] == [users["0,1" if index < 2 else "1,0"].pid]
    (link,) = true["peers"]
    peers = {(peer.pop("gpu_index"), peer.pop("peer_index")): peer for peer in told["peers"]}
    between = {key: value for key, value in link.items() if key not in ("gpu_index", "peer_index")}
    assert peers[0, 1] == peers[2, 3] == peers[0, 2] == peers[1, 3] == between, "two GPUs, in either order"


def test_of_more_gpus_two_are_told_and_one_is_not_enough(nvml_folder: Path):
    assert read(nvml_folder, RECORDED / "eight-4090-48g.json", pipeline.SHARED)["count"] == 4
    with pytest.raises(subprocess.CalledProcessError) as failed:
        read(nvml_folder, RECORDED / "gb10.json", pipeline.SHARED)
    assert "NVML failed" in failed.value.stderr


@pytest.mark.parametrize(("told", "real"), [("2,3", "1,0"), ("0,1", "0,1"), ("0", "0")])
def test_the_engine_gets_the_gpu_that_was_meant(told: str, real: str, tmp_path: Path):
    script = pipeline.engine_python(tmp_path)
    asked = [
        str(script),
        "-c",
        "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.executable, sys.argv[1])",
        "a b",
    ]
    said = subprocess.run(
        asked, env={**os.environ, "CUDA_VISIBLE_DEVICES": told}, capture_output=True, text=True, check=True, timeout=30
    )
    assert said.stdout.split(maxsplit=2) == [real, sys.executable, "a b\n"]


def test_no_group_has_two_ranks_on_one_gpu():
    """Tensor-parallel ranks are a node's, pipeline ranks have the same place on both nodes."""
    spec = importlib.util.spec_from_file_location("told", pipeline.SHARED / "pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    told = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(told)
    first, second = told.WHOLE[:2], told.WHOLE[2:]
    assert all(len(set(group)) == 2 for group in (first, second, *zip(first, second, strict=True)))
    assert told.SECOND == "1,0", "as engine_python makes them"
