"""Triton kernels of the indexer logits: paged (decode), ragged (prefill), and the fill of what lies outside a row.

Letters: T tokens of a tile, H = 32 heads, D = 128, G query rows that share a key tile. Keys are operand A of the dot
(tokens on M), so a warp holds whole rows of heads and sums over them with two shuffles.
e4m3 becomes fp16 before every dot, exactly; products and sums are then fp32. The fp8 tensor cores of Hopper and Ada keep
22 accumulator bits, which is 500 times the error allowed here (README, "Why not the fp8 tensor cores").
"""

from __future__ import annotations

import triton
import triton.language as tl

from glmplan.kernels.e4m3 import decode_e4m3_finite

HEADS = tl.constexpr(32)
DIM = tl.constexpr(128)
PAGE = tl.constexpr(64)

# How e4m3 bytes become fp16: by the hardware (sm_89 and later), by integer operations, or by Triton's own operations,
# which is what the interpreter can run.
CONVERT = tl.constexpr(0)
INTEGER = tl.constexpr(1)
PLAIN = tl.constexpr(2)

# Four e4m3 bytes in $2 -> two pairs of fp16 in $0 and $1.
HARDWARE_ASM = tl.constexpr("""{
    .reg .b16 lo, hi;
    mov.b32 {lo, hi}, $2;
    cvt.rn.f16x2.e4m3x2 $0, lo;
    cvt.rn.f16x2.e4m3x2 $1, hi;
    }""")
# Byte SEEEEMMM moved to the top of a half and shifted right by one: S lands on bit 14; adding bit 14 to itself carries it
# into the sign. fp16 subnormals keep e4m3's exact, and the dot reads them.
INTEGER_ASM = tl.constexpr("""{
    .reg .b32 lo, hi, s, t;
    prmt.b32 lo, $2, 0, 0x1404;
    prmt.b32 hi, $2, 0, 0x3424;
    shr.u32 lo, lo, 1;
    shr.u32 hi, hi, 1;
    and.b32 s, lo, 0x40004000;
    and.b32 t, hi, 0x40004000;
    add.u32 $0, lo, s;
    add.u32 $1, hi, t;
    }""")


@triton.jit
def to_fp16(raw, DECODE: tl.constexpr, PURE: tl.constexpr):
    """e4m3 in uint8 -> fp16, exact; with INTEGER the value is divided by 256, which `gain` gives back.

    Triton lays out a dot for the narrowest type it sees behind an operand. For 8 bits under fp16 that suits operands
    loaded once, and costs a register move per dot instruction where the other operand streams: PURE = False hides it.
    """
    if DECODE == PLAIN:
        return decode_e4m3_finite(raw)
    ASM: tl.constexpr = HARDWARE_ASM if DECODE == CONVERT else INTEGER_ASM
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [raw], dtype=tl.float16, is_pure=PURE, pack=4)


@triton.jit
def gain(DECODE: tl.constexpr):
    """What a dot of two operands from `to_fp16` must be multiplied by."""
    return 65536.0 if DECODE == INTEGER else 1.0


