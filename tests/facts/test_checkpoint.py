"""Storage rules read from published quantisation settings, and refusals of unknown ones."""

from __future__ import annotations

import contextlib
import json

import pytest

from glmplan.errors import GlmplanError, UnsupportedError
from glmplan.facts.checkpoint import Format, StorageRule, StorageRules, rules_from_config, scheme_of
from glmplan.model.tensors import Role, all_groups
from tests.samples import CONFIGS, config

BF16_ALWAYS = {Role.EMBEDDING, Role.LM_HEAD, Role.FINAL_NORM, Role.NORM, Role.ROUTER, Role.EH_PROJ, Role.INDEXER_NORM}
QUANTISED_FP8 = set(Role) - BF16_ALWAYS - {Role.ROUTER_BIAS, Role.INDEXER_WEIGHTS_PROJ}


def published(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((CONFIGS / f"{name}.json").read_text())
    return found


def formats(name: str, model: str) -> dict[Format, set[tuple[Role, int | None]]]:
    """Which roles of which layers have each format."""
    rules = rules_from_config(published(name), name)
    found: dict[Format, set[tuple[Role, int | None]]] = {}
    for group in all_groups(config(model)):
        storage = rules.format_of(group.module, group.role, group.layer)
        found.setdefault(storage, set()).add((group.role, group.layer))
    return found


def roles(places: set[tuple[Role, int | None]]) -> set[Role]:
    return {role for role, _ in places}


def test_bf16_has_only_the_router_bias_apart():
    found = formats("GLM-5.2", "glm-5.2")
    assert found.keys() == {Format.BF16, Format.F32}
    assert roles(found[Format.F32]) == {Role.ROUTER_BIAS}


@pytest.mark.parametrize(("name", "model"), [("GLM-5.2-FP8", "glm-5.2"), ("GLM-5.1-FP8", "glm-5.1")])
def test_fp8_quantises_every_linear_but_the_kept_ones(name, model):
    found = formats(name, model)
    assert found.keys() == {Format.BF16, Format.F32, Format.FP8_BLOCK}
    assert roles(found[Format.FP8_BLOCK]) == QUANTISED_FP8
    assert roles(found[Format.BF16]) == BF16_ALWAYS | {Role.INDEXER_WEIGHTS_PROJ}


def test_the_published_fp8_list_spells_weights_proj_as_indexers_proj():
    quantization = published("GLM-5.2-FP8")["quantization_config"]
    assert isinstance(quantization, dict)
    kept = quantization["modules_to_not_convert"]
    assert len(kept) == 541
    assert "model.layers.0.self_attn.indexers_proj" in kept
    rules = rules_from_config({"quantization_config": quantization}, "x")
    module = "model.layers.0.self_attn.indexer.weights_proj"
    assert rules.format_of(module, Role.INDEXER_WEIGHTS_PROJ, 0) is Format.BF16
    assert rules.format_of("model.layers.0.self_attn.indexer.wk", Role.INDEXER_WK, 0) is Format.FP8_BLOCK


@pytest.mark.parametrize(("name", "model"), [("GLM-5.2-NVFP4", "glm-5.2"), ("GLM-5.1-NVFP4", "glm-5.1")])
def test_nvfp4_quantises_the_routed_experts_of_the_decoder_only(name, model):
    found = formats(name, model)
    assert found[Format.NVFP4] == {(Role.ROUTED_EXPERTS, layer) for layer in range(3, 78)}
    assert (Role.ROUTED_EXPERTS, 78) in found[Format.BF16]


@pytest.mark.parametrize(
    ("quantization", "scheme", "experts", "attention"),
    [
        ({"quant_method": "fp8"}, "fp8", Format.FP8_CHANNEL, Format.FP8_CHANNEL),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", Format.FP8_BLOCK, Format.FP8_BLOCK),
        ({"quant_method": "w4afp8"}, "w4afp8", Format.INT4_G128, Format.FP8_BLOCK),
        ({"quant_method": "awq", "group_size": 128}, "int4", Format.INT4_G128, Format.INT4_G128),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", Format.NVFP4, Format.NVFP4),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", Format.FP8_CHANNEL, Format.FP8_CHANNEL),
        ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4", "ignore": ["*self_attn*"]}, "nvfp4", Format.NVFP4,
         Format.BF16),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}, "exclude": ["*self_attn*"]},
         "mxfp4", Format.MXFP4, Format.BF16),
    ],
)  # fmt: skip
def test_each_quantiser_s_spelling(quantization, scheme, experts, attention):
    raw = {"quantization_config": quantization}
    rules = rules_from_config(raw, "x")
    assert scheme_of(raw, "x") == scheme
    assert rules.format_of("model.layers.5.mlp.experts.0.up_proj", "routed_experts", 5) is experts
    assert rules.format_of("model.layers.5.self_attn.q_b_proj", "q_b", 5) is attention
    assert rules.format_of("model.layers.5.input_layernorm", "norm", 5) is Format.BF16


