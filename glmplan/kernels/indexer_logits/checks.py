"""Can the indexer-logits kernels take these tensors? Every refusal is one sentence with the value and what is needed."""

from __future__ import annotations

import torch
from triton.runtime.jit import JITFunction

from glmplan.errors import UsageError
from glmplan.kernels.indexer_logits import kernel

HEADS, DIM, PAGE = 32, 128, 64
PAGE_BYTES = PAGE * (DIM + 4)


def interpreted() -> bool:
    """True under TRITON_INTERPRET=1, where the kernels run on the CPU."""
    return not isinstance(kernel.paged_kernel, JITFunction)


def result(out: torch.Tensor | None, rows: int, width: int, device: torch.device) -> torch.Tensor:
    if out is None:
        return torch.empty((rows, (width + 3) // 4 * 4), dtype=torch.float32, device=device)[:, :width]
    if out.dtype != torch.float32 or tuple(out.shape) != (rows, width) or out.device != device:
        raise UsageError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; needed is float32 {(rows, width)} on {device}."
        )
    if out.stride(1) != 1 or out.stride(0) % 4:
        raise UsageError(f"out has strides {out.stride()}; its rows must be contiguous and a multiple of 4 apart.")
    return out


def check_paged(
    q: torch.Tensor, pages: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor
) -> None:
    _check_e4m3("q", q, 4)
    requests, next_n = q.shape[:2]
    _check_shape("weights", weights, (requests * next_n, HEADS), torch.float32)
    _check_shape("block_table", table, (requests, table.shape[-1]), torch.int32)
    wanted = (requests,) if lengths.dim() == 1 else (requests, next_n)
    _check_shape("context_lens", lengths, wanted, torch.int32)
    bytes_per_page = pages[0].numel() if pages.dim() > 1 and pages.shape[0] else PAGE_BYTES
    if pages.element_size() != 1 or bytes_per_page != PAGE_BYTES:
        raise UsageError(
            f"pages is {pages.dtype} {tuple(pages.shape)}; needed is one byte type with {PAGE_BYTES} bytes a page."
        )
    if pages.shape[0] and (not pages[0].is_contiguous() or pages.stride(0) % 4):
        raise UsageError(
            f"pages has strides {pages.stride()}; a page must be contiguous and start at a multiple of 4 bytes."
        )
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise UsageError(f"block_table has strides {table.stride()}; its rows must be contiguous.")
    _check_devices(q, pages, weights, lengths, table)


def check_ragged(
    q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor
) -> None:
    _check_e4m3("q", q, 3)
    rows = q.shape[0]
    if k.dim() != 2 or k.shape[1] != DIM or k.element_size() != 1 or k.stride(1) != 1:
        raise UsageError(
            f"k is {k.dtype} {tuple(k.shape)} with strides {k.stride()}; needed is e4m3 [Nk, {DIM}], rows contiguous."
        )
    _check_shape("k_scale", scale, (k.shape[0],), torch.float32)
    _check_shape("weights", weights, (rows, HEADS), torch.float32)
    _check_shape("starts", starts, (rows,), torch.int32)
    _check_shape("stops", stops, (rows,), torch.int32)
    _check_devices(q, k, scale, weights, starts, stops)


def _check_e4m3(name: str, tensor: torch.Tensor, dims: int) -> None:
    right_type = tensor.dtype in (torch.uint8, torch.float8_e4m3fn)
    if not right_type or tensor.dim() != dims or tuple(tensor.shape[-2:]) != (HEADS, DIM):
        raise UsageError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; needed is e4m3 (or uint8) with {HEADS} heads of {DIM} last."
        )
    if tensor.stride(-1) != 1:
        raise UsageError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous.")


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise UsageError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; needed is {dtype} {shape}.")


def _check_devices(*tensors: torch.Tensor) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise UsageError(f"The inputs are on {', '.join(sorted(map(str, devices)))}; they must be on one device.")
    if next(iter(devices)).type != "cuda" and not interpreted():
        raise UsageError("The inputs are not on a CUDA GPU.", "Move them to one; on the CPU only TRITON_INTERPRET=1 runs.")
