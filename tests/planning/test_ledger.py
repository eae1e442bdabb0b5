"""Weights of every rank: the published per-rank sums, and nothing lost or invented when the model is divided."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmplan.facts.checkpoint import Format, StorageRule, StorageRules
from glmplan.facts.engine_profile import EngineProfile
from glmplan.model.tensors import LINEAR_ROLES, Role
from glmplan.model.weights import Weights, weights_by_rule
from glmplan.planning.ledger import LineItem, Split, WeightLedger
from glmplan.units import GIB
from tests.samples import NEW, OLD, VLLM, config, engine, weights

# sglang.md section 5.4: FP8, 0.5.23, no MTP, GiB of each stage's ranks with the engine's default cut
PER_RANK = {
    (8, 1): [88.46],
    (8, 2): [42.59, 45.88],
    (8, 4): [19.17, 22.24, 23.42, 23.64],
    (16, 1): [45.03],
    (16, 2): [21.70, 23.33],
    (4, 4): [37.94, 44.10, 46.43, 46.87],
}
LAYERS = 78


def default_cuts(stages: int) -> list[int]:
    """The engine's own cut: the last stages take the layers that remain."""
    base, more = divmod(LAYERS, stages)
    sizes = [base] * (stages - more) + [base + 1] * more
    return [sum(sizes[:stage]) for stage in range(stages + 1)]


def stages(
    split: Split, cuts: list[int], mtp: bool = False, engine_name: str = NEW, held: Weights | None = None
) -> list[list[LineItem]]:
    """The weight lines of each stage's ranks."""
    ledger = WeightLedger(config(), engine(engine_name), held or weights(), split)
    return [ledger.stage_items(begin, end, mtp) for begin, end in itertools.pairwise(cuts)]


def total(items: list[LineItem], *kinds: str) -> int:
    return sum(item.bytes for item in items if not kinds or item.kind in kinds)


def line(items: list[LineItem], name: str) -> int:
    return sum(item.bytes for item in items if item.name == name)


@pytest.mark.parametrize(("tp", "pp"), PER_RANK)
def test_per_rank_sums_are_the_published_ones(tp, pp):
    found = [total(items) / GIB for items in stages(Split(tp, tp, 1), default_cuts(pp))]
    assert found == pytest.approx(PER_RANK[tp, pp], abs=0.01)


def test_the_first_and_last_of_eight_stages_at_tp4():
    found = [total(items) / GIB for items in stages(Split(4, 4, 1), default_cuts(8))]
    assert (found[0], found[-1]) == (pytest.approx(14.72, abs=0.01), pytest.approx(23.65, abs=0.01))


def test_parts_of_a_layer_at_tp8():
    """Section 5.4: a MoE layer is 1212.97 MB experts, 22.29 MB attention, 19.30 MB replicated; a dense one 77.1 MB."""
    moe = WeightLedger(config(), engine(), weights(), Split(8, 8, 1)).stage_items(4, 5, False)
    scales = line(moe, "block scales, sharded") + line(moe, "block scales, replicated")
    experts = line(moe, "routed experts") + line(moe, "shared expert")
    attention = line(moe, "attention, sharded") + line(moe, "absorbed kv_b (w_kc, w_vc)")
    replicated = line(moe, "attention, replicated") + line(moe, "router and norms")
    assert (experts + attention + replicated + scales) / 1e6 == pytest.approx(1212.97 + 22.29 + 19.30, abs=0.01)
    assert replicated / 1e6 == pytest.approx(19.30, abs=0.01)
    dense = WeightLedger(config(), engine(), weights(), Split(8, 8, 1)).stage_items(1, 2, False)
    assert total(dense) / 1e6 == pytest.approx(77.1, abs=0.1)


def test_lines_have_names_sources_and_positive_bytes():
    for items in stages(Split(8, 8, 1), [0, 38, 78], mtp=True):
        assert all(item.bytes > 0 and item.source and item.name for item in items)
        assert {item.group for item in items} == {"weights"}
        assert {item.kind for item in items} == {"sharded", "replicated", "derived"}


