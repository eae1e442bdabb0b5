"""What config.json says: three spellings of index sharing, and refusals that name the file."""

from __future__ import annotations

import json

import pytest

from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.model_config import parse_model_config, read_json
from glmplan.facts.profiles import model_names, model_profile
from tests.samples import CONFIGS, config

FULL_LAYERS = [0, 1, 2, *range(6, 75, 4)]
SHARING = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
PUBLISHED = sorted(path.stem for path in CONFIGS.glob("*.json") if "hf_quant" not in path.name)


def published(name: str = "GLM-5.2-FP8", without: tuple[str, ...] = (), **changes: object) -> dict[str, object]:
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    return {key: value for key, value in raw.items() if key not in without} | changes


def full_layers(raw: dict[str, object]) -> list[int]:
    return [layer for layer, full in enumerate(parse_model_config(raw, "x").indexer_full) if full]


def test_all_three_spellings_of_index_sharing_agree():
    pattern = "".join("F" if layer in FULL_LAYERS else "S" for layer in range(78))
    by_types = published(without=SHARING[1:])
    by_pattern = published(without=SHARING, index_topk_pattern=pattern)
    by_frequency = published(without=SHARING[:2])
    assert full_layers(by_types) == full_layers(by_pattern) == full_layers(by_frequency) == FULL_LAYERS


def test_types_win_over_pattern_and_pattern_over_frequency():
    every, pattern = ["full"] * 78, "F" + "S" * 77
    assert full_layers(published(indexer_types=every, index_topk_pattern=pattern)) == list(range(78))
    assert full_layers(published(indexer_types=None, index_topk_pattern=pattern)) == [0]


def test_without_sharing_keys_every_layer_is_full():
    assert full_layers(published(without=SHARING)) == list(range(78))
    assert full_layers(published("GLM-5.1-FP8")) == list(range(78))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_profiles_sizes(name):
    model = "glm-5.2" if "5.2" in name else "glm-5.1"
    assert parse_model_config(published(name), name) == config(model)


def test_published_configs_are_all_read():
    assert PUBLISHED == ["GLM-5.1-FP8", "GLM-5.1-NVFP4", "GLM-5.2", "GLM-5.2-FP8", "GLM-5.2-NVFP4"]


@pytest.mark.parametrize("name", model_names())
def test_every_packaged_model_has_its_lengths(name):
    found = model_profile(name).model_config_()
    assert len(found.indexer_full) == len(found.dense_layers) == found.num_hidden_layers == 78
    assert found.dense_layers == (True,) * 3 + (False,) * 75
    assert found.head_dim == 256


@pytest.mark.parametrize("model_type", ["deepseek_v32", "llama", None])
def test_another_architecture_is_unsupported_by_name(model_type):
    with pytest.raises(UnsupportedError, match=rf"config\.json describes model_type {model_type!r}") as raised:
        parse_model_config(published(model_type=model_type), "config.json")
    assert raised.value.exit_code == 4


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"indexer_types": ["full"] * 77}, "indexer_types has 77 entries but num_hidden_layers is 78"),
        ({"mlp_layer_types": ["dense"] * 79}, "mlp_layer_types has 79 entries but num_hidden_layers is 78"),
        ({"num_hidden_layers": 46}, "has 78 entries but num_hidden_layers is 46"),
        ({"indexer_types": None, "index_topk_pattern": "FS"}, "has 2 entries but num_hidden_layers is 78"),
        ({"indexer_types": ["shared"] * 78}, "layer 0 is marked as sharing"),
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"hidden_size": "wide"}, "hidden_size: input should be a valid integer"),
        ({"hidden_size": None}, "hidden_size: input should be a valid integer"),
        ({"hidden_size": 0}, "hidden_size is 0, which is below 1"),
        ({"n_routed_experts": -1}, "n_routed_experts is -1, which is below 1"),
        ({"indexer_types": 5}, "is not usable"),
    ],
)
def test_an_unusable_config_is_one_sentence_with_the_value(changes, problem):
    with pytest.raises(UsageError) as raised:
        parse_model_config(published(**changes), "here/config.json")
    assert raised.value.message.startswith("here/config.json")
    assert problem in raised.value.message
    assert raised.value.next_step


@pytest.mark.parametrize("key", ["kv_lora_rank", "moe_intermediate_size", "v_head_dim", "hidden_size", "n_shared_experts"])
def test_a_missing_size_is_named(key):
    with pytest.raises(UsageError, match=f"{key}: field required"):
        parse_model_config(published(without=(key,)), "config.json")


@pytest.mark.parametrize(
    "key",
    ["kv_lora_rank", "q_lora_rank", "moe_intermediate_size", "intermediate_size", "index_head_dim", "v_head_dim",
     "max_position_embeddings", "num_experts_per_tok"],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1])
def test_no_size_may_be_below_one(key, value):
    with pytest.raises(UsageError, match=f"{key} is {value}, which is below 1"):
        parse_model_config(published(**{key: value}), "config.json")


@pytest.mark.parametrize(
    ("key", "words"), [("indexer_types", ["full", "ful"] + ["full"] * 76), ("mlp_layer_types", ["Dense"] * 78)]
)
def test_an_unknown_layer_kind_is_refused(key, words):
    with pytest.raises(UsageError, match=key):
        parse_model_config(published(**{key: words}), "config.json")


def test_a_pruned_model_keeps_its_own_expert_count():
    assert parse_model_config(published(n_routed_experts=154), "x").n_routed_experts == 154


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", r"is not JSON: .* at line 1, column 2"),
        (b"[]", "holds a JSON list, not an object"),
        (b"5", "holds a JSON int, not an object"),
        (b"\xff\xfe{", "cannot be read"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, content, problem):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem) as raised:
        read_json(path)
    assert raised.value.message.startswith(str(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_json(tmp_path)