@triton.jit
def row_length(lengths, request, token, stride_b, stride_n, limit, NEXT_N: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Tokens that draft token `token` of `request` sees, between 0 and `limit`."""
    if PER_TOKEN:
        seen = tl.load(lengths + request * stride_b + token * stride_n, mask=token < NEXT_N, other=0)
    else:
        seen = tl.load(lengths + request * stride_b) - (NEXT_N - 1) + token
    return tl.minimum(tl.maximum(seen, 0), limit)


@triton.jit
def request_pages(lengths, request, inside, stride_b, stride_n, limit, NEXT_N: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Pages that the longest row of each request covers; 0 where not `inside`."""
    if PER_TOKEN:
        seen = tl.load(lengths + request * stride_b, mask=inside, other=0)
        for token in tl.static_range(1, NEXT_N):
            seen = tl.maximum(seen, tl.load(lengths + request * stride_b + token * stride_n, mask=inside, other=0))
    else:
        seen = tl.load(lengths + request * stride_b, mask=inside, other=0)
    return (tl.minimum(tl.maximum(seen, 0), limit) + (PAGE - 1)) // PAGE


@triton.jit
def head_of(column, G: tl.constexpr):
    """Columns of the dot run (head // 8, row of the group, head % 8): each warp along N then owns whole rows."""
    return column // (8 * G) * 8 + column % 8


@triton.jit
def group_row_of(column, G: tl.constexpr):
    return column // 8 % G


@triton.jit
def twice_relu(score):
    """2 * relu(score), exactly, NaN kept: an addition runs on a wider pipe than a maximum."""
    return score + tl.abs(score)


@triton.jit
def sum_heads(terms, T: tl.constexpr, G: tl.constexpr):
    """[T, G*32] in the column order of `head_of` -> [T, G]."""
    return tl.sum(tl.sum(tl.reshape(terms, [T, HEADS // 8, G, 8]), 1), 2)


@triton.jit
def paged_kernel(
    q, keys, scales, weights, lengths, table, out,
    requests, pages_total, limit,
    stride_qb, stride_qn, stride_qh, stride_page, stride_page_scale, stride_wr, stride_wh,
    stride_lb, stride_ln, stride_tb, stride_or,
    NEXT_N: tl.constexpr, PER_TOKEN: tl.constexpr, G: tl.constexpr, BLOCK_B: tl.constexpr,
    DECODE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program takes an equal share of all pages of all requests, and walks through the requests it meets.

    q e4m3 in uint8 [B, NEXT_N, 32, 128]; keys uint8 and scales f32 are two views of the pages; weights f32 [B*NEXT_N, 32];
    lengths int32 [B] or [B, NEXT_N]; table int32 [B, W]; out f32 [B*NEXT_N, >= limit].
    Grid (programs, groups of G draft tokens); the shares come from the lengths on the device.
    """
    request_ids = tl.arange(0, BLOCK_B)
    pages = request_pages(
        lengths, request_ids.to(tl.int64), request_ids < requests, stride_lb, stride_ln, limit, NEXT_N, PER_TOKEN
    ).to(tl.int64)
    ends = tl.cumsum(pages, 0)
    total = tl.sum(pages, 0)
    share = tl.program_id(0).to(tl.int64)
    start = total * share // tl.num_programs(0)
    stop = total * (share + 1) // tl.num_programs(0)
    if start >= stop:
        return
    first = tl.sum((ends <= start).to(tl.int64), 0)
    last = tl.sum((ends < stop).to(tl.int64), 0)
    begin = tl.sum(tl.where(request_ids < first, pages, 0), 0)

    column = tl.arange(0, G * HEADS)
    token = tl.program_id(1) * G + group_row_of(column, G)
    out_token = tl.program_id(1) * G + tl.arange(0, G)
    depth = tl.arange(0, DIM)
    slot = tl.arange(0, PAGE)
    key_offset = slot[:, None] * DIM + depth[None, :]
    for row in range(first, last + 1):
        own = request_pages(lengths, row, True, stride_lb, stride_ln, limit, NEXT_N, PER_TOKEN)
        from_page = tl.maximum(start - begin, 0).to(tl.int32)
        to_page = tl.minimum(stop - begin, own.to(tl.int64)).to(tl.int32)
        begin += own
        used = token < NEXT_N
        q_row = q + row * stride_qb + token * stride_qn + head_of(column, G) * stride_qh
        q_raw = tl.load(q_row[:, None] + depth[None, :], mask=used[:, None], other=0)
        query = tl.trans(to_fp16(q_raw, DECODE, True))
        weight_row = weights + (row * NEXT_N + token) * stride_wr + head_of(column, G) * stride_wh
        weight = tl.load(weight_row, mask=used, other=0.0) * (gain(DECODE) * 0.5)
        seen = row_length(lengths, row, out_token, stride_lb, stride_ln, limit, NEXT_N, PER_TOKEN)
        seen = tl.where(out_token < NEXT_N, seen, 0)
        out_row = out + (row * NEXT_N + out_token) * stride_or
        table_row = table + row * stride_tb
        page = tl.load(table_row + from_page)
        for index in tl.range(from_page, to_page, num_stages=STAGES):
            real = (page >= 0) & (page < pages_total)
            at = tl.where(real, page, 0).to(tl.int64)
            raw = tl.load(keys + at * stride_page + key_offset)
            scale = tl.load(scales + at * stride_page_scale + (PAGE * DIM // 4) + slot)
            score = tl.dot(to_fp16(raw, DECODE, True), query, out_dtype=tl.float32)
            logit = sum_heads(twice_relu(score) * weight[None, :], PAGE, G) * scale[:, None]
            logit = tl.where(real, logit, float("-inf"))
            position = index * PAGE + slot
            tl.store(out_row[None, :] + position[:, None], logit, mask=position[:, None] < seen[None, :])
            page = tl.load(table_row + index + 1, mask=index + 1 < to_page, other=0)


@triton.jit
def ragged_kernel(
    q, keys, scales, weights, starts, stops, out,
    rows, tokens, width, rows_per_program,
    stride_qr, stride_qh, stride_k, stride_wr, stride_wh, stride_or,
    T: tl.constexpr, CHUNK: tl.constexpr, COMPRESSED: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """One program keeps T keys in registers and walks over the rows of its chunk that see any of them.

    q e4m3 in uint8 [rows, 32, 128]; keys likewise [tokens, 128]; scales f32 [tokens]; weights f32 [rows, 32];
    starts, stops int32 [rows]; out f32 [rows, >= width]. Row r holds tokens starts[r]..stops[r]-1, at their own column
    or, when COMPRESSED, from column 0. Grid (token tiles, chunks of rows_per_program <= CHUNK rows).
    """
    tile = tl.program_id(0) * T
    chunk = tl.program_id(1) * rows_per_program
    local = tl.arange(0, CHUNK)
    inside = (local < rows_per_program) & (chunk + local < rows)
    begin = tl.load(starts + chunk + local, mask=inside, other=0)
    end = tl.load(stops + chunk + local, mask=inside, other=0)
    sees = inside & (begin < end) & (begin < tile + T) & (end > tile)
    first = tl.min(tl.where(sees, local, CHUNK), 0)
    last = tl.max(tl.where(sees, local, -1), 0)
    if first > last:
        return

    # Eight bytes a thread: sixteen would be two fp16 stores of a thread side by side, which conflict in shared memory.
    depth = tl.max_contiguous(tl.arange(0, DIM), 8)
    head = tl.arange(0, HEADS)
    position = tile + tl.arange(0, T)
    real = position < tokens
    raw = tl.load(keys + position.to(tl.int64)[:, None] * stride_k + depth[None, :], mask=real[:, None], other=0)
    key = to_fp16(raw, DECODE, False)
    scale = tl.load(scales + position, mask=real, other=0.0) * (gain(DECODE) * 0.5)
    q_offset = head[:, None] * stride_qh + depth[None, :]
    row = (chunk + first).to(tl.int64)
    stop = (chunk + last + 1).to(tl.int64)
    query = to_fp16(tl.load(q + row * stride_qr + q_offset), DECODE, False)
    # `while`, not `for`: Triton would move the keys into a `for` loop and read them from shared memory for every row.
    while row < stop:
        q_raw = tl.load(q + tl.minimum(row + 1, stop - 1) * stride_qr + q_offset)
        weight = tl.load(weights + row * stride_wr + head * stride_wh)
        score = tl.dot(key, tl.trans(query), out_dtype=tl.float32)
        logit = tl.sum(twice_relu(score) * weight[None, :], 1) * scale
        row_begin = tl.maximum(tl.load(starts + row), 0)
        row_end = tl.load(stops + row)
        first_column = row_begin if COMPRESSED else 0
        keep = (position >= row_begin) & (position < row_end) & (position < first_column + width) & real
        tl.store(out + (row * stride_or - first_column) + position, logit, mask=keep)
        query = to_fp16(q_raw, DECODE, False)
        row += 1


@triton.jit
def fill_row(out_row, begin, end, width, BLOCK: tl.constexpr):
    """-inf at the columns of one row before `begin` and from `end` on; program_id(1) takes every so-many-th block."""
    for block in range(tl.program_id(1) * BLOCK, width, tl.num_programs(1) * BLOCK):
        at = block + tl.arange(0, BLOCK)
        tl.store(out_row + at, float("-inf"), mask=(at < width) & ((at < begin) | (at >= end)))


@triton.jit
def fill_paged_kernel(
    out, lengths, limit, width, stride_lb, stride_ln, stride_or,
    NEXT_N: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-inf past each row's length; grid (B*NEXT_N, parts of a row)."""
    row = tl.program_id(0).to(tl.int64)
    seen = row_length(lengths, row // NEXT_N, row % NEXT_N, stride_lb, stride_ln, limit, NEXT_N, PER_TOKEN)
    fill_row(out + row * stride_or, 0, seen, width, BLOCK)


@triton.jit
def fill_ragged_kernel(out, starts, stops, tokens, width, stride_or, COMPRESSED: tl.constexpr, BLOCK: tl.constexpr):
    """-inf outside starts[r]..stops[r]-1, or from stops[r]-starts[r] on when COMPRESSED; grid (rows, parts of a row)."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(starts + row), 0)
    end = tl.minimum(tl.load(stops + row), tokens)
    if COMPRESSED:
        end = end - begin
        begin = tl.zeros_like(begin)
    fill_row(out + row * stride_or, begin, end, width, BLOCK)
