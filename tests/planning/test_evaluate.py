"""What a rank keeps beside weights and KV cache, and what the engine's own rule makes of the planned fraction."""

from __future__ import annotations

import json
import re

import pytest

from glmplan.planning.plan import Plan, PlanRank
from glmplan.planning.request import Pins, Request
from glmplan.units import GIB, MIB
from tests.samples import CONFIGS, NEW, OLD, PATCHED, VLLM, config, engine, host, plan, plan_for

STARTUP = {"other processes", "CUDA context", "NCCL buffers"}
SGLANG = {
    "three stages": {"gpus": "24x rtx-4090-48g"},
    "three stages, old": {"gpus": "24x rtx-4090-48g", "engine": OLD},
    "four stages, old": {"gpus": "32x rtx-4090-48g", "engine": OLD},
    "one stage": {"gpus": "8x h200"},
    "one stage, old, packed rows": {"gpus": "8x h200", "engine": OLD},
    "unlike cards": {"gpus": "24x rtx-4090-48g + 8x rtx-5090"},
    "a fraction of one's own": {"gpus": "8x h200", "checkpoint": "w4afp8", "mem_fraction": 0.85},
    "attention groups": {"gpus": "8x h200", "pin": "tp=8,dp=8", "context": "64k", "concurrency": 8},
}


def item(rank: PlanRank, name: str) -> int:
    return sum(entry.bytes for entry in rank.items if entry.name == name)


