"""Checks of GPUs, each with the fact that sets it off and the one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from glmplan.facts.gpu import GpuProblem, GpuProcess
from glmplan.facts.host import Host
from glmplan.facts.system import PeerLink
from glmplan.units import GIB
from tests.doctor.hosts import host, plan, seen, verdict


def changed(index: int, number: int = 1, **facts: Any) -> Host:
    """A healthy host with one GPU that differs."""
    made = host(number)
    gpus = tuple(gpu.model_copy(update=facts) if gpu.index == index else gpu for gpu in made.gpus)
    return made.model_copy(update={"gpus": gpus})


def test_planned_gpus_that_are_missing_or_of_another_kind_fail() -> None:
    whole = host()
    fewer = whole.model_copy(update={"gpus": whole.gpus[:6]})
    found = verdict("gpus", seen(fewer, host(2), host(3), plan=plan()))
    assert found.status == "fail"
    assert "GPUs 6 and 7" in found.evidence
    other = verdict("gpus", seen(host(gpu="rtx-5090"), host(2), host(3), plan=plan()))
    assert other.status == "fail"
    assert "sm_120" in other.evidence
    assert verdict("gpus", seen(plan=plan())).status == "ok"


def test_a_driver_that_does_not_answer_is_quoted() -> None:
    problem = GpuProblem(kind="driver-mismatch", message="The library does not match.", next_step="Reboot.")
    found = verdict("gpus", seen(Host(name="h1", gpu_problem=problem)))
    assert (found.status, found.evidence) == ("fail", "The library does not match.")
    assert "Reboot." in found.repair


def test_memory_that_others_hold_is_compared_with_the_plan() -> None:
    what = seen(changed(3, memory_in_use_bytes=30 * GIB), host(2), host(3), plan=plan())
    found = verdict("gpu-memory", what)
    assert found.status == "fail"
    assert "GPU 3 has" in found.evidence
    assert "its rank needs" in found.evidence
    unplanned = verdict("gpu-memory", seen(changed(3, memory_in_use_bytes=30 * GIB)))
    assert (unplanned.status, unplanned.evidence) == ("warn", "GPU 3: 30.00 GiB in use")


def test_one_byte_short_of_the_rank_fails() -> None:
    rank = next(rank for rank in plan().ranks if (rank.node_rank, rank.gpu_index) == (0, 0))
    others = sum(item.bytes for item in rank.items if item.group == "others")
    for spare, status in ((0, "ok"), (-1, "fail")):
        usable = rank.total_bytes - others + spare
        what = seen(changed(0, memory_usable_bytes=usable), host(2), host(3), plan=plan())
        assert verdict("gpu-memory", what).status == status


def test_foreign_processes_are_named_with_owner_and_gpus() -> None:
    process = GpuProcess(pid=4711, used_bytes=3 * GIB, owner="bob", command="train.py")
    found = verdict("gpu-processes", seen(changed(5, processes=(process,))))
    assert found.status == "warn"
    assert "pid 4711 train.py of bob, 3.00 GiB on GPU 5" in found.evidence
    assert "kill 4711" in found.repair


@pytest.mark.parametrize(
    ("check", "facts", "status", "words"),
    [
        ("mig", {"mig": True}, "fail", "GPU 2"),
        ("pcie", {"pcie_width": 4}, "warn", "GPU 2 x4 of x16; fewer than x8"),
        ("pcie", {"pcie_generation": 1}, "ok", "x16"),
        ("power", {"power_limit_w": 300}, "warn", "300 W, others 450 W"),
        ("throttling", {"throttle_reasons": ("hardware-thermal",)}, "warn", "GPU 2: hardware-thermal"),
        ("throttling", {"throttle_reasons": ("power-cap",)}, "ok", "no GPU"),
        ("ecc", {"ecc": False}, "warn", "ECC is off on GPU 2"),
        ("nvlink", {"nvlink_active": 17}, "warn", "GPU 2: 17 of 18"),
    ],
)
def test_one_gpu_that_differs(check: str, facts: dict[str, Any], status: str, words: str) -> None:
    links = {"nvlink_active": 18} if check == "nvlink" else {}
    made = host(gpu_changes={"ecc": True, "power_limit_w": 450, **links})
    gpus = tuple(gpu.model_copy(update=facts) if gpu.index == 2 else gpu for gpu in made.gpus)
    found = verdict(check, seen(made.model_copy(update={"gpus": gpus})))
    assert found.status == status
    assert words in found.evidence


def test_nvlinks_are_compared_between_equal_gpus() -> None:
    made = host(gpu_changes={"nvlink_active": 18})
    other = tuple(
        gpu.model_copy(update={"nvlink_active": 4, "name": "NVIDIA A40"}) if gpu.index > 3 else gpu for gpu in made.gpus
    )
    found = verdict("nvlink", seen(made.model_copy(update={"gpus": other})))
    assert (found.status, found.evidence) == ("ok", "4 or 18 NVLinks up on every GPU")


def test_peers_without_direct_copies() -> None:
    none = tuple(PeerLink(gpu_index=a, peer_index=b, path="PHB", p2p=False) for a in range(8) for b in range(8) if a != b)
    found = verdict("peer-access", seen(host(peers=none)))
    assert found.status == "warn"
    assert "/dev/shm" in found.evidence
    some = tuple(link.model_copy(update={"p2p": link.gpu_index < 4 and link.peer_index < 4}) for link in none)
    assert "between GPUs 0-4" in verdict("peer-access", seen(host(peers=some))).evidence
    assert verdict("peer-access", seen(host(peers=()))).status == "skip"


def test_only_the_gpus_of_the_plan_count() -> None:
    node = plan().nodes[0].model_copy(update={"gpu_indexes": (0, 1), "all_gpus_used": False})
    small = plan().model_copy(update={"nodes": (node, *plan().nodes[1:])})
    busy = changed(7, memory_in_use_bytes=40 * GIB, mig=True)
    what = seen(busy, host(2), host(3), plan=small)
    assert verdict("mig", what).status == "ok"
    assert verdict("gpu-memory", what).status == "ok"
