"""Is sparse MLA right on this GPU, at sizes and in situations the interpreter cannot reach? Exits 1 when it is not.

`python tests/gpu/sparse_mla.py [--small]`; `python -m glmplan.kernels.run_as sm89 tests/gpu/sparse_mla.py` runs the code of
another SM. `--small` is for compute-sanitizer and captures no graph.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from glmplan.kernels import run_as
from glmplan.kernels.sparse_mla import op, reference, samples

DEVICE, SCALE = "cuda", 0.1
SMALL = "--small" in sys.argv
RELATIVE, OFF_COSINE, LSE = 5e-3, 1e-5, 1e-4
TOPK = 100 if SMALL else 2048
SLOTS = 300 if SMALL else 200_000


def wrong(q, kv, indices, launch=None, **options) -> str:
    """Empty when out and lse agree with fp64; otherwise the three errors."""
    out = torch.full((*q.shape[:2], 512), torch.nan, dtype=q.dtype, device=DEVICE)
    _, lse = op.sparse_mla(q, kv, indices, SCALE, out=out, launch=launch, **options)
    found = samples.errors(out, lse, *reference.sparse_mla(q, kv, indices, SCALE, **options))
    fine = found[0] <= RELATIVE and found[1] <= OFF_COSINE and found[2] <= LSE
    print(f"    relative {found[0]:.2e}, 1 - cosine {found[1]:.1e}, lse {found[2]:.1e}" + ("" if fine else "  WRONG"))
    return "" if fine else str(found)


def layouts_heads_and_rows() -> list[str]:
    found = []
    for layout in samples.LAYOUTS:
        kv = samples.kv_rows(layout, SLOTS, DEVICE)
        for rows, heads in ((1, 8), (2, 1), (3, 64)) if SMALL else ((1, 8), (9, 8), (40, 5), (1100, 8), (3, 64), (130, 16)):
            print(f"  {layout} N={rows} H={heads}")
            indices = samples.hostile_indices(rows + 1, TOPK, SLOTS, DEVICE)
            found.append(wrong(samples.queries(rows + 1, heads, DEVICE), kv, indices))
    return found


def every_tile_split_and_not() -> list[str]:
    found = []
    for layout in samples.LAYOUTS:
        kv = samples.kv_rows(layout, SLOTS, DEVICE)
        for rows, heads in ((1, 8), (8, 8), (2000, 8), (1, 16)):
            shape = op.tile(layout, heads, rows)
            for count in (1, 5):
                print(f"  {layout} {shape} splits={count}")
                q, indices = samples.queries(4, heads, DEVICE), samples.hostile_indices(4, TOPK, SLOTS, DEVICE)
                found.append(wrong(q, kv, indices, op.Launch(shape, count)))
    return found


def far_rows() -> list[str]:
    """Rows past 2**31 bytes and past 2**31 elements of the cache."""
    if SMALL:
        return []
    slots = 4_000_000
    kv = torch.zeros(slots, 1, 576, dtype=torch.bfloat16, device=DEVICE)
    kv[-2000:] = samples.kv_rows("bf16", 2000, DEVICE)
    indices = torch.randint(slots - 2000, slots, (5, 1, TOPK), dtype=torch.int32, device=DEVICE)
    return [wrong(samples.queries(5, 8, DEVICE), kv, indices)]


def nan_everywhere_else() -> list[str]:
    """Rows that no valid id names hold NaN: row 0, the last row, all but the chosen."""
    kv = torch.full((SLOTS, 1, 576), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    kv[50:150] = samples.kv_rows("bf16", 100, DEVICE)
    indices = samples.hostile_indices(6, TOPK, 100, DEVICE)
    indices = torch.where((indices >= 0) & (indices < 100), indices + 50, torch.where(indices == 105, SLOTS, indices))
    return [wrong(samples.queries(6, 8, DEVICE), kv, indices)]


def graph_follows_indices_and_lengths() -> list[str]:
    """One captured graph, replayed after q, indices and lengths changed in place."""
    found = []
    for layout in samples.LAYOUTS:
        for rows in (1, 40):
            kv, q = samples.kv_rows(layout, SLOTS, DEVICE), samples.queries(rows, 8, DEVICE)
            indices = torch.randint(0, SLOTS, (rows, 1, TOPK), dtype=torch.int32, device=DEVICE)
            lengths = torch.full((rows,), TOPK, dtype=torch.int32, device=DEVICE)
            op.sparse_mla(q, kv, indices, SCALE, lengths=lengths)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out, lse = op.sparse_mla(q, kv, indices, SCALE, lengths=lengths)
            for step in range(3):
                q.copy_(samples.queries(rows, 8, DEVICE))
                indices.copy_(torch.randint(-1, SLOTS + 3, indices.shape, device=DEVICE))
                lengths.copy_(torch.randint(0, TOPK + 9, (rows,), device=DEVICE))
                lengths[0] = 37 * step
                out.fill_(torch.nan)
                graph.replay()
                errors = samples.errors(out, lse, *reference.sparse_mla(q, kv, indices, SCALE, lengths))
                fine = errors[0] <= RELATIVE and errors[1] <= OFF_COSINE and errors[2] <= LSE
                print(f"  {layout} N={rows} replay {step}: {'right' if fine else errors}")
                found.append("" if fine else str(errors))
    return found


def main() -> int:
    torch.manual_seed(3)
    print(f"{torch.cuda.get_device_name()}, kernels for sm_{run_as.target_sm()}")
    failed = 0
    checks = (layouts_heads_and_rows, every_tile_split_and_not, far_rows, nan_everywhere_else)
    for check in checks if SMALL else (*checks, graph_follows_indices_and_lengths):
        bad = [one for one in check() if one]
        print(f"{'FAIL' if bad else 'ok':4} {check.__name__}")
        failed += len(bad)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
