"""Which sizes divide the model, and which GPU gets which rank."""

from __future__ import annotations

import pytest

from glmplan.facts.host import Host
from glmplan.planning.layout import Layout, seat_ranks, shape_problem
from tests.samples import config, host

FP8_BLOCK = 128


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_sizes_that_divide_heads_and_keep_blocks_whole(tp):
    assert shape_problem(config(), Layout(tp, 1, 1), FP8_BLOCK) is None


@pytest.mark.parametrize(
    ("layout", "block", "words"),
    [
        (Layout(6, 1, 1), FP8_BLOCK, "64 heads do not divide over 6 TP ranks"),
        (Layout(3, 1, 1), FP8_BLOCK, "64 heads do not divide over 3 TP ranks"),
        (Layout(32, 1, 4), FP8_BLOCK, "width 2048 / TP 32 breaks blocks of 128"),
        (Layout(8, 1, 1, dp=3), FP8_BLOCK, "3 attention groups"),
        (Layout(8, 1, 1, ep=3), FP8_BLOCK, "256 experts do not divide over 3 expert groups"),
        (Layout(1, 79, 79), 1, "79 stages are more than 78 layers"),
    ],
)
def test_sizes_that_do_not_divide_are_named(layout, block, words):
    assert words in (shape_problem(config(), layout, block) or "")


def test_expert_parallelism_keeps_experts_whole():
    assert shape_problem(config(), Layout(32, 1, 4), FP8_BLOCK) is not None
    assert shape_problem(config(), Layout(32, 1, 4, ep=32), FP8_BLOCK) is None


def seats(layout: Layout, *hosts: Host) -> list[list[str]]:
    return [
        [f"{seat.host.name}{seat.gpu.index}" for seat in stage]
        for stage in seat_ranks(layout, [(one, list(one.gpus)) for one in hosts])
    ]


def test_one_stage_on_each_node():
    assert seats(Layout(2, 2, 2), host("a", "h200", 2), host("b", "h200", 2)) == [["a0", "a1"], ["b0", "b1"]]


def test_several_stages_on_a_node():
    found = seats(Layout(2, 4, 2), host("a", "h200", 4), host("b", "h200", 4))
    assert found == [["a0", "a1"], ["a2", "a3"], ["b0", "b1"], ["b2", "b3"]]


def test_a_stage_over_two_nodes():
    hosts = [host(name, "h200", 2) for name in "abcd"]
    assert seats(Layout(4, 2, 4), *hosts) == [["a0", "a1", "b0", "b1"], ["c0", "c1", "d0", "d1"]]


def test_unused_gpus_get_no_rank():
    assert seats(Layout(4, 1, 1), host("a", "h200", 8)) == [["a0", "a1", "a2", "a3"]]


@pytest.mark.parametrize("layout", [Layout(8, 3, 3), Layout(4, 6, 3), Layout(2, 4, 1), Layout(16, 1, 2), Layout(8, 2, 4)])
def test_every_gpu_gets_exactly_one_rank(layout):
    hosts = [host(f"n{number}-", "h200", layout.gpus_per_node) for number in range(layout.nodes)]
    found = seats(layout, *hosts)
    assert [len(stage) for stage in found] == [layout.tp] * layout.pp
    assert len({seat for stage in found for seat in stage}) == layout.gpus
