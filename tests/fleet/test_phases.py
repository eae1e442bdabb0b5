"""Logs of the engines, in the words of their released wheels, as phases and memory of every rank."""

from __future__ import annotations

import pytest

from glmplan.fleet.log_lines import Phase, named_rank
from glmplan.fleet.phases import NodeProgress, ranks_of_node
from glmplan.units import GIB
from tests import samples
from tests.fleet.engine_logs import SGLANG_13, SGLANG_23, VLLM_33


def node(family="sglang", ranks=((0, 0), (0, 1)), tp_size=2, head=True):
    return NodeProgress(family, ranks, tp_size, head, 0.0)


def test_sglang_of_both_versions_and_vllm_reach_their_phases():
    seen = {}
    for name, family, text in (("13", "sglang", SGLANG_13), ("23", "sglang", SGLANG_23), ("33", "vllm", VLLM_33)):
        one = node(family)
        one.feed(text, 1.0)
        seen[name] = one.ranks[0, 0].phase
    assert seen == {"13": Phase.CAPTURED, "23": Phase.CAPTURED, "33": Phase.READY}


def test_memory_of_a_rank_is_read_in_gib():
    one = node()
    one.feed(SGLANG_23, 1.0)
    memory = one.ranks[0, 0].memory
    assert memory.startup_bytes == round(1.25 * GIB)
    assert memory.weights_bytes == round(30.5 * GIB)
    assert memory.kv_bytes == round(2.5 * GIB)
    assert memory.graph_bytes == round(0.3 * GIB)
    assert memory.free_bytes == round(13.05 * GIB)
    assert memory.tokens == 131_072
    assert one.ranks[0, 1].memory.weights_bytes is None


def test_a_draft_model_adds_its_weights_and_graphs_and_keeps_the_first_start():
    one = node(ranks=[(0, 0)], tp_size=1)
    one.feed(SGLANG_13, 1.0)
    memory = one.ranks[0, 0].memory
    assert memory.weights_bytes == round(30.5 * GIB) + round(1.5 * GIB)
    assert memory.graph_bytes == round(0.3 * GIB) + round(0.2 * GIB)
    assert memory.startup_bytes == round(1.1 * GIB)


def test_vllm_states_totals_and_names_its_ranks_in_the_process_name():
    one = node("vllm")
    one.feed(VLLM_33, 1.0)
    memory = one.ranks[0, 0].memory
    assert memory.weights_bytes == round(88.46 * GIB)
    assert memory.kv_bytes == 30 * GIB
    assert memory.graph_bytes == round(1.23 * GIB)
    assert memory.tokens == 597_184
    assert one.ranks[0, 1].phase is Phase.READY
    assert one.ready


def test_a_line_cut_anywhere_reads_the_same():
    whole = node()
    whole.feed(SGLANG_23, 1.0)
    for size in (1, 7, 64):
        cut = node()
        for begin in range(0, len(SGLANG_23), size):
            cut.feed(SGLANG_23[begin : begin + size], 1.0)
        assert cut.ranks == whole.ranks
        assert [line.text for line in cut.lines] == [line.text for line in whole.lines]


def test_carriage_returns_end_lines_once():
    one = node()
    texts = []
    for piece in ("a\r", "\nb\r\nc\r", "d\n", "e"):
        texts += [line.text for line in one.feed(piece, 1.0)]
    assert texts == ["a", "b", "c", "d"]
    assert [line.text for line in one.finish(2.0)] == ["e"]


def test_shard_progress_belongs_to_world_rank_0_alone():
    one = node()
    one.feed("[2026-11-21 10:00:26 PP0 TP1] Load weight begin. avail mem=46.40 GB\n", 1.0)
    one.feed("Multi-thread loading shards:  50% Completed | 71/142 [01:00<01:00,  1.18it/s]\r\n", 2.0)
    assert (one.ranks[0, 0].shards_done, one.ranks[0, 0].shards_total) == (71, 142)
    assert one.ranks[0, 1].shards_done is None


