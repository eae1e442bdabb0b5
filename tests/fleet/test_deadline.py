"""The deadline follows from bytes, disk and graphs; silence is judged by what a phase may take."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from glmplan.fleet import deadline as module
from glmplan.fleet.deadline import LoadWork, Pulse, deadline, eta, graph_count, loaded_share, quiet_limit_s, work_of
from glmplan.fleet.log_lines import Phase
from glmplan.fleet.phases import NodeProgress
from glmplan.units import GIB
from tests import samples
from tests.fleet.engine_logs import CAPTURING

FAST = LoadWork(bytes_to_read=750_000_000_000, disk_bytes_per_s=6_000_000_000, graphs=10, nodes=3)


def node(text="", now_s=0.0, ranks=((0, 0), (0, 1))):
    one = NodeProgress("sglang", ranks, 2, True, 0.0)
    one.feed(text, now_s)
    return one


def test_twice_the_bytes_or_half_the_disk_take_twice_as_long():
    def load_s(work):
        return next(part.limit_s for part in deadline(work).parts if part.part == "load")

    assert load_s(FAST) == pytest.approx(module.SLACK * 125)
    assert load_s(replace(FAST, bytes_to_read=2 * FAST.bytes_to_read)) == pytest.approx(2 * load_s(FAST))
    assert load_s(replace(FAST, disk_bytes_per_s=3_000_000_000)) == pytest.approx(2 * load_s(FAST))


def test_a_slow_disk_gives_hours_and_a_fast_one_minutes():
    slow = deadline(replace(FAST, disk_bytes_per_s=None))
    assert slow.total_s > 6 * 3600
    assert deadline(FAST).total_s < 3600
    assert "nothing was measured" in slow.parts[2].reason


def test_every_part_says_why_and_the_sum_is_the_deadline():
    found = deadline(FAST)
    assert all(part.reason and part.limit_s >= part.estimate_s >= 0 for part in found.parts)
    assert found.total_s == sum(part.limit_s for part in found.parts)


def test_one_node_waits_for_no_other():
    alone, three = (deadline(replace(FAST, nodes=nodes)).parts[1].limit_s for nodes in (1, 3))
    assert alone < three == module.JOIN_S


@pytest.mark.parametrize(("largest", "count"), [(0, 0), (1, 1), (16, 6), (32, 8), (160, 24), (10, 5)])
def test_graphs_are_counted_as_the_engine_lists_them(largest, count):
    assert graph_count(largest) == count
    assert graph_count(largest, mtp=True) == 3 * count


def test_the_work_of_a_plan_s_node_is_the_whole_checkpoint_and_its_own_ranks():
    plan = samples.plan(gpus="24x rtx-4090-48g", nodes=3)
    work = work_of(plan, 1, 2_000_000_000)
    assert work.bytes_to_read == (plan.weights.file_bytes or plan.weights.tensor_bytes)
    assert set(work.rank_bytes) == {(1, tp) for tp in range(8)}
    assert work.graphs == graph_count(plan.settings.graph_max_bs)


LOADING = "".join(f"[2026-11-21 10:00:00 TP{rank}] Load weight begin. avail mem=46.50 GB\n" for rank in range(2))


def test_eta_follows_the_files_read_where_they_are_printed():
    one = node(LOADING, 100.0, ranks=[(0, 0)])
    one.feed("Loading safetensors checkpoint shards:  25% Completed | 25/100 [00:30<01:30]\r\n", 130.0)
    found = eta(one, FAST, {}, 130.0)
    assert (found.share, found.basis) == (0.25, "files read")
    later = sum(part.estimate_s for part in deadline(FAST).parts if part.part in ("capture", "warm up"))
    assert found.remaining_s == pytest.approx(90 + later)


def test_eta_follows_gpu_memory_where_no_file_is_printed_and_the_slowest_rank_counts():
    work = replace(FAST, rank_bytes={(0, 0): 30 * GIB, (0, 1): 30 * GIB})
    one = node(LOADING, 100.0)
    assert loaded_share(one, work, {(0, 0): 15 * GIB, (0, 1): 6 * GIB}) == (0.2, "GPU memory")
    assert eta(one, work, {(0, 0): 15 * GIB, (0, 1): 6 * GIB}, 120.0).share == 0.2
    assert loaded_share(one, work, {(0, 0): 90 * GIB, (0, 1): -5}) == (0.0, "GPU memory")


def test_eta_without_any_reading_falls_back_on_the_disk():
    found = eta(node(LOADING, 100.0), FAST, {}, 110.0)
    assert found.share is None
    assert found.remaining_s == pytest.approx(125 - 10 + 20 + 15)
    assert "measured" in found.basis


def test_eta_counts_down_over_the_phases_to_nothing():
    one = node(ranks=[(0, 0)])
    before = eta(one, FAST, {}, 1.0).remaining_s
    one.feed("[2026-11-21 10:00:00] Memory pool end. avail mem=13.40 GB\n", 2.0)
    after = eta(one, FAST, {}, 2.0).remaining_s
    one.feed("[2026-11-21 10:00:00] The server is fired up and ready to roll!\n", 3.0)
    assert before > after > eta(one, FAST, {}, 3.0).remaining_s == 0.0


CAPTURED = "[2026-11-22 02:13:00] Capture cuda graph end. Time elapsed: 2.81 s. mem usage=0.09 GB. avail mem=77.11 GB.\n"


@pytest.mark.parametrize(
    ("log", "phase", "parts"),
    [
        ("", Phase.STARTING, ("spawn", "join")),
        ("[2026-11-22 02:09:50] Init torch distributed begin.\n", Phase.JOINING, ("join",)),
        ("[2026-11-22 02:09:58] Load weight begin. avail mem=138.50 GB\n", Phase.LOADING, ("load",)),
        (CAPTURING, Phase.CAPTURING, ("capture", "warm up")),
        (CAPTURED, Phase.CAPTURED, ("warm up",)),
    ],
)
def test_an_estimate_counts_down_and_is_given_up_once_it_is_used_up(log, phase, parts):
    """A capture that compiled kernels said "about 22 s left" for two and a half minutes."""
    one = NodeProgress("sglang", [(0, 0)], 2, True, 100.0)
    one.feed(log, 100.0)
    assert one.phase is phase
    at_first, later = (eta(one, FAST, {}, 100.0 + s).remaining_s for s in (0.0, 5.0))
    assert at_first - later == pytest.approx(5.0)
    allowed = sum(found.estimate_s for found in deadline(FAST).parts if found.part in parts)
    assert eta(one, FAST, {}, 100.0 + allowed).remaining_s is not None
    assert eta(one, FAST, {}, 100.5 + allowed).remaining_s is None


def test_the_last_rank_starts_the_clock_of_a_part():
    one = node(ranks=[(0, 0), (0, 1)])
    one.feed("[2026-11-22 02:10:00 TP0] Memory pool end. avail mem=70.40 GB\n", 10.0)
    one.feed("[2026-11-22 02:11:40 TP1] Memory pool end. avail mem=70.40 GB\n", 110.0)
    assert one.phase is Phase.ALLOCATED
    estimate = sum(part.estimate_s for part in deadline(FAST).parts if part.part in ("capture", "warm up"))
    assert eta(one, FAST, {}, 110.0).remaining_s == pytest.approx(estimate)


def test_the_phases_after_loading_share_one_estimate():
    one = node("[2026-11-22 02:10:00] Memory pool end. avail mem=70.40 GB\n", 10.0, ranks=[(0, 0)])
    before = eta(one, FAST, {}, 15.0).remaining_s
    one.feed("[2026-11-22 02:10:05] Capture cuda graph begin.\n", 15.0)
    assert one.phase is Phase.CAPTURING
    assert eta(one, FAST, {}, 15.0).remaining_s == before


def test_weights_that_are_read_and_still_worked_on_have_no_time_left():
    one = node("[2026-11-22 02:09:58] Load weight begin. avail mem=138.50 GB\n", 0.0, ranks=[(0, 0)])
    one.feed("Loading safetensors checkpoint shards: 100% Completed | 100/100 [00:30<00:00]\r\n", 30.0)
    found = eta(one, FAST, {}, 60.0)
    assert (found.remaining_s, found.share) == (None, 1.0)


def test_without_graphs_the_first_request_is_waited_for():
    one = node("[2026-11-22 02:10:00] Memory pool end. avail mem=70.40 GB\n", 0.0, ranks=[(0, 0)])
    found = eta(one, replace(FAST, graphs=0), {}, 5.0)
    assert found.remaining_s == pytest.approx(10.0)
    assert found.basis == "the 15 s estimated for a first request where no kernel is compiled"


def test_silence_is_allowed_by_phase():
    slow = replace(FAST, disk_bytes_per_s=50_000_000)
    assert quiet_limit_s(Phase.LOADING, FAST) == module.QUIET_S
    assert quiet_limit_s(Phase.LOADING, slow) == pytest.approx(module.SLACK * module.FILE_BYTES / 50_000_000)
    assert quiet_limit_s(Phase.CAPTURING, FAST) > quiet_limit_s(Phase.CAPTURING, replace(FAST, compiles=False))
    assert quiet_limit_s(Phase.READY, FAST) == math.inf


def test_log_and_memory_are_signs_of_life_and_nothing_else():
    pulse = Pulse(0.0)
    pulse.beat(10.0, 100, {0: GIB})
    pulse.beat(200.0, 100, {0: GIB + 1})
    assert pulse.stalled(Phase.LOADING, FAST, 131.0) is not None, "one byte is no growth"
    pulse.beat(210.0, 100, {0: 2 * GIB})
    assert pulse.stalled(Phase.LOADING, FAST, 330.0) is None
    pulse.beat(300.0, 101, {0: 2 * GIB})
    assert pulse.stalled(Phase.LOADING, FAST, 420.0) is None
    words = pulse.stalled(Phase.LOADING, FAST, 421.0)
    assert words is not None
    assert "121 s while loading; 120 s are allowed" in words
    assert pulse.stalled(Phase.READY, FAST, 1e9) is None


def test_slow_steady_growth_is_life():
    pulse = Pulse(0.0)
    for second in range(1, 400):
        pulse.beat(float(second), 0, {0: second * 4 * 1024 * 1024})
    assert pulse.stalled(Phase.LOADING, FAST, 400.0) is None
