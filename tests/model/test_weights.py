"""The weight ledger against what was published: parameters, tensors and bytes of every known checkpoint."""

from __future__ import annotations

import json

import pytest

from glmplan.facts.checkpoint import Format, StorageRules, rules_from_config
from glmplan.facts.model_config import ModelConfig, parse_model_config
from glmplan.facts.profiles import checkpoint_profile, model_profile
from glmplan.model.tensors import Role, all_groups
from glmplan.model.weights import StoredBytes, Weights, header_bytes, stored_bytes, weights_by_rule
from glmplan.units import GIB
from tests.samples import CONFIGS, config, weights

BYTES = {"bf16": 1_506_659_919_872, "fp8": 755_617_140_416}
PUBLISHED_FILES = {
    ("glm-5.2", "bf16"): "GLM-5.2",
    ("glm-5.2", "fp8"): "GLM-5.2-FP8",
    ("glm-5.2", "nvfp4"): "GLM-5.2-NVFP4",
    ("glm-5.1", "fp8"): "GLM-5.1-FP8",
    ("glm-5.1", "nvfp4"): "GLM-5.1-NVFP4",
}
# Sizes as their authors print them. Where they say GB they mean GiB: 256 experts at 4 bits alone are 367 GB.
PUBLISHED_DERIVED = {
    "nvfp4-lorbus": 459 * GIB,
    "nvfp4-mapika": 410 * GIB,
    "w4afp8": 368 * GIB,
    "awq-int4": 410 * GIB,
    "mxfp4": 438_033_728_823,
}


def published(name: str, **changes: object) -> tuple[ModelConfig, StorageRules]:
    raw = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    return parse_model_config(raw, name), rules_from_config(raw, name)


def by_file(name: str, **changes: object) -> Weights:
    shapes, rules = published(name, **changes)
    return weights_by_rule(shapes, rules, name)


def tensor_count(shapes: ModelConfig, rules: StorageRules) -> int:
    """Entries of the index: block-quantised tensors have their scales beside them."""
    quantised = {Format.FP8_BLOCK: 2}
    return sum(g.count * quantised.get(rules.format_of(g.module, g.role, g.layer), 1) for g in all_groups(shapes))


def test_parameters_are_the_published_ones():
    assert sum(group.parameters for group in all_groups(config())) == 753_329_940_480
    assert sum(group.parameters for group in all_groups(config(), with_mtp=False)) == 743_377_019_904


def test_bf16_index_has_its_tensors():
    assert sum(group.count for group in all_groups(config())) == 59_585


@pytest.mark.parametrize("checkpoint", BYTES)
def test_bytes_by_profile_are_the_published_ones(checkpoint):
    assert weights(checkpoint).total_bytes == BYTES[checkpoint]


@pytest.mark.parametrize(("checkpoint", "name"), [("bf16", "GLM-5.2"), ("fp8", "GLM-5.2-FP8")])
def test_bytes_by_config_file_are_the_published_ones(checkpoint, name):
    assert by_file(name).total_bytes == BYTES[checkpoint]


@pytest.mark.parametrize(("model", "checkpoint"), PUBLISHED_FILES)
def test_profile_and_config_file_agree_in_every_layer_and_role(model, checkpoint):
    ours, theirs = weights(checkpoint, model), by_file(PUBLISHED_FILES[model, checkpoint])
    assert ours.outer == theirs.outer
    assert ours.layers == theirs.layers
    assert ours.mtp == theirs.mtp


def test_nvfp4_files_are_432_90_gib():
    profile = model_profile("glm-5.2")
    rules = checkpoint_profile(profile, "nvfp4").storage_rules()
    on_disk = weights("nvfp4").total_bytes + header_bytes(all_groups(config()), rules)
    assert on_disk / GIB == pytest.approx(432.90, abs=0.01)


def test_nvfp4_tensors_are_464_8_gb():
    assert weights("nvfp4").total_bytes / 1e9 == pytest.approx(464.79, abs=0.01)


@pytest.mark.parametrize("checkpoint", PUBLISHED_DERIVED)
def test_derived_checkpoints_meet_their_published_size(checkpoint):
    assert weights(checkpoint).total_bytes == pytest.approx(PUBLISHED_DERIVED[checkpoint], rel=0.015)


def test_every_checkpoint_that_names_a_published_size_meets_it():
    found = model_profile("glm-5.2").checkpoints
    named = {entry.name: entry.published_bytes for entry in found if entry.published_bytes is not None}
    assert named.keys() >= {"fp8", "bf16", "nvfp4", *PUBLISHED_DERIVED}
    assert {name: weights(name).total_bytes for name in named} == pytest.approx(named, rel=0.015)


def test_pruned_fp8_has_the_published_tensors():
    """154 of 256 experts: every one of the 72,117 tensors, and all but 223 MB of the published 463,045,186,640 bytes."""
    shapes, rules = published("GLM-5.2-FP8", n_routed_experts=154)
    assert tensor_count(shapes, rules) == 72_117
    pruned = by_file("GLM-5.2-FP8", n_routed_experts=154).total_bytes
    assert pruned == 462_822_208_928
    assert pruned == pytest.approx(463_045_186_640, rel=0.0005)


def test_the_mtp_layer_is_left_out_where_the_checkpoint_has_none():
    assert weights("nvfp4-mapika").mtp == {}
    assert by_file("GLM-5.2-FP8", num_nextn_predict_layers=0).mtp == {}


@pytest.mark.parametrize(
    ("shape", "storage", "expected"),
    [
        ((576, 6144), Format.BF16, StoredBytes(2 * 576 * 6144)),
        ((256,), Format.F32, StoredBytes(4 * 256)),
        ((576, 6144), Format.FP8_BLOCK, StoredBytes(576 * 6144, 4 * 5 * 48)),
        ((2048, 6144), Format.FP8_CHANNEL, StoredBytes(2048 * 6144, 4 * 2048)),
        ((2048, 6144), Format.NVFP4, StoredBytes(2048 * 3072, 2048 * 384, 8)),
        ((2048, 6144), Format.MXFP4, StoredBytes(2048 * 3072, 2048 * 192)),
        ((2048, 6144), Format.INT4_G32, StoredBytes(2048 * 3072, 2 * 2048 * 192)),
        ((2048, 6144), Format.INT4_G128, StoredBytes(2048 * 3072, 2 * 2048 * 48)),
    ],
)
def test_each_format_s_values_scales_and_scalars(shape, storage, expected):
    assert stored_bytes(shape, storage) == expected
    three = stored_bytes(shape, storage, 3)
    assert three == expected + expected + expected
    assert three.total == 3 * expected.total


def test_router_bias_is_f32_in_every_format():
    for checkpoint in ("bf16", "fp8", "nvfp4", "awq-int4"):
        assert weights(checkpoint).layers[3][Role.ROUTER_BIAS] == StoredBytes(4 * 256)


def test_shared_layers_hold_no_indexer():
    full, shared = weights().layers[2], weights().layers[3]
    assert Role.INDEXER_WQ_B in full
    assert Role.INDEXER_WQ_B not in shared
    assert Role.INDEXER_WQ_B in weights().mtp
    assert sum(Role.INDEXER_WK in layer for layer in weights().layers) == 21
