"""Random inputs of the indexer logits at any shape, for tests, verification and benchmarks.

Values are as an engine's: unit-variance keys and queries in e4m3, scales around 1/64, weights of both signs. Pages are
shuffled and the pool holds spare ones, so that a kernel that ignores the table cannot pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PAGE, HEADS, DIM = 64, 32, 128


class Paged(NamedTuple):
    q: torch.Tensor
    pages: torch.Tensor
    weights: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor


class Ragged(NamedTuple):
    q: torch.Tensor
    keys: tuple[torch.Tensor, torch.Tensor]
    weights: torch.Tensor
    starts: torch.Tensor
    stops: torch.Tensor


def e4m3(shape: tuple[int, ...], device: torch.device | str, gain: float = 1.0) -> torch.Tensor:
    """uint8 holding e4m3 of normal variates, built in slices so that a large pool needs little besides itself."""
    flat = torch.empty(torch.Size(shape).numel(), dtype=torch.uint8, device=device)
    for part in flat.split(1 << 26):
        part.copy_((torch.randn(part.numel(), device=device) * gain).to(torch.float8_e4m3fn).view(torch.uint8))
    return flat.view(shape)


def scales(shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return (torch.rand(shape, device=device) + 0.5) / 64


def paged(
    lengths: list[int], device: torch.device | str, next_n: int = 1, per_token: bool = False, spare: int = 3, width: int = 0
) -> Paged:
    """Requests of `lengths` tokens; `width` pages in the table (default: as many as the longest needs)."""
    requests = len(lengths)
    width = width or max(1, max((n + PAGE - 1) // PAGE for n in lengths))
    owned = [min((n + PAGE - 1) // PAGE, width) for n in lengths]
    pool = sum(owned) + spare
    pages = torch.empty((pool, PAGE * (DIM + 4)), dtype=torch.uint8, device=device)
    pages[:, : PAGE * DIM] = e4m3((pool, PAGE * DIM), device)
    pages[:, PAGE * DIM :] = scales((pool, PAGE), device).view(torch.uint8)
    table = torch.full((requests, width), -1, dtype=torch.int32, device=device)
    order = torch.randperm(pool, device=device).to(torch.int32)
    first = 0
    for request, count in enumerate(owned):
        table[request, :count] = order[first : first + count]
        first += count
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    if per_token:
        lens = (lens[:, None] - torch.arange(next_n - 1, -1, -1, device=device, dtype=torch.int32)).contiguous()
    weights = torch.randn((requests * next_n, HEADS), device=device)
    return Paged(e4m3((requests, next_n, HEADS, DIM), device), pages, weights, lens, table)


def ragged(rows: int, tokens: int, device: torch.device | str, causal: bool = True) -> Ragged:
    """The last `rows` of `tokens` positions, each seeing itself and all before; or everything when not causal."""
    keys = (e4m3((tokens, DIM), device), scales((tokens,), device))
    stops = (
        torch.arange(tokens - rows + 1, tokens + 1, device=device).clamp(min=0) if causal else torch.full((rows,), tokens)
    )
    starts = torch.zeros(rows, dtype=torch.int32, device=device)
    weights = torch.randn((rows, HEADS), device=device)
    return Ragged(e4m3((rows, HEADS, DIM), device), keys, weights, starts, stops.to(torch.int32).to(device))
