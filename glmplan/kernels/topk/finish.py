"""The last launch of top-k: the exact threshold among the candidates, and every winner to its place by position."""

from __future__ import annotations

import triton
import triton.language as tl

from glmplan.kernels.topk.kernel import HEAD
from glmplan.kernels.topk.keys import (
    HALF,
    bits_of,
    chunk_of,
    count_at_least,
    descend,
    key_load,
    keys_at,
    last_of,
    listed,
    narrow,
    row_of,
    threshold_bin,
)

LOGICAL = 0
PAGED = 1
RAGGED = 2


@triton.jit
def finish_kernel(
    logits,
    lengths,
    row_starts,
    work,
    out,
    table,
    offsets,
    stride,
    width,
    work_stride,
    out_stride,
    table_stride,
    table_width,
    rows_per_table,
    K: tl.constexpr,
    BINS_AT: tl.constexpr,
    BINS_LOG2: tl.constexpr,
    KEYS_AT: tl.constexpr,
    CAP: tl.constexpr,
    SMALL: tl.constexpr,
    B: tl.constexpr,
    SHARE: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    PART: tl.constexpr,
    THREADS: tl.constexpr,
    MODE: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Exact threshold among the candidates, then this block's own winners to their places by position.

    Short rows are copied; a row with more than CAP candidates is selected by block 0 from the logits themselves.
    """
    row = tl.program_id(1)
    block = tl.program_id(0)
    base, length = row_of(logits, lengths, row_starts, row, stride, width, HAS_STARTS)
    mine = work + row.to(tl.int64) * work_stride
    out += row.to(tl.int64) * out_stride
    shift_by = 0
    if MODE == 1:
        table += (row // rows_per_table).to(tl.int64) * table_stride
    if MODE == 2:
        shift_by = tl.load(offsets + row)
    total = tl.load(mine)
    bound, highest = key_load(mine + 1), key_load(mine + 2)
    # Read before it is known how many there are: the addresses are the row's own.
    counts = tl.load(mine + BINS_AT + tl.arange(0, 1 << BINS_LOG2))
    keys = key_load(mine + KEYS_AT + tl.arange(0, SMALL))
    if length <= K:
        _copy_all(out, table, table_width, shift_by, block, length, K, PART, MODE, PAGE)
    elif total <= CAP:
        low, shift, count, need = threshold_bin(counts, bound, highest, total, K, BINS_LOG2)
        _finish(
            keys, low, shift, count, need, mine, out, table, table_width, shift_by, block, length, total,
            KEYS_AT, CAP, SMALL, B, SHARE, SEGMENT, THREADS, MODE, PAGE,
        )  # fmt: skip
    elif block == 0:
        _select_from_row(
            base, bound, highest, total, out, table, table_width, shift_by, length, K, TILE, THREADS, MODE, PAGE
        )


@triton.jit
def _mapped(position, wanted, table, table_width, shift_by, MODE: tl.constexpr, PAGE: tl.constexpr):
    """Position in the row -> what the caller asked for; -1 where the page table has no page."""
    result = position + shift_by
    if MODE == 1:
        page = position // PAGE
        entry = tl.load(table + page, mask=wanted & (page < table_width), other=-1)
        result = tl.where(entry >= 0, entry * PAGE + position % PAGE, -1)
    return result


@triton.jit
def _copy_all(
    out, table, table_width, shift_by, block, length,
    K: tl.constexpr, PART: tl.constexpr, MODE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A row of at most K elements: all of them, then -1; this block writes its PART."""
    position = block * PART + tl.arange(0, PART)
    real = position < length
    value = _mapped(position, real, table, table_width, shift_by, MODE, PAGE)
    tl.store(out + position, tl.where(real, value, -1), mask=position < K)


@triton.jit
def _finish(
    keys, low, shift, count, need, mine, out, table, table_width, shift_by, block, length, total,
    KEYS_AT: tl.constexpr, CAP: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, SHARE: tl.constexpr,
    SEGMENT: tl.constexpr, THREADS: tl.constexpr, MODE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The row's `total` candidates hold the top K: find the threshold, place the winners of SHARE segments."""
    keys = tl.where(tl.arange(0, SIZE) < total, keys, 0).to(tl.uint32)
    stored = mine + KEYS_AT
    segments = mine + HEAD
    # What this block will place is read before the threshold is known, so that only counting is left after it.
    segment = block * SHARE
    begin = tl.load(segments + 2 * segment)
    size = tl.load(segments + 2 * segment + 1)
    own, where = _candidates(stored + begin, 0, size, SEGMENT, CAP)
    value = _mapped(where, own > 0, table, table_width, shift_by, MODE, PAGE)
    first = segment * chunk_of(length, B)
    earlier = _earlier(stored + CAP, 0, total, first, SIZE)
    low, shift, need = narrow(keys, stored, total, low, shift, count, need, 0, SIZE, THREADS)
    last = last_of(low, shift)
    before = _count_before(keys, earlier, low, last)
    above, ties = before >> 16, before & HALF
    for at in range(SIZE, total, SIZE):
        before = _count_before(listed(stored, at, total, SIZE), _earlier(stored + CAP, at, total, first, SIZE), low, last)
        above += before >> 16
        ties += before & HALF
    at = 0
    stop = tl.minimum(segment + SHARE, B)
    next_begin = tl.load(segments + 2 * segment + 2, mask=segment + 1 < stop, other=0)
    next_size = tl.load(segments + 2 * segment + 3, mask=segment + 1 < stop, other=0)
    while segment < stop:
        at += SEGMENT
        done = at >= size
        at = tl.where(done, 0, at)
        begin = tl.where(done, next_begin, begin)
        size = tl.where(done, next_size, size)
        segment += done.to(tl.int32)
        # The next part is on its way while this one is counted and placed.
        next_own, where = _candidates(stored + begin, at, tl.where(segment < stop, size, 0), SEGMENT, CAP)
        next_begin = tl.load(segments + 2 * segment + 2, mask=segment + 1 < stop, other=0)
        next_size = tl.load(segments + 2 * segment + 3, mask=segment + 1 < stop, other=0)
        more = _place(own, value, low, last, need, above, ties, out)
        above += more >> 16
        ties += more & HALF
        own = next_own
        value = _mapped(where, own > 0, table, table_width, shift_by, MODE, PAGE)


@triton.jit
def _candidates(stored, at, size, SEGMENT: tl.constexpr, CAP: tl.constexpr):
    """(keys, positions) of a segment from `at` on; key 0 past its end."""
    index = at + tl.arange(0, SEGMENT)
    own = tl.load(stored + index, mask=index < size, other=0).to(tl.uint32, bitcast=True)
    return own, tl.load(stored + CAP + index, mask=index < size, other=0)


@triton.jit
def _earlier(positions, at, total, first, SIZE: tl.constexpr):
    """Which candidates are at positions before `first`."""
    index = at + tl.arange(0, SIZE)
    return tl.load(positions + index, mask=index < total, other=0) < first


@triton.jit
def _count_before(keys, earlier, low, last):
    """Earlier keys above the bin [low, last] (upper half) and in it (lower half)."""
    return tl.sum(tl.where(earlier & (keys >= low), tl.where(keys > last, 1 << 16, 1), 0), 0)


@triton.jit
def _place(keys, value, low, last, need, above, ties, out):
    """Write the values of the winners among `keys` (in position order), `above` higher and `ties` tied before them.

    Returns how many higher (upper half) and tied (lower half) keys there were.
    """
    higher = keys > last
    tied = (keys >= low) & (keys <= last)
    each = tl.where(higher, 1 << 16, tl.where(tied, 1, 0))
    before = tl.cumsum(each, 0) - each
    tie_rank = ties + (before & HALF)
    wins = higher | (tied & (tie_rank < need))
    rank = above + (before >> 16) + tl.minimum(tie_rank, need)
    tl.store(out + rank, value, mask=wins)
    return tl.sum(each, 0)


@triton.jit
def _select_from_row(
    base, low, highest, total, out, table, table_width, shift_by, length,
    K: tl.constexpr, TILE: tl.constexpr, THREADS: tl.constexpr, MODE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One block selects from the whole row by radix passes: for rows with more near-ties than the list holds."""
    above_low = 0
    for at in range(0, length, TILE):
        above_low += tl.sum((keys_at(base, at + tl.arange(0, TILE), length) > low).to(tl.int32), 0)
    # Fewer than K keys exceed the bound: it is itself the threshold, and all that is left is ties.
    shift = tl.where(above_low < K, 0, bits_of(highest - low))
    need = K - tl.where(above_low < K, above_low, 0)
    count = total
    while (shift > 0) & (count > need):
        digits = tl.full((), 1, tl.uint32) << tl.minimum(shift, 3).to(tl.uint32)
        shift = tl.maximum(shift - 3, 0)
        at_least = tl.zeros((8,), tl.int32)
        for at in range(0, length, TILE):
            keys = keys_at(base, at + tl.arange(0, TILE), length)
            at_least += count_at_least(keys, low, shift, digits, TILE, THREADS)
        low, count, need = descend(at_least, low, shift, need)
    last = last_of(low, shift)
    higher, ties = 0, 0
    for at in range(0, length, TILE):
        position = at + tl.arange(0, TILE)
        own = keys_at(base, position, length)
        value = _mapped(position, own >= low, table, table_width, shift_by, MODE, PAGE)
        more = _place(own, value, low, last, need, higher, ties, out)
        higher += more >> 16
        ties += more & HALF
