"""How a checkpoint stores each tensor: storage formats and the rules that assign them.

A rule set answers, for a module, its role and its layer, which format its weights have. It comes from a profile
(`profiles/models/*.toml`) or from the `quantization_config` of a config.json. The published spellings of the
quantisers (fp8, modelopt, compressed-tensors, quark, awq, w4afp8) are read here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from glmplan.errors import UnsupportedError, UsageError


class Format(StrEnum):
    """How the weights of one tensor are stored."""

    BF16 = "bf16"
    F32 = "f32"
    FP8_BLOCK = "fp8_block"
    FP8_CHANNEL = "fp8_channel"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"
    INT4_G32 = "int4_g32"
    INT4_G64 = "int4_g64"
    INT4_G128 = "int4_g128"
    INT8_CHANNEL = "int8_channel"


@dataclass(frozen=True, slots=True)
class StorageRule:
    """`roles` of `layers` (None: all layers) are stored as `format`."""

    roles: frozenset[str]
    format: Format
    layers: frozenset[int] | None = None

    def covers(self, role: str, layer: int | None) -> bool:
        """Whether this rule speaks about the role in that layer."""
        return role in self.roles and (self.layers is None or layer in self.layers)


@dataclass(frozen=True)
class StorageRules:
    """The last rule that covers a tensor wins; modules in `kept` (or matching `kept_pattern`) stay BF16."""

    rules: tuple[StorageRule, ...] = ()
    kept: frozenset[str] = frozenset()
    kept_pattern: re.Pattern[str] | None = None
    without_mtp: bool = False
    f32_roles: frozenset[str] = field(default=frozenset({"router_bias"}))

    def format_of(self, module: str, role: str, layer: int | None) -> Format:
        """The storage format of one module's weights."""
        if role in self.f32_roles:
            return Format.F32
        chosen = Format.BF16
        for rule in self.rules:
            if rule.covers(role, layer):
                chosen = rule.format
        if chosen is Format.BF16 or chosen is Format.F32 or module in self.kept:
            return chosen if module not in self.kept else Format.BF16
        if self.kept_pattern is not None and self.kept_pattern.search(module):
            return Format.BF16
        return chosen


LINEAR = frozenset(
    {"q_a", "kv_a", "q_b", "kv_b", "o_proj", "indexer_wq_b", "indexer_wk", "indexer_weights_proj"}
    | {"dense_mlp", "shared_expert", "routed_experts"}
)
EXPERTS = frozenset({"routed_experts"})


def rules_from_config(raw: dict[str, Any], origin: str) -> StorageRules:
    """Read `quantization_config` (absent: BF16 throughout). Unknown methods raise UnsupportedError."""
    quantization = _quantization(raw, origin)
    if not quantization:
        return StorageRules()
    method = str(quantization.get("quant_method", "")).lower()
    reader = {
        "fp8": _fp8,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
        "compressed-tensors": _compressed_tensors,
        "w4afp8": _w4afp8,
        "quark": _quark,
        "awq": _awq,
    }.get(method)
    if reader is None:
        raise UnsupportedError(
            f"{origin}: quantization method {method or '(none given)'!r} has no storage rule here.",
            "Use --model-path DIR with the downloaded checkpoint: its safetensors headers give the true sizes.",
        )
    try:
        return reader(quantization, origin)
    except (AttributeError, TypeError, re.error) as error:
        raise UsageError(
            f"{origin}: quantization_config is malformed ({error}).", "Give the checkpoint's own file."
        ) from None


def _quantization(raw: dict[str, Any], origin: str) -> dict[str, Any]:
    """The quantiser's table; empty where the checkpoint is not quantised."""
    found = raw.get("quantization_config") or raw.get("compression_config") or {}
    if not isinstance(found, dict):
        raise UsageError(f"{origin}: quantization_config is not an object.", "Give the checkpoint's own config.json.")
    return found


def _kept_modules(names: list[str]) -> tuple[frozenset[str], re.Pattern[str] | None]:
    """Split an ignore list into exact names and one pattern for its globs and `re:` entries.

    `indexers_proj` in the published FP8 lists means `indexer.weights_proj` (model.md).
    """
    exact: set[str] = set()
    patterns: list[str] = []
    for name in names:
        if name.startswith("re:"):
            patterns.append(f"(?:{name[3:]})")
        elif "*" in name:
            patterns.append("^" + ".*".join(re.escape(part) for part in name.split("*")) + "$")
        else:
            exact.add(name.replace("self_attn.indexers_proj", "self_attn.indexer.weights_proj"))
    return frozenset(exact), re.compile("|".join(patterns)) if patterns else None


def _names(quantization: dict[str, Any], *keys: str) -> list[str]:
    for key in keys:
        if quantization.get(key):
            return [str(name) for name in quantization[key]]
    return []


