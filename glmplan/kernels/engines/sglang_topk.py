"""Which top-k serves SGLang's decode? Ours, for the shape where the engine's has one block per row.

Read in the wheels: sgl_kernel's top-k and 0.5.23's version 2 run on every SM, but outside sm_90 and sm_100 one block walks
a whole row, which is slow for few rows of long context. Prefill has rows enough and stays with the engine's. Ours is also
exact and independent of scheduling, so a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from glmplan.kernels.engines.process import compiled_as_asked
from glmplan.kernels.topk import op

PAGE = 64

_topk_paged = compiled_as_asked(op.topk_paged)


def topk_transform(
    original: Callable[..., torch.Tensor],
    self: Any,
    logits: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    topk_transform_method: Any,
    attn_metadata: Any,
    cu_seqlens_q_topk: torch.Tensor | None = None,
    topk_indices_offset: torch.Tensor | None = None,
    row_starts: torch.Tensor | None = None,
    batch_idx_list: Sequence[int] | None = None,
    force_unfused_topk: bool = False,
) -> torch.Tensor:
    """KV slots int32 [N, topk], -1 padded; logits f32 [N, L], lengths int32 [N]."""
    table = attn_metadata.real_page_table
    decode_shaped = (
        topk_transform_method.name == "PAGED"
        and row_starts is None
        and batch_idx_list is None
        and not force_unfused_topk
        and self.is_sgl_kernel()
        and fuses()
        and 0 < topk <= op.K_MAX
        and attn_metadata.page_size == PAGE
        and lengths.shape[0] == logits.shape[0] == table.shape[0]
        and logits.dtype == torch.float32
        and lengths.dtype == torch.int32
    )
    if decode_shaped:
        return _topk_paged(logits, lengths.contiguous(), table, page_size=PAGE, k=topk)
    return original(
        self, logits, lengths, topk, topk_transform_method, attn_metadata,
        cu_seqlens_q_topk=cu_seqlens_q_topk, topk_indices_offset=topk_indices_offset, row_starts=row_starts,
        batch_idx_list=batch_idx_list, force_unfused_topk=force_unfused_topk,
    )  # fmt: skip


def fuses() -> bool:
    """Whether the engine maps positions to slots inside its top-k, which then is what attention expects of ours."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_DSA_FUSE_TOPK.get())
