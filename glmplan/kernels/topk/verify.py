"""Does top-k give exactly the reference's answer on this GPU, and how long does it take?

`cases(device)` runs a handful of shapes and hostile inputs; `error` counts rows that differ from the stable reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from glmplan.kernels.results import Result, checked, graph_microseconds
from glmplan.kernels.topk.op import K_MAX, topk, topk_paged, topk_ragged
from glmplan.kernels.topk.reference import add_offsets, map_pages, topk_reference

PATTERNS = ("normal", "ties", "equal", "ramp", "clump", "sink", "infinite", "nan", "zeros")


def make_logits(pattern: str, rows: int, width: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """[rows, width] f32 of one kind: each pattern is an input that breaks some way of selecting."""
    generator = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(rows, width, device=device, generator=generator)
    column = torch.arange(width, device=device)
    if pattern == "ties":
        x = (x * 4).round() / 4
    elif pattern == "equal":
        x = torch.full_like(x, -1.5)
    elif pattern == "ramp":
        x = column.float().expand(rows, width).contiguous()
    elif pattern == "clump":
        x = x + 10.0 * ((column > width // 3) & (column < width // 3 + 3000))
    elif pattern == "sink":
        x[:, : min(4, width)] = 1e30
        x[:, width // 2 :] -= 100.0
    elif pattern == "infinite":
        x = torch.where(x > 2.5, x, -torch.inf)
        x[:, ::997] = torch.inf
    elif pattern == "nan":
        x = torch.where(x.abs() < 1.5, torch.nan, x)
        x[0] = torch.nan
    elif pattern == "zeros":
        x = torch.where(x > 2.6, x, torch.where(column % 2 == 0, 0.0, -0.0))
    return x


def wrong_rows(got: torch.Tensor, want: torch.Tensor) -> int:
    return int((got != want).any(1).sum())


def cases(device: torch.device | str = "cuda") -> list[Result]:
    """One Result per variant and pattern."""
    return list(_cases(torch.device(device)))


def _cases(device: torch.device) -> Iterator[Result]:
    rows, width = 4, 20_000
    lengths = torch.tensor([width, 0, K_MAX + 1, width - 77], dtype=torch.int32, device=device)
    for pattern in PATTERNS:
        logits = make_logits(pattern, rows, width, device)
        want = topk_reference(logits, lengths, K_MAX)
        yield _result(f"f32 logical, {pattern}", lambda x=logits: topk(x, lengths), want)
    logits = make_logits("normal", rows, width, device, seed=1)
    want = topk_reference(logits, lengths, K_MAX)
    offsets = torch.tensor([0, 5, 1000, 7], dtype=torch.int32, device=device)
    yield _result("f32 ragged", lambda: topk_ragged(logits, lengths, offsets), add_offsets(want, offsets))
    for page_size in (64, 1):
        pages = -(-width // page_size)
        table = torch.randperm(rows * pages, device=device).to(torch.int32).view(rows, pages)
        yield _result(
            f"f32 paged, page {page_size}",
            lambda t=table, p=page_size: topk_paged(logits, lengths, t, page_size=p),
            map_pages(want, table, page_size),
        )


def _result(name: str, call: Callable[[], torch.Tensor], want: torch.Tensor) -> Result:
    wrong = wrong_rows(call(), want)
    return checked("topk", name, float(wrong), 0.0, graph_microseconds([call]))
