"""The model to plan for: a profiled checkpoint, a config.json, or a checkpoint folder on disk.

True bytes always win over a rule: safetensors headers first, then the index's total, then the rule. The plan's
`weights.origin` says which was used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.checkpoint import StorageRules, rules_from_config, scheme_of
from glmplan.facts.engine_profile import EngineProfile
from glmplan.facts.model_config import ModelConfig, parse_model_config, read_json
from glmplan.facts.profiles import checkpoint_profile, model_profile
from glmplan.model.tensors import all_groups
from glmplan.model.weights import Weights, header_bytes, weights_by_rule
from glmplan.planning.request import Target
from glmplan.units import format_bytes

if TYPE_CHECKING:
    from glmplan.facts.safetensors import StoredTensors


@dataclass(frozen=True)
class Loaded:
    """A target and the size of its files on disk, where that is known."""

    target: Target
    file_bytes: int | None


def profiled_target(model: str, checkpoint: str, engine: EngineProfile, model_path: str | None) -> Loaded:
    """A checkpoint by name, sized by its storage rule."""
    profile = model_profile(model)
    config, found = profile.model_config_(), checkpoint_profile(profile, checkpoint)
    rules = found.storage_rules()
    weights = weights_by_rule(config, rules, f"storage rule of {found.repository} ({found.certainty})")
    note = found.source
    if found.published_bytes is not None:
        note = f"{found.source}; published: {format_bytes(found.published_bytes)} ({found.published_source})"
    target = Target(
        model, config, weights, found.scheme, checkpoint, model_path or found.repository, engine, found.certainty, note
    )
    groups = all_groups(config, with_mtp=not found.without_mtp)
    return Loaded(target, weights.total_bytes + header_bytes(groups, rules))


def config_target(path: Path, engine: EngineProfile, model_path: str | None) -> Loaded:
    """Any glm_moe_dsa config.json, sized by the rule its quantization_config states."""
    raw = read_json(path)
    config = parse_model_config(raw, str(path))
    scheme, rules = scheme_of(raw, str(path)), rules_from_config(raw, str(path))
    weights = weights_by_rule(config, rules, f"storage rule read from {path}")
    served = model_path or str(path.parent)
    target = Target(path.stem, config, weights, scheme, scheme, served, engine, "exact", _stale_experts(raw, config))
    return Loaded(target, weights.total_bytes + header_bytes(all_groups(config), rules))


def folder_target(folder: Path, engine: EngineProfile, model_path: str | None) -> Loaded:
    """A checkpoint folder: headers or index of its safetensors files, config.json for the shapes."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder on this machine.",
            "Give a local checkpoint folder; --served-model names what the nodes load instead.",
        )
    from glmplan.facts.safetensors import read_checkpoint

    raw = read_json(folder / "config.json")
    config = parse_model_config(raw, str(folder / "config.json"))
    stored = read_checkpoint(folder)
    weights, certainty, note = _folder_weights(raw, config, stored, folder)
    scheme = scheme_of(raw, str(folder))
    target = Target(
        folder.name, config, weights, scheme, scheme, model_path or str(folder.resolve()), engine, certainty, note
    )
    return Loaded(target, None if stored is None else stored.file_bytes)


def _folder_weights(
    raw: dict[str, Any], config: ModelConfig, stored: StoredTensors | None, folder: Path
) -> tuple[Weights, str, str]:
    from glmplan.model.stored import missing_modules, scaled_to_total, weights_from_tensors

    if stored is not None and stored.files:
        missing = missing_modules(config, stored.bytes_by_name)
        if missing:
            raise UsageError(
                f"{folder} is incomplete: {len(missing):,} tensors of its config.json are missing, first {missing[0]}.",
                "Finish the download, or plan by rule with --model-config.",
            )
        weights, unknown = weights_from_tensors(config, stored.bytes_by_name, stored.origin)
        note = f"{len(unknown)} tensors of unknown names counted as replicated, first {unknown[0]}" if unknown else ""
        return weights, "exact", note
    origin = str(folder / "config.json")
    try:
        rules = rules_from_config(raw, origin)
    except UnsupportedError:
        if stored is None:
            raise
        rules = StorageRules()
    weights = weights_by_rule(config, rules, f"storage rule read from {origin}")
    if stored is None:
        return weights, "exact", "no safetensors files or index in the folder: the rule of its config.json is used"
    scaled = scaled_to_total(weights, stored.total_bytes, f"{stored.origin}, placed by the rule of {origin}")
    return scaled, "derived", "the index gives the total only; the rule gives each tensor's share"


def _stale_experts(raw: dict[str, Any], config: ModelConfig) -> str:
    other = raw.get("num_experts")
    if other is not None and other != config.n_routed_experts:
        return (
            f"num_experts is {other} but n_routed_experts is {config.n_routed_experts}: vLLM builds {other} experts "
            "and runs out of memory; remove num_experts"
        )
    return ""
