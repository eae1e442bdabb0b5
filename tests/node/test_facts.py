"""The `facts` operation as it is sent to hosts: the zip on stdin, any Python from 3.9, and every answer a Host."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glmplan.facts.host import Host
from glmplan.probe.remote import to_host
from glmplan.transport.base import parse_hosts
from glmplan.transport.local import LocalTransport
from glmplan.transport.node import NodeFailedError, call
from tests import fake_nvidia_smi, fake_nvml_build
from tests.facts.files import write_safetensors
from tests.node.host import until

RECORDED = Path(__file__).parents[1] / "recorded" / "hosts"
QUICK_S = 1.5


def ask(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, python: str = sys.executable, **request: Any
) -> dict[str, Any]:
    """The operation's answer from a child process with this environment."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return call(LocalTransport(parse_hosts("local")[0]), "facts", request, python=python)


def host(answer: dict[str, Any]) -> Host:
    return to_host(answer, "a", ())


def test_a_host_tells_everything_it_is_asked_for(nvml_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": 40 * 1024**2})
    (tmp_path / "config.json").write_text("{}")
    env = fake_nvml_build.environment(nvml_folder, "eight-4090-48g")
    answer = ask(env, monkeypatch, model_path=str(tmp_path), disk_read=True, disk_seconds=10.0, gpu_indexes=[0, 1, 2])
    found = host(answer)
    assert [gpu.index for gpu in found.gpus] == [0, 1, 2]
    assert (found.driver_version, found.cuda_version, found.gpu_problem) == ("580.95.05", "13.0", None)
    system = found.system
    assert system is not None
    assert len(system.peers) == 3
    assert {nic.kind for nic in system.nics} >= {"loopback"}
    assert system.model is not None
    assert system.model.complete
    assert system.disks[0].path == str(tmp_path)
    assert system.disks[0].read_bytes_per_s
    assert system.disks[0].read_sample_bytes == 32 * 1024**2


def test_quick_facts_are_quick(nvml_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once is enough: a busy machine makes any try slow, and what is slow by itself is slow in all."""
    env = fake_nvml_build.environment(nvml_folder, "eight-4090-48g")

    def took_s() -> float:
        begin = time.monotonic()
        ask(env, monkeypatch)
        return time.monotonic() - begin

    until(lambda: took_s() < QUICK_S)


def test_without_a_driver_the_rest_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = host(ask(fake_nvidia_smi.environment(tmp_path, "not-loaded"), monkeypatch))
    assert found.gpus == ()
    assert found.gpu_problem is not None
    assert found.gpu_problem.kind == "no-driver"
    assert found.system is not None
    assert found.system.nics


def test_a_lost_gpu_is_a_problem_beside_the_others(nvml_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = host(ask(fake_nvml_build.environment(nvml_folder, "lost-gpu"), monkeypatch))
    assert found.gpu_problem is not None
    assert found.gpu_problem.kind == "gpu-lost"
    assert len(found.gpus) >= 2


def test_a_gpu_of_another_machine_is_a_problem(nvml_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = host(ask(fake_nvml_build.environment(nvml_folder, "mixed"), monkeypatch, gpu_indexes=[7]))
    assert found.gpu_problem is not None
    assert found.gpu_problem.kind == "no-such-gpu"


OTHER_PYTHONS = [path for name in ("python3.9", "python3.10", "python3.12", "python3.13") if (path := shutil.which(name))]


def pythons() -> list[str]:
    """Other Pythons of this machine that really run; a version manager's shims may not."""
    found = [path for path in OTHER_PYTHONS if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]
    return found or ["/usr/bin/python3"]


@pytest.mark.parametrize("python", pythons())
def test_other_pythons_give_the_same_answer(python: str, nvml_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.access(python, os.X_OK):
        pytest.skip("there is one Python only")
    env = fake_nvml_build.environment(nvml_folder, "two-h200")
    mine, other = ask(env, monkeypatch), ask(env, monkeypatch, python)
    assert set(other) >= {"hostname", "gpus", "gpu_problem", "system"}
    assert set(mine["system"]) == set(other["system"])
    assert host(other).system is not None


def test_the_sources_are_python_3_9() -> None:
    import ast

    import glmplan.node

    for path in sorted(Path(glmplan.node.__path__[0]).glob("*.py")):
        ast.parse(path.read_text(), filename=str(path), feature_version=(3, 9))
        assert "from __future__ import annotations" in path.read_text() or path.name == "__init__.py", path


def test_an_older_python_is_one_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 'python 3.8.18 is older than 3.9' >&2\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(NodeFailedError, match=re.escape("older than 3.9")):
        call(LocalTransport(parse_hosts("local")[0]), "facts", {}, python=str(old))


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_hosts_are_hosts(path: Path) -> None:
    found = host(json.loads(path.read_text()))
    assert found.gpus
    assert found.system is not None
    assert found.system.nics
