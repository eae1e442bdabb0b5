"""What does SGLang's indexer get in place of DeepGEMM? Logits of the paged index-key cache and of gathered keys.

The functions have DeepGEMM's signatures. Its schedule is not needed: ours splits the work on the GPU, so the schedule is a
constant of the shape that the engine copies between graph replays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from glmplan.kernels.engines.process import compiled_as_asked
from glmplan.kernels.indexer_logits import op

_paged = compiled_as_asked(op.paged_logits)
_ragged = compiled_as_asked(op.ragged_logits)


def num_sms() -> int:
    """Multiprocessors of this process's GPU; the engine sizes the schedule and its batches of requests by it."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def schedule(context_lens: torch.Tensor, block_kv: int, num_sms: int, indices: torch.Tensor | None = None) -> torch.Tensor:
    """int32 [num_sms + 1, 2], the shape DeepGEMM's has; nothing reads it."""
    return torch.zeros((num_sms + 1, 2), dtype=torch.int32, device=context_lens.device)


def paged(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """f32 [B * next_n, max_context_len], row stride a multiple of 4.

    q e4m3 [B, next_n, 32, 128]; kv_cache uint8 [pages, 64, 1, 132], a struct of arrays per page; context_lens int32
    [B, next_n]; block_table int32 [B, pages of the longest].
    """
    return _paged(q, kv_cache, weights, context_lens, block_table, max_context_len, clean_logits=clean_logits)


def ragged(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    clean_logits: bool = False,
    max_seqlen_k: int = 0,
) -> torch.Tensor:
    """f32 [Nq, Nk], row stride a multiple of 4; kv is (e4m3 [Nk, 128], f32 [Nk]); row r sees ks[r] .. ke[r] - 1."""
    return _ragged(q, kv, weights, ks, ke, clean_logits=clean_logits, max_k=max_seqlen_k)


def schedule_function() -> Callable[..., torch.Tensor]:
    return schedule


def paged_function() -> Callable[..., torch.Tensor]:
    return paged


def ragged_function() -> Callable[..., torch.Tensor]:
    return ragged
