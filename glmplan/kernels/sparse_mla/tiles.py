"""Which tile a query gets, and into how many splits its top-k is cut: one table, with its reasons.

Every tile needs less than 64 KB of shared memory, so each serves every SM from 80 to 120 and no row depends on the SM.
Shared memory of `attend`, bytes: (stages - 1) row tiles (tokens x row) + q (1152 x heads) + exchange of S and p (2 KB).
Tiles were chosen by sweeping tokens, warps and stages on one H200 (code for sm_89), see README.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One program of `attend`: heads x tokens, by `warps` that share out `groups` of latent columns.

    `stages` - 1 row tiles are in shared memory at once; `resident` is how many programs an SM's registers hold.
    """

    heads: int
    tokens: int
    warps: int
    groups: int
    stages: int
    resident: int

    def shared_bytes(self, row_bytes: int) -> int:
        return (self.stages - 1) * self.tokens * row_bytes + 1152 * self.heads + 2048


# A handful of queries: latency counts, so four warps share one 16-token tile and 128 programs serve one query.
FEW = Tile(heads=8, tokens=16, warps=4, groups=4, stages=3, resident=3)
FEW_ROWS = 4
# Otherwise two warps a program: half the exchange of S per token, and more programs to hide each other's latency. Packed
# rows have four scales, so four groups; their tile is small enough for 32 tokens, which halves the exchanges of S again.
PACKED = Tile(heads=8, tokens=32, warps=2, groups=4, stages=2, resident=4)
RAW = Tile(heads=8, tokens=16, warps=2, groups=2, stages=3, resident=6)
BF16 = Tile(heads=8, tokens=16, warps=2, groups=2, stages=3, resident=4)
# Thousands of queries in bf16: other programs hide the latency, and a single row tile leaves shared memory to more of them.
BF16_MANY = Tile(heads=8, tokens=16, warps=2, groups=2, stages=2, resident=5)
MANY_ROWS = 1024
# More than 8 heads: 16 fill the tensor cores' tile; accumulators double, so four warps hold them. 32 tokens halve the
# exchanges of S: 1.7 times the speed of 16 with FP8 rows, 1.05 with bf16.
WIDE = Tile(heads=16, tokens=32, warps=4, groups=4, stages=2, resident=2)

TILES = (FEW, PACKED, RAW, BF16, BF16_MANY, WIDE)


def tile(layout: str, heads: int, rows: int) -> Tile:
    if heads > 8:
        return WIDE
    if rows <= FEW_ROWS:
        return FEW
    if layout == "bf16":
        return BF16_MANY if rows >= MANY_ROWS else BF16
    return PACKED if layout == "packed" else RAW


def splits(programs: int, topk: int, tokens: int, multiprocessors: int, resident: int) -> int:
    """How many programs share one query's top-k; `programs` is queries x head blocks.

    Least of waves x (tokens per program + 48) x slowdown: starting, the first gather and the partial result cost as much as
    48 tokens; programs of one SM slow each other beyond two, by the power 0.7 (fitted to N = 1, 8, 32, 128 on one H200).
    No splits once the queries alone fill the GPU: partial results would then cost memory without gain.
    """
    slots = multiprocessors * resident
    tiles = -(-topk // tokens)
    best, best_cost = 1, float("inf")
    for count in range(1, min(tiles, 128) + 1 if programs < slots else 2):
        per_program = -(-tiles // count)
        if -(-tiles // per_program) != count:
            continue
        waves = -(-programs * count // slots)
        crowd = min(programs * count / multiprocessors, resident)
        cost = waves * (per_program * tokens + 48) * max(1.0, crowd / 2) ** 0.7
        if cost < best_cost:
            best, best_cost = count, cost
    return best
