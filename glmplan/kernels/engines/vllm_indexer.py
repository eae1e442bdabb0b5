"""What does vLLM's sparse indexer get in place of DeepGEMM and its own top-k?

The functions have the engine's signatures (0.33.0: utils/deep_gemm.py, _custom_ops.py, layers/indexer_topk.py and
layers/sparse_attn_indexer.py). Prefill logits are compressed, as the engine's are: row r begins with its own first token, so
its top-k gives positions within the request. Columns past a row's length are left as they are; no caller reads them.
Below sm_89 no Triton kernel may see the type fp8e4nv, not even through a pointer; three of the functions are for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from glmplan.errors import UnsupportedError
from glmplan.kernels.engines.process import compiled_as_asked
from glmplan.kernels.engines.vllm_versions import BACKEND
from glmplan.kernels.indexer_logits import op as logits_op
from glmplan.kernels.topk import op as topk_op

PACKED = "fp8_ds_mla"

_paged_logits = compiled_as_asked(logits_op.paged_logits)
_ragged_logits = compiled_as_asked(logits_op.ragged_logits)
_topk = compiled_as_asked(topk_op.topk)


def prefill_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seqlen_ks: torch.Tensor,
    cu_seqlen_ke: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:
    """f32 [M, max_seqlen_k], row stride a multiple of 4: row r's tokens ks[r] .. ke[r] - 1, from column 0 on.

    q (e4m3 [M, 32, 128], None); kv (e4m3 [N, 128], f32 [N]); weights f32 [M, 32] with q's scale folded in.
    """
    return _ragged_logits(_fp8_only(q), kv, weights.float(), cu_seqlen_ks, cu_seqlen_ke, max_k=max_seqlen_k)


def decode_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    schedule_metadata: torch.Tensor,
    max_model_len: int,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """f32 [B * next_n, max_model_len], row stride a multiple of 4.

    q (e4m3 [B, next_n, 32, 128], None); kv_cache uint8 [pages, 64, 1, 132], a struct of arrays per page; context_lens int32
    [B, next_n], tokens each row sees, or [B, 1], tokens of the request; block_tables int32 [B, pages].
    """
    if indices is not None:
        raise UnsupportedError("vLLM asks for rows of varying draft length, which only its sm_100 indexer has.")
    values = _fp8_only(q)
    if context_lens.dim() == 2 and context_lens.shape[1] != values.shape[1]:
        context_lens = context_lens.squeeze(1)
    if block_tables.stride(-1) != 1:
        block_tables = block_tables.clone(memory_format=torch.contiguous_format)
    return _paged_logits(values, kv_cache, weights.float(), context_lens, block_tables, max_model_len)


def schedule(context_lens: torch.Tensor, block_size: int, num_sms: int, indices: torch.Tensor | None = None) -> torch.Tensor:
    """No rows: ours splits the work on the GPU, and the engine copies as many rows as it gets."""
    return context_lens.new_empty((0, 2))


def decode_topk_of(backend: str) -> Callable[..., None]:
    """What the engine calls for any --kernel-config.sparse_indexer_topk_backend."""
    return decode_topk


def decode_topk(
    logits: torch.Tensor,
    seq_lens: torch.Tensor,
    next_n: int,
    topk_indices: torch.Tensor,
    topk_tokens: int,
    max_seq_len: int,
) -> None:
    """Positions of the topk_tokens largest of each row into topk_indices int32 [rows, topk_tokens], -1 after the last.

    seq_lens int32, one per row, or one per request of next_n rows.
    """
    _topk(logits, row_lengths(seq_lens, next_n, logits.shape[0]), k=topk_tokens, out=topk_indices)


def row_lengths(seq_lens: torch.Tensor, next_n: int, rows: int) -> torch.Tensor:
    """Contiguous int32 [rows]: tokens each row sees; a request's last row sees all of it."""
    if seq_lens.numel() == rows:
        return seq_lens.reshape(-1).contiguous()
    before = torch.arange(1 - next_n, 1, dtype=torch.int32, device=seq_lens.device)
    return (seq_lens.reshape(-1, 1) + before).clamp_(min=0).reshape(-1)


