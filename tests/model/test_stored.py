"""A checkpoint folder's own headers: the same bytes in the same places as the rule, and nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmplan.cli._target import folder_target
from glmplan.errors import UsageError
from glmplan.facts.checkpoint import Format, StorageRules, rules_from_config
from glmplan.facts.model_config import ModelConfig, parse_model_config
from glmplan.model.stored import scaled_to_total, weights_from_tensors
from glmplan.model.tensors import Role, TensorGroup, all_groups
from glmplan.model.weights import header_bytes, stored_bytes, weights_by_rule
from tests.facts.files import write_index, write_safetensors
from tests.samples import CONFIGS, engine, weights

# Suffixes of values, scales and scalars as the published checkpoints spell them.
SUFFIXES = {
    Format.FP8_BLOCK: ("weight", "weight_scale_inv"),
    Format.NVFP4: ("weight", "weight_scale"),
    Format.MXFP4: ("weight", "weight_scale"),
    Format.INT4_G32: ("weight_packed", "weight_scale"),
    Format.INT4_G128: ("qweight", "scales"),
}
INT4 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
    "ignore": ["lm_head", "re:.*indexer.*"],
}
MXFP4 = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}, "exclude": ["*self_attn*"]}
NAMES = ["GLM-5.2", "GLM-5.2-FP8", "GLM-5.2-NVFP4", "GLM-5.1-NVFP4"]


def small(name: str, **changes: object) -> dict[str, object]:
    """A published config with few and small layers; its ignore list stays as published."""
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    raw |= {"num_hidden_layers": 7, "n_routed_experts": 3, "hidden_size": 384, "vocab_size": 512}
    raw |= {"moe_intermediate_size": 256, "intermediate_size": 640, "num_attention_heads": 4}
    for key in ("indexer_types", "mlp_layer_types"):
        if key in raw:
            raw[key] = raw[key][:7]
    return raw | changes


def names_of(group: TensorGroup) -> list[str]:
    """The modules of a group, named one by one."""
    return [group.module.replace("experts.0.", f"experts.{number}.") for number in range(group.count)]


def tensors(config: ModelConfig, rules: StorageRules) -> dict[str, int]:
    """Every tensor name of the checkpoint with its bytes. The MTP layer's number in the file is the one after the last."""
    found: dict[str, int] = {}
    for group in all_groups(config):
        storage = rules.format_of(group.module, group.role, group.layer)
        one = stored_bytes(group.shape, storage)
        if group.role is Role.INDEXER_NORM:
            found |= {f"{group.module}.weight": one.values, f"{group.module}.bias": one.values}
            continue
        if group.role is Role.ROUTER_BIAS:
            found[group.module] = one.values
            continue
        values, scales = SUFFIXES.get(storage, ("weight", ""))
        for module in names_of(group):
            found[f"{module}.{values}"] = one.values
            if one.scales:
                found[f"{module}.{scales}"] = one.scales
            if one.scalars:
                found |= {f"{module}.weight_scale_2": one.scalars // 2, f"{module}.input_scale": one.scalars // 2}
    return found


def sample(raw: dict[str, object]) -> tuple[ModelConfig, StorageRules]:
    return parse_model_config(raw, "small"), rules_from_config(raw, "small")


RAWS = {name: small(name) for name in NAMES}
RAWS |= {"int4": small("GLM-5.2", quantization_config=INT4), "mxfp4": small("GLM-5.2", quantization_config=MXFP4)}


@pytest.mark.parametrize("name", RAWS)
def test_headers_give_the_rule_s_bytes_in_every_place_and_role(name):
    config, rules = sample(RAWS[name])
    ours, unknown = weights_from_tensors(config, tensors(config, rules), "headers")
    ruled = weights_by_rule(config, rules, "rule")
    assert unknown == []
    assert ours.outer == ruled.outer
    assert ours.layers == ruled.layers
    assert ours.mtp == ruled.mtp
    assert ours.total_bytes == ruled.total_bytes > 0


def test_the_samples_hold_every_kind_of_tensor():
    roles = {group.role for group in all_groups(sample(RAWS["GLM-5.2"])[0])}
    assert roles == set(Role)
    for name, storage in (("GLM-5.2-FP8", Format.FP8_BLOCK), ("GLM-5.2-NVFP4", Format.NVFP4), ("int4", Format.INT4_G32)):
        config, rules = sample(RAWS[name])
        assert storage in {rules.format_of(g.module, g.role, g.layer) for g in all_groups(config)}


def folder(path: Path, name: str) -> int:
    """A checkpoint folder in two shards with its config and index; its bytes on disk."""
    config, rules = sample(RAWS[name])
    found = sorted(tensors(config, rules).items())
    half = len(found) // 2
    shards = {"model-00001-of-00002.safetensors": dict(found[:half]), "model-00002-of-00002.safetensors": dict(found[half:])}
    for file, sizes in shards.items():
        write_safetensors(path / file, sizes)
    write_index(path, {tensor: file for file, sizes in shards.items() for tensor in sizes}, sum(dict(found).values()))
    (path / "config.json").write_text(json.dumps(RAWS[name]))
    return sum((path / file).stat().st_size for file in shards)


@pytest.mark.parametrize("name", ["GLM-5.2-FP8", "GLM-5.2-NVFP4"])
def test_a_folder_is_sized_by_its_headers_and_says_so(tmp_path, name):
    on_disk = folder(tmp_path, name)
    loaded = folder_target(tmp_path, engine(), None)
    config, rules = sample(RAWS[name])
    assert loaded.file_bytes == on_disk
    assert loaded.target.weights.total_bytes == weights_by_rule(config, rules, "").total_bytes
    assert "headers" in loaded.target.weights.origin
    assert loaded.target.certainty == "exact"
    assert loaded.target.weight_note == ""


def test_headers_win_over_the_rule(tmp_path):
    folder(tmp_path, "GLM-5.2-FP8")
    (tmp_path / "config.json").write_text(json.dumps(RAWS["GLM-5.2"]))
    fp8, bf16 = (weights_by_rule(*sample(RAWS[name]), "").total_bytes for name in ("GLM-5.2-FP8", "GLM-5.2"))
    assert folder_target(tmp_path, engine(), None).target.weights.total_bytes == fp8 < bf16


def test_a_folder_with_its_index_only_uses_the_total(tmp_path):
    folder(tmp_path, "GLM-5.2-FP8")
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    loaded = folder_target(tmp_path, engine(), None)
    assert loaded.file_bytes is None
    assert loaded.target.weights.total_bytes == weights_by_rule(*sample(RAWS["GLM-5.2-FP8"]), "").total_bytes
    assert loaded.target.certainty == "derived"
    assert "index total" in loaded.target.weights.origin


def test_a_folder_with_its_config_only_uses_the_rule(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RAWS["GLM-5.2-FP8"]))
    loaded = folder_target(tmp_path, engine(), None)
    assert "rule" in loaded.target.weights.origin
    assert "no safetensors files or index" in loaded.target.weight_note


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        folder_target(tmp_path, engine(), None)


