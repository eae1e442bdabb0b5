"""Checks of memory, limits, IOMMU, leftovers and the clock."""

from __future__ import annotations

from typing import Any

import pytest

from glmplan.facts.system import Leftover, Nic
from glmplan.units import GIB, MIB
from tests.doctor.hosts import host, seen, verdict

RDMA = (Nic(name="ib0", kind="infiniband", up=True, addresses=("10.1.0.1/24",), rdma_device="mlx5_0"),)


@pytest.mark.parametrize(
    ("check", "facts", "status", "words"),
    [
        ("memory", {"memory_available_bytes": 47 * GIB}, "warn", "8 ranks take about 48.00 GiB"),
        ("memory", {"memory_available_bytes": 48 * GIB}, "ok", "48.00 GiB available"),
        ("shared-memory", {"shared_memory_free_bytes": 64 * MIB}, "fail", "64 MiB free"),
        ("shared-memory", {"shared_memory_free_bytes": 512 * MIB}, "warn", "little"),
        ("swap", {"swap_total_bytes": 8 * GIB, "swap_used_bytes": 5 * GIB}, "warn", "5.00 GiB of 8.00 GiB"),
        ("swap", {"swap_total_bytes": 8 * GIB, "swap_used_bytes": 0}, "ok", "0 bytes of"),
        ("limits", {"limits": {"open_files": 1024}}, "warn", "open files 1,024"),
        ("limits", {"limits": {"open_files": None, "locked_memory_bytes": 65536}}, "ok", "suffice"),
        ("limits", {"limits": {"locked_memory_bytes": 65536}, "nics": RDMA}, "warn", "RDMA needs it unlimited"),
        ("limits", {"limits": {"processes": 1000}}, "warn", "processes 1,000"),
        ("iommu", {"iommu": "translated"}, "warn", "translates"),
        ("iommu", {"acs_bridges": 4}, "warn", "ACS redirects on 4"),
        ("iommu", {"iommu": "translated", "virtual_machine": True}, "skip", "virtual machine"),
        ("iommu", {"iommu": None, "acs_bridges": None}, "skip", "neither"),
        ("clock", {"clock_offset_s": -3.0, "clock_error_s": 0.5}, "warn", "3.00 s behind"),
        ("clock", {"clock_offset_s": 2.4, "clock_error_s": 0.5}, "ok", "ahead"),
        ("clock", {"clock_offset_s": 3600.0, "clock_error_s": 0.5}, "fail", "3600.00 s ahead"),
        ("clock", {"clock_offset_s": None}, "skip", "not read"),
    ],
)
def test_facts_and_verdicts(check: str, facts: dict[str, Any], status: str, words: str) -> None:
    found = verdict(check, seen(host(**facts)))
    assert found.status == status
    assert words in found.evidence
    assert bool(found.repair) == (status in ("warn", "fail"))


def test_gpus_on_nvlink_need_no_iommu_judgement() -> None:
    what = seen(host(gpu="h200", gpu_changes={"nvlink_active": 18}, iommu="translated"))
    assert verdict("iommu", what).status == "skip"


def test_leftovers_are_stopped_by_name_or_by_pid() -> None:
    named = Leftover(pid=10, owner="alice", command="sglang.launch_server", deployment="glm-5.2-x", gpu_indexes=(0, 1, 2, 3))
    stray = Leftover(pid=11, owner="bob", command="vllm serve", gpu_indexes=(5,))
    found = verdict("leftovers", seen(host(leftovers=(named, stray))))
    assert found.status == "warn"
    assert "pid 10 sglang.launch_server of alice (deployment glm-5.2-x) on GPUs 0-3" in found.evidence
    assert found.repair == "glmplan stop glm-5.2-x; on h1: kill 11"
