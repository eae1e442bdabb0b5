"""How do FP8 KV rows get into SGLang's pool on GPUs whose Triton has no FP8 type? Quantised and written by one kernel of
ours.

Packed rows are 656 bytes and raw rows 576, as the pool allocated them; anything else is left to the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from glmplan.kernels.engines.process import compiled_as_asked
from glmplan.kernels.kv_quant import op

_write_packed = compiled_as_asked(op.write_packed_rows)
_write_raw = compiled_as_asked(op.write_raw_rows)


def write_mla_kv_buffer(
    original: Callable[..., None],
    self: Any,
    dst_buffer: torch.Tensor,
    loc: torch.Tensor,
    cache_k_nope: torch.Tensor,
    cache_k_rope: torch.Tensor,
) -> None:
    """0.5.23: rows of one layer to the slots `loc`."""
    if self.use_dsa and self._write_loc_dcp_span == 1 and write_rows(dst_buffer, loc, cache_k_nope, cache_k_rope):
        return
    original(self, dst_buffer, loc, cache_k_nope, cache_k_rope)


def set_mla_kv_buffer(
    original: Callable[..., None],
    self: Any,
    layer: Any,
    loc: torch.Tensor,
    cache_k_nope: torch.Tensor,
    cache_k_rope: torch.Tensor,
) -> None:
    """0.5.13.post1: the same, for the layer by its id."""
    buffer = self.kv_buffer[layer.layer_id - self.start_layer]
    if self.use_dsa and write_rows(buffer, loc, cache_k_nope, cache_k_rope):
        return
    original(self, layer, loc, cache_k_nope, cache_k_rope)


def write_rows(buffer: torch.Tensor, loc: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor | None) -> bool:
    """True when the rows were FP8 and are written. latent bf16 [N, 1, 512] or [N, 512], rope likewise with 64."""
    width = buffer.shape[-1]
    if buffer.element_size() != 1 or width not in (op.PACKED_BYTES, op.RAW_BYTES):
        return False
    if rope is None or rope.shape[-1] != op.ROPE or latent.dtype != torch.bfloat16 or rope.dtype != torch.bfloat16:
        return False
    count = loc.numel()
    latent, rope = (_flat(tensor)[:count] for tensor in (latent, rope))
    (_write_packed if width == op.PACKED_BYTES else _write_raw)(buffer, latent, rope, loc.reshape(-1))
    return True


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.squeeze(1) if tensor.dim() == 3 else tensor
