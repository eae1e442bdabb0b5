"""What does the sparse-attention indexer think of every token? The two public entries, paged and ragged.

logits[row, t] = k_scale[t] * sum over 32 heads of relu(q[row, head] . k[t]) * weights[row, head]

Inputs are as the engines keep them: q e4m3 with its scale folded into weights, keys e4m3 with one F32 scale per token.
No host synchronisation, no allocation but the result; grids depend on shapes only, so
both can be captured in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton

from glmplan.kernels.indexer_logits import kernel
from glmplan.kernels.indexer_logits.aot import aot_cases
from glmplan.kernels.indexer_logits.checks import check_paged, check_ragged, interpreted, result
from glmplan.kernels.indexer_logits.launch import FILL_BLOCK, FP8_SM, request_block
from glmplan.kernels.indexer_logits.tiles import PagedTile, RaggedTile, group_size, paged_tile, ragged_tile
from glmplan.kernels.run_as import target_sm

PAGE = 64
REQUESTS_PER_LAUNCH = 1024

__all__ = ["aot_cases", "chunk_rows", "paged_logits", "ragged_logits", "request_block"]


def paged_logits(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_len: int,
    *,
    clean_logits: bool = False,
    out: torch.Tensor | None = None,
    tile: PagedTile | None = None,
) -> torch.Tensor:
    """Logits of B requests against the paged index-key cache (decode).

    q            [B, next_n, 32, 128] float8_e4m3fn or uint8 holding e4m3
    pages        [pages, 64*132] or [pages, 64, 1, 132] uint8: per page 64 x 128 e4m3 keys, then 64 F32 scales
    weights      [B*next_n, 32] float32
    context_lens [B] int32, tokens of the request including its next_n new ones: row j sees context_lens - next_n + 1 + j;
                 or [B, next_n] int32, tokens that each row sees
    block_table  [B, max_pages] int32; a token on a page that does not exist (-1, too large) gets -inf
    returns      [B*next_n, max_len] float32, row stride a multiple of 4; past a row's length -inf when `clean_logits`,
                 else untouched. Lengths are cut to max_len and to the width of the table.
    """
    check_paged(q, pages, weights, context_lens, block_table)
    requests, next_n = q.shape[:2]
    out = result(out, requests * next_n, max_len, q.device)
    if out.numel() == 0:
        return out
    limit = min(max_len, block_table.shape[1] * PAGE)
    for first in range(0, requests, REQUESTS_PER_LAUNCH):
        part = slice(first, min(first + REQUESTS_PER_LAUNCH, requests))
        rows = slice(part.start * next_n, part.stop * next_n)
        arguments = (q[part], pages, weights[rows], context_lens[part], block_table[part], out[rows], limit)
        if limit and pages.shape[0]:
            _launch_paged(*arguments, tile)
    if clean_logits or not pages.shape[0]:
        _fill_paged(out, context_lens, next_n, limit if pages.shape[0] else 0)
    return out


def ragged_logits(
    q: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    starts: torch.Tensor,
    stops: torch.Tensor,
    *,
    clean_logits: bool = False,
    max_k: int = 0,
    out: torch.Tensor | None = None,
    tile: RaggedTile | None = None,
) -> torch.Tensor:
    """Logits of Nq query rows against Nk gathered keys (prefill); row r sees tokens starts[r] .. stops[r] - 1.

    q       [Nq, 32, 128] float8_e4m3fn or uint8 holding e4m3
    keys    (k [Nk, 128] e4m3, scale [Nk] float32)
    weights [Nq, 32] float32; starts, stops [Nq] int32
    returns [Nq, Nk] float32, or with `max_k` [Nq, max_k] with row r's tokens from column 0 on; row stride a multiple of 4;
            elsewhere -inf when `clean_logits`, else untouched.
    """
    k, scale = keys
    check_ragged(q, k, scale, weights, starts, stops)
    rows, tokens = q.shape[0], k.shape[0]
    out = result(out, rows, max_k or tokens, q.device)
    if out.numel() == 0:
        return out
    starts, stops, scale = starts.contiguous(), stops.contiguous(), scale.contiguous()
    if clean_logits:
        _fill_ragged(out, starts, stops, tokens, bool(max_k))
    if tokens:
        _launch_ragged(q, k, scale, weights, starts, stops, out, bool(max_k), tile)
    return out


def _launch_paged(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    limit: int,
    tile: PagedTile | None,
) -> None:
    requests, next_n = q.shape[:2]
    group = group_size(next_n)
    tile = tile or paged_tile(_sm(q.device), group)
    groups = triton.cdiv(next_n, group)
    programs = max(1, _sm_count(q.device) * tile.programs_per_sm // (groups * group))
    flat = pages.flatten(1)
    per_token = lengths.dim() == 2
    with _on(q.device):
        kernel.paged_kernel[(min(programs, requests * table.shape[1]), groups)](
            _bytes(q), _bytes(flat), flat.view(torch.float32), weights, lengths, table, out,
            requests, pages.shape[0], limit,
            *q.stride()[:3], flat.stride(0), flat.stride(0) // 4, *weights.stride(),
            lengths.stride(0), lengths.stride(1) if per_token else 0, table.stride(0), out.stride(0),
            NEXT_N=next_n, PER_TOKEN=per_token, G=group, BLOCK_B=request_block(requests),
            DECODE=_decode(q.device), STAGES=tile.stages, num_warps=tile.num_warps, num_stages=tile.stages,
        )  # fmt: skip


def _launch_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    stops: torch.Tensor,
    out: torch.Tensor,
    compressed: bool,
    tile: RaggedTile | None,
) -> None:
    tile = tile or ragged_tile(_sm(q.device))
    rows, tokens = q.shape[0], k.shape[0]
    tiles = triton.cdiv(tokens, tile.tokens)
    chunk = chunk_rows(rows, tiles, tile, _sm_count(q.device))
    with _on(q.device):
        kernel.ragged_kernel[(tiles, triton.cdiv(rows, chunk))](
            _bytes(q), _bytes(k), scale, weights, starts, stops, out,
            rows, tokens, out.shape[1], chunk,
            *q.stride()[:2], k.stride(0), *weights.stride(), out.stride(0),
            T=tile.tokens, CHUNK=tile.chunk, COMPRESSED=compressed, DECODE=_decode(q.device), num_warps=tile.num_warps,
        )  # fmt: skip


def _fill_paged(out: torch.Tensor, lengths: torch.Tensor, next_n: int, limit: int) -> None:
    per_token = lengths.dim() == 2
    with _on(out.device):
        kernel.fill_paged_kernel[(out.shape[0], _fill_parts(out))](
            out, lengths, limit, out.shape[1],
            lengths.stride(0), lengths.stride(1) if per_token else 0, out.stride(0),
            NEXT_N=next_n, PER_TOKEN=per_token, BLOCK=FILL_BLOCK,
        )  # fmt: skip


def _fill_ragged(out: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor, tokens: int, compressed: bool) -> None:
    with _on(out.device):
        kernel.fill_ragged_kernel[(out.shape[0], _fill_parts(out))](
            out, starts, stops, tokens, out.shape[1], out.stride(0), COMPRESSED=compressed, BLOCK=FILL_BLOCK
        )


def chunk_rows(rows: int, tiles: int, tile: RaggedTile, sm_count: int) -> int:
    """Query rows per program: the most that still gives every SM four programs."""
    chunk = tile.chunk
    while chunk > 4 and triton.cdiv(rows, chunk) * tiles < 4 * sm_count:
        chunk //= 2
    return chunk


def _fill_parts(out: torch.Tensor) -> int:
    return max(1, min(triton.cdiv(out.shape[1], FILL_BLOCK), 4096 // out.shape[0]))


def _sm(device: torch.device) -> int:
    return 80 if interpreted() else target_sm(device)


def _sm_count(device: torch.device) -> int:
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _decode(device: torch.device) -> int:
    if interpreted():
        return kernel.PLAIN.value
    return kernel.CONVERT.value if _sm(device) >= FP8_SM else kernel.INTEGER.value


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)