def test_the_estimate_of_the_headers_is_near_the_files(tmp_path):
    config, rules = sample(RAWS["GLM-5.2-FP8"])
    sizes = tensors(config, rules)
    path = write_safetensors(tmp_path / "x.safetensors", sizes)
    real = path.stat().st_size - sum(sizes.values())
    assert header_bytes(all_groups(config), rules) == pytest.approx(real, rel=0.25)


def test_an_unknown_name_is_counted_and_named():
    config, rules = sample(RAWS["GLM-5.2"])
    extra = {"model.layers.3.self_attn.rotary.inv_freq": 100, "visual.patch_embed.weight": 23}
    ours, unknown = weights_from_tensors(config, tensors(config, rules) | extra, "headers")
    assert unknown == list(extra)
    assert ours.total_bytes == weights_by_rule(config, rules, "").total_bytes + 123


def test_layers_after_the_last_count_as_mtp():
    config, _ = sample(RAWS["GLM-5.2"])
    ours, _ = weights_from_tensors(config, {"model.layers.7.eh_proj.weight": 5, "model.layers.8.eh_proj.weight": 7}, "")
    assert ours.mtp[Role.EH_PROJ].values == 12


@given(total=st.integers(300_000_000_000, 2_000_000_000_000))
def test_scaling_meets_the_total_to_the_byte_and_moves_experts_only(total):
    before = weights("fp8")
    after = scaled_to_total(before, total, "index")
    assert after.total_bytes == total
    assert after.outer == before.outer
    for old, new in zip([*before.layers, before.mtp], [*after.layers, after.mtp], strict=True):
        assert {**new, Role.ROUTED_EXPERTS: None} == {**old, Role.ROUTED_EXPERTS: None}


def test_scaling_keeps_the_layers_alike():
    before = weights("fp8")
    after = scaled_to_total(before, before.total_bytes + 1000, "index")
    shares = [new[Role.ROUTED_EXPERTS].values - old[Role.ROUTED_EXPERTS].values
              for old, new in zip(before.layers[3:], after.layers[3:], strict=True)]  # fmt: skip
    assert set(shares) <= {13, 14}
    assert replace(after, origin=before.origin).outer == before.outer
