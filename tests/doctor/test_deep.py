"""Who is which rank, and what answers of the deep parts mean."""

from __future__ import annotations

from typing import Any

import pytest

from glmplan.doctor.schedule import ranks_of, tournament
from glmplan.doctor.seen import Deep, Seen
from glmplan.errors import GlmplanError, UnreachableError
from glmplan.facts.host import Host
from glmplan.transport.node import NodeFailedError
from glmplan.units import GIB, MIB
from tests import samples
from tests.doctor.hosts import host, seen, verdict


@pytest.mark.parametrize("count", [2, 3, 8, 9, 33])
def test_every_two_meet_once_and_nobody_twice_a_round(count: int) -> None:
    rounds = tournament(range(count))
    pairs = [pair for round_ in rounds for pair in round_]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for round_ in rounds:
        players = [player for pair in round_ for player in pair]
        assert len(set(players)) == len(players)


def part(name: str, *indexes: int) -> Host:
    """A host that owns some H200s."""
    whole = samples.host(name, "h200", 8)
    return whole.model_copy(update={"gpus": tuple(gpu for gpu in whole.gpus if gpu.index in indexes)})


def two_hosts(**changes: Any) -> Seen:
    """`local#0-1` and `local#2-3`."""
    return seen(part("local#0-1", 0, 1), part("local#2-3", 2, 3), **changes)


def test_one_rank_a_gpu_with_nccl() -> None:
    ranks = ranks_of(two_hosts())
    assert (ranks.backend, ranks.world_size, ranks.first) == ("nccl", 4, (0, 2))
    assert [ranks.label(rank) for rank in range(4)] == [
        "local#0-1 GPU 0", "local#0-1 GPU 1", "local#2-3 GPU 2", "local#2-3 GPU 3",
    ]  # fmt: skip
    assert sum(len(round_) for round_ in ranks.rounds) == 6


def test_beyond_sixteen_ranks_one_of_each_host_talks() -> None:
    ranks = ranks_of(seen())
    assert ranks.world_size == 24
    assert sorted(pair for round_ in ranks.rounds for pair in round_) == [(0, 8), (0, 16), (8, 16)]


def test_a_host_without_room_on_its_gpus_makes_all_use_gloo() -> None:
    full = tuple(
        gpu.model_copy(update={"memory_in_use_bytes": gpu.memory_usable_bytes - GIB}) for gpu in part("b", 0, 1).gpus
    )
    what = seen(part("a", 0, 1), part("b", 0, 1).model_copy(update={"gpus": full}))
    assert (ranks_of(what).backend, ranks_of(what).counts) == ("gloo", (1, 1))
    assert ranks_of(seen(Host(name="local"))).counts == (2,)


def ranks_answer(first: int, **changes: Any) -> dict[str, Any]:
    """What a host of two ranks answers; `changes` are of its first rank."""

    def rank(number: int) -> dict[str, Any]:
        others = [other for other in range(4) if other != number]
        return {
            "rank": number, "join_s": 1.5, "nccl_version": "2.28.9", "paths": ["P2P/CUMEM"],
            "all_reduce": [
                {"bytes": 8, "wrong_elements": 0, "seconds": 21e-6},
                {"bytes": 256 * MIB, "wrong_elements": 0, "seconds": 1.2e-3},
            ],
            "links": [
                {"peer": peer, "latency_s": 12e-6, "bytes_per_s": 300e9, "wrong_elements": 0} for peer in others
            ],
        }  # fmt: skip

    return {"python": "python3", "ranks": [{**rank(first), **changes}, rank(first + 1)]}


def with_ranks(first: dict[str, Any] | GlmplanError, second: dict[str, Any] | GlmplanError) -> Seen:
    """A visit whose all-reduce gave these answers."""
    return two_hosts(deep=Deep({"ranks": {"local#0-1": first, "local#2-3": second}}))


def test_an_all_reduce_says_latency_and_bus_bandwidth() -> None:
    found = verdict("all-reduce", with_ranks(ranks_answer(0), ranks_answer(2)))
    assert found.status == "ok"
    # 2 x 3/4 x 268,435,456 bytes / 1.2 ms
    assert "4 ranks, NCCL 2.28.9 over P2P/CUMEM, right by value: 8 bytes in 21 µs" in found.evidence
    assert "256 MiB in 1.20 ms (bus 335.5 GB/s)" in found.evidence


def test_ranks_that_failed_are_named() -> None:
    lost = UnreachableError("local#2-3 did not answer within 150 s.", "Look at it.")
    found = verdict("all-reduce", with_ranks({"ranks": [{"rank": 1, "error": "DistStoreError: Timed out"}]}, lost))
    assert found.status == "fail"
    assert "local#2-3 did not answer" in found.evidence
    assert "local#0-1 GPU 1: DistStoreError: Timed out" in found.evidence


