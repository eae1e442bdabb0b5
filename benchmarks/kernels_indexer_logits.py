"""How fast are the indexer logits, and how near to what their bytes and operations allow?

`python -m benchmarks.kernels_indexer_logits [NAME ...]` prints one line a case: median microseconds by CUDA events over
replays of a graph, bytes and operations counted, the floor they give and the ratio to it. Fresh random data; every launch
of a graph reads other pages of a 554 MB pool, or writes 2 GB, so nothing is read from the L2 cache.
Run under `python -m glmplan.kernels.run_as sm89 benchmarks/kernels_indexer_logits.py` for the code an Ada card would run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from glmplan.kernels.indexer_logits import samples
from glmplan.kernels.indexer_logits.op import paged_logits, ragged_logits
from glmplan.kernels.results import graph_microseconds
from glmplan.kernels.run_as import target_sm

POOL_PAGES = 65_536
PAGE_BYTES = 8_448
FLOPS_PER_PAIR = 2 * 32 * 128
LAUNCHES = 200


class Case(NamedTuple):
    name: str
    requests: int
    tokens: int
    aim_us: float


PAGED = (
    Case("paged B=1 4,096", 1, 4_096, 7),
    Case("paged B=1 131,072", 1, 131_072, 12),
    Case("paged B=1 1,048,576", 1, 1_048_576, 45),
    Case("paged B=32 131,072", 32, 131_072, 165),
)
RAGGED = Case("ragged 4096 x 131,072", 4_096, 131_072, 9_500)


def pool() -> torch.Tensor:
    return samples.paged([POOL_PAGES * 64], "cuda", spare=0).pages


def paged_launches(case: Case, pages: torch.Tensor, run: Callable[..., object]) -> list[Callable[[], object]]:
    """Launches over disjoint sets of pages, together the whole pool or LAUNCHES of them."""
    width = case.tokens // 64
    order = torch.randperm(len(pages), device="cuda").to(torch.int32)
    count = min(LAUNCHES, len(pages) // (width * case.requests))
    tables = order[: count * case.requests * width].view(count, case.requests, width)
    lens = torch.full((case.requests,), case.tokens, dtype=torch.int32, device="cuda")
    weights = torch.randn((case.requests, 32), device="cuda")
    out = torch.empty((case.requests, case.tokens), device="cuda")
    q = samples.e4m3((case.requests, 1, 32, 128), "cuda").view(torch.float8_e4m3fn)
    return [lambda t=t: run(q, pages, weights, lens, t, case.tokens, out=out) for t in tables]


def ragged_launches(case: Case, run: Callable[..., object]) -> list[Callable[[], object]]:
    data = samples.ragged(case.requests, case.tokens, "cuda")
    out = torch.empty((case.requests, case.tokens), device="cuda")
    return [lambda: run(*data, out=out)]


def ceilings(pages: torch.Tensor) -> tuple[float, float]:
    """(bytes/s of a plain read of the pool, FLOP/s of an fp16 matrix product) of this GPU, measured now."""
    flat = pages.view(torch.int64)
    read = graph_microseconds([lambda: torch.sum(flat)])
    a, b = (torch.randn((8192, 8192), device="cuda", dtype=torch.float16) for _ in range(2))
    product = graph_microseconds([lambda: a @ b])
    return pages.numel() / read * 1e6, 2 * 8192**3 / product * 1e6


def line(case: Case, microseconds: float, moved: int, operations: int, rates: tuple[float, float]) -> str:
    floor = max(moved / rates[0], operations / rates[1]) * 1e6
    return (
        f"{case.name:22} {microseconds:9.1f} us  aim {case.aim_us:7.0f}  {moved / 1e6:7.1f} MB {operations / 1e9:6.1f} GFLOP"
        f"  floor {floor:8.1f} us  ratio {microseconds / floor:5.2f}"
    )


def main(names: list[str]) -> int:
    torch.manual_seed(0)
    pages = pool()
    rates = ceilings(pages)
    print(f"{torch.cuda.get_device_name()}, kernels for sm_{target_sm()}, torch {torch.__version__}")
    print(f"plain read {rates[0] / 1e12:.2f} TB/s, fp16 product {rates[1] / 1e12:.0f} TFLOP/s")
    for case in PAGED:
        if names and not any(name in case.name for name in names):
            continue
        pairs = case.requests * case.tokens
        time = graph_microseconds(paged_launches(case, pages, paged_logits))
        print(line(case, time, pairs * (132 + 4), pairs * FLOPS_PER_PAIR, rates), flush=True)
    del pages
    if not names or any(name in RAGGED.name for name in names):
        pairs = sum(range(RAGGED.tokens - RAGGED.requests + 1, RAGGED.tokens + 1))
        time = graph_microseconds(ragged_launches(RAGGED, ragged_logits))
        moved = pairs * 4 + RAGGED.tokens * 132 + RAGGED.requests * 4096
        print(line(RAGGED, time, moved, pairs * FLOPS_PER_PAIR, rates), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
