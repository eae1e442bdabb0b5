"""Which tile does an indexer-logits kernel use on an SM? One table, with the reason of every choice.

Measured on one H200, native and compiled for sm_89 and sm_80, over the shapes of benchmarks/kernels_indexer_logits.py; no
autotuning at serving time. The same tile won on every SM, so the table has one row a kernel; it stays a function of the
SM because that is what the entries ask. All fit in 99 KiB of shared memory (sm_86, 89, 120), the smallest there is.
"""

from __future__ import annotations

from typing import NamedTuple


class PagedTile(NamedTuple):
    """`programs_per_sm`: programs in flight; each walks its share of all pages with `stages - 1` pages under way."""

    programs_per_sm: int
    num_warps: int
    stages: int


class RaggedTile(NamedTuple):
    """`tokens` keys stay in registers while the rows of a chunk, at most `chunk`, pass by."""

    tokens: int
    chunk: int
    num_warps: int


def group_size(next_n: int) -> int:
    """Draft tokens of one request that share each key tile: up to two. Of four draft tokens, one group of four takes 1.3 to
    1.5 times as long as two and two (2.7 times on sm_90, where wgmma gives every warp some heads of each row and the sum
    crosses warps); one by one is as fast, but reads each key twice as often, from L2 at best."""
    return min(next_n, 2)


def paged_tile(sm: int, group: int) -> PagedTile:
    """Two warps a row, so that each holds 32 tokens and all 32 heads and no sum crosses warps: 4 warps take 1.7 times as
    long, 1 warp 1.07 times. Two pages under way in six programs are 100 KB an SM: more stages gain nothing, fewer lose 10 %.
    A group of G rows needs G times the warps and takes G programs' room."""
    del sm
    return PagedTile(programs_per_sm=6, num_warps=2 * group, stages=3)


def ragged_tile(sm: int) -> RaggedTile:
    """64 tokens a warp: all 255 registers, but each row of q is read from shared memory half as often as with 32, where
    shared memory is the limit. 128 rows of q pay for loading and decoding the keys once."""
    del sm
    return RaggedTile(tokens=256, chunk=128, num_warps=4)
