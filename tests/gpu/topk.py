"""Is top-k exact on this GPU? Run as `python -m tests.gpu.topk`; prints one line per case, exits 1 on any difference.

Every answer is compared element by element with a stable sort. GLMPLAN_RUN_AS=sm89 (or sm80) compiles as
that card would. `--small` runs each kernel on a few small rows and captures no graph, for compute-sanitizer.
"""

from __future__ import annotations

import sys

import torch

from glmplan.kernels.run_as import enable_from_environment
from glmplan.kernels.topk.op import K_MAX, topk, topk_paged, topk_ragged
from glmplan.kernels.topk.reference import add_offsets, map_pages, topk_reference
from glmplan.kernels.topk.verify import PATTERNS, make_logits, wrong_rows

SMALL = "--small" in sys.argv
SHAPES = ((1, 4096), (1, 131_072), (1, 1_048_576), (2, 524_288), (32, 131_072), (7, 33_001), (300, 9000), (1, 2000))
SMALL_SHAPES = ((1, 4096), (7, 9001), (1, 2000), (140, 2500))
VARIANTS = ((1, 70_001), (6, 20_000), (514, 5000))
failures = 0


def report(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    global failures
    wrong = wrong_rows(got, want)
    failures += wrong > 0
    if wrong:
        row = int((got != want).any(1).nonzero()[0])
        column = int((got[row] != want[row]).nonzero()[0])
        print(f"FAIL {name}: {wrong} rows; row {row} column {column}: {got[row, column]} != {want[row, column]}")


def poisoned(rows: int, k: int = K_MAX) -> torch.Tensor:
    return torch.full((rows, k), -77, dtype=torch.int32, device="cuda")


def mixed_lengths(rows: int, width: int) -> torch.Tensor:
    lengths = torch.randint(0, width + 1, (rows,), dtype=torch.int32, device="cuda")
    special = [width, 0, K_MAX, K_MAX + 1, 1, width + 9, -3]
    for row in range(min(rows - 1, len(special))):
        lengths[row] = special[row]
    if rows == 1:
        lengths[0] = width
    return lengths


def patterns() -> None:
    for rows, width in SMALL_SHAPES if SMALL else SHAPES:
        for pattern in PATTERNS:
            few = min(rows, 8) if pattern != "normal" else rows
            logits, lengths = make_logits(pattern, few, width, torch.device("cuda")), mixed_lengths(few, width)
            got = topk(logits, lengths, out=poisoned(few))
            report(f"{pattern} {few}x{width}", got, topk_reference(logits, lengths, K_MAX))
    print("patterns done")


def variants() -> None:
    for rows, width in VARIANTS[1:2] if SMALL else VARIANTS:
        wide = make_logits("ties", rows, width + 7, torch.device("cuda"))
        logits = wide[:, 3:-4]
        starts = torch.randint(-2, width // 2, (rows,), dtype=torch.int32, device="cuda")
        lengths = mixed_lengths(rows, width)
        want = topk_reference(logits, lengths, K_MAX, starts)
        report(f"starts {rows}x{width}", topk(logits, lengths, row_starts=starts, out=poisoned(rows)), want)
        offsets = torch.randint(0, 1 << 20, (rows,), dtype=torch.int32, device="cuda")
        got = topk_ragged(logits, lengths, offsets, row_starts=starts, out=poisoned(rows))
        report(f"ragged {rows}x{width}", got, add_offsets(want, offsets))
        for page_size in (1, 64):
            for shared in (1, 2):
                if rows % shared:
                    continue
                pages = -(-width // page_size) - 3
                table = torch.randint(-1, 1 << 20, (rows // shared, pages + 5), dtype=torch.int32, device="cuda")[:, :pages]
                got = topk_paged(logits, lengths, table, page_size=page_size, row_starts=starts, out=poisoned(rows))
                report(f"paged {rows}x{width} {page_size} {shared}", got, map_pages(want, table, page_size, shared))
    for k in (1, 7, 100, 2047):
        logits, lengths = make_logits("ties", 5, 40_000, torch.device("cuda")), mixed_lengths(5, 40_000)
        report(f"k {k}", topk(logits, lengths, k=k, out=poisoned(5, k)), topk_reference(logits, lengths, k))
    print("variants done")


def replay() -> None:
    """One captured graph, three sets of lengths and logits."""
    rows, width = 8, 60_000
    logits, lengths = make_logits("normal", rows, width, torch.device("cuda")), mixed_lengths(rows, width)
    table = torch.randperm(rows * 1000, device="cuda")[: rows * 938].to(torch.int32).view(rows, 938)
    out = poisoned(rows)
    topk_paged(logits, lengths, table, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk_paged(logits, lengths, table, out=out)
    for seed in range(3):
        logits.copy_(make_logits("ties" if seed == 1 else "normal", rows, width, torch.device("cuda"), seed))
        lengths.copy_(torch.randint(0, width + 1, (rows,), dtype=torch.int32, device="cuda"))
        out.fill_(-77)
        graph.replay()
        want = map_pages(topk_reference(logits, lengths, K_MAX), table, 64)
        report(f"replay {seed}", out, want)
    print("replay done")


def main() -> int:
    enable_from_environment()
    torch.manual_seed(0)
    patterns()
    variants()
    if not SMALL:
        replay()
    print("FAILED" if failures else "all exact")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