def test_one_wrong_element_fails() -> None:
    wrong = [{"bytes": 8, "wrong_elements": 1, "seconds": 1e-5}]
    found = verdict("all-reduce", with_ranks(ranks_answer(0), ranks_answer(2, all_reduce=wrong)))
    assert (found.status, found.evidence) == ("fail", "wrong sums on local#2-3 GPU 2")


def test_a_link_of_less_than_half_the_median_is_named() -> None:
    slow = [
        {"peer": 1, "latency_s": 12e-6, "bytes_per_s": 300e9, "wrong_elements": 0},
        {"peer": 2, "latency_s": 12e-6, "bytes_per_s": 100e9, "wrong_elements": 0},
    ]
    found = verdict("links", with_ranks(ranks_answer(0, links=slow), ranks_answer(2)))
    assert found.status == "warn"
    assert "slow: local#0-1 GPU 0 to local#2-3 GPU 2 100.0 GB/s (median 300.0 GB/s)" in found.evidence
    right = verdict("links", with_ranks(ranks_answer(0), ranks_answer(2)), of=1)
    assert right.evidence == (
        "2 links inside the host: 300.0 GB/s to 300.0 GB/s, latency up to 12 µs, "
        "4 links to other hosts: 300.0 GB/s to 300.0 GB/s, latency up to 12 µs"
    )


def test_wrong_values_on_a_link_fail() -> None:
    bad = [{"peer": 3, "latency_s": 12e-6, "bytes_per_s": 300e9, "wrong_elements": 7}]
    found = verdict("links", with_ranks(ranks_answer(0, links=bad), ranks_answer(2)))
    assert (found.status, found.evidence) == ("fail", "wrong values between local#0-1 GPU 0 to local#2-3 GPU 3")


def copies(**changes: Any) -> Any:
    """The verdict about copies between two GPUs."""
    pairs = [
        {"source": a, "target": b, "direct": True, "wrong_elements": 0, "bytes_per_s": 50e9} for a, b in ((0, 1), (1, 0))
    ]
    answer = {"python": "p", "pairs": pairs, "overran": False, "stuck_at": None, "exit_status": 0, "err": "", **changes}
    return verdict("copies", seen(host(), deep=Deep({"copies": {"h1": answer}})))


def test_copies_are_judged_by_value() -> None:
    assert copies().evidence == "2 pairs right by value, all direct, 50.0 GB/s to 50.0 GB/s"
    wrong = copies(pairs=[{"source": 0, "target": 1, "direct": True, "wrong_elements": 12345, "bytes_per_s": 1e9}])
    assert (wrong.status, wrong.evidence) == ("fail", "GPU 0 to 1: 12,345 wrong values")
    assert "NCCL_P2P_DISABLE=1" in wrong.repair
    stuck = copies(pairs=[], overran=True, stuck_at=[1, 3], exit_status=-9)
    assert (stuck.status, stuck.evidence) == ("fail", "the copy from GPU 1 to GPU 3 never ended")
    broken = copies(pairs=[], exit_status=1, err="Traceback\nRuntimeError: CUDA driver too old")
    assert "RuntimeError: CUDA driver too old" in broken.evidence


def kernels(**changes: Any) -> Any:
    """The verdict about the kernels of one GPU."""
    lines = ["op format error", "topk   k=2048  0  0  12.0  yes", "topk   k=512  1  0  12.0   NO"]
    gpu = {"gpu_index": 0, "exit_status": 0, "overran": False, "lines": lines[:2], "err": "", "elapsed_s": 61.4}
    answer = {"python": "/venv/bin/python3", "gpus": [{**gpu, **changes}]}
    return verdict("kernels", seen(host(), deep=Deep({"kernels": {"h1": answer}})))


def test_kernels_are_judged_by_their_own_checks() -> None:
    assert kernels().evidence == "1 checks right on GPU 0 in 61 s"
    wrong = kernels(exit_status=1, lines=["topk   k=512  1  0  12.0   NO"])
    assert (wrong.status, wrong.evidence) == ("fail", "GPU 0: topk k=512 1 0 12.0 NO")
    unable = kernels(exit_status=4, lines=[], err="glmplan: This GPU is sm_75; the kernels need sm_80 or newer.")
    assert unable.status == "skip"
    assert "sm_75" in unable.evidence
    assert "did not end in 420 s" in kernels(exit_status=-9, overran=True, elapsed_s=420.0).evidence


def test_without_torch_the_deep_parts_are_skipped_with_the_repair() -> None:
    error = NodeFailedError("no-torch", "No Python here can import torch.", "Name the engine's: --engine-python PATH.")
    what = seen(host(), deep=Deep({"kernels": {"h1": error}, "ranks": {"h1": error}}))
    for name in ("kernels", "all-reduce"):
        found = verdict(name, what)
        assert found.status == "skip"
        assert "--engine-python" in found.evidence
