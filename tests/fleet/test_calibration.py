"""Predicted against measured memory, its record, and what a later plan makes of it."""

from __future__ import annotations

import json
import stat
from dataclasses import replace

import pytest

from glmplan.fleet.calibration import (
    LOG_ROUNDING_BYTES,
    MeasuredRank,
    calibrations,
    compare,
    load_calibrations,
    measure,
    measured_runtimes,
    save_calibration,
)
from glmplan.fleet.diagnosis import GpuMemory
from glmplan.fleet.phases import NodeProgress, ranks_of_node
from glmplan.planning.measured import MEASURED_ITEM, MeasuredStage
from glmplan.planning.request import Request
from glmplan.units import GIB, MIB
from tests import samples

REQUEST = Request(context_tokens=65_536, concurrency=2)


def hosts():
    return [samples.host(f"h{index}", "rtx-4090-48g") for index in range(3)]


@pytest.fixture(scope="module")
def plan():
    return samples.plan_for(hosts(), REQUEST)


def item(rank, name):
    return sum(one.bytes for one in rank.items if one.name == name)


def runtime(rank):
    return sum(one.bytes for one in rank.items if one.group == "runtime")


def as_planned(plan, more=0):
    """Every rank takes what was planned, and `more`."""
    return tuple(
        MeasuredRank(
            pp_rank=rank.pp_rank, tp_rank=rank.tp_rank, weights_bytes=rank.weights_bytes + item(rank, "RoPE table"),
            kv_bytes=rank.kv_cache_bytes, graph_bytes=item(rank, "CUDA graphs"),
            used_bytes=rank.weights_bytes + rank.kv_cache_bytes + runtime(rank) + more,
        )
        for rank in plan.ranks
    )  # fmt: skip


def planned_with(found):
    return samples.plan_for(hosts(), replace(REQUEST, measured=found))


def saved(tmp_path, plan, more=0, now_s=1_795_000_000.0):
    for one in calibrations(plan, as_planned(plan, more), "glm-x", now_s):
        save_calibration(one, tmp_path)
    return measured_runtimes(tmp_path)


def test_a_rank_as_planned_differs_by_nothing(plan):
    found = compare(plan, as_planned(plan))
    assert len(found) == 24
    for rank in found:
        differences = {part.part: part.difference_bytes for part in rank.parts}
        assert differences == {"weights": 0, "kv_cache": 0, "graphs": 0, "runtime": 2 * LOG_ROUNDING_BYTES, "total": 0}


def test_what_was_not_measured_is_left_out(plan):
    first = MeasuredRank(pp_rank=0, tp_rank=0, weights_bytes=GIB)
    found = compare(plan, [first])
    assert [(rank.pp_rank, rank.tp_rank) for rank in found] == [(0, 0)]
    assert [part.part for part in found[0].parts] == ["weights"]
    assert found[0].parts[0].difference_bytes == GIB - found[0].parts[0].predicted_bytes


def test_log_and_nvml_are_brought_together_by_rank_and_gpu(plan):
    node = NodeProgress("sglang", ranks_of_node(plan, 1), 8, False, 0.0)
    node.feed(
        "[2026-11-21 10:00:25 PP1 TP3] Memory baseline taken. mem usage=1.25 GB\n"
        "[2026-11-21 10:03:00 PP1 TP3] Load weight end. elapsed=1 s, type=G, avail mem=16.00 GB, mem usage=30.50 GB.\n",
        1.0,
    )
    found = measure(plan, {1: node}, {1: {3: GpuMemory(3, 40 * GIB, 41 * GIB, 48 * GIB)}})
    assert len(found) == 24
    one = next(rank for rank in found if (rank.pp_rank, rank.tp_rank) == (1, 3))
    assert (one.startup_bytes, one.weights_bytes, one.used_bytes) == (round(1.25 * GIB), round(30.5 * GIB), 40 * GIB)
    assert one.runtime_bytes is None, "the KV cache was not seen"
    assert found[0].used_bytes is None


def test_a_plan_without_measurement_is_the_same_to_the_byte(plan, tmp_path):
    assert measured_runtimes(tmp_path) == ()
    assert planned_with(()).model_dump_json() == plan.model_dump_json()


