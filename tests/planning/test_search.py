"""The seeds' sizing answers, what a plan may never be, and how answers move when memory does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.gpu import Gpu
from glmplan.facts.host import Host, Inventory
from glmplan.facts.profiles import gpu_profile
from glmplan.planning.plan import Plan
from glmplan.planning.request import Pins, Request
from glmplan.planning.search import layouts, search
from glmplan.units import GIB
from tests.samples import NEW, OLD, PATCHED, VLLM, engine, host, plan, plan_for, target

# What was run or estimated: options, and the layout of the answer.
SIZING = {
    "24 modified 4090s": ({"gpus": "24x rtx-4090-48g"}, (8, 3)),
    "24 modified 4090s, old SGLang": ({"gpus": "24x rtx-4090-48g", "engine": OLD}, (8, 3)),
    "32 modified 4090s": ({"gpus": "32x rtx-4090-48g"}, (8, 4)),
    "32 modified 4090s, old SGLang": ({"gpus": "32x rtx-4090-48g", "engine": OLD}, (8, 4)),
    "8 H200, 1M tokens": ({"gpus": "8x h200", "checkpoint": "w4afp8", "context": "1M"}, (8, 1)),
    "8 H200, 1M tokens, old SGLang": ({"gpus": "8x h200", "checkpoint": "w4afp8", "context": "1M", "engine": OLD}, (8, 1)),
    "8 H200, 1M tokens, MTP": (
        {"gpus": "8x h200", "checkpoint": "w4afp8", "context": "1M", "engine": OLD, "mtp": "1"},
        (8, 1),
    ),
    "8 PRO 6000": ({"gpus": "8x rtx-pro-6000", "checkpoint": "nvfp4"}, (8, 1)),
    "8 PRO 6000, vLLM": ({"gpus": "8x rtx-pro-6000", "checkpoint": "nvfp4-lorbus", "engine": VLLM}, (8, 1)),
    "8 A100": ({"gpus": "8x a100-80g", "checkpoint": "awq-int4"}, (8, 1)),
    "8 A100, patched vLLM": ({"gpus": "8x a100-80g", "checkpoint": "awq-int4", "engine": PATCHED}, (8, 1)),
    "8 A100, patched vLLM, 32k": (
        {"gpus": "8x a100-80g", "checkpoint": "awq-int4", "engine": PATCHED, "context": "32k", "mem_fraction": 0.9},
        (8, 1),
    ),
}
TOO_SMALL = {
    "8 L40S": {"gpus": "8x l40s"},
    "8 A100 40 GB": {"gpus": "8x a100-40g"},
    "4 PRO 6000": {"gpus": "4x rtx-pro-6000", "checkpoint": "nvfp4-lorbus"},
    "16 modified 4090s": {"gpus": "16x rtx-4090-48g", "nodes": 2},
    "8 H200 in BF16": {"gpus": "8x h200", "checkpoint": "bf16"},
    "1 H200": {"gpus": "1x h200"},
}
MORE = {
    "40 4090s": {"gpus": "40x rtx-4090-24g", "context": "128k"},
    "40 4090s, old SGLang": {"gpus": "48x rtx-4090-24g", "context": "128k", "engine": OLD},
    "24 5090s, vLLM": {"gpus": "40x rtx-5090", "engine": VLLM},
    "24 5090s, vLLM, MTP": {"gpus": "40x rtx-5090", "engine": VLLM, "mtp": "on"},
    "48 3090s, patched vLLM": {"gpus": "48x rtx-3090", "engine": PATCHED, "context": "8k"},
    "24 A6000s": {"gpus": "24x a6000"},
    "5 B200": {"gpus": "5x b200", "checkpoint": "nvfp4"},
    "8 B200, vLLM, one group each": {
        "gpus": "8x b200",
        "engine": VLLM,
        "pin": "tp=8,dp=8",
        "concurrency": 8,
        "context": "64k",
    },
    "16 H100, one stage over two nodes": {"gpus": "16x h100-80g", "allow_cross_node_tp": True},
    "16 H100, GLM-5.1": {"gpus": "16x h100-80g", "model": "glm-5.1", "engine": VLLM},
    "16 H100, vLLM, MTP": {"gpus": "16x h100-80g", "engine": VLLM, "mtp": "3", "context": "128k"},
    "8 GB10": {"gpus": "8x gb10"},
    "unlike cards": {"gpus": "24x rtx-4090-48g + 8x rtx-5090"},
    "unlike SMs": {"gpus": "8x rtx-4090-48g + 8x rtx-5090", "checkpoint": "nvfp4"},
    "most tokens": {"gpus": "8x h200", "engine": VLLM, "objective": "kv-tokens"},
    "AMD": {"gpus": "8x mi300x"},
}
ALL = {name: options for name, (options, _) in SIZING.items()} | TOO_SMALL | MORE
ENGINES = (NEW, OLD, VLLM, PATCHED, "vllm-pr47629", "vllm-fp8kv")


@pytest.mark.parametrize("name", SIZING)
def test_the_seeds_deployments_fit_in_their_layout(name):
    options, layout = SIZING[name]
    found = plan(**options)
    assert found.fits, found.summary
    assert (found.layout.tp_size, found.layout.pp_size) == layout


def test_the_proven_cut_of_32_cards():
    assert plan(gpus="32x rtx-4090-48g", engine=OLD).layout.stages == (18, 20, 20, 20)


def test_one_million_tokens_are_carried_on_8_h200():
    for name in ("8 H200, 1M tokens", "8 H200, 1M tokens, old SGLang", "8 H200, 1M tokens, MTP"):
        found = plan(**SIZING[name][0])
        assert found.kv_cache_tokens >= 1_048_576
        assert found.max_context_tokens == 1_048_576


def test_24_gb_4090s_need_40_to_48():
    found = plan(gpu="rtx-4090-24g")
    assert 40 <= found.layout.gpus <= 48
    assert found.layout.tp_size == 8
    assert found.layout.pp_size in (5, 6)


def test_5090s_need_32():
    found = plan(gpu="rtx-5090")
    assert (found.layout.gpus, found.layout.tp_size, found.layout.pp_size) == (32, 8, 4)


@pytest.mark.parametrize("gpu", ["rtx-5090", "rtx-4090-24g", "h200", "rtx-3090"])
def test_the_smallest_count_is_the_smallest(gpu):
    smallest = plan(gpu=gpu).layout
    per_node = gpu_profile(gpu).gpus_per_node
    nodes = smallest.gpus // per_node - 1
    fewer = f"{nodes * per_node}x {gpu}" if nodes else f"{per_node // 2}x {gpu}"
    assert not plan(gpus=fewer, context="131072").fits
    assert plan(gpus=f"{smallest.gpus}x {gpu}", context="131072").fits


@pytest.mark.parametrize("name", TOO_SMALL)
def test_what_is_too_small_lacks_a_counted_number_of_bytes(name):
    found = plan(**TOO_SMALL[name])
    assert not found.fits
    assert found.shortfall_bytes > 0
    assert found.kv_cache_tokens == 0
    assert found.summary.startswith("does not fit")


@pytest.fixture(params=ALL)
def any_plan(request: pytest.FixtureRequest) -> Plan:
    """Every plan of this file."""
    return plan(**ALL[request.param])


def test_stages_hold_every_layer_once_in_order(any_plan):
    layers = [layer for stage in any_plan.stages for layer in range(stage.first_layer, stage.last_layer + 1)]
    assert layers == list(range(78))
    assert [stage.layers for stage in any_plan.stages] == list(any_plan.layout.stages)
    assert sum(any_plan.layout.stages) == 78


def test_stages_begin_on_full_layers_where_top_k_is_not_sent(any_plan):
    if not engine(any_plan.engine).parallel.relays_topk:
        assert {stage.begins_on for stage in any_plan.stages} == {"full"}


def test_stages_divide_nodes_or_nodes_stages(any_plan):
    stages, nodes = any_plan.layout.pp_size, any_plan.layout.nodes
    assert stages % nodes == 0 or nodes % stages == 0


def test_every_rank_has_a_gpu_of_its_own(any_plan):
    seats = {(rank.host, rank.gpu_index) for rank in any_plan.ranks}
    assert len(seats) == len(any_plan.ranks) == any_plan.layout.gpus
    for node in any_plan.nodes:
        assert [r.gpu_index for r in any_plan.ranks if r.host == node.host] == list(node.gpu_indexes)
    for stage in any_plan.stages:
        ranks = [rank for rank in any_plan.ranks if rank.pp_rank == stage.pp_rank]
        assert [rank.tp_rank for rank in ranks] == list(range(any_plan.layout.tp_size))


def test_items_add_up_and_only_what_fits_fits(any_plan):
    for rank in any_plan.ranks:
        assert sum(item.bytes for item in rank.items) == rank.total_bytes
        assert rank.shortfall_bytes == max(rank.total_bytes - rank.capacity_bytes, 0)
        assert sum(item.bytes for item in rank.items if item.group == "margin") > 512 * 1024**2
    assert any_plan.shortfall_bytes == max(rank.shortfall_bytes for rank in any_plan.ranks)
    assert any_plan.fits == (any_plan.shortfall_bytes == 0)


def test_a_fitting_plan_caches_what_was_asked(any_plan):
    if any_plan.fits:
        groups = any_plan.layout.dp_size
        asked = -(-any_plan.settings.concurrency // groups) * groups * any_plan.settings.context_tokens
        assert any_plan.kv_cache_tokens >= asked
        assert any_plan.max_context_tokens >= any_plan.settings.context_tokens
        page_bytes = any_plan.layout.dp_size * any_plan.layout.dcp_size
        assert any_plan.kv_cache_tokens == any_plan.settings.max_total_tokens * page_bytes


def test_the_worst_rank_is_the_fullest(any_plan):
    worst = any_plan.worst_rank
    assert worst.fill == round(max(rank.total_bytes / rank.capacity_bytes for rank in any_plan.ranks), 4)
    (rank,) = [r for r in any_plan.ranks if (r.pp_rank, r.tp_rank) == (worst.pp_rank, worst.tp_rank)]
    assert (rank.host, rank.gpu_index) == (worst.host, worst.gpu_index)


def test_the_fraction_is_one_an_engine_takes(any_plan):
    assert 0 < any_plan.settings.mem_fraction <= 0.99


def test_plans_survive_json(any_plan):
    assert Plan.model_validate_json(any_plan.model_dump_json()) == any_plan


def test_every_rejected_layout_has_a_reason_with_numbers(any_plan):
    for rejected in any_plan.rejected:
        assert re.search(r"\d|no attention backend", rejected.reason)
        assert rejected.layout.startswith(f"TP{rejected.tp_size}xPP{rejected.pp_size}")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("cross", [False, True])
def test_no_layout_falls_into_the_rank_trap(name, cross):
    """Where neither stages nor nodes divide the other, some ranks are never started and the rest wait for ever."""
    hosts = [host(f"n{number}", "h200", 8) for number in range(6)]
    found = layouts(hosts, target("fp8", name), Request(1024, allow_cross_node_tp=cross))
    assert found
    for layout in found:
        assert layout.pp % layout.nodes == 0 or (cross and layout.nodes % layout.pp == 0)
        assert layout.gpus % layout.nodes == 0
        assert layout.gpus_per_node <= 8
        assert layout.tp in engine(name).parallel.tp_sizes


@pytest.mark.parametrize("stages", range(2, 9))
@pytest.mark.parametrize("name", [OLD, VLLM])
def test_every_stage_count_is_cut_on_full_layers(name, stages):
    hosts = [host(f"n{number}", "h200") for number in range(stages)]
    found = plan_for(hosts, Request(8192, pins=Pins(tp=8, pp=stages)), engine_name=name)
    assert found.fits
    starts = [stage.first_layer for stage in found.stages]
    assert all(start in (0, 1, 2) or start % 4 == 2 for start in starts)


def test_more_stages_than_full_layers_are_refused_with_the_count():
    hosts = [host(f"n{number}", "gb10", 1) for number in range(22)]
    with pytest.raises(UnsupportedError):
        search(Inventory(hosts=tuple(hosts)), target("fp8", OLD), Request(8192))
    rejected = search(Inventory(hosts=tuple(hosts)), target("fp8", VLLM), Request(8192, pins=Pins(pp=22))).rejected
    assert "22 stages need as many full layers to begin on; the model has 21" in {found.reason for found in rejected}


@pytest.mark.parametrize(("name", "allowed", "opted_in"), [(OLD, False, False), (NEW, False, True), (VLLM, True, True)])
def test_mtp_with_a_pipeline_by_version(name, allowed, opted_in):
    gpus = "24x h100-80g"
    pin = "tp=8,pp=3"
    for opt_in, legal in ((False, allowed), (True, opted_in)):
        options = {"gpus": gpus, "pin": pin, "mtp": "on", "engine": name, "context": "8k", "allow_pipeline_mtp": opt_in}
        if legal:
            assert plan(**options).fits
        else:
            with pytest.raises(UsageError, match="MTP with 3 pipeline stages"):
                plan(**options)


@pytest.mark.parametrize("name", [OLD, NEW, VLLM])
def test_mtp_in_one_stage_is_legal_everywhere(name):
    found = plan(gpus="8x h200", mtp="on", engine=name, context="8k")
    assert found.fits
    assert found.settings.mtp_steps == 3
    assert any(item.name == "MTP layer" for item in found.ranks[0].items)


def test_mtp_without_an_mtp_layer_is_refused():
    with pytest.raises(UsageError, match="no MTP layer"):
        plan(gpus="8x h200", checkpoint="nvfp4-mapika", mtp="on")


def test_a_mix_of_sms_shares_one_attention_option():
    mixed = plan(**MORE["unlike SMs"])
    assert {rank.gpu for rank in mixed.ranks} == {"rtx-4090-48g", "rtx-5090"}
    alone = plan(gpus="24x rtx-5090", checkpoint="nvfp4")
    assert alone.settings.prefill_backend == "flashinfer_sparse_mla"
    shared = [o for o in engine().attention if o.prefill == mixed.settings.prefill_backend and {89, 120} <= set(o.sms)]
    assert shared
    assert mixed.settings.kv_format == shared[0].kv_format
    kernels = {port.implementation for port in mixed.ports if port.op == "nvfp4 weights"}
    assert kernels == {"Marlin W4A16", "native FP4 tensor cores"}


def test_gpus_that_share_no_attention_option_are_not_mixed():
    found = plan(gpus="8x rtx-4090-48g + 8x b200", kv_dtype="fp8")
    assert {rank.gpu for rank in found.ranks} == {"b200"}


def test_unlike_memory_gets_unlike_stages():
    mixed = plan(**MORE["unlike cards"])
    assert mixed.fits
    assert mixed.settings.mixed_memory
    by_gpu = {rank.gpu: mixed.layout.stages[rank.pp_rank] for rank in mixed.ranks}
    assert by_gpu["rtx-5090"] < by_gpu["rtx-4090-48g"]
    assert not plan(gpus="32x rtx-4090-48g").settings.mixed_memory


def test_memory_in_use_is_an_item_of_its_own_and_taken_off():
    request = Request(8192, pins=Pins(tp=8, pp=1, stages=(78,)))
    idle = plan_for([host("a", "h200")], request)
    busy = plan_for([host("a", "h200", memory_in_use_bytes=6 * GIB)], request)
    assert busy.fits
    lost = (idle.kv_cache_tokens - busy.kv_cache_tokens) * idle.kv_bytes_per_token
    assert lost == pytest.approx(6 * GIB, abs=64 * idle.kv_bytes_per_token)
    for rank in busy.ranks:
        assert [item.bytes for item in rank.items if item.group == "others"] == [6 * GIB]


def with_gpus(name: str, *gpus: Gpu) -> Host:
    return Host(name=name, gpus=tuple(gpu.model_copy(update={"index": index}) for index, gpu in enumerate(gpus)))


def test_busy_gpus_are_left_out_where_idle_ones_suffice():
    card = gpu_profile("h200").gpu(0)
    busy = card.model_copy(update={"memory_in_use_bytes": 100 * GIB})
    found = plan_for([with_gpus("a", busy, *[card] * 3, busy, card, card, card)], Request(8192), "nvfp4")
    assert found.fits
    assert found.layout.tp_size == 4
    assert set(found.nodes[0].gpu_indexes) <= {1, 2, 3, 5, 6, 7}
    assert not found.nodes[0].all_gpus_used


def test_one_busy_gpu_bounds_the_whole_stage():
    card = gpu_profile("h200").gpu(0)
    busy = card.model_copy(update={"memory_in_use_bytes": 30 * GIB})
    request = Request(8192, pins=Pins(tp=8, pp=1, stages=(78,)))
    one = plan_for([with_gpus("a", *[card] * 7, busy)], request)
    every = plan_for([with_gpus("a", *[busy] * 8)], request)
    assert one.kv_cache_tokens == every.kv_cache_tokens
    assert one.worst_rank.fill > one.ranks[0].total_bytes / one.ranks[0].capacity_bytes


def test_no_rank_of_a_fitting_plan_lacks_memory():
    """Free memory is equal but for a megabyte; the larger cards keep a larger margin and so hold less."""
    small = gpu_profile("h200").gpu(0)
    free = small.memory_usable_bytes
    large = small.model_copy(
        update={"memory_usable_bytes": 2 * free, "memory_total_bytes": 2 * free, "memory_in_use_bytes": free - 1_000_000}
    )
    found = plan_for([with_gpus("a", *[small] * 4, *[large] * 4)], Request(8192, pins=Pins(tp=8, pp=1)))
    assert found.fits
    assert found.shortfall_bytes == 0


def test_gpus_of_one_node_load_the_weights_alike():
    """One process group has one set of flags: GPUs that need different ones cannot share a node."""
    cards = [gpu_profile(name).gpu(0) for name in ("rtx-4090-48g", "a6000")]
    hosts = [with_gpus(name, *[cards[0]] * 4, *[cards[1]] * 4) for name in "abc"]
    free = plan_for(hosts, Request(8192, pins=Pins(tp=4)), "nvfp4")
    for node in free.nodes:
        assert len({rank.gpu for rank in free.ranks if rank.host == node.host}) == 1
    with pytest.raises(AssertionError, match="neither fits nor misses"):
        plan_for(hosts, Request(8192, pins=Pins(tp=8, pp=3)))


def test_mig_is_refused_with_the_command_that_turns_it_off():
    gpus = [gpu.model_copy(update={"mig": gpu.index == 3}) for gpu in host("a", "h200").gpus]
    with pytest.raises(UsageError, match=r"GPU 3 of a .* is split by MIG") as raised:
        plan_for([Host(name="a", gpus=tuple(gpus))], Request(8192))
    assert raised.value.next_step.endswith("nvidia-smi -i 3 -mig 0")


def test_hosts_without_gpus_are_passed_over_and_none_at_all_refused():
    assert plan_for([Host(name="a"), host("b", "h200")], Request(8192)).nodes[0].host == "b"
    with pytest.raises(UsageError, match="no GPUs"):
        plan_for([Host(name="a")], Request(8192))


LAYOUTS = {
    "one stage": (["a"], Pins(tp=8, pp=1, stages=(78,))),
    "two stages": (["a", "b"], Pins(tp=8, pp=2, stages=(38, 40))),
}


@settings(max_examples=25)
@given(
    usable=st.integers(40 * GIB, 200 * GIB),
    more=st.integers(1, 40 * GIB),
    layout=st.sampled_from(sorted(LAYOUTS)),
    name=st.sampled_from([NEW, OLD, VLLM]),
    context=st.sampled_from([1024, 131_072, 1_048_576]),
)
def test_more_memory_never_makes_a_plan_worse(usable, more, layout, name, context):
    names, pins = LAYOUTS[layout]

    def at(size: int) -> Plan:
        hosts = [host(label, "h200", memory_usable_bytes=size) for label in names]
        return plan_for(hosts, Request(context, pins=pins), engine_name=name)

    less, larger = at(usable), at(usable + more)
    assert larger.fits >= less.fits
    assert larger.kv_cache_tokens >= less.kv_cache_tokens
    assert larger.shortfall_bytes <= less.shortfall_bytes


@settings(max_examples=25)
@given(
    usable=st.integers(20 * GIB, 200 * GIB), more=st.integers(0, 20 * GIB), count=st.integers(1, 4),
    name=st.sampled_from([NEW, OLD]), context=st.sampled_from([1024, 131_072]),
)  # fmt: skip
def test_more_memory_keeps_an_unpinned_plan_fitting(usable, more, count, name, context):
    def fits(size: int) -> bool:
        hosts = [host(f"n{number}", "rtx-4090-48g", memory_usable_bytes=size) for number in range(count)]
        return plan_for(hosts, Request(context), engine_name=name).fits

    assert fits(usable + more) >= fits(usable)


@pytest.mark.parametrize("name", [NEW, OLD, VLLM])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mtp_steps", [0, 3])
def test_one_byte_short_is_reported(name, layout, mtp_steps):
    names, pins = LAYOUTS[layout]
    if mtp_steps and len(names) > 1 and name == OLD:
        mtp_steps = 0
    request = Request(131_072, pins=pins, mtp_steps=mtp_steps, allow_pipeline_mtp=True)

    def at(size: int) -> Plan:
        return plan_for([host(label, "h200", memory_usable_bytes=size) for label in names], request, engine_name=name)

    low, high = 10 * GIB, 200 * GIB
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).fits else (middle, high)
    exact, below = at(high), at(high - 1)
    assert exact.fits
    assert {rank.shortfall_bytes for rank in exact.ranks} == {0}
    assert exact.worst_rank.fill == 1
    assert not below.fits
    assert below.shortfall_bytes == 1


@settings(max_examples=15)
@given(
    context=st.integers(1, 1_048_576), concurrency=st.integers(1, 64), mtp_steps=st.sampled_from([0, 0, 1, 3]),
    name=st.sampled_from(ENGINES), gpu=st.sampled_from(["h200", "rtx-5090", "a100-80g", "gb10"]), nodes=st.integers(1, 5),
)  # fmt: skip
def test_any_request_gives_a_whole_plan_or_a_sentence(context, concurrency, mtp_steps, name, gpu, nodes):
    request = Request(context, concurrency, mtp_steps=mtp_steps, allow_pipeline_mtp=True)
    hosts = [host(f"n{number}", gpu, gpu_profile(gpu).gpus_per_node) for number in range(nodes)]
    try:
        found = plan_for(hosts, request, "nvfp4", name)
    except UnsupportedError:
        return
    assert sum(found.layout.stages) == 78
    assert found.fits == (found.shortfall_bytes == 0)
    assert Plan.model_validate_json(found.model_dump_json()) == found


def test_objectives_order_what_fits():
    hosts = [host(name, "h200") for name in "ab"]
    fewest, latency, tokens = (plan_for(hosts, Request(8192, objective=o)) for o in ("fewest-gpus", "latency", "kv-tokens"))
    assert fewest.layout.gpus == 8
    assert latency.layout.pp_size == 1
    assert latency.layout.gpus >= fewest.layout.gpus
    assert tokens.kv_cache_tokens > fewest.kv_cache_tokens


def test_what_is_pinned_is_kept():
    hosts = [host(name, "h200") for name in "ab"]
    found = plan_for(hosts, Request(8192, pins=Pins(tp=4, pp=4, nodes=2, stages=(18, 20, 20, 20))))
    assert found.fits
    assert (found.layout.tp_size, found.layout.pp_size, found.layout.nodes) == (4, 4, 2)
    assert found.layout.stages == (18, 20, 20, 20)


def test_pins_that_cannot_be_seated_are_named():
    with pytest.raises(UsageError, match=r"No layout with tp=8, pp=3 can be seated on 2 hosts with 8, 8 GPUs"):
        plan_for([host(name, "h200") for name in "ab"], Request(8192, pins=Pins(tp=8, pp=3)))


def test_advice_is_true():
    """A suggested context fits and one page more does not; a suggested checkpoint and node count fit."""
    options = {"gpus": "8x a100-80g", "checkpoint": "awq-int4", "context": "1M", "pin": "tp=8"}
    sentences = plan(**options).advice
    (context,) = [int(found[1]) for text in sentences if (found := re.match(r"--context (\d+) fits", text))]
    assert plan(**{**options, "context": str(context)}).fits
    assert not plan(**{**options, "context": str(context + 64)}).fits
    (nodes,) = [int(found[1]) for text in sentences if (found := re.search(r"\((\d+) in all\)", text))]
    assert plan(**{**options, "gpus": f"{8 * nodes}x a100-80g"}).fits
    assert not plan(**{**options, "gpus": f"{8 * (nodes - 1)}x a100-80g"}).fits


@pytest.mark.parametrize("name", ["8 L40S", "8 H200 in BF16"])
def test_suggested_checkpoints_and_nodes_fit(name):
    options = {"context": "8192", **TOO_SMALL[name]}
    sentences = plan(**options).advice
    assert sentences
    for text in sentences:
        if found := re.match(r"--checkpoint (\S+) fits", text):
            assert plan(**{**options, "checkpoint": found[1]}).fits
        if found := re.search(r"\((\d+) in all\)", text):
            gpu = options["gpus"].split()[1]
            assert plan(**{**options, "gpus": f"{8 * int(found[1])}x {gpu}"}).fits


def test_the_longest_context_is_the_longest():
    found = plan(gpus="8x a100-80g", checkpoint="awq-int4", context="32k")
    longest = found.max_context_tokens
    options = {"gpus": "8x a100-80g", "checkpoint": "awq-int4", "pin": "tp=8,pp=1"}
    assert plan(**options, context=str(longest)).fits
    assert not plan(**options, context=str(longest + 64)).fits


@pytest.mark.parametrize(("graphs", "concurrency"), [(0, 1), (8, 64)])
def test_as_many_requests_run_as_were_asked_for(graphs, concurrency):
    found = plan_for([host("a", "h200")], Request(1024, concurrency, graph_max_bs=graphs))
    assert found.fits
    assert found.settings.max_running_requests >= concurrency


def test_mtp_that_alone_stands_in_the_way_is_named_in_the_advice():
    found = plan(gpus="24x rtx-4090-48g", mtp="on")
    assert not found.fits
    assert any("mtp" in sentence for sentence in found.advice)


def test_a_given_fraction_bounds_the_pool():
    hosts = [host("a", "h200")]
    free = plan_for(hosts, Request(8192), "w4afp8")
    held = plan_for(hosts, Request(8192, mem_fraction=0.85), "w4afp8")
    assert held.settings.mem_fraction == 0.85
    assert held.kv_cache_tokens < free.kv_cache_tokens
    assert not plan_for(hosts, Request(8192, mem_fraction=0.3), "w4afp8").fits


def test_plans_do_not_depend_on_earlier_ones():
    request = Request(8192, pins=Pins(tp=8, pp=2))
    hosts = [host(name, "h200") for name in "ab"]
    first = plan_for(hosts, request)
    plan_for(hosts, replace(request, kv_dtype="bf16"), "nvfp4", OLD)
    assert plan_for(hosts, request) == first
