"""Writes and reads the KV cache in FP8: packed 656-byte rows, raw 576-byte rows, index-key pages of 64 tokens.

Byte layouts:
- packed row: 512 e4m3 (latent), 4 F32 scales (one per 128 latent values), 64 BF16 (rope, not quantised);
- raw row: 576 e4m3 (latent, rope) under one scale for the whole cache;
- index page: 64 x 128 e4m3 keys, then 64 F32 scales: two arrays, not interleaved.
Slot ids count tokens (page * 64 + position in the page). Ids outside the cache (-1 pads) are skipped by writers and read as
zeros. Slots written in one call must be distinct, as the engines' are; with a repeated one, which token's bytes stay is
undefined group by group. Nothing here waits for the GPU, and grids depend on the number of tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from glmplan.errors import UsageError
from glmplan.kernels.kv_quant import kernel
from glmplan.kernels.kv_quant.tiles import INDEX_TILES, LATENT_TILES, index_tile, latent_tile

LATENT, ROPE, KEY, PAGE_TOKENS = 512, 64, 128, 64
PACKED_BYTES, RAW_BYTES, PAGE_BYTES = 656, 576, PAGE_TOKENS * (KEY + 4)
FP8 = torch.float8_e4m3fn


def write_packed_rows(cache: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor) -> None:
    """Quantise tokens into packed rows.

    cache uint8 or e4m3 [slots, 656] or [slots, 1, 656], written; latent [N, 512] and rope [N, 64] bf16, any strides;
    slots int32 or int64 [N]. Scale: largest finite magnitude of the 128 over 448, at least 2**-126.
    """
    _write_rows(_rows(cache, PACKED_BYTES), latent, rope, slots, 1.0, packed=True)


def write_raw_rows(
    cache: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor, scale: float = 1.0
) -> None:
    """Quantise tokens into raw rows: value / scale, saturating. cache [slots, 576] or [slots, 1, 576]; rest as above."""
    if not scale > 0.0:
        raise UsageError(f"The KV cache scale is {scale}; it must be positive.")
    _write_rows(_rows(cache, RAW_BYTES), latent, rope, slots, scale, packed=False)


def gather_packed_rows(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Packed rows -> bf16 [N, 576] (latent, rope), rounded once; zeros where the slot id is invalid.

    `out`: bf16 or f32 [N, 576] to fill instead; f32 holds the exact products.
    """
    return _gather_rows(_rows(cache, PACKED_BYTES), slots, out, 1.0, packed=True)


