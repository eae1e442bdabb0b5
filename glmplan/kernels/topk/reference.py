"""What top-k means here, in plain PyTorch: a stable sort, the lowest position first among equal logits."""

from __future__ import annotations

import torch


def topk_reference(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    row_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits [N, L] f32, lengths [N], row_starts [N] -> int32 [N, k]: positions relative to the row start, ascending,
    -1 after the last. NaN counts as lower than -inf, -0.0 equals 0.0, equal logits are taken by position."""
    out = torch.full((logits.shape[0], k), -1, dtype=torch.int32, device=logits.device)
    for row in range(logits.shape[0]):
        start = 0 if row_starts is None else max(0, min(int(row_starts[row]), logits.shape[1]))
        length = max(0, min(int(lengths[row]), logits.shape[1] - start))
        values = logits[row, start : start + length].double()
        is_nan = values.isnan()
        order = torch.sort(values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), descending=True, stable=True)[1]
        order = torch.cat([order[~is_nan[order]], torch.nonzero(is_nan).flatten()])
        kept = torch.sort(order[:k])[0]
        out[row, : kept.numel()] = kept.to(torch.int32)
    return out


def map_pages(positions: torch.Tensor, page_table: torch.Tensor, page_size: int, rows_per_table: int = 1) -> torch.Tensor:
    """positions [N, k], page_table [N / rows_per_table, pages] -> slots; -1 where there is no position or no page."""
    table = page_table.long().cpu().repeat_interleave(rows_per_table, 0)
    where = positions.long().cpu()
    page = where.clamp(min=0) // page_size
    real = (where >= 0) & (page < table.shape[1])
    entry = torch.gather(table, 1, torch.where(real, page, 0)) if table.shape[1] else torch.full_like(page, -1)
    slots = torch.where(real & (entry >= 0), entry * page_size + where % page_size, -1)
    return slots.to(torch.int32).to(positions.device)


def add_offsets(positions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """positions [N, k] -> position + offset of the row; -1 stays."""
    return torch.where(positions >= 0, positions + offsets[:, None].to(positions), -1).to(torch.int32)
