"""How large are the pieces of one top-k launch, and why?

One table by SM. Tiles are held in registers, and shared memory is only scratch for scans and counts (16 KiB at most), so
no SM's shared-memory limit binds; registers do: 16 keys a thread stay within 128 of them. Sizes are elements unless named;
the timings behind the choices are in README.md.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD_INTS = 4


class Choice(NamedTuple):
    """What differs by SM; each value's reason is beside the table."""

    group_warps: int
    filter_warps: int
    finish_warps: int
    segment: int


# group_warps is for few rows, where a block has a deep tile of loads in flight; with many rows half of it.
# 8 warps: 4,096 keys are 16 a thread, and scans and counts cross 8 warps, not 16.
# Segment, the winners placed at once: two a thread, but one on sm_120, where ptxas spills up to 32 bytes with two.
TABLE = {sm: Choice(16, 8, 8, 256 if sm == 120 else 512) for sm in (80, 86, 89, 90, 120)}

MIN_TILE = 1024  # less work than this does not pay for the bound every filter block derives
MAX_TILE = 4096  # keys a filter block holds at once
OWN_BOUND_WAVES = 1  # up to one filter block per multiprocessor each derives the bound; beyond, a launch does it once
GROUP_TILE = 8192  # loads in flight per block of the first launch; a quarter of it with many rows
SLACK_PART = 8  # the bound may let K / 8 groups too many pass: one counting step less, 300 candidates more
FINISH_BLOCKS = 128  # winners and page entries of one row are spread over as many multiprocessors
FINISH_WAVES = 2  # finish blocks per multiprocessor with many rows; each repeats the search for the threshold
# Two finish blocks a multiprocessor. Without a limit, Triton 3.8's ptxas aims at three in some variants and spills 8 bytes,
# and on sm_120 spills 56 bytes at the same 128 registers.
FINISH_REGISTERS = 128
SLAB_ROWS = 256  # rows per launch: bounds the workspace at 38 MB whatever N is


class Tiles(NamedTuple):
    """One launch: block counts, tile sizes, and where things lie in a row of the workspace."""

    groups: int
    cap: int
    small: int
    slack: int
    blocks: int
    group_cols: int
    group_rows: int
    tile: int
    own_bound: bool
    share: int
    segment: int
    part: int
    group_warps: int
    bound_warps: int
    filter_warps: int
    finish_warps: int

    @property
    def groups_at(self) -> int:
        return HEAD_INTS + -(-2 * self.blocks // 4) * 4

    @property
    def bins_log2(self) -> int:
        """The histogram has half as many bins as there are groups."""
        return (self.groups // 2).bit_length() - 1

    @property
    def keys_at(self) -> int:
        return self.groups_at + self.groups + self.groups // 2

    @property
    def finish_blocks(self) -> int:
        return -(-self.blocks // self.share)

    @property
    def work_ints(self) -> int:
        """int32 of workspace per row."""
        return -(-(self.keys_at + 2 * self.cap) // 16) * 16


def known_sm(sm: int) -> int:
    """The nearest SM of the table that is not newer; the oldest for anything older."""
    return max((known for known in TABLE if known <= sm), default=min(TABLE))


def choose(sm: int, rows: int, width: int, k: int, multiprocessors: int) -> Tiles:
    """Tiles for `rows` rows of `width` logits on a GPU with that many multiprocessors; depends on shapes only."""
    choice = TABLE[known_sm(sm)]
    groups = max(64, 2 * _power(k))  # twice K: half the groups win, and about 1.4 K keys pass the bound
    per_multiprocessor = _power(-(-rows * width // multiprocessors))
    tile = min(max(MIN_TILE, per_multiprocessor), MAX_TILE)
    blocks = max(1, -(-width // tile))
    share = -(-blocks // max(1, min(FINISH_BLOCKS, FINISH_WAVES * multiprocessors // max(1, rows))))
    group_cols = min(max(32, _power(groups * rows // (4 * multiprocessors))), groups)
    own_bound = rows * blocks <= OWN_BOUND_WAVES * multiprocessors
    # One row: few blocks, so each has all its loads in flight at once. Many rows: smaller tiles, more blocks.
    group_tile = GROUP_TILE if rows < 4 else GROUP_TILE // 4
    group_rows = min(_power(-(-width // groups)), max(1, group_tile // group_cols))
    return Tiles(
        groups=groups,
        cap=4 * groups,
        small=groups,
        slack=max(1, k // SLACK_PART),
        blocks=blocks,
        group_cols=group_cols,
        group_rows=group_rows,
        tile=tile,
        own_bound=own_bound,
        share=share,
        segment=min(choice.segment, 2 * groups),
        part=_power(-(-k // -(-blocks // share))),
        group_warps=choice.group_warps if group_rows * group_cols > 4096 else choice.group_warps // 2,
        bound_warps=choice.filter_warps,
        filter_warps=choice.filter_warps if own_bound or rows < 4 else choice.filter_warps // 2,
        finish_warps=choice.finish_warps,
    )


def _power(value: int) -> int:
    """The smallest power of two not below `value`."""
    return 1 << max(0, value - 1).bit_length()
