"""What does SGLang's sparse attention get in place of its Triton and TileLang kernels? One kernel for all three KV formats.

The format is told by the rows: 576 bf16, 656 bytes (packed FP8) or 576 bytes (raw FP8). Shapes are those of
`dsa_backend.py`: q_nope [N, H, 512], q_rope [N, H, 64], kv [slots, 1, width], indices int32 [N, 1, top-k] with pads of -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from glmplan.kernels.engines.process import compiled_as_asked
from glmplan.kernels.sparse_mla import op

OURS = frozenset({"triton", "tilelang"})
COLUMNS = 64

_sparse_mla = compiled_as_asked(op.sparse_mla)


def triton_sparse_mla_fwd(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    topk_length: torch.Tensor | None = None,
    max_topk_length: int | None = None,
) -> torch.Tensor:
    """bf16 [1, N, H, 512]; columns from max_topk_length on hold no index in any row (prefill of short prompts)."""
    if max_topk_length is not None and max_topk_length < indices.shape[-1]:
        indices = indices[..., : -(-max(max_topk_length, 1) // COLUMNS) * COLUMNS]
    return _attend(joined(q_nope, q_rope), kv, indices, sm_scale).unsqueeze(0)


def triton_sparse_mla_decode_splitk(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    kv_splits: int | None = None,
    workspace: object = None,
) -> torch.Tensor:
    """bf16 [1, N, H, 512]; splits and their buffers are ours."""
    return _attend(joined(q_nope, q_rope), kv, indices, sm_scale).unsqueeze(0)


def tilelang(
    self: Any, q_all: torch.Tensor, kv_cache: torch.Tensor, v_head_dim: int, page_table_1: torch.Tensor, sm_scale: float
) -> torch.Tensor:
    """bf16 [N, H, 512] for q_all [N, H, 576] and slot ids int32 [N, top-k] (0.5.23)."""
    return _attend(q_all, kv_cache, page_table_1, sm_scale)


def batched_tilelang(
    self: Any, q_all: torch.Tensor, kv_cache: torch.Tensor, v_head_dim: int, page_table_1: torch.Tensor, sm_scale: float
) -> torch.Tensor:
    """The same with a leading axis of 1, as 0.5.13.post1 has it."""
    return _attend(q_all, kv_cache, page_table_1, sm_scale).unsqueeze(0)


def validate_flashinfer(original: Callable[..., bool], **chosen: Any) -> bool:
    """Is FlashInfer's sm_120 kernel in use? Backends that lead here are allowed beside it."""
    if {chosen["prefill_impl"], chosen["decode_impl"]} <= OURS:
        return False
    return original(**chosen)


def joined(q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
    """[N, H, 576]; without a copy where both are already parts of such a tensor."""
    step = q_nope.shape[-1] * q_nope.element_size()
    together = q_rope.data_ptr() == q_nope.data_ptr() + step and q_rope.stride() == q_nope.stride()
    if together and q_nope.stride(-1) == 1 and q_nope.dtype == q_rope.dtype:
        return q_nope.as_strided((*q_nope.shape[:2], q_nope.shape[2] + q_rope.shape[2]), q_nope.stride())
    return torch.cat([q_nope, q_rope], dim=-1)


def _attend(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sm_scale: float) -> torch.Tensor:
    out: torch.Tensor = _sparse_mla(q, kv, indices, sm_scale)[0]
    return out
