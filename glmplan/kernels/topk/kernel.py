"""The first launches of top-k: group maxima, bound, filter. The last one is in finish.py, the derivation in README.md.

Shape letters: N rows, L columns, K kept, G groups (G >= 2 K), B blocks per row. Nothing waits on another block, so any
schedule of the blocks gives the same answer.

Workspace, int32 per row (offsets in tiles.py): total | bound | highest | 0 | B x (offset, count) | G group maxima |
G / 2 histogram bins | CAP candidate keys | CAP candidate positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glmplan.kernels.topk.keys import (
    bin_shift,
    bits_of,
    chunk_of,
    count_at_least,
    float_of,
    key_load,
    keys_at,
    logits_at,
    narrow,
    ordered,
    row_of,
)

HEAD = tl.constexpr(4)


@triton.jit
def group_max_kernel(
    logits, lengths, row_starts, work, stride, width, work_stride,
    K: tl.constexpr, GROUPS: tl.constexpr, GROUPS_AT: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Group g holds positions g, g + G, g + 2 G ...: their largest key, 0 for an empty group.

    Also clears the row's total and histogram (G / 2 bins).
    """
    row = tl.program_id(1)
    base, length = row_of(logits, lengths, row_starts, row, stride, width, HAS_STARTS)
    mine = work + row.to(tl.int64) * work_stride
    if tl.program_id(0) == 0:
        tl.store(mine, 0)
    if length > K:
        column = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
        # NaN gives way to any number, so a group's maximum is NaN only if all of it is. Written out, because
        # the interpreter's tl.maximum keeps NaN.
        best = tl.full((ROWS, COLS), float("nan"), tl.float32)
        for first in range(0, tl.cdiv(length, GROUPS), ROWS):
            index = (first + tl.arange(0, ROWS)[:, None]) * GROUPS + column
            x = logits_at(base, index, length, PADDED)
            best = tl.where((x > best) | (best != best), x, best)
        top = tl.where(column < length, tl.max(ordered(best), 0)[None, :], 0).to(tl.uint32)
        at = GROUPS_AT + column
        tl.store(mine + at, top.to(tl.int32, bitcast=True))
        bin_ = tl.program_id(0) * (COLS // 2) + tl.arange(0, COLS // 2)
        tl.store(mine + GROUPS_AT + GROUPS + bin_, tl.zeros((COLS // 2,), tl.int32))


@triton.jit
def bound_kernel(
    lengths, work, work_stride,
    K: tl.constexpr, GROUPS: tl.constexpr, GROUPS_AT: tl.constexpr, SLACK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The row's bound and highest key, once per row: when there are many rows, not in every filter block."""
    row = tl.program_id(0)
    mine = work + row.to(tl.int64) * work_stride
    maxima = key_load(mine + GROUPS_AT + tl.arange(0, GROUPS))
    length = tl.load(lengths + row)
    if length > K:
        bound, highest = _bound(mine, maxima, K, GROUPS, SLACK, THREADS)
        _store_bound(mine, bound, highest)


@triton.jit
def filter_kernel(
    logits, lengths, row_starts, work, stride, width, work_stride,
    K: tl.constexpr, GROUPS: tl.constexpr, GROUPS_AT: tl.constexpr, KEYS_AT: tl.constexpr, CAP: tl.constexpr,
    SLACK: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, BINS_LOG2: tl.constexpr, THREADS: tl.constexpr,
    OWN_BOUND: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Every key not below the bound that the group maxima give goes to the row's candidate list, one segment a block."""
    row = tl.program_id(1)
    block = tl.program_id(0)
    mine = work + row.to(tl.int64) * work_stride
    if OWN_BOUND:
        maxima = key_load(mine + GROUPS_AT + tl.arange(0, GROUPS))
    base, length = row_of(logits, lengths, row_starts, row, stride, width, HAS_STARTS)
    if length > K:
        begin = block * chunk_of(length, B)
        end = tl.minimum(begin + chunk_of(length, B), length)
        # One a thread at a time, as the scattered stores below have it: otherwise keys change hands in between.
        position = tl.max_contiguous(begin + tl.arange(0, TILE), 1)
        if OWN_BOUND:
            keys = keys_at(base, position, end)
            bound, highest = _bound(mine, maxima, K, GROUPS, SLACK, THREADS)
            taken = (keys >= bound).to(tl.int32)
        else:
            bound, highest = key_load(mine + 1), key_load(mine + 2)
            logit = logits_at(base, position, end, False)
            taken = ((logit >= float_of(bound)) | ((bound == 1) & (position < end))).to(tl.int32)
        count = tl.sum(taken, 0)
        offset = tl.atomic_add(mine, count, sem="relaxed")
        slot = offset + tl.cumsum(taken, 0) - taken
        fits = (taken > 0) & (slot < CAP)
        stored = mine + KEYS_AT
        bins = mine + GROUPS_AT + GROUPS
        shift = bin_shift(bound, highest, BINS_LOG2)
        tl.store(stored + CAP + slot, position, mask=fits)
        if OWN_BOUND:
            _record(stored + slot, bins, keys, taken > 0, fits, bound, shift, BINS_LOG2)
        else:
            # Few pass, so what is done for them alone is done on the compacted list.
            tl.debug_barrier()
            for at in range(0, count, THREADS):
                index = offset + at + tl.arange(0, THREADS)
                kept = (index < offset + count) & (index < CAP)
                where = tl.load(stored + CAP + index, mask=kept, other=0)
                key = ordered(tl.load(base + where, mask=kept, other=0.0))
                _record(stored + index, bins, key, kept, kept, bound, shift, BINS_LOG2)
        tl.store(mine + HEAD + 2 * block, offset)
        tl.store(mine + HEAD + 2 * block + 1, count)
        if OWN_BOUND and block == 0:
            _store_bound(mine, bound, highest)


@triton.jit
def _store_bound(mine, bound, highest):
    tl.store(mine + 1, bound.to(tl.int32, bitcast=True))
    tl.store(mine + 2, highest.to(tl.int32, bitcast=True))


@triton.jit
def _record(stored, bins, keys, counted, fits, bound, shift, BINS_LOG2: tl.constexpr):
    """Store the keys that fit and count all of them in the histogram."""
    chosen = tl.minimum((keys - bound) >> shift.to(tl.uint32), (1 << BINS_LOG2) - 1)
    tl.atomic_add(bins + chosen.to(tl.int32), 1, mask=counted, sem="relaxed")
    tl.store(stored, keys.to(tl.int32, bitcast=True), mask=fits)


@triton.jit
def _extremes(low, high, total, other_low, other_high, other_total):
    return tl.minimum(low, other_low), tl.maximum(high, other_high), total + other_total


@triton.jit
def _bound(mine, keys, K: tl.constexpr, GROUPS: tl.constexpr, SLACK: tl.constexpr, THREADS: tl.constexpr):
    """(bound, highest key): K groups have a maximum of at least `bound`, so at least K elements do.

    K is near half the groups, so the bound is near the mean of the maxima: the first digit is a sixteenth of their
    range around it. If it is not there, the descent starts from the whole range.
    """
    # An empty group (key 0) is as high as can be in this order, and so never the lowest.
    lowest, highest, total = tl.reduce((keys - 1, keys, keys.to(tl.float32)), 0, _extremes)
    lowest += 1
    shift = tl.maximum(bits_of(highest - lowest) - 7, 0)
    half = tl.full((), 4, tl.uint32) << shift.to(tl.uint32)
    middle = tl.minimum(total / GROUPS, 4.0e9).to(tl.uint32)
    guess = tl.maximum(middle, lowest + half) - half
    at_least = count_at_least(keys, guess, shift, 8, GROUPS, THREADS, OPEN=True)
    enough = at_least >= K
    chosen = tl.sum(enough.to(tl.int32), 0) - 1
    above = tl.max(tl.where(enough, 0, at_least), 0)
    upto = tl.min(tl.where(enough, at_least, GROUPS), 0)
    found = chosen >= 0
    low = tl.where(found, guess + (tl.maximum(chosen, 0).to(tl.uint32) << shift.to(tl.uint32)), lowest)
    shift = tl.where(found & (chosen < 7), shift, bits_of(highest - low))
    count = tl.where(found, upto - above, GROUPS)
    need = tl.where(found, K - above, K)
    # Empty groups among `count` do no harm: only whether more than SLACK too many are left matters.
    bound, _, _ = narrow(keys, mine, 0, low, shift, count, need, SLACK, GROUPS, THREADS)
    return bound, highest