def _fp8(quantization: dict[str, Any], origin: str) -> StorageRules:
    block = quantization.get("weight_block_size")
    if block not in (None, [128, 128]):
        raise UnsupportedError(
            f"{origin}: FP8 blocks of {block} are not known here; 128x128 is.", "Use --model-path DIR for true sizes."
        )
    kept, pattern = _kept_modules(_names(quantization, "modules_to_not_convert", "ignored_layers"))
    storage = Format.FP8_BLOCK if block else Format.FP8_CHANNEL
    return StorageRules((StorageRule(LINEAR, storage),), kept, pattern)


def _modelopt(quantization: dict[str, Any], origin: str) -> StorageRules:
    algorithm = str(quantization.get("quant_algo", "")).upper()
    if algorithm not in ("NVFP4", "FP8"):
        raise UnsupportedError(f"{origin}: modelopt quant_algo {algorithm!r} is not known here.", "Use --model-path DIR.")
    kept, pattern = _kept_modules(_names(quantization, "ignore", "exclude_modules"))
    storage = Format.NVFP4 if algorithm == "NVFP4" else Format.FP8_CHANNEL
    return StorageRules((StorageRule(LINEAR, storage),), kept, pattern)


def _int4(group: Any, origin: str) -> Format:
    try:
        return Format(f"int4_g{int(group)}")
    except (TypeError, ValueError):
        raise UnsupportedError(
            f"{origin}: INT4 groups of {group!r} are not known here (32, 64 and 128 are).", "Use --model-path DIR."
        ) from None


def _compressed_tensors(quantization: dict[str, Any], origin: str) -> StorageRules:
    rules = []
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        bits, kind, size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
        if (bits, kind) == (4, "int"):
            storage = _int4(size, origin)
        elif (bits, kind) == (4, "float"):
            storage = Format.NVFP4 if size == 16 else Format.MXFP4
        elif bits == 8:
            storage = Format.INT8_CHANNEL if kind == "int" else Format.FP8_CHANNEL
        else:
            raise UnsupportedError(f"{origin}: {bits}-bit {kind} weights are not known here.", "Use --model-path DIR.")
        targets = [str(target) for target in group.get("targets") or ["Linear"]]
        only_experts = all("experts" in target for target in targets)
        rules.append(StorageRule(EXPERTS if only_experts else LINEAR, storage))
    kept, pattern = _kept_modules(_names(quantization, "ignore"))
    return StorageRules(tuple(rules), kept, pattern)


def _w4afp8(quantization: dict[str, Any], origin: str) -> StorageRules:
    kept, pattern = _kept_modules(_names(quantization, "modules_to_not_convert", "ignored_layers"))
    rules = (StorageRule(LINEAR, Format.FP8_BLOCK), StorageRule(EXPERTS, Format.INT4_G128))
    return StorageRules(rules, kept | {"lm_head"}, pattern)


def _quark(quantization: dict[str, Any], origin: str) -> StorageRules:
    weights = ((quantization.get("global_quant_config") or {}).get("weight")) or {}
    if str(weights.get("dtype")) not in ("fp4", "mxfp4"):
        raise UnsupportedError(f"{origin}: quark dtype {weights.get('dtype')!r} is not known here.", "Use --model-path DIR.")
    kept, pattern = _kept_modules(_names(quantization, "exclude"))
    return StorageRules((StorageRule(LINEAR, Format.MXFP4),), kept, pattern)


def _awq(quantization: dict[str, Any], origin: str) -> StorageRules:
    kept, pattern = _kept_modules([f"*{name}*" for name in _names(quantization, "modules_to_not_convert")])
    return StorageRules((StorageRule(LINEAR, _int4(quantization.get("group_size"), origin)),), kept, pattern)


def scheme_of(raw: dict[str, Any], origin: str) -> str:
    """The checkpoint scheme that engine profiles speak of: bf16, fp8, nvfp4, w4afp8, int4 or mxfp4."""
    quantization = _quantization(raw, origin)
    if not quantization:
        return "bf16"
    method = str(quantization.get("quant_method", "")).lower()
    fixed = {"fp8": "fp8", "w4afp8": "w4afp8", "quark": "mxfp4", "awq": "int4", "gptq": "int4"}
    if method in fixed:
        return fixed[method]
    if method in ("modelopt", "modelopt_fp4"):
        return "nvfp4" if "FP4" in str(quantization.get("quant_algo", "FP4")).upper() else "fp8"
    if method == "compressed-tensors":
        try:
            groups = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
            kinds = {(weights.get("num_bits"), weights.get("type")) for weights in groups}
        except (AttributeError, TypeError) as error:
            raise UsageError(f"{origin}: config_groups is malformed ({error}).", "Give the checkpoint's own file.") from None
        if (4, "int") in kinds:
            return "int4"
        return "nvfp4" if (4, "float") in kinds else "fp8"
    raise UnsupportedError(
        f"{origin}: quantization method {method or '(none given)'!r} is not one that a profiled engine loads.",
        "Use a bf16, fp8, nvfp4, w4afp8, awq-int4 or mxfp4 checkpoint.",
    )
