"""What are the indexer logits, in plain PyTorch? The truth the kernels are measured against.

Everything is computed in `dtype` (float64 by default) from the decoded e4m3 values, one row of queries at a time.
"""

from __future__ import annotations

import torch

PAGE, HEADS, DIM = 64, 32, 128


def decode(tensor: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """e4m3 bytes -> `dtype`, by torch's own cast."""
    return tensor.view(torch.float8_e4m3fn).to(torch.float32).to(dtype)


def row_logits(
    q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: q [32, 128], k [T, 128], scale [T], weights [32], decoded -> (logits [T], sums of |head terms| [T])."""
    terms = torch.relu(q @ k.T)
    return (weights @ terms) * scale, (weights.abs() @ terms) * scale.abs()


def split_pages(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of 64 x 128 key bytes, THEN 64 F32 scales -> (keys uint8 [P, 64, 128], scales f32 [P, 64])."""
    flat = pages.flatten(1).view(torch.uint8)
    keys = flat[:, : PAGE * DIM].reshape(-1, PAGE, DIM)
    return keys, flat[:, PAGE * DIM :].contiguous().view(torch.float32)


def row_lengths(context_lens: torch.Tensor, next_n: int, limit: int) -> torch.Tensor:
    """[B] or [B, next_n] -> tokens each of the B*next_n rows sees, between 0 and `limit`."""
    if context_lens.dim() == 1:
        step = torch.arange(next_n, device=context_lens.device) - (next_n - 1)
        context_lens = context_lens[:, None] + step[None, :]
    return context_lens.reshape(-1).clamp(0, limit)


def paged_logits_reference(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_len: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B*next_n, max_len] logits with -inf past each length and on pages that do not exist, [B*next_n] error scale).

    The error scale of a row is its largest sum of absolute head terms.
    """
    requests, next_n = q.shape[:2]
    keys, scales = split_pages(pages)
    lengths = row_lengths(context_lens, next_n, min(max_len, block_table.shape[1] * PAGE)).tolist()
    logits = torch.full((requests * next_n, max_len), float("-inf"), dtype=dtype, device=q.device)
    error_scale = torch.zeros(requests * next_n, dtype=dtype, device=q.device)
    for row, length in enumerate(lengths):
        if not length:
            continue
        table = block_table[row // next_n, : (length + PAGE - 1) // PAGE].long()
        real = (table >= 0) & (table < pages.shape[0])
        table = torch.where(real, table, 0)
        k = decode(keys[table], dtype).reshape(-1, DIM)[:length]
        scale = scales[table].to(dtype).reshape(-1)[:length]
        query = decode(q[row // next_n, row % next_n], dtype)
        found, size = row_logits(query, k, scale, weights[row].to(dtype))
        seen = real.repeat_interleave(PAGE)[:length]
        logits[row, :length] = torch.where(seen, found, float("-inf"))
        error_scale[row] = torch.where(seen, size, 0).max()
    return logits, error_scale


def ragged_logits_reference(
    q: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    starts: torch.Tensor,
    stops: torch.Tensor,
    max_k: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([Nq, Nk] or compressed [Nq, max_k] logits with -inf outside each row's tokens, [Nq] error scale)."""
    k, scale = decode(keys[0], dtype), keys[1].to(dtype)
    width = max_k or k.shape[0]
    logits = torch.full((q.shape[0], width), float("-inf"), dtype=dtype, device=q.device)
    error_scale = torch.zeros(q.shape[0], dtype=dtype, device=q.device)
    for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        first, last = max(start, 0), min(stop, k.shape[0])
        shift = first if max_k else 0
        last = min(last, width + shift)
        if first >= last:
            continue
        found, size = row_logits(decode(q[row], dtype), k[first:last], scale[first:last], weights[row].to(dtype))
        logits[row, first - shift : last - shift] = found
        error_scale[row] = size.max()
    return logits, error_scale


def relative_error(got: torch.Tensor, logits: torch.Tensor, error_scale: torch.Tensor) -> float:
    """Worst |got - logits| over the finite entries, each row over its error scale; inf if any is NaN."""
    finite = torch.isfinite(logits)
    if not finite.any():
        return 0.0
    difference = torch.where(finite, (got.to(logits.dtype) - logits).abs(), 0)
    worst = difference / error_scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return float("inf") if worst.isnan().any() else float(worst.max())
