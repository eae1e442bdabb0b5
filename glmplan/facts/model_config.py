"""What a checkpoint's config.json says about a GLM-5 family model, validated.

Reads the `glm_moe_dsa` architecture only (GLM-5, 5.1, 5.2, 5.3 and pruned or shortened relatives). `indexer_full[l]`
is True where decoder layer l computes its own top-k; the MTP layer always has its own indexer. The order in which the
sharing keys win is SGLang 0.5.23's (`srt/configs/model_config.py` `dsa_layer_skips_topk`): indexer_types, then
index_topk_pattern, then index_topk_freq with index_skip_topk_offset, else every layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.base import Frozen

ARCHITECTURE = "glm_moe_dsa"


class ModelConfig(Frozen):
    """Sizes of one model. All counts are elements, layers or tokens."""

    model_type: str = ARCHITECTURE
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    dense_layers: tuple[bool, ...]
    indexer_full: tuple[bool, ...]

    @property
    def head_dim(self) -> int:
        """Elements of one query head: nope and rope parts together."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def _marks(words: list[str], key: str, yes: str, no: str) -> tuple[bool, ...]:
    """One flag per layer from two known words."""
    for layer, word in enumerate(words):
        if word not in (yes, no):
            raise ValueError(f"{key} calls layer {layer} {word!r}; {yes} and {no} are known")
    return tuple(word == yes for word in words)


def _indexer_full(raw: dict[str, Any], layers: int) -> tuple[bool, ...]:
    types = raw.get("indexer_types")
    if types:
        return _marks(types, "indexer_types", "full", "shared")
    pattern = raw.get("index_topk_pattern")
    if pattern:
        return tuple(mark != "S" for mark in pattern)
    frequency = raw.get("index_topk_freq") or 1
    if frequency == 1:
        return (True,) * layers
    offset = raw.get("index_skip_topk_offset")
    offset = 2 if offset is None else offset
    return tuple(layer < offset or (layer - offset + 1) % frequency == 0 for layer in range(layers))


def _dense_layers(raw: dict[str, Any], layers: int) -> tuple[bool, ...]:
    kinds = raw.get("mlp_layer_types")
    if kinds:
        return _marks(kinds, "mlp_layer_types", "dense", "sparse")
    return tuple(layer < int(raw.get("first_k_dense_replace", 0)) for layer in range(layers))


def _check_lengths(config: ModelConfig, origin: str) -> None:
    for key, value in (("indexer_types", config.indexer_full), ("mlp_layer_types", config.dense_layers)):
        if len(value) != config.num_hidden_layers:
            raise UsageError(
                f"{origin}: {key} has {len(value)} entries but num_hidden_layers is {config.num_hidden_layers}.",
                f"Correct {key} or num_hidden_layers; both engines read them layer by layer.",
            )
    if config.indexer_full and not config.indexer_full[0]:
        raise UsageError(
            f"{origin}: layer 0 is marked as sharing a top-k, but no layer before it computes one.",
            "Mark layer 0 as full in indexer_types.",
        )
    if config.num_nextn_predict_layers > 1 or config.num_hidden_layers > 1024:
        raise UsageError(
            f"{origin}: {config.num_hidden_layers:,} layers and {config.num_nextn_predict_layers:,} MTP layers are more "
            "than the family has (up to 1,024 and 1).",
            "Correct num_hidden_layers or num_nextn_predict_layers.",
        )
    for name, value in config:
        least = 0 if name in ("num_nextn_predict_layers", "n_shared_experts") else 1
        if isinstance(value, int) and value < least:
            raise UsageError(f"{origin}: {name} is {value}, which is below {least}.", "Correct the file.")


def parse_model_config(raw: dict[str, Any], origin: str) -> ModelConfig:
    """Validate a config.json's content; `origin` names the file in errors."""
    model_type = raw.get("model_type")
    if model_type != ARCHITECTURE:
        raise UnsupportedError(
            f"{origin} describes model_type {model_type!r}; glmplan plans {ARCHITECTURE!r} models only.",
            "Give the config.json of a GLM-5, 5.1, 5.2 or 5.3 checkpoint.",
        )
    layers = raw.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise UsageError(f"{origin} has no num_hidden_layers.", "Give the complete config.json of the checkpoint.")
    wanted = {key: raw[key] for key in ModelConfig.model_fields if key in raw}
    try:
        wanted |= {"dense_layers": _dense_layers(raw, layers), "indexer_full": _indexer_full(raw, layers)}
        wanted.setdefault("num_nextn_predict_layers", 0)
        config = ModelConfig.model_validate(wanted)
    except (ValidationError, TypeError, ValueError) as error:
        raise UsageError(f"{origin} is not usable: {first_problem(error)}.", "Correct the file and try again.") from None
    _check_lengths(config, origin)
    return config


def first_problem(error: Exception) -> str:
    """The first finding of a pydantic error as words, or the error's own text."""
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_input=True)[0]
        where = ".".join(str(part) for part in found["loc"]) or "the file"
        given = "" if found["type"] == "missing" else f" (it is {str(found['input'])[:60]!r})"
        return f"{where}: {found['msg'][0].lower()}{found['msg'][1:]}{given}"
    return str(error)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; every way it can fail is a UsageError that names the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.", "Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", "Check the path and its permissions.") from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.", "Correct or reload it."
        ) from None
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{path} is not usable JSON: {str(error)[:80]}.", "Give the right file.") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds a JSON {type(raw).__name__}, not an object.", "Give the right file.")
    return raw
