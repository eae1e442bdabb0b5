"""How one pass gathers, decodes and attends: `attend` reads each chosen row once, `combine` joins splits of the top-k.

A program serves BLOCK_HEADS heads of one query over one split. The 512 latent columns are cut into GROUPS, a batch dimension
shared out to the warps: a warp owns its groups in q k^T, in v^T p^T and in the scales, and reads its part of the row tile
[groups, columns, tokens] from shared memory for both, as right operand first and as left operand then.
FP8 rows are read as 16-bit words of two columns: even and odd columns become two bf16 operands by shifts alone, too
small by 2**120: 2**60 of it goes to q (the logits' scale has the rest), p is 2**60 too large and the output takes 2**120.
Base 2 inside: logits carry log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from glmplan.kernels.e4m3 import decode_e4m3_finite

LATENT = tl.constexpr(512)
ROPE = tl.constexpr(64)
GROUP = tl.constexpr(128)
LN2 = tl.constexpr(0.6931471805599453)
HALF_BIAS = tl.constexpr(1152921504606846976.0)  # 2**60; bf16's exponent bias less e4m3's is 120


# Two 16-bit words in $1, each of two e4m3 -> the low or the high one of both as bf16 in $0, too small by 2**120.
EVEN_ASM = tl.constexpr("{ .reg .b32 x; prmt.b32 x, $1, 0, 0xA280; shl.b32 x, x, 4; and.b32 $0, x, 0x87F087F0; }")
ODD_ASM = tl.constexpr("{ .reg .b32 x; prmt.b32 x, $1, 0, 0xB391; shl.b32 x, x, 4; and.b32 $0, x, 0x87F087F0; }")


@triton.jit
def columns(words, ODD: tl.constexpr, PORTABLE: tl.constexpr):
    """uint16 of two e4m3 -> the low one, or the high one if ODD, as bf16 times 2**-120 (PORTABLE: as float16, exact)."""
    if PORTABLE:
        return decode_e4m3_finite((words >> 8 if ODD else words & 0xFF).to(tl.uint8))
    ASM: tl.constexpr = ODD_ASM if ODD else EVEN_ASM
    return tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def decode_bytes(bits, PORTABLE: tl.constexpr):
    """uint8 -> bf16 times 2**-120 (PORTABLE: float16, exact)."""
    if PORTABLE:
        return decode_e4m3_finite(bits)
    wide = bits.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 4)).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["slots", "topk", "splits", "span"])
def attend(
    q_ptr,
    kv_ptr,
    indices_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    value_scale,
    slots,
    topk,
    heads,
    splits,
    span,
    q_stride_row,
    q_stride_head,
    kv_stride_16_bytes,
    indices_stride,
    FORMAT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    WIDTH: tl.constexpr = LATENT // GROUPS
    ROPE_WIDTH: tl.constexpr = ROPE // GROUPS
    FP8: tl.constexpr = FORMAT != "bf16"
    SHIFT: tl.constexpr = 60.0 if FP8 and not PORTABLE else 0.0
    FOLD: tl.constexpr = HALF_BIAS if FP8 and not PORTABLE else 1.0
    OPERAND: tl.constexpr = tl.float16 if PORTABLE else tl.bfloat16

    head_blocks = tl.cdiv(heads, BLOCK_HEADS)
    program = tl.program_id(0)
    split = program // head_blocks % splits
    row = (program // head_blocks // splits).to(tl.int64)
    head = program % head_blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head_ok = (head < heads)[None, :, None]

    group = tl.arange(0, GROUPS)[:, None, None]
    q_row = q_ptr + row * q_stride_row + head.to(tl.int64)[None, :, None] * q_stride_head
    in_rope = tl.arange(0, ROPE_WIDTH)
    rope = group * ROPE_WIDTH + in_rope[None, :, None]
    q_rope = tl.load(q_row + LATENT + group * ROPE_WIDTH + in_rope[None, None, :], mask=head_ok, other=0.0).to(OPERAND)
    if FORMAT == "raw":
        q_rope = (q_rope.to(tl.float32) * FOLD).to(OPERAND)
    if FORMAT == "packed":
        q_rope = (q_rope.to(tl.float32) / FOLD).to(OPERAND)
    if FP8:
        in_word = tl.arange(0, WIDTH // 2)
        word = group * (WIDTH // 2) + in_word[None, :, None]
        pair = tl.load(
            (q_row).to(tl.pointer_type(tl.uint32), bitcast=True) + group * (WIDTH // 2) + in_word[None, None, :],
            mask=head_ok,
            other=0,
        )
        q_even = ((pair & 0xFFFF).to(tl.uint16).to(q_ptr.dtype.element_ty, bitcast=True).to(tl.float32) * FOLD).to(OPERAND)
        q_odd = ((pair >> 16).to(tl.uint16).to(q_ptr.dtype.element_ty, bitcast=True).to(tl.float32) * FOLD).to(OPERAND)
        even = tl.zeros([GROUPS, WIDTH // 2, BLOCK_HEADS], tl.float32)
        odd = tl.zeros([GROUPS, WIDTH // 2, BLOCK_HEADS], tl.float32)
        words_ptr = kv_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        in_column = tl.arange(0, WIDTH)
        column = group * WIDTH + in_column[None, :, None]
        q_latent = tl.load(q_row + group * WIDTH + in_column[None, None, :], mask=head_ok, other=0.0).to(OPERAND)
        values = tl.zeros([GROUPS, WIDTH, BLOCK_HEADS], tl.float32)

    top = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    lane = tl.arange(0, BLOCK_TOKENS)
    first = split * span
    last = tl.minimum(first + span, topk)
    if HAS_LENGTHS:
        last = tl.minimum(last, tl.load(lengths_ptr + row))

    indices_row = indices_ptr + row * indices_stride
    # one tile ahead and carried in registers: the rows' loads are then one step, not two, from being issued
    next_slot = tl.load(indices_row + first + lane, mask=first + lane < last, other=-1)
    for start in tl.range(first, last, BLOCK_TOKENS, num_stages=STAGES):
        # as unsigned, -1 is out of range too; masked loads of out-of-range rows touch no memory
        slot = next_slot.to(tl.uint32, bitcast=True)
        token = start + BLOCK_TOKENS + lane
        next_slot = tl.load(indices_row + token, mask=token < last, other=-1)
        ok = slot < slots.to(tl.uint32)
        at = slot.to(tl.int64)[None, None, :] * kv_stride_16_bytes.to(tl.uint32).to(tl.int64)
        ok3 = ok[None, None, :]
        if FORMAT == "packed":
            words = tl.load(words_ptr + tl.max_contiguous(at * 8, (1, 1, 2)) + word, mask=ok3, other=0)
            scales_ptr = kv_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
            scale = tl.load(scales_ptr + at * 4 + LATENT // 4 + group, mask=ok3, other=0.0)
            rope_ptr = kv_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True)
            k_rope = tl.load(
                rope_ptr + tl.max_contiguous(at * 8, (1, 1, 2)) + (LATENT + 16) // 2 + rope, mask=ok3, other=0.0
            ).to(OPERAND)
        elif FORMAT == "raw":
            words = tl.load(words_ptr + tl.max_contiguous(at * 8, (1, 1, 2)) + word, mask=ok3, other=0)
            k_rope = decode_bytes(
                tl.load(kv_ptr + tl.max_contiguous(at * 16, (1, 1, 2)) + LATENT + rope, mask=ok3, other=0), PORTABLE
            )
        else:
            latent = tl.load(kv_ptr + tl.max_contiguous(at * 8, (1, 1, 2)) + column, mask=ok3, other=0.0)
            k_rope = tl.load(kv_ptr + tl.max_contiguous(at * 8, (1, 1, 2)) + LATENT + rope, mask=ok3, other=0.0)

        if FP8:
            k_even = columns(words, False, PORTABLE)
            k_odd = columns(words, True, PORTABLE)
            logits = tl.dot(q_even, k_even)
            logits = tl.dot(q_odd, k_odd, logits)
            if FORMAT == "packed":
                logits = logits * scale
            logits = tl.dot(q_rope, k_rope, logits)
        else:
            logits = tl.dot(q_latent, latent)
            logits = tl.dot(q_rope, k_rope, logits)
        logits = tl.sum(logits, 0)
        logits = tl.where(ok[None, :], logits * (scale_log2 * FOLD), -float("inf"))

        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        keep = tl.exp2(top - base)
        p = tl.exp2(logits - (base - SHIFT)[:, None])
        total = total * keep + tl.sum(p, 1)
        keep = keep[None, None, :]
        if FORMAT == "packed":
            p_all = tl.trans((p[None, :, :] * scale).to(OPERAND), 0, 2, 1)
        else:
            p_all = tl.trans(p.to(OPERAND))[None, :, :]
        p_all = tl.broadcast_to(p_all, (GROUPS, BLOCK_TOKENS, BLOCK_HEADS))
        if FP8:
            even = tl.dot(k_even, p_all, even * keep)
            odd = tl.dot(k_odd, p_all, odd * keep)
        else:
            values = tl.dot(latent, p_all, values * keep)
        top = new_top

    empty = total == 0.0
    if FP8:
        values = tl.reshape(tl.trans(tl.join(even, odd), 0, 1, 3, 2), GROUPS, WIDTH, BLOCK_HEADS)
    values = values * (FOLD * FOLD * value_scale / tl.where(empty, 1.0, total))[None, None, :]
    lse = tl.where(empty, -float("inf"), top - SHIFT + tl.log2(tl.where(empty, 1.0, total)))
    if not PARTIAL:
        lse = lse * LN2
    at_head = (row * splits + split) * heads + head
    out_type = out_ptr.dtype.element_ty
    column = group * WIDTH + tl.arange(0, WIDTH)[None, :, None]
    tl.store(out_ptr + at_head[None, None, :] * LATENT + column, values.to(out_type), mask=(head < heads)[None, None, :])
    tl.store(lse_ptr + at_head, lse, mask=head < heads)


@triton.jit(do_not_specialize=["splits"])
def combine(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    heads,
    splits,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """[rows, splits, heads, 512] f32 with base-2 log-sum-exp -> [rows, heads, 512] and its natural log-sum-exp."""
    chunks: tl.constexpr = LATENT // BLOCK_COLUMNS
    program = tl.program_id(0)
    row = (program // chunks // heads).to(tl.int64)
    head = program // chunks % heads
    chunk = program % chunks
    split = tl.arange(0, BLOCK_SPLITS)
    column = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    ok = split < splits
    at = (row * splits + split) * heads + head
    lse = tl.load(partial_lse_ptr + at, mask=ok, other=-float("inf"))
    values = tl.load(partial_ptr + at[:, None] * LATENT + column[None, :], mask=ok[:, None], other=0.0)
    top = tl.max(lse, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    share = tl.exp2(lse - base)
    total = tl.sum(share, 0)
    empty = total == 0.0
    joined = tl.sum(values * share[:, None], 0) / tl.where(empty, 1.0, total)
    at_head = row * heads + head
    tl.store(out_ptr + at_head * LATENT + column, joined.to(out_ptr.dtype.element_ty))
    joined_lse = tl.where(empty, -float("inf"), (base + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse_ptr + at_head, joined_lse, mask=chunk == 0)
