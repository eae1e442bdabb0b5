"""Bytes per token against the table that was checked with the engines' own logs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmplan.model.kv_cache import KvCell, layer_cell, range_cell
from tests.samples import NEW, OLD, VLLM, config, engine

# engine, KV format, model, bytes a token of the whole model, and with the MTP layer where the table has it
TABLE = [
    (VLLM, "fp8_packed", "glm-5.2", 53_940, 54_728),
    (VLLM, "bf16", "glm-5.2", 92_628, 93_912),
    (VLLM, "fp8_raw", "glm-5.2", 47_700, 48_408),
    (OLD, "fp8_packed", "glm-5.2", 61_464, 62_252),
    (OLD, "fp8_raw", "glm-5.2", 55_224, None),
    (OLD, "bf16", "glm-5.2", 100_152, None),
    (NEW, "fp8_packed", "glm-5.2", 53_940, 54_728),
    (NEW, "fp8_raw", "glm-5.2", 47_700, 48_408),
    (NEW, "bf16", "glm-5.2", 92_628, 93_912),
    *[
        (name, "fp8_packed", model, 61_464, 62_252)
        for model in ("glm-5.1", "glm-5")
        for name in (VLLM, OLD, NEW)
    ],
]  # fmt: skip


def whole(engine_name: str, kv_format: str, model: str = "glm-5.2", mtp: bool = False) -> KvCell:
    profile = engine(engine_name)
    return range_cell(config(model), profile, profile.kv_format(kv_format), 0, 78, mtp)


@pytest.mark.parametrize(("engine_name", "kv_format", "model", "plain", "with_mtp"), TABLE)
def test_bytes_per_token_of_the_whole_model(engine_name, kv_format, model, plain, with_mtp):
    assert whole(engine_name, kv_format, model).allocated == plain
    if with_mtp is not None:
        assert whole(engine_name, kv_format, model, mtp=True).allocated == with_mtp


@pytest.mark.parametrize(
    ("engine_name", "model", "layers"), [(VLLM, "glm-5.2", 21), (OLD, "glm-5.2", 78), (NEW, "glm-5.1", 78)]
)
def test_index_rows_stand_on_the_layers_that_have_a_buffer(engine_name, model, layers):
    assert whole(engine_name, "bf16", model).index_k == layers * 132


def test_rows_are_the_sum_of_their_parts():
    values, scales, rope = 512, 4 * 4, 64 * 2
    assert engine().kv_format("fp8_packed").row_bytes == values + scales + rope
    assert engine().kv_format("fp8_raw").row_bytes == 512 + 64
    assert engine().kv_format("bf16").row_bytes == 2 * (512 + 64)
    assert engine().index_row_bytes == 128 + 4


def test_the_old_version_budgets_708_bytes_for_rows_of_788():
    profile = engine(OLD)
    cell = layer_cell(config(), profile, profile.kv_format("fp8_packed"), 5)
    assert (cell.allocated, cell.budgeted) == (788, 708)


@pytest.mark.parametrize("kv_format", ["fp8_packed", "fp8_raw", "bf16"])
def test_other_versions_budget_what_they_allocate(kv_format):
    for name in (NEW, VLLM):
        cell = whole(name, kv_format, mtp=True)
        assert cell.budgeted == cell.allocated


def test_the_mtp_layer_always_has_an_index_row():
    for name in (OLD, NEW, VLLM):
        profile = engine(name)
        assert layer_cell(config(), profile, profile.kv_format("bf16"), 78).index_k == 132


@given(cut=st.integers(0, 78), mtp=st.booleans(), engine_name=st.sampled_from([OLD, NEW, VLLM]))
def test_stages_add_up_to_the_whole_model(cut, mtp, engine_name):
    profile = engine(engine_name)
    kv = profile.kv_format("fp8_packed")
    first = range_cell(config(), profile, kv, 0, cut, False)
    last = range_cell(config(), profile, kv, cut, 78, mtp)
    assert first + last == whole(engine_name, "fp8_packed", mtp=mtp)