def test_a_rank_never_goes_back():
    one = node()
    one.feed("[2026-11-21 10:03:01 PP0 TP0] Memory pool end. avail mem=13.40 GB\n", 1.0)
    one.feed("[2026-11-21 10:03:02 PP0 TP0] Load weight begin. avail mem=13.40 GB\n", 2.0)
    assert one.ranks[0, 0].phase is Phase.ALLOCATED
    assert one.ranks[0, 0].since_s == 1.0
    assert one.phase is Phase.STARTING, "the other rank has said nothing"


def test_a_traceback_belongs_to_the_rank_whose_record_it_continues():
    one = node()
    lines = one.feed(
        "[2026-11-21 10:03:01 PP0 TP1] Scheduler hit an exception: Traceback (most recent call last):\n"
        '  File "x.py", line 1\n'
        "torch.OutOfMemoryError: CUDA out of memory.\n"
        "[2026-11-21 10:03:02] Initialization failed. Please see the error messages above.\n",
        1.0,
    )
    assert [line.rank for line in lines] == [(0, 1), (0, 1), (0, 1), None]


@pytest.mark.parametrize(
    ("family", "text", "rank"),
    [
        ("sglang", "[2026-11-21 10:00:00 PP2 TP5] x", (2, 5)),
        ("sglang", "[2026-11-21 10:00:00 TP5] x", (0, 5)),
        ("sglang", "[2026-11-21 10:00:00.123 DP1 PP1 ATTN_CP0 MOE_DP0 TP3 EP3] x", (1, 3)),
        ("sglang", "[2026-11-21 10:00:00 PP1] x", (1, 0)),
        ("sglang", "[2026-11-21 10:00:00] x", None),
        ("sglang", "[rank9]:[E1121 10:00:00 ProcessGroupNCCL.cpp:1] Watchdog caught", (1, 1)),
        ("vllm", "(Worker_PP1_TP3 pid=12) INFO 11-21 10:00:00 [x.py:1] y", (1, 3)),
        ("vllm", "(Worker_DP0_PP1_PCP0_TP3_DCP1_EP3 pid=12) ERROR 11-21 10:00:00 [x.py:1] y", (1, 3)),
        ("vllm", "(EngineCore pid=12) INFO 11-21 10:00:00 [x.py:1] y", None),
    ],
)
def test_prefixes_name_ranks(family, text, rank):
    assert named_rank(family, text, 8) == rank


def test_the_ready_line_differs_between_head_and_the_other_nodes():
    head, other = node(), node(ranks=[(1, 0), (1, 1)], head=False)
    fired = "[2026-11-21 10:04:00] The server is fired up and ready to roll!\n"
    dummy = "[2026-11-21 10:04:00] Dummy health check server started in background thread at 0.0.0.0:30000\n"
    head.feed(dummy, 1.0)
    other.feed(fired, 1.0)
    assert (head.ready, other.ready) == (False, False)
    head.feed(fired, 2.0)
    other.feed(dummy, 2.0)
    assert (head.ready, other.ready) == (True, True)
    assert {progress.phase for progress in head.ranks.values()} == {Phase.READY}


def test_a_node_that_says_nothing_is_ready_with_its_head():
    one = node("vllm", ranks=[(1, 0), (1, 1)], head=False)
    one.feed(VLLM_33, 1.0)
    assert not one.ready
    one.mark_ready(2.0)
    assert one.ready
    assert one.phase is Phase.READY
    assert one.feed("torch.OutOfMemoryError: CUDA out of memory.\n", 3.0)[0].phase is Phase.READY


def test_colours_and_odd_bytes_do_no_harm():
    one = node("vllm")
    one.feed(
        "\x1b[0;36m(Worker_TP1 pid=3)\x1b[0;0m INFO 11-21 10:00:00 [m.py:4] Model loading took 1.00 GiB memory\n\ufffd\n",
        1.0,
    )
    assert one.ranks[0, 1].memory.weights_bytes == GIB


def test_ranks_of_a_node_come_from_the_plan():
    plan = samples.plan(gpus="24x rtx-4090-48g", nodes=3)
    assert [ranks_of_node(plan, node)[0] for node in range(3)] == [(0, 0), (1, 0), (2, 0)]
    assert sum(len(ranks_of_node(plan, node)) for node in range(3)) == 24