def prefill_topk(
    logits: torch.Tensor,
    cu_seqlen_ks: torch.Tensor,
    cu_seqlen_ke: torch.Tensor,
    raw_topk_indices: torch.Tensor,
    num_rows: int,
    stride0: int,
    stride1: int,
    topk_tokens: int,
) -> None:
    """The same for columns ks[r] .. ke[r] - 1 of row r, as positions from ks[r] on."""
    starts, stops = cu_seqlen_ks[:num_rows], cu_seqlen_ke[:num_rows]
    _topk(logits, stops - starts, row_starts=starts.contiguous(), k=topk_tokens, out=raw_topk_indices)


def merge_ranks(
    logits: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_tokens: int,
    dcp_rank: int,
    dcp_world_size: int,
    cp_interleave: int,
    row_starts: torch.Tensor | None = None,
) -> None:
    """The top-k of all decode-context-parallel ranks as token ids of the request, into topk_indices [rows, topk_tokens].

    Before, topk_indices are positions in this rank's share of the tokens. A token among the best of all is among the best of
    its own rank, so exchanging those is exact.
    """
    if dcp_world_size <= 1:
        return
    from vllm.distributed.parallel_state import get_dcp_group

    own = candidates(logits, topk_indices, dcp_rank, dcp_world_size, cp_interleave, row_starts)
    best_of_all(get_dcp_group().all_gather(own, dim=1), topk_tokens, topk_indices)


def candidates(
    logits: torch.Tensor,
    positions: torch.Tensor,
    rank: int,
    ranks: int,
    interleave: int,
    row_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """f32 [rows, k, 2]: the logit of each position and, as bits, the token id it stands for; -inf and -1 for pads."""
    real = positions >= 0
    at = torch.where(real, positions, 0).long()
    columns = at if row_starts is None else at + row_starts[:, None]
    scores = logits.gather(1, columns) if logits.shape[1] else torch.zeros(at.shape, device=logits.device)
    tokens = (at // interleave * ranks + rank) * interleave + at % interleave
    ids = torch.where(real, tokens, -1).to(torch.int32)
    return torch.stack([torch.where(real, scores, float("-inf")), ids.view(torch.float32)], -1)


def best_of_all(gathered: torch.Tensor, k: int, out: torch.Tensor) -> None:
    """Ids of the k highest of gathered f32 [rows, ranks * k, 2] into out int32 [rows, k]."""
    scores, ids = gathered[..., 0].contiguous(), gathered[..., 1].contiguous().view(torch.int32)
    lengths = torch.full((scores.shape[0],), scores.shape[1], dtype=torch.int32, device=scores.device)
    out.copy_(ids.gather(1, _topk(scores, lengths, k=k).long()))


def kv_cache_format(original: Callable[..., Any], attn_backend: type, kv_cache_dtype: str) -> Any:
    """The row format that a --kv-cache-dtype means; for our backend fp8 is fp8_ds_mla, as it is for FLASHMLA_SPARSE."""
    if attn_backend.get_name() == BACKEND and kv_cache_dtype in ("fp8", "fp8_e4m3"):  # type: ignore[attr-defined]
        return PACKED
    return original(attn_backend, kv_cache_dtype)


def no_cutedsl() -> bool:
    return False


def pack_bytes(
    original: Callable[..., torch.Tensor],
    x: torch.Tensor,
    lengths: torch.Tensor,
    pad_value: float = -float("inf"),
    block_t: int = 64,
    block_d: int = 64,
) -> torch.Tensor:
    """Requests of different length side by side: e4m3 as bytes, pads 0, which no row reads."""
    if x.dtype != torch.float8_e4m3fn:
        return original(x, lengths, pad_value, block_t, block_d)
    return original(x.view(torch.uint8), lengths, 0, block_t, block_d).view(x.dtype)


def warm_up_bytes(original: Callable[..., None], kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Compiles the variant that `pack_bytes` uses in place of the FP8 one."""
    if kwargs.get("dtype") == torch.float8_e4m3fn:
        kwargs |= {"dtype": torch.uint8, "pad_value": 0}
    original(kernel, *args, **kwargs)


def indexer_without_fused_q(original: Callable[..., None], indexer: Any, *args: Any, **kwargs: Any) -> None:
    """Indexer.__init__; then its forward rotates q and quantises it in CUDA."""
    original(indexer, *args, **kwargs)
    indexer.use_fused_indexer_q = False


def _fp8_only(q: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    values, scale = q
    if scale is not None:
        raise UnsupportedError("vLLM's indexer keeps MXFP4 or MXFP8 keys here; glmplan's kernels read e4m3 with F32 scales.")
    return values
