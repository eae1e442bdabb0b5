"""Which tile serves many heads per rank best? Times the candidates of sparse MLA's tiles.py against each other.

`python benchmarks/kernels_tiles.py [--heads 16 64] [--rows 1 16 64 2048]`, native or under
`python -m glmplan.kernels.run_as sm89`. Each candidate runs with the splits `tiles.splits` gives it; rows are drawn from
131,072 slots. Best first; a candidate whose result is off by more than 5e-3 from the kept tile's is said to be wrong. What
the assembler spills is not seen here: `python -m glmplan.kernels.aot sparse_mla SM` is the judge of that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glmplan.kernels import run_as
from glmplan.kernels.results import graph_microseconds
from glmplan.kernels.sparse_mla import op, samples
from glmplan.kernels.sparse_mla.tiles import WIDE, Tile, splits

DEVICE, TOPK, SLOTS, SCALE, LIMIT = "cuda", 2048, 131_072, 0.1, 5e-3
CANDIDATES = (
    WIDE,
    Tile(heads=16, tokens=16, warps=4, groups=4, stages=3, resident=2),
    Tile(heads=16, tokens=16, warps=4, groups=4, stages=2, resident=2),
    Tile(heads=16, tokens=32, warps=4, groups=4, stages=3, resident=2),
    Tile(heads=32, tokens=16, warps=4, groups=4, stages=2, resident=2),
    Tile(heads=32, tokens=16, warps=4, groups=4, stages=3, resident=2),
)


def launch(shape: Tile, heads: int, rows: int) -> op.Launch:
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    programs = rows * triton.cdiv(heads, shape.heads)
    return op.Launch(shape, splits(programs, TOPK, shape.tokens, multiprocessors, shape.resident))


def timed(layout: str, heads: int, rows: int) -> list[tuple[float, str]]:
    """(microseconds, what) of every candidate, best first."""
    kv = samples.kv_rows(layout, SLOTS, DEVICE)
    q = samples.queries(rows, heads, DEVICE)
    drawn = [
        torch.randint(0, SLOTS, (rows, 1, TOPK), dtype=torch.int32, device=DEVICE) for _ in range(8 if rows < 1024 else 1)
    ]
    kept = op.sparse_mla(q, kv, drawn[0], SCALE, launch=launch(WIDE, heads, rows))[0].float()
    found = []
    for shape in CANDIDATES:
        how = launch(shape, heads, rows)
        out = op.sparse_mla(q, kv, drawn[0], SCALE, launch=how)[0].float()
        error = ((out - kept).norm() / kept.norm()).item()
        calls = [lambda one=one, how=how: op.sparse_mla(q, kv, one, SCALE, launch=how) for one in drawn]
        name = f"{shape.heads}x{shape.tokens} {shape.warps} warps {shape.stages} stages, {how.splits} splits"
        found.append((graph_microseconds(calls, 4), name + (" WRONG" if error > LIMIT else "")))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times candidate tiles of sparse MLA on this GPU.")
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 2048])
    asked = parser.parse_args()
    torch.manual_seed(1)
    print(
        f"{torch.cuda.get_device_name()}, kernels for sm_{run_as.target_sm()}, torch {torch.__version__},"
        f" triton {triton.__version__}; top-k {TOPK}; microseconds, best first; kept: {WIDE}"
    )
    for layout in samples.LAYOUTS:
        for heads in asked.heads:
            for rows in asked.rows:
                best = "; ".join(f"{time:.1f} ({what})" for time, what in timed(layout, heads, rows))
                print(f"{layout}, {heads} heads, N={rows}: {best}", flush=True)


if __name__ == "__main__":
    main()
