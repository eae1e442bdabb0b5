"""Which way the node program reads GPUs, and which GPUs a node of its own is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pynvml

from tests.fake_nvml_build import environment

ROOT = Path(__file__).parents[2]

READ = """
import json, sys
from glmplan.node.errors import NodeError
from glmplan.node.gpus import read_gpus, read_readable
indexes, folders = json.loads(sys.argv[1])
try:
    found = read_gpus(indexes, site_packages=folders)
except NodeError as error:
    found = {"kind": error.kind, "message": error.message}
print(json.dumps(found))
"""


def read(env: dict[str, str], indexes: list[int] | None = None, folders: tuple[str, ...] = ()) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", "-c", READ, json.dumps([indexes, folders])]
    ran = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_a_node_of_its_own_sees_only_its_gpus(nvml_folder: Path) -> None:
    found = read(environment(nvml_folder, "eight-4090-48g"), [4, 5])
    assert [gpu["index"] for gpu in found["gpus"]] == [4, 5]


def test_gpus_of_another_node_may_be_lost(nvml_folder: Path) -> None:
    env = environment(nvml_folder, "lost-gpu")
    assert [gpu["index"] for gpu in read(env, [0, 1])["gpus"]] == [0, 1]
    assert read(env)["kind"] == "gpu-lost"


def test_a_gpu_that_is_not_there_is_named(nvml_folder: Path) -> None:
    found = read(environment(nvml_folder, "mixed"), [0, 2])
    assert found == {"kind": "no-such-gpu", "message": "There is no GPU 2 on this machine; it has GPUs 0 to 1."}


def test_pynvml_is_taken_from_an_engines_environment(nvml_folder: Path, tmp_path: Path) -> None:
    """This Python's own pynvml cannot be imported and there is no nvidia-smi: only the engine's file is left."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "pynvml.py").write_text("raise ImportError\n")
    broken, engine = tmp_path / "broken", tmp_path / "engine"
    for folder in (broken, engine):
        folder.mkdir()
    (broken / "pynvml.py").write_text("raise RuntimeError('for another Python')\n")
    (engine / "pynvml.py").write_text(Path(pynvml.__file__).read_text())
    env = {**environment(nvml_folder, "mixed"), "PYTHONPATH": str(tmp_path / "hidden"), "PATH": str(tmp_path)}
    found = read(env, None, (str(tmp_path), str(broken), str(engine)))
    assert [gpu["name"] for gpu in found["gpus"]] == ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090"]
