"""How floats become keys, and how the n-th largest of many keys is found: the parts all top-k kernels share.

Keys are uint32 and order as the floats do: 0 = no element, 1 = NaN (the lowest), -0.0 = 0.0.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALF = tl.constexpr(0xFFFF)


@triton.jit
def ordered(x):
    """f32 -> uint32 that sorts the same; NaN is 1, below -inf; -0.0 is 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)
    signed = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = signed.to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 1, key).to(tl.uint32)


@triton.jit
def row_of(logits, lengths, row_starts, row, stride, width, HAS_STARTS: tl.constexpr):
    """(pointer to the row's first logit, its length), clamped to the row whatever the inputs say."""
    start = 0
    if HAS_STARTS:
        start = tl.minimum(tl.maximum(tl.load(row_starts + row), 0), width)
    length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), width - start)
    return logits + row.to(tl.int64) * stride + start, length


@triton.jit
def logits_at(base, index, length, PADDED: tl.constexpr):
    """Logits at `index`, NaN past `length`. PADDED: up to the next multiple of 4 may be read, 16 bytes at once."""
    if PADDED:
        x = tl.load(base + index, mask=index < tl.cdiv(length, 4) * 4, other=float("nan"))
        return tl.where(index < length, x, float("nan"))
    return tl.load(base + index, mask=index < length, other=float("nan"))


@triton.jit
def key_load(at):
    """Keys that the workspace holds as int32, with nothing masked."""
    return tl.load(at).to(tl.uint32, bitcast=True)


@triton.jit
def keys_at(base, index, length):
    """Keys at `index`, 0 past `length`."""
    return tl.where(index < length, ordered(logits_at(base, index, length, False)), 0).to(tl.uint32)


@triton.jit
def chunk_of(length, B: tl.constexpr):
    """Positions per block: all blocks share the row's real length, in steps of 16."""
    return tl.cdiv(tl.cdiv(length, B), 16) * 16


@triton.jit
def bits_of(span):
    """Bits of `span` (uint32); at most one too many, from rounding."""
    return tl.maximum((span.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def count_at_least(keys, low, shift, digits, SIZE: tl.constexpr, THREADS: tl.constexpr, OPEN: tl.constexpr = False):
    """[8] counts of keys at `low` or above whose digit (bits from `shift` up, below `digits` <= 8) is at least 0 ... 7.

    OPEN: keys past the last digit count as having it.

    In no particular order. Counts travel packed: nibbles within 4 keys, bytes within a thread, halves across threads.
    """
    LANES: tl.constexpr = THREADS if THREADS * 4 <= SIZE else SIZE // 4
    digit = (keys - low) >> shift.to(tl.uint32)
    if OPEN:
        digit = tl.minimum(digit, 7)
    inside = (keys >= low) & (digit < digits)
    ones = tl.where(inside, 0x11111111 >> ((28 - 4 * digit) & 31).to(tl.int32), 0)
    fours = tl.sum(tl.reshape(ones, (SIZE // (4 * LANES), LANES, 4)), 2)
    even = tl.sum(fours & 0x0F0F0F0F, 0)
    odd = tl.sum((fours >> 4) & 0x0F0F0F0F, 0)
    first = tl.join(even & 0x00FF00FF, odd & 0x00FF00FF)
    second = tl.join((even >> 8) & 0x00FF00FF, (odd >> 8) & 0x00FF00FF)
    words = tl.sum(tl.reshape(tl.join(first, second), (LANES, 4)), 0)
    return tl.reshape(tl.join(words & HALF, words >> 16), (8,))


@triton.jit
def listed(stored, at, stop, SIZE: tl.constexpr):
    """Keys stored at `stored` + at ...; 0 from `stop` on."""
    index = at + tl.arange(0, SIZE)
    return tl.load(stored + index, mask=index < stop, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def descend(at_least, low, shift, need):
    """(low, keys inside, need inside) of the digit that holds the `need`-th largest key; `at_least` as counted."""
    chosen = tl.sum((at_least >= need).to(tl.int32), 0) - 1
    above = tl.max(tl.where(at_least >= need, 0, at_least), 0)
    inside = tl.min(tl.where(at_least >= need, at_least, 0x7FFFFFFF), 0) - above
    return low + (chosen.to(tl.uint32) << shift.to(tl.uint32)), inside, need - above


@triton.jit
def narrow(keys, more, stop, low, shift, inside_count, need, slack, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Radix descent from the bin [low, low + 2**shift) to the one of the `need`-th largest key in it.

    The keys are the SIZE given, and those stored at `more` from SIZE up to `stop` (none if that is less). Stops once
    at most `slack` more keys than needed are in the bin, or it is one key wide.
    Returns (low, shift, need within the bin). Keys outside the bin do not count.
    """
    need = tl.zeros((), tl.int32) + need
    inside_count = tl.zeros((), tl.int32) + inside_count
    while (shift > 0) & (inside_count - need > slack):
        digits = tl.full((), 1, tl.uint32) << tl.minimum(shift, 3).to(tl.uint32)
        shift = tl.maximum(shift - 3, 0)
        at_least = count_at_least(keys, low, shift, digits, SIZE, THREADS)
        for at in range(SIZE, stop, SIZE):
            at_least += count_at_least(listed(more, at, stop, SIZE), low, shift, digits, SIZE, THREADS)
        low, inside_count, need = descend(at_least, low, shift, need)
    return low, shift, need


@triton.jit
def last_of(low, shift):
    """Highest key of the bin [low, low + 2**shift), saturating at 2**32 - 1."""
    width = (tl.full((), 1, tl.uint64) << shift.to(tl.uint64)) - 1
    return tl.minimum(low.to(tl.uint64) + width, 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def bin_shift(bound, highest, BINS_LOG2: tl.constexpr):
    """Width of a histogram bin as a power of two: the bins cover the lowest eighth of the keys' range, where the
    threshold is expected; the last one takes everything above."""
    return tl.maximum(bits_of(highest - bound) - BINS_LOG2 - 3, 0)


@triton.jit
def _ranks(count, above, upto, other_count, other_above, other_upto):
    return count + other_count, tl.maximum(above, other_above), tl.minimum(upto, other_upto)


@triton.jit
def threshold_bin(counts, bound, highest, total, need, BINS_LOG2: tl.constexpr):
    """(low, shift, keys inside, need inside) of the histogram bin with the `need`-th largest of `total` keys."""
    at_least = total - tl.cumsum(counts, 0) + counts
    enough = at_least >= need
    chosen, above, upto = tl.reduce(
        (enough.to(tl.int32), tl.where(enough, 0, at_least), tl.where(enough, at_least, 0x7FFFFFFF)), 0, _ranks
    )
    chosen -= 1
    shift = bin_shift(bound, highest, BINS_LOG2)
    low = bound + (chosen.to(tl.uint32) << shift.to(tl.uint32))
    shift = tl.where(chosen == (1 << BINS_LOG2) - 1, bits_of(highest - low), shift)
    return low, shift, upto - above, need - above


@triton.jit
def float_of(key):
    """The float of a key above 1."""
    signed = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (signed ^ ((signed >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
