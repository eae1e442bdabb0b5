"""How fast are the indexer logits, and how near to what their bytes and operations allow?

`python benchmarks/kernels_indexer_logits.py [NAME ...]` prints one line a case: median microseconds by CUDA events over
replays of a graph, bytes and operations counted, the floor they give and the ratio to it, and DeepGEMM's time where it can
be imported (kernels_baselines.py). Fresh random data; every launch of a graph reads other pages of a 554 MB pool, or writes
2 GB, so nothing is read from the L2 cache.
Run under `python -m glmplan.kernels.run_as sm89 benchmarks/kernels_indexer_logits.py` for the code an Ada card would run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import kernels_baselines
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
    aim_us: float | None
    next_n: int = 1

    @property
    def rows(self) -> int:
        return self.requests * self.next_n


PAGED = (
    Case("paged B=1 4,096", 1, 4_096, 7),
    Case("paged B=1 131,072", 1, 131_072, 12),
    Case("paged B=1 1,048,576", 1, 1_048_576, 45),
    Case("paged B=32 131,072", 32, 131_072, 165),
    Case("paged B=8 next_n=2 131,072", 8, 131_072, None, 2),
    Case("paged B=8 next_n=4 131,072", 8, 131_072, None, 4),
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
    weights = torch.randn((case.rows, 32), device="cuda")
    out = torch.empty((case.rows, case.tokens), device="cuda")
    q = samples.e4m3((case.requests, case.next_n, 32, 128), "cuda").view(torch.float8_e4m3fn)
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


def line(case: Case, times: list[float], moved: int, operations: int, rates: tuple[float, float]) -> str:
    floor = max(moved / rates[0], operations / rates[1]) * 1e6
    beside = f"  DeepGEMM {times[1]:8.1f} us" if len(times) > 1 else ""
    return (
        f"{case.name:26} {times[0]:9.1f} us  aim {case.aim_us or '-':>5}  {moved / 1e6:7.1f} MB"
        f" {operations / 1e9:6.1f} GFLOP"
        f"  floor {floor:8.1f} us  ratio {times[0] / floor:5.2f}{beside}"
    )


def paged_line(case: Case, pages: torch.Tensor, rates: tuple[float, float], beside: ModuleType | None) -> str:
    runs: list[Callable[..., object]] = [paged_logits]
    if beside and case.next_n == 1:
        lengths = torch.full((case.requests, 1), case.tokens, dtype=torch.int32, device="cuda")
        runs.append(kernels_baselines.deep_gemm_paged(beside, lengths))
    times = [graph_microseconds(paged_launches(case, pages, run)) for run in runs]
    moved = case.requests * case.tokens * 132 + case.rows * case.tokens * 4
    return line(case, times, moved, case.rows * case.tokens * FLOPS_PER_PAIR, rates)


def ragged_line(case: Case, rates: tuple[float, float], beside: ModuleType | None) -> str:
    runs = [ragged_logits] + ([kernels_baselines.deep_gemm_ragged(beside)] if beside else [])
    times = [graph_microseconds(ragged_launches(case, run), 8) for run in runs]
    pairs = sum(range(case.tokens - case.requests + 1, case.tokens + 1))
    moved = pairs * 4 + case.tokens * 132 + case.requests * 4096
    return line(case, times, moved, pairs * FLOPS_PER_PAIR, rates)


def main(names: list[str]) -> int:
    torch.manual_seed(0)
    beside = kernels_baselines.deep_gemm()
    pages = pool()
    rates = ceilings(pages)
    print(f"{torch.cuda.get_device_name()}, kernels for sm_{target_sm()}, torch {torch.__version__}")
    print(f"plain read {rates[0] / 1e12:.2f} TB/s, fp16 product {rates[1] / 1e12:.0f} TFLOP/s")
    for case in PAGED:
        if not names or any(name in case.name for name in names):
            print(paged_line(case, pages, rates, beside), flush=True)
    del pages
    if not names or any(name in RAGGED.name for name in names):
        print(ragged_line(RAGGED, rates, beside), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