@pytest.mark.parametrize(
    ("weights", "scheme", "expected"),
    [
        ({"num_bits": 4, "type": "int", "group_size": 32}, "int4", Format.INT4_G32),
        ({"num_bits": 4, "type": "int", "group_size": 128}, "int4", Format.INT4_G128),
        ({"num_bits": 4, "type": "float", "group_size": 16}, "nvfp4", Format.NVFP4),
        ({"num_bits": 8, "type": "float"}, "fp8", Format.FP8_CHANNEL),
    ],
)
@pytest.mark.parametrize("target", ["Linear", "re:.*mlp.experts.*"])
def test_compressed_tensors_groups(weights, scheme, expected, target):
    groups = {"group_0": {"targets": [target], "weights": weights}}
    raw = {
        "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["re:.*lm_head"]}
    }
    rules = rules_from_config(raw, "x")
    assert scheme_of(raw, "x") == scheme
    assert rules.format_of("model.layers.5.mlp.experts.0.up_proj", "routed_experts", 5) is expected
    attention = expected if target == "Linear" else Format.BF16
    assert rules.format_of("model.layers.5.self_attn.o_proj", "o_proj", 5) is attention
    assert rules.format_of("lm_head", "lm_head", None) is Format.BF16


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gguf"}, "'gguf'"),
        ({"bits": 4}, "(none given)"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "[64, 64]"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "'W4A8'"),
        ({"quant_method": "awq", "group_size": 48}, "groups of 48"),
        ({"quant_method": "awq"}, "groups of None"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8"}}}, "'int8'"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}}},
            "3-bit",
        ),
    ],
)
def test_an_unknown_quantiser_is_refused_with_its_value_and_a_way_out(quantization, words):
    with pytest.raises(UnsupportedError) as raised:
        rules_from_config({"quantization_config": quantization}, "config.json")
    assert raised.value.message.startswith("config.json: ")
    assert words in raised.value.message
    assert "--model-path" in raised.value.next_step


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "modules_to_not_convert": 5},
        {"quant_method": "fp8", "ignored_layers": ["re:("]},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": 5}},
        {"quant_method": "quark", "global_quant_config": 5},
        [1],
    ],
)
def test_a_malformed_quantization_config_is_a_sentence(quantization):
    """Either reader may find it good enough for its purpose; neither may break."""
    for reader in (rules_from_config, scheme_of):
        with contextlib.suppress(GlmplanError):
            reader({"quantization_config": quantization}, "config.json")


def test_the_last_rule_that_covers_a_tensor_wins():
    rules = StorageRules(
        (
            StorageRule(frozenset({"routed_experts", "q_b"}), Format.FP8_BLOCK),
            StorageRule(frozenset({"routed_experts"}), Format.INT4_G32, frozenset({4})),
        )
    )
    assert rules.format_of("m", "routed_experts", 3) is Format.FP8_BLOCK
    assert rules.format_of("m", "routed_experts", 4) is Format.INT4_G32
    assert rules.format_of("m", "q_b", 4) is Format.FP8_BLOCK
    assert rules.format_of("m", "kv_b", 4) is Format.BF16


def test_a_glob_keeps_only_the_layer_it_names():
    raw = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.1.*"]}}
    rules = rules_from_config(raw, "x")
    assert rules.format_of("model.layers.1.mlp.experts.0.up_proj", "routed_experts", 1) is Format.BF16
    assert rules.format_of("model.layers.10.mlp.experts.0.up_proj", "routed_experts", 10) is Format.NVFP4
