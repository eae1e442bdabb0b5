"""What a deployment is told about its GPUs, through the real pynvml and the stand-in NVML library."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmplan.transport.node import NodeFailedError
from tests.fake_nvml_build import environment
from tests.node.host import Host, until

TOTAL, RESERVED = 51_527_024_640, 629_145_600


class GpuHost(Host):
    """A host of two GPUs whose memory and processes the test sets."""

    def __init__(self, home: Path, libraries: Path) -> None:
        super().__init__(home, python=sys.executable)
        self._home, self._libraries = home, libraries
        self.gpus([0, 0])

    def gpus(self, in_use: list[int], processes: list[dict[str, Any]] | None = None) -> None:
        facts = {"driver_version": "580.95.05", "nvml_version": "13.580.95.05", "cuda_version": 13000, "gpus": []}
        facts["gpus"] = [
            {
                "name": "NVIDIA GeForce RTX 4090",
                "uuid": f"GPU-{index}",
                "memory_v2": {"total": TOTAL, "reserved": RESERVED, "free": TOTAL - RESERVED - used, "used": used},
                "processes": (processes or []) if index == 0 else [],
            }
            for index, used in enumerate(in_use)
        ]
        path = self._home / "gpus.json"
        path.write_text(json.dumps(facts))
        self.transport._environment |= environment(self._libraries, path)


@pytest.fixture
def host(tmp_path: Path, nvml_folder: Path) -> Iterator[GpuHost]:
    made = GpuHost(tmp_path, nvml_folder)
    yield made
    made.end()


def test_a_foreign_process_on_a_gpu_is_refused_by_name(host: GpuHost) -> None:
    host.gpus([1 << 30, 0], [{"pid": os.getpid(), "used_bytes": 1 << 30}])
    with pytest.raises(
        NodeFailedError, match=rf"GPU 0 is used by pid {os.getpid()} \(.+\) of .+, which holds 1.0 GiB"
    ) as caught:
        host.shell("sleep 300", gpu_indexes=[0])
    assert caught.value.kind == "busy"
    assert host.shell("sleep 300", gpu_indexes=[1])["state"] == "started"


def test_a_desktop_on_a_gpu_is_no_foreign_process(host: GpuHost) -> None:
    host.gpus([512 << 20, 0], [{"pid": os.getpid(), "used_bytes": 512 << 20}])
    assert host.shell("sleep 300", gpu_indexes=[0])["state"] == "started"


def test_memory_is_told_by_process(host: GpuHost) -> None:
    pid = host.shell("sleep 300", gpu_indexes=[0, 1])["pid"]
    host.gpus([5 << 30, 1 << 30], [{"pid": pid, "used_bytes": 4 << 30}, {"pid": os.getpid(), "used_bytes": 1 << 30}])
    first, second = host.poll()["gpus"]
    assert first == {"index": 0, "used_bytes": 4 << 30, "in_use_bytes": 5 << 30, "total_bytes": TOTAL}
    # nobody is listed on the second: a container hides processes, and what was added since the start must be ours
    assert second == {"index": 1, "used_bytes": 1 << 30, "in_use_bytes": 1 << 30, "total_bytes": TOTAL}
    assert host.poll(gpus=False)["gpus"] == []


def test_stop_proves_that_memory_is_free(host: GpuHost) -> None:
    pid = host.shell("sleep 300", gpu_indexes=[0, 1])["pid"]
    host.gpus([4 << 30, 0], [{"pid": pid, "used_bytes": 4 << 30}])
    held = host.stop(gpu_free_s=0.5)
    assert (held["stopped"], held["survivors"]) == (False, [])
    assert [gpu["freed"] for gpu in held["gpus"]] == [False, True]
    host.gpus([128 << 20, 0])
    told = host.stop()
    assert told["stopped"]
    assert [gpu["freed"] for gpu in told["gpus"]] == [True, True]


def test_memory_that_nobody_explains_is_not_free(host: GpuHost) -> None:
    host.shell("sleep 300", gpu_indexes=[0])
    host.gpus([4 << 30, 0], [{"pid": 4_999_999, "used_bytes": 4 << 30}])
    assert not host.stop(gpu_free_s=0.5)["stopped"]
    host.gpus([4 << 30, 0], [{"pid": os.getpid(), "used_bytes": 4 << 30}])
    assert host.stop()["stopped"]


def test_without_a_driver_nothing_is_claimed(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.shell("sleep 300", gpu_indexes=[0])
    until(lambda: host.poll()["processes"])
    assert host.poll()["gpus"] == []
    told = host.stop()
    assert (told["stopped"], told["gpus"]) == (True, [])
    assert told["gpu_problem"]
