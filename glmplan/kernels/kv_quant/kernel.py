"""Triton kernels that write and read FP8 KV rows and index-key pages; byte layouts are stated in op.py and README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from glmplan.kernels.e4m3 import decode_e4m3, encode_e4m3

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # smallest normal F32: its reciprocal is finite, so a zero group stays zero
SMALLEST_KEY = tl.constexpr(1e-4)  # the engines' floor under an index key's largest magnitude
F32_POINTER = tl.constexpr(tl.pointer_type(tl.float32))
BF16_POINTER = tl.constexpr(tl.pointer_type(tl.bfloat16))


@triton.jit
def largest_finite(values):
    """[groups, 128] f32 -> [groups]: NaN and infinities do not count, so they spoil no neighbour."""
    magnitudes = tl.abs(values)
    return tl.max(tl.where(magnitudes < float("inf"), magnitudes, 0.0), axis=1)


@triton.jit
def next_power_of_two(scale):
    """Smallest power of two not below a positive normal f32, by its bits."""
    bits = scale.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def load_slots(slots, token, n, stride, capacity):
    """int64 slot ids and whether each may be touched; rows past n and ids outside [0, capacity) may not."""
    slot = tl.load(slots + token.to(tl.int64) * stride, mask=token < n, other=-1).to(tl.int64)
    return slot, (slot >= 0) & (slot < capacity)


@triton.jit
def write_rows(
    latent, rope, slots, cache, n, capacity, latent_stride, latent_step, rope_stride, rope_step, slots_stride, cache_stride,
    inverse_scale, PACKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    group = tl.arange(0, ROWS * 4)  # one group of 128 latent values each, four a token
    column = (group % 4)[:, None] * 128 + tl.arange(0, 128)[None, :]  # [4 * ROWS, 128]
    token = first + group // 4
    slot, allowed = load_slots(slots, token, n, slots_stride, capacity)
    source = latent + token.to(tl.int64)[:, None] * latent_stride + column.to(tl.int64) * latent_step
    # Masked by position alone, so that the values need not wait for the slot ids.
    values = tl.load(source, mask=(token < n)[:, None], other=0.0).to(tl.float32)
    row = cache + slot * cache_stride
    if PACKED:
        scale = tl.maximum(tl.div_rn(largest_finite(values), E4M3_MAX), SMALLEST_SCALE)
        codes = encode_e4m3(values * tl.div_rn(tl.full([ROWS * 4], 1.0, tl.float32), scale)[:, None])
        tl.store((row + 512).to(F32_POINTER, bitcast=True) + group % 4, scale, mask=allowed)
    else:
        codes = encode_e4m3(values * inverse_scale)
    tl.store(row[:, None] + column, codes, mask=allowed[:, None])

    token = first + tl.arange(0, ROWS)
    lane = tl.arange(0, 64)
    slot, allowed = load_slots(slots, token, n, slots_stride, capacity)
    source = rope + token.to(tl.int64)[:, None] * rope_stride + lane.to(tl.int64)[None, :] * rope_step
    values = tl.load(source, mask=(token < n)[:, None], other=0.0)  # [ROWS, 64] bf16
    row = cache + slot * cache_stride
    if PACKED:
        tl.store((row + 528).to(BF16_POINTER, bitcast=True)[:, None] + lane[None, :], values, mask=allowed[:, None])
    else:
        codes = encode_e4m3(values.to(tl.float32) * inverse_scale)
        tl.store(row[:, None] + 512 + lane[None, :], codes, mask=allowed[:, None])


@triton.jit
def gather_rows(
    cache, slots, out, n, capacity, cache_stride, slots_stride, out_stride, raw_scale, PACKED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    group = tl.arange(0, ROWS * 4)
    column = (group % 4)[:, None] * 128 + tl.arange(0, 128)[None, :]
    token = first + group // 4
    slot, allowed = load_slots(slots, token, n, slots_stride, capacity)
    row = cache + slot * cache_stride
    codes = tl.load(row[:, None] + column, mask=allowed[:, None], other=0)
    values = decode_e4m3(codes).to(tl.float32)
    if PACKED:
        scale = tl.load((row + 512).to(F32_POINTER, bitcast=True) + group % 4, mask=allowed, other=0.0)
        values = values * scale[:, None]
    else:
        values = values * raw_scale
    target = out + token.to(tl.int64)[:, None] * out_stride + column
    tl.store(target, values.to(out.dtype.element_ty), mask=(token < n)[:, None])

    token = first + tl.arange(0, ROWS)
    lane = tl.arange(0, 64)
    slot, allowed = load_slots(slots, token, n, slots_stride, capacity)
    row = cache + slot * cache_stride
    if PACKED:
        rope = tl.load((row + 528).to(BF16_POINTER, bitcast=True)[:, None] + lane[None, :], mask=allowed[:, None], other=0.0)
    else:
        codes = tl.load(row[:, None] + 512 + lane[None, :], mask=allowed[:, None], other=0)
        rope = decode_e4m3(codes).to(tl.float32) * raw_scale
    target = out + token.to(tl.int64)[:, None] * out_stride + 512 + lane[None, :]
    tl.store(target, rope.to(out.dtype.element_ty), mask=(token < n)[:, None])


@triton.jit
def write_keys(
    keys, slots, pages, n, capacity, keys_stride, keys_step, slots_stride, page_stride, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 128)
    slot, allowed = load_slots(slots, token, n, slots_stride, capacity)
    source = keys + token.to(tl.int64)[:, None] * keys_stride + column.to(tl.int64)[None, :] * keys_step
    values = tl.load(source, mask=(token < n)[:, None], other=0.0).to(tl.float32)  # [ROWS, 128]
    scale = tl.div_rn(tl.maximum(largest_finite(values), SMALLEST_KEY), E4M3_MAX)
    if POWER_OF_TWO:
        scale = next_power_of_two(scale)
    codes = encode_e4m3(values * tl.div_rn(tl.full([ROWS], 1.0, tl.float32), scale)[:, None])
    page = pages + (slot // 64) * page_stride
    within = slot % 64
    tl.store(page[:, None] + within[:, None] * 128 + column[None, :], codes, mask=allowed[:, None])
    tl.store((page + 64 * 128).to(F32_POINTER, bitcast=True) + within, scale, mask=allowed)


@triton.jit
def gather_keys(pages, slots, out_codes, out_scales, n, capacity, page_stride, slots_stride, ROWS: tl.constexpr):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 128)
    slot, allowed = load_slots(slots, token, n, slots_stride, capacity)
    page = pages + (slot // 64) * page_stride
    within = slot % 64
    codes = tl.load(page[:, None] + within[:, None] * 128 + column[None, :], mask=allowed[:, None], other=0)
    scale = tl.load((page + 64 * 128).to(F32_POINTER, bitcast=True) + within, mask=allowed, other=0.0)
    tl.store(out_codes + token.to(tl.int64)[:, None] * 128 + column[None, :], codes, mask=(token < n)[:, None])
    tl.store(out_scales + token, scale, mask=token < n)
