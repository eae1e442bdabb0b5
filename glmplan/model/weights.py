"""How many bytes each tensor takes, by layer and role.

`StoredBytes` keeps values and scales apart, because block scales shard with their weights while per-tensor scalars do
not. All counts are integers. Formats, and where their layouts are defined:
fp8_block: e4m3 and one F32 scale per 128x128 tile (GLM-5.2-FP8's config.json); nvfp4: two values a byte, one e4m3
scale per 16 along `in`, two F32 scalars a tensor (modelopt 0.46 exports); mxfp4: one E8M0 byte per 32 (OCP MX 1.0);
int4_gN: two values a byte and one BF16 scale per N along `in` (compressed-tensors pack-quantized, SGLang w4afp8).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from glmplan.facts.checkpoint import Format, StorageRules
from glmplan.facts.model_config import ModelConfig
from glmplan.model.tensors import Role, TensorGroup, layer_groups, outer_groups


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """`values` and `scales` shard together; `scalars` are per tensor and on every rank."""

    values: int = 0
    scales: int = 0
    scalars: int = 0

    def __add__(self, other: StoredBytes) -> StoredBytes:
        return StoredBytes(self.values + other.values, self.scales + other.scales, self.scalars + other.scalars)

    @property
    def total(self) -> int:
        """All bytes of the role."""
        return self.values + self.scales + self.scalars


RoleBytes = Mapping[Role, StoredBytes]


def stored_bytes(shape: tuple[int, ...], storage: Format, count: int = 1) -> StoredBytes:
    """Bytes of `count` tensors of one shape in one format."""
    elements = prod(shape)
    width = shape[-1]
    rows = elements // width
    match storage:
        case Format.F32:
            one = StoredBytes(4 * elements)
        case Format.BF16:
            one = StoredBytes(2 * elements)
        case Format.FP8_BLOCK:
            one = StoredBytes(elements, 4 * ceil(rows / 128) * ceil(width / 128))
        case Format.FP8_CHANNEL | Format.INT8_CHANNEL:
            one = StoredBytes(elements, 4 * rows)
        case Format.NVFP4:
            one = StoredBytes(rows * ceil(width / 2), rows * ceil(width / 16), 8)
        case Format.MXFP4:
            one = StoredBytes(rows * ceil(width / 2), rows * ceil(width / 32))
        case _:
            group = int(storage.value.removeprefix("int4_g"))
            one = StoredBytes(rows * ceil(width / 2), 2 * rows * ceil(width / group))
    return StoredBytes(one.values * count, one.scales * count, one.scalars * count)


@dataclass(frozen=True)
class Weights:
    """Bytes of a checkpoint by place. `layers[l]` is decoder layer l; `mtp` is empty where there is none.

    `origin` says whether a rule or the checkpoint's own headers gave the sizes.
    """

    outer: RoleBytes
    layers: tuple[RoleBytes, ...]
    mtp: RoleBytes
    origin: str

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole checkpoint's tensors."""
        places: tuple[RoleBytes, ...] = (self.outer, *self.layers, self.mtp)
        return sum(stored.total for place in places for stored in place.values())


def sum_roles(groups: Iterable[TensorGroup], rules: StorageRules) -> dict[Role, StoredBytes]:
    """Bytes by role over some groups."""
    found: dict[Role, StoredBytes] = {}
    for group in groups:
        storage = rules.format_of(group.module, group.role, group.layer)
        found[group.role] = found.get(group.role, StoredBytes()) + stored_bytes(group.shape, storage, group.count)
    return found


def weights_by_rule(config: ModelConfig, rules: StorageRules, origin: str) -> Weights:
    """Bytes that the rules give for the config's tensors."""
    has_mtp = config.num_nextn_predict_layers > 0 and not rules.without_mtp
    return Weights(
        outer=sum_roles(outer_groups(config), rules),
        layers=tuple(sum_roles(layer_groups(config, layer), rules) for layer in range(config.num_hidden_layers)),
        mtp=sum_roles(layer_groups(config, config.num_hidden_layers), rules) if has_mtp else {},
        origin=origin,
    )


_SUFFIXES = {
    Format.FP8_BLOCK: (".weight", ".weight_scale_inv"),
    Format.FP8_CHANNEL: (".weight", ".weight_scale"),
    Format.INT8_CHANNEL: (".weight", ".weight_scale"),
    Format.NVFP4: (".weight", ".weight_scale", ".weight_scale_2", ".input_scale"),
    Format.MXFP4: (".weight", ".weight_scale"),
    Format.INT4_G32: (".weight_packed", ".weight_scale", ".weight_shape"),
    Format.INT4_G64: (".weight_packed", ".weight_scale", ".weight_shape"),
    Format.INT4_G128: (".weight_packed", ".weight_scale", ".weight_shape"),
}
_HEADER_ENTRY = len('"":{"dtype":"BF16","shape":[2048,6144],"data_offsets":[1234567890,1234567890]},')


def header_bytes(groups: Iterable[TensorGroup], rules: StorageRules) -> int:
    """About how many bytes the safetensors headers add on disk: one JSON entry per stored tensor."""
    found = 0
    for group in groups:
        suffixes = _SUFFIXES.get(rules.format_of(group.module, group.role, group.layer), (".weight",))
        name = len(group.module) + (2 if group.role is Role.ROUTED_EXPERTS else 0)
        found += group.count * sum(name + len(suffix) + _HEADER_ENTRY for suffix in suffixes)
    return found