def gather_raw_rows(
    cache: torch.Tensor, slots: torch.Tensor, scale: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Raw rows times scale -> bf16 [N, 576]; zeros where the slot id is invalid."""
    return _gather_rows(_rows(cache, RAW_BYTES), slots, out, scale, packed=False)


def write_index_keys(pages: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, power_of_two: bool = False) -> None:
    """Quantise index keys into pages.

    pages uint8 [pages, 64 * 132] (or split as [pages, 64, 132] or [pages, 64, 1, 132], the same bytes), written;
    keys bf16 [N, 128], any strides; slots int32 or int64 [N]. Scale: largest finite magnitude, at least 1e-4, over 448;
    `power_of_two` rounds it up to a power of two (the engines' `ue8m0` scale format, kept in F32).
    """
    flat = _pages(pages)
    _require("keys", keys, (slots.numel(), KEY), (torch.bfloat16,), flat.device)
    _require_slots(slots, flat.device)
    if not keys.shape[0]:
        return
    tile = index_tile(keys.shape[0])
    kernel.write_keys[(triton.cdiv(keys.shape[0], tile.rows),)](
        keys, slots, flat, keys.shape[0], flat.shape[0] * PAGE_TOKENS, keys.stride(0), keys.stride(1), slots.stride(0),
        flat.stride(0), POWER_OF_TWO=power_of_two, ROWS=tile.rows, num_warps=tile.num_warps,
    )  # fmt: skip


def gather_index_keys(pages: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index keys as the ragged logits take them: e4m3 codes uint8 [N, 128] and scales f32 [N]; zeros where invalid."""
    flat = _pages(pages)
    _require_slots(slots, flat.device)
    n = slots.numel()
    codes = torch.empty((n, KEY), dtype=torch.uint8, device=flat.device)
    scales = torch.empty((n,), dtype=torch.float32, device=flat.device)
    if n:
        tile = index_tile(n)
        kernel.gather_keys[(triton.cdiv(n, tile.rows),)](
            flat, slots, codes, scales, n, flat.shape[0] * PAGE_TOKENS, flat.stride(0), slots.stride(0),
            ROWS=tile.rows, num_warps=tile.num_warps,
        )  # fmt: skip
    return codes, scales


def _write_rows(
    cache: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor, scale: float, packed: bool
) -> None:
    n = slots.numel()
    _require("latent", latent, (n, LATENT), (torch.bfloat16,), cache.device)
    _require("rope", rope, (n, ROPE), (torch.bfloat16,), cache.device)
    _require_slots(slots, cache.device)
    if not n:
        return
    tile = latent_tile(n)
    kernel.write_rows[(triton.cdiv(n, tile.rows),)](
        latent, rope, slots, cache, n, cache.shape[0], latent.stride(0), latent.stride(1), rope.stride(0), rope.stride(1),
        slots.stride(0), cache.stride(0), 1.0 / scale, PACKED=packed, ROWS=tile.rows, num_warps=tile.num_warps,
    )  # fmt: skip


def _gather_rows(
    cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None, scale: float, packed: bool
) -> torch.Tensor:
    _require_slots(slots, cache.device)
    n = slots.numel()
    if out is None:
        out = torch.empty((n, LATENT + ROPE), dtype=torch.bfloat16, device=cache.device)
    _require("out", out, (n, LATENT + ROPE), (torch.bfloat16, torch.float32), cache.device)
    if out.stride(1) != 1:
        raise UsageError(f"out has a stride of {out.stride(1)} between the values of a row; it must be 1.")
    if n:
        tile = latent_tile(n)
        kernel.gather_rows[(triton.cdiv(n, tile.rows),)](
            cache, slots, out, n, cache.shape[0], cache.stride(0), slots.stride(0), out.stride(0), scale,
            PACKED=packed, ROWS=tile.rows, num_warps=tile.num_warps,
        )  # fmt: skip
    return out


def _rows(cache: torch.Tensor, width: int) -> torch.Tensor:
    """The cache as uint8 [slots, width]; the same memory."""
    flat = cache.squeeze(1) if cache.dim() == 3 and cache.shape[1] == 1 else cache
    if flat.dim() != 2 or flat.shape[1] != width or flat.dtype not in (torch.uint8, FP8):
        raise UsageError(f"The KV cache is {cache.dtype} {list(cache.shape)}; it must be uint8 or e4m3 [slots, {width}].")
    if flat.stride(1) != 1 or flat.stride(0) % 4 or flat.data_ptr() % 4:
        raise UsageError(
            f"KV cache rows start {flat.stride(0)} bytes apart with {flat.stride(1)} between bytes; "
            "rows must be contiguous and start at multiples of 4 bytes."
        )
    return flat.view(torch.uint8)


def _pages(pages: torch.Tensor) -> torch.Tensor:
    """The index pages as uint8 [pages, 8448]; the same memory."""
    width = pages[0].numel() if pages.dim() > 1 and pages.shape[0] else PAGE_BYTES
    if pages.dim() < 2 or width != PAGE_BYTES or pages.dtype not in (torch.uint8, FP8):
        raise UsageError(f"Index pages are {pages.dtype} {list(pages.shape)}; they must be uint8 [pages, {PAGE_BYTES}].")
    try:
        flat = pages.view(torch.uint8).view(pages.shape[0], PAGE_BYTES)
    except RuntimeError:
        raise UsageError(f"The bytes of an index page are not contiguous: strides {list(pages.stride())}.") from None
    if flat.stride(0) % 4 or flat.data_ptr() % 4:
        raise UsageError(f"Index pages start {flat.stride(0)} bytes apart; they must start at multiples of 4 bytes.")
    return flat


def _require(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise UsageError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {wanted} {list(shape)}.")
    if tensor.device != device:
        raise UsageError(f"{name} is on {tensor.device} and the cache on {device}; they must be on one device.")


def _require_slots(slots: torch.Tensor, device: torch.device) -> None:
    _require("slots", slots, (slots.numel(),), (torch.int32, torch.int64), device)


def aot_cases(sm: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Every kernel as it is launched, with every tile and both slot types; the code is the same on every SM."""
    cases = []
    for tile, slot_type in zip(LATENT_TILES, ("*i32", "*i64", "*i32"), strict=True):
        slots, rest = {"slots": slot_type}, (tile.num_warps, 3)
        for packed in (True, False):
            name = f"{'packed' if packed else 'raw'}_{tile.rows}"
            fixed = {"PACKED": packed, "ROWS": tile.rows, "slots_stride": 1}
            cases.append((f"write_{name}", kernel.write_rows, _WRITE | slots, fixed | _STEPS, *rest))
            cases.append((f"gather_{name}", kernel.gather_rows, _GATHER | slots, fixed, *rest))
    for tile, slot_type in zip(INDEX_TILES, ("*i32", "*i64"), strict=True):
        slots, rest = {"slots": slot_type}, (tile.num_warps, 3)
        fixed = {"ROWS": tile.rows, "slots_stride": 1}
        for power in (True, False):
            name = f"write_keys_{tile.rows}_{'ue8m0' if power else 'f32'}"
            special = fixed | {"keys_step": 1, "POWER_OF_TWO": power}
            cases.append((name, kernel.write_keys, _WRITE_KEYS | slots, special, *rest))
        cases.append((f"gather_keys_{tile.rows}", kernel.gather_keys, _GATHER_KEYS | slots, fixed, *rest))
    return cases


_STEPS = {"latent_step": 1, "rope_step": 1}
_WRITE = {
    "latent": "*bf16", "rope": "*bf16", "slots": "*i64", "cache": "*u8", "n": "i32", "capacity": "i32",
    "latent_stride": "i32:16", "rope_stride": "i32:16", "cache_stride": "i32:16", "inverse_scale": "fp32",
}  # fmt: skip
_GATHER = {
    "cache": "*u8", "slots": "*i64", "out": "*bf16", "n": "i32", "capacity": "i32", "cache_stride": "i32:16",
    "out_stride": "i32:16", "raw_scale": "fp32",
}  # fmt: skip
_WRITE_KEYS = {
    "keys": "*bf16", "slots": "*i64", "pages": "*u8", "n": "i32", "capacity": "i32", "keys_stride": "i32:16",
    "page_stride": "i32:16",
}  # fmt: skip
_GATHER_KEYS = {
    "pages": "*u8", "slots": "*i64", "out_codes": "*u8", "out_scales": "*fp32", "n": "i32", "capacity": "i32",
    "page_stride": "i32:16",
}  # fmt: skip
