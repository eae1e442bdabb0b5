"""How many rows one program takes, and with how many warps: one table for every SM, with its reason.

No kernel here uses more than 4 KiB of shared memory, so an SM's limit does not matter; only the number of rows does. Few
rows: few a program, so that they spread over the multiprocessors and each lane waits for one load. Many rows: more a
program, so that each lane has several 16-byte loads in flight and slot ids are read once for them. Measured on an H200
(torch 2.11, triton 3.6): the best of ten tiles at 1 to 131,072 rows; neighbours in the table are within 10 %.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    up_to: int  # rows
    rows: int  # a program
    num_warps: int


ANY = 1 << 62
LATENT_TILES = (Tile(512, 1, 4), Tile(8192, 2, 4), Tile(ANY, 4, 2))
INDEX_TILES = (Tile(8192, 8, 4), Tile(ANY, 16, 2))


def latent_tile(tokens: int) -> Tile:
    return next(tile for tile in LATENT_TILES if tokens <= tile.up_to)


def index_tile(tokens: int) -> Tile:
    return next(tile for tile in INDEX_TILES if tokens <= tile.up_to)