def test_a_measurement_of_another_layout_gpu_or_load_changes_nothing(plan, tmp_path):
    (found,) = saved(tmp_path, plan, more=GIB)
    changes = {
        "gpu": "l40s",
        "tp_size": 4,
        "engine": "vllm-0.33.0",
        "chunk_tokens": 64,
        "context_tokens": 1,
        "kv_format": "bf16",
    }
    for name, value in changes.items():
        other = replace(found, key=replace(found.key, **{name: value}))
        assert planned_with((other,)).model_dump_json() == plan.model_dump_json(), name


def test_the_same_deployment_is_planned_with_what_it_took_and_says_measured(plan, tmp_path):
    more = 700 * MIB
    again = planned_with(saved(tmp_path, plan, more))
    before, after = plan.ranks[0], again.ranks[0]
    assert runtime(after) == runtime(before) + more + 2 * LOG_ROUNDING_BYTES
    assert {one.source for one in after.items if one.name == MEASURED_ITEM} == {"measured on 2026-11-18 in glm-x"}
    for group in ("weights", "margin", "others"):
        assert [i for i in after.items if i.group == group] == [i for i in before.items if i.group == group]
    assert again.kv_cache_tokens < plan.kv_cache_tokens


def test_less_than_planned_gives_more_tokens(plan, tmp_path):
    assert planned_with(saved(tmp_path, plan, -300 * MIB)).kv_cache_tokens > plan.kv_cache_tokens


def test_a_measurement_below_the_fixed_lines_never_gives_negative_bytes(plan, tmp_path):
    (found,) = saved(tmp_path, plan)
    tiny = replace(found, stages=tuple(MeasuredStage(1) for _ in found.stages))
    ranks = planned_with((tiny,)).ranks
    assert all(one.bytes > 0 for rank in ranks for one in rank.items)
    assert all(one.name != MEASURED_ITEM for rank in ranks for one in rank.items)


def test_the_fullest_rank_of_a_stage_counts_and_an_unseen_rank_makes_no_record(plan):
    ranks = list(as_planned(plan))
    ranks[3] = ranks[3].model_copy(update={"used_bytes": (ranks[3].used_bytes or 0) + GIB})
    (found,) = calibrations(plan, ranks)
    (even,) = calibrations(plan, as_planned(plan))
    assert (found.stages[0]["runtime_bytes"] or 0) - (even.stages[0]["runtime_bytes"] or 0) == GIB
    assert found.stages[1] == even.stages[1]
    ranks[9] = ranks[9].model_copy(update={"used_bytes": None})
    assert calibrations(plan, ranks) == ()


def test_records_are_private_whole_and_the_newest_wins(plan, tmp_path):
    folder = tmp_path / "state" / "calibration"
    for now_s, more in ((1_000.0, GIB), (2_000.0, 2 * GIB)):
        (one,) = calibrations(plan, as_planned(plan, more), "x", now_s)
        path = save_calibration(one, folder)
    assert [file.name for file in folder.iterdir()] == [path.name], "one record a key, no temporary file"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_calibrations(folder)[0] == one
    assert one.ranks[0].parts


def test_damaged_records_are_passed_over(plan, tmp_path):
    saved(tmp_path, plan)
    good = next(tmp_path.glob("*.json"))
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    (tmp_path / "c.json").write_text(json.dumps(json.loads(good.read_text()) | {"key": {"engine": "x"}}))
    (tmp_path / "d.json").mkdir()
    assert len(measured_runtimes(tmp_path)) == 1


def test_the_folder_follows_the_state_home(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (one,) = calibrations(plan, as_planned(plan))
    assert save_calibration(one).parent == tmp_path / "glmplan" / "calibration"
    assert len(measured_runtimes()) == 1


def test_size_uses_it_for_probed_hosts_and_never_for_words(tmp_path, monkeypatch):
    from glmplan.cli._options import PlanningOptions
    from glmplan.cli._plan import make_plan
    from glmplan.facts.host import Inventory

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    options, real = PlanningOptions(context="64k"), Inventory(origin="probe", hosts=tuple(hosts()))
    words = PlanningOptions(context="64k", gpus="24x rtx-4090-48g", nodes=3)
    first, declared = make_plan(options, False, real), make_plan(words, False)
    (one,) = calibrations(first, as_planned(first, GIB))
    save_calibration(one)
    assert make_plan(options, False, real).kv_cache_tokens < first.kv_cache_tokens
    assert make_plan(words, False) == declared