@pytest.mark.parametrize("name", SGLANG)
def test_sglang_s_own_rule_gives_the_planned_pool(name):
    """sglang.md 5.1: free after loading less (1 - fraction) of free before, both the least of all ranks, by the cell."""
    found = plan(**SGLANG[name])
    assert found.fits
    before = min(rank.capacity_bytes - sum(e.bytes for e in rank.items if e.name in STARTUP) for rank in found.ranks)
    after = min(
        rank.capacity_bytes
        - sum(e.bytes for e in rank.items if e.name in STARTUP)
        - rank.weights_bytes
        - item(rank, "RoPE table")
        for rank in found.ranks
    )
    profile = engine(found.engine)
    kv = profile.kv_format(found.settings.kv_format)
    row = kv.row_bytes if kv.budget_row_bytes is None else kv.budget_row_bytes
    full = config().indexer_full
    every = profile.index_cache_layers == "all"
    cells = [
        sum(row + (132 if every or full[layer] else 0) for layer in range(stage.first_layer, stage.last_layer + 1))
        for stage in found.stages
    ]
    budget = after - before * (1 - found.settings.mem_fraction)
    tokens = int(budget // max(cells) // 64 * 64)
    assert tokens >= found.settings.max_total_tokens
    if "mem_fraction" in SGLANG[name]:
        assert tokens == found.settings.max_total_tokens


@pytest.mark.parametrize("name", [VLLM, PATCHED])
def test_vllm_s_fraction_covers_weights_workspaces_and_pool(name):
    checkpoint = "awq-int4" if name == PATCHED else "nvfp4"
    found = plan(gpus="8x a100-80g" if name == PATCHED else "8x rtx-pro-6000", checkpoint=checkpoint, engine=name)
    assert found.fits
    for rank in found.ranks:
        counted = sum(e.bytes for e in rank.items if e.group == "runtime" and e.name != "CUDA context")
        need = rank.weights_bytes + rank.kv_cache_bytes + counted
        assert need <= rank.capacity_bytes * found.settings.mem_fraction
        assert rank.capacity_bytes * found.settings.mem_fraction <= rank.capacity_bytes - item(rank, "CUDA context")


def alone(gpus: int, pins: Pins, **request: object) -> Plan:
    return plan_for([host("a", "h200", gpus, memory_usable_bytes=2000 * GIB)], Request(8192, pins=pins, **request))  # type: ignore[arg-type]


def test_the_margin_is_half_a_gib_and_one_percent():
    for rank in plan(gpus="24x rtx-4090-48g + 8x rtx-5090").ranks:
        assert item(rank, "margin") == 512 * MIB + rank.capacity_bytes // 100


def test_one_gpu_has_no_nccl_buffers():
    assert item(alone(1, Pins(tp=1, pp=1)).ranks[0], "NCCL buffers") == 0
    assert item(alone(2, Pins(tp=2, pp=1)).ranks[0], "NCCL buffers") > 0


def test_a_pipeline_adds_buffers_of_its_own():
    one, both = alone(2, Pins(tp=2, pp=1)), alone(4, Pins(tp=2, pp=2))
    assert item(both.ranks[0], "NCCL buffers") > item(one.ranks[0], "NCCL buffers")


def test_links_that_are_slower_take_smaller_buffers():
    fast, slow = plan(gpus="8x h200"), plan(gpus="24x rtx-4090-48g")
    assert item(fast.ranks[0], "NCCL buffers") != item(slow.ranks[0], "NCCL buffers")


def test_logits_stand_on_the_last_stage_alone():
    found = plan(gpus="24x rtx-4090-48g")
    by_stage = {rank.pp_rank: item(rank, "sampling logits") for rank in found.ranks}
    assert by_stage[0] == by_stage[1] == 0
    assert by_stage[2] == found.settings.graph_max_bs * 154_880 * 6


def test_no_graphs_take_no_memory():
    with_graphs, without = alone(1, Pins(tp=1, pp=1)), alone(1, Pins(tp=1, pp=1), graph_max_bs=0)
    assert item(with_graphs.ranks[0], "CUDA graphs") > 0
    assert item(without.ranks[0], "CUDA graphs") == 0


def test_larger_chunks_take_more_workspace():
    small, large = (alone(1, Pins(tp=1, pp=1), chunk_tokens=chunk) for chunk in (512, 8192))
    assert item(large.ranks[0], "activations") > item(small.ranks[0], "activations")
    assert small.settings.chunk_tokens == 512


@pytest.mark.parametrize(
    ("gpus", "name", "chunk"),
    [
        ("40x rtx-4090-24g", OLD, 2048),
        ("40x rtx-4090-24g", NEW, 4096),
        ("24x rtx-4090-48g", NEW, 4096),
        ("8x rtx-pro-6000", NEW, 8192),
        ("8x h200", NEW, 8192),
        ("8x b200", NEW, 16384),
    ],
)
def test_the_chunk_is_the_engine_s_default_for_the_smallest_gpu(gpus, name, chunk):
    checkpoint = "nvfp4" if "pro" in gpus else "fp8"
    assert plan(gpus=gpus, engine=name, checkpoint=checkpoint, context="8k").settings.chunk_tokens == chunk


def test_every_item_has_a_source():
    for name in (NEW, OLD, VLLM):
        for rank in plan(gpus="8x h200", engine=name, mtp="on", context="8k").ranks:
            assert all(len(entry.source) > 2 for entry in rank.items)


def test_nvlink_reserves_are_the_measured_ones():
    measured = json.loads((CONFIGS.parent / "measured" / "reserve-h200-x4.json").read_text())["world_4"]["1"]
    reserve = engine().reserve
    assert reserve.cuda_context_bytes == pytest.approx(measured["after_first_gemm_and_kernels"], rel=0.002)
    assert reserve.nccl_tp_nvlink_bytes == measured["after_all_reduce"] - measured["after_first_gemm_and_kernels"]


def test_a_pipeline_s_reserve_covers_what_the_engine_took():
    """One launch of TP2 x PP2 on four H200: with the other lines as they were, no rank took more than is now planned."""
    record = json.loads((CONFIGS.parent / "measured" / "sglang-0.5.23-h200-tp2-pp2.json").read_text())
    old_bytes, reserve = 608_174_080, engine().reserve.nccl_pp_nvlink_bytes
    for rank in record["ranks"]:
        total = next(part for part in rank["parts"] if part["part"] == "total")
        planned = total["predicted_bytes"] - old_bytes + reserve
        assert total["measured_bytes"] <= planned <= 1.02 * total["measured_bytes"]


def test_the_older_engine_s_pipeline_reserve_is_what_its_launch_showed():
    """Predicted and measured GiB of the worst rank, as `glmplan launch` printed them when the reserve was the old one."""
    text = (CONFIGS.parents[2] / "docs" / "proof" / "launch-cuts-tp2.txt").read_text()
    predicted, measured = map(float, re.findall(r"predicted ([\d.]+) GiB, measured ([\d.]+) GiB", text)[1])
    old_bytes, reserve = 608_174_080, engine(OLD).reserve.nccl_pp_nvlink_bytes
    assert reserve - old_bytes == pytest.approx((measured - predicted) * GIB, abs=0.01 * GIB)