FORMATS = [Format.BF16, Format.FP8_BLOCK, Format.NVFP4, Format.MXFP4, Format.INT4_G128]
LAYER_SETS = st.none() | st.frozensets(st.integers(0, LAYERS), max_size=LAYERS)
RULES = st.lists(
    st.builds(StorageRule, st.frozensets(st.sampled_from(sorted(LINEAR_ROLES))), st.sampled_from(FORMATS), LAYER_SETS),
    max_size=4,
)


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A TP size and cuts."""
    inner = draw(st.sets(st.integers(1, LAYERS - 1), max_size=5))
    return draw(st.sampled_from([1, 2, 4, 8, 16])), [0, *sorted(inner), LAYERS]


@settings(max_examples=30)
@given(division=divisions(), rules=RULES, mtp=st.booleans(), name=st.sampled_from([NEW, OLD, VLLM]))
def test_ranks_add_up_to_the_checkpoint_plus_declared_replication(division, rules, mtp, name):
    (tp, cuts), held = division, weights_by_rule(config(), StorageRules(tuple(rules)), "drawn")
    found = stages(Split(tp, tp, 1), cuts, mtp, name, held)
    once = sum(tp * total(items, "sharded") + total(items, "replicated") for items in found)
    left_out = 0 if mtp else sum(stored.total for stored in held.mtp.values())
    assert once == held.total_bytes - left_out


@settings(max_examples=20)
@given(division=divisions(), mtp=st.booleans(), name=st.sampled_from([NEW, OLD, VLLM]))
def test_cuts_move_bytes_and_make_none(division, mtp, name):
    """All stages together hold what one stage holds, but for the embedding that may stand twice."""
    tp, cuts = division
    split = Split(tp, tp, 1)
    apart = stages(split, cuts, mtp, name)
    (whole,) = stages(split, [0, LAYERS], mtp, name)
    again = sum(line(items, "embedding for the MTP layer") for items in apart)
    assert sum(total(items) for items in apart) == total(whole) + again
    twice = mtp and len(cuts) > 2 and engine(name).mtp.embedding_on_last_stage
    assert again == (weights().outer[Role.EMBEDDING].total // tp if twice else 0)


def test_embedding_first_head_and_norm_last():
    first, middle, last = stages(Split(8, 8, 1), [0, 20, 50, 78])
    table = 154880 * 6144 * 2 // 8
    assert [line(items, "embedding") for items in (first, middle, last)] == [table, 0, 0]
    assert [line(items, "output head") for items in (first, middle, last)] == [0, 0, table]


def test_the_mtp_layer_stands_on_the_last_stage_alone():
    off = stages(Split(8, 8, 1), [0, 38, 78])
    on = stages(Split(8, 8, 1), [0, 38, 78], mtp=True)
    assert [line(items, "MTP layer") for items in off] == [0, 0]
    assert line(on[0], "MTP layer") == 0
    assert on[0] == off[0]
    assert line(on[1], "MTP layer") > 1e9


def test_replicated_roles_do_not_shrink_with_tp():
    for name in ("attention, replicated", "router and norms", "indexer"):
        at = [line(stages(Split(tp, tp, 1), [0, 78])[0], name) for tp in (2, 4, 8, 16)]
        assert len(set(at)) == 1
        assert at[0] > 0
    q_a_and_kv_a = (2048 + 576) * 6144 * LAYERS
    assert line(stages(Split(8, 8, 1), [0, 78])[0], "attention, replicated") == q_a_and_kv_a


def test_absorbed_kv_b_is_bf16_and_derived():
    (items,) = stages(Split(8, 8, 1), [0, 78])
    (absorbed,) = [item for item in items if item.name.startswith("absorbed kv_b")]
    assert absorbed.bytes == 28672 * 512 * 2 // 8 * LAYERS
    assert absorbed.kind == "derived"


def test_the_old_version_builds_indexers_on_all_layers():
    """57 shared layers hold 9.6 MB of weights that are never loaded: 545 MB a rank over all stages."""
    old = stages(Split(8, 8, 1), [0, 38, 78], engine_name=OLD)
    new = stages(Split(8, 8, 1), [0, 38, 78], engine_name=NEW)
    never = [item for items in old for item in items if item.name == "indexers never loaded"]
    one = 4096 * 2048 + 128 * 6144 + 32 * 6144 * 2 + 4 * 32 * 16 + 4 * 48 + 2 * 128 * 2
    assert sum(item.bytes for item in never) == 57 * one
    assert 57 * one / 1e6 == pytest.approx(545, abs=1)
    assert {item.kind for item in never} == {"derived"}
    assert [line(items, "indexers never loaded") for items in new] == [0, 0]


def test_a_model_without_sharing_has_no_unloaded_indexers():
    ledger = WeightLedger(config("glm-5.1"), engine(OLD), weights("fp8", "glm-5.1"), Split(8, 8, 1))
    assert line(ledger.stage_items(0, 78, False), "indexers never loaded") == 0


@pytest.mark.parametrize(("name", "wider"), [(NEW, True), (VLLM, True), (OLD, False)])
def test_indexer_keys_are_widened_to_bf16_where_the_engine_does(name, wider):
    (items,) = stages(Split(8, 8, 1), [0, 78], engine_name=name)
    stored = 128 * 6144 + 4 * 48
    assert line(items, "indexer keys widened to BF16") == (21 * (2 * 128 * 6144 - stored) if wider else 0)
    (bf16,) = stages(Split(8, 8, 1), [0, 78], engine_name=name, held=weights("bf16"))
    assert line(bf16, "indexer keys widened to BF16") == 0


def test_a_loader_that_widens_scales_says_so():
    """16-bit scales per row and 128 columns: a 64th of the values, less the F32 tile scales that were there."""
    (plain,) = stages(Split(8, 8, 1), [0, 78])
    (widened,) = stages(Split(8, 8, 1, scale_denominator=64), [0, 78])
    more = line(widened, "scales widened to BF16")
    assert total(widened) - total(plain) == more
    quantised = line(plain, "routed experts") + line(plain, "shared expert") + line(plain, "dense MLP")
    assert more == pytest.approx(quantised / 64, rel=0.05)


def test_attention_data_parallelism_shards_attention_over_its_group():
    (plain,) = stages(Split(8, 8, 1), [0, 78])
    (groups,) = stages(Split(8, 1, 1), [0, 78])
    assert line(groups, "attention, sharded") == 8 * line(plain, "attention, sharded")
    assert line(groups, "attention, replicated") == line(plain, "attention, replicated")
    assert line(groups, "routed experts") == line(plain, "routed experts")
    assert line(groups, "embedding") == 8 * line(plain, "embedding")


@pytest.mark.parametrize("name", ["output head", "dense MLP", "shared expert"])
def test_vllm_data_parallel_ranks_hold_whole_what_is_not_an_expert(name):
    (plain,) = stages(Split(8, 8, 8), [0, 78], engine_name=VLLM)
    (groups,) = stages(Split(8, 1, 8), [0, 78], engine_name=VLLM)
    assert line(groups, name) == 8 * line(plain, name)


def test_profiles_of_engines_agree_on_what_the_checkpoint_holds():
    def held(profile: EngineProfile) -> int:
        items = WeightLedger(config(), profile, weights(), Split(8, 8, 1)).stage_items(0, 78, False)
        return total(items, "sharded", "replicated")

    assert len({held(engine(name)) for name in (OLD, NEW, VLLM)}) == 1
