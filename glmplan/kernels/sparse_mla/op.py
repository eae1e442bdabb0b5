"""What do these queries read from the KV rows the indexer chose? Sparse MLA attention, absorbed form, decode and prefill.

q is already multiplied by w_kc: [N, H, 512 latent + 64 rope]; the value of a row is its first 512 numbers.
A KV row is one of:
- bf16: 576 bf16 (1152 bytes);
- packed: 656 bytes: 512 e4m3, 4 F32 scales (one per 128 latent values), 64 BF16 rope;
- raw: 576 e4m3 under one scale for the whole cache.
e4m3 bytes 0x7F and 0xFF (NaN) in a chosen row read as +-480. Nothing waits for the GPU; grids and allocations depend on
N, H and top-k alone, never on the number of slots, so a captured CUDA graph follows changed indices and lengths.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs

from glmplan.errors import UsageError
from glmplan.kernels.sparse_mla import kernel
from glmplan.kernels.sparse_mla.tiles import TILES, Tile, splits, tile

LATENT, ROPE = 512, 64
WIDTH, PACKED_BYTES = LATENT + ROPE, 656
BYTES = (torch.uint8, torch.float8_e4m3fn)
# float16 is for the interpreter only, which mishandles bf16 dots
HALF = (torch.bfloat16, torch.float16) if knobs.runtime.interpret else (torch.bfloat16,)
MAX_HEADS = 64


class Launch(NamedTuple):
    """How one call is spread over the GPU; `choose` makes it."""

    tile: Tile
    splits: int


def sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    *,
    lengths: torch.Tensor | None = None,
    kv_scale: float = 1.0,
    out: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the chosen rows: softmax(q k^T * sm_scale) v.

    q bf16 [N, H, 576], H 1..64, last dimension contiguous; kv [slots, 576 or 656] or [slots, 1, ...] bf16, uint8 or
    e4m3, rows 16-byte aligned; indices int32 [N, topk] or [N, 1, topk], pads -1: ids outside [0, slots) are ignored, a
    repeated id counts each time; lengths int32 [N]: look at the first lengths[n] indices only (all when None); kv_scale:
    of raw rows; out bf16 [N, H, 512], contiguous, to fill instead of a new one.
    Returns out bf16 [N, H, 512] and lse f32 [N, H], the natural log of the summed exponentials; a row with no valid id
    gives 0 and -inf.
    """
    rows = _rows(kv)
    indices = indices.squeeze(1) if indices.dim() == 3 else indices
    _check(q, rows, indices, lengths)
    count, heads = q.shape[:2]
    if out is None:
        out = torch.empty(count, heads, LATENT, dtype=q.dtype, device=q.device)
    elif out.shape != (count, heads, LATENT) or not out.is_contiguous():
        raise UsageError(f"out is {list(out.shape)}; it must be a contiguous {[count, heads, LATENT]}.")
    lse = torch.empty(count, heads, dtype=torch.float32, device=q.device)
    if not count:
        return out, lse
    launch = launch or choose(q, rows, indices.shape[1])
    if launch.splits == 1:
        _attend(q, rows, indices, lengths, sm_scale, kv_scale, out, lse, launch)
        return out, lse
    partial = torch.empty(count, launch.splits, heads, LATENT, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(count, launch.splits, heads, dtype=torch.float32, device=q.device)
    _attend(q, rows, indices, lengths, sm_scale, kv_scale, partial, partial_lse, launch)
    _combine(partial, partial_lse, out, lse)
    return out, lse


def choose(q: torch.Tensor, rows: torch.Tensor, topk: int) -> Launch:
    """The tile of tiles.py, and splits that fill this GPU."""
    chosen = tile(layout_of(rows), q.shape[1], q.shape[0])
    # the interpreter has no multiprocessors; any small number makes it split too
    multiprocessors, shared_bytes = (8, 102_400) if knobs.runtime.interpret else _multiprocessors(q.device)
    fitting = shared_bytes // (chosen.shared_bytes(rows.shape[1] * rows.element_size()) + 1024)
    resident = max(1, min(chosen.resident, fitting))
    programs = q.shape[0] * triton.cdiv(q.shape[1], chosen.heads)
    return Launch(chosen, splits(programs, topk, chosen.tokens, multiprocessors, resident))


def layout_of(rows: torch.Tensor) -> str:
    """`bf16`, `packed` or `raw`."""
    if rows.element_size() == 2:
        return "bf16"
    return "packed" if rows.shape[1] == PACKED_BYTES else "raw"


@lru_cache
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """Their number, and the shared memory of each."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


def _attend(
    q: torch.Tensor,
    rows: torch.Tensor,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    sm_scale: float,
    kv_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    launch: Launch,
) -> None:
    count, heads = q.shape[:2]
    shape, topk = launch.tile, indices.shape[1]
    span = triton.cdiv(triton.cdiv(topk, shape.tokens), launch.splits) * shape.tokens
    kernel.attend[(count * launch.splits * triton.cdiv(heads, shape.heads),)](
        q, rows, indices, lengths if lengths is not None else indices, out, lse,
        sm_scale * kv_scale * math.log2(math.e), kv_scale,
        rows.shape[0], topk, heads, launch.splits, span,
        q.stride(0), q.stride(1), rows.stride(0) * rows.element_size() // 16, indices.stride(0),
        FORMAT=layout_of(rows), HAS_LENGTHS=lengths is not None, PARTIAL=launch.splits > 1,
        BLOCK_HEADS=shape.heads, BLOCK_TOKENS=shape.tokens, GROUPS=shape.groups, STAGES=shape.stages,
        PORTABLE=knobs.runtime.interpret, num_warps=shape.warps,
    )  # fmt: skip


def _combine(partial: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    count, split_count, heads = partial_lse.shape
    columns = LATENT
    while columns > 32 and count * heads * (LATENT // columns) < 256:
        columns //= 2
    kernel.combine[(count * heads * (LATENT // columns),)](
        partial, partial_lse, out, lse, heads, split_count,
        BLOCK_SPLITS=triton.next_power_of_2(split_count), BLOCK_COLUMNS=columns, num_warps=4,
    )  # fmt: skip


def _rows(kv: torch.Tensor) -> torch.Tensor:
    """[slots, 576 or 656] without copying; e4m3 seen as bytes."""
    rows = kv.squeeze(1) if kv.dim() == 3 and kv.shape[1] == 1 else kv
    width = (WIDTH,) if rows.dtype in HALF else (WIDTH, PACKED_BYTES) if rows.dtype in BYTES else ()
    if rows.dim() != 2 or rows.shape[1] not in width:
        raise UsageError(
            f"KV rows are {rows.dtype} {list(kv.shape)}; known are bf16 [slots, 1, 576], packed uint8 [slots, 1, 656] and"
            " raw e4m3 [slots, 1, 576]."
        )
    step = rows.stride(0) * rows.element_size()
    if rows.stride(1) != 1 or step % 16 or rows.data_ptr() % 16:
        raise UsageError(f"KV rows must be contiguous inside and begin at multiples of 16 bytes; they are {step} apart.")
    if not 0 < rows.shape[0] < 2**31:
        raise UsageError(f"The KV cache has {rows.shape[0]} slots; 1 to 2**31 - 1 are possible.")
    return rows.view(torch.uint8) if rows.dtype in BYTES else rows


def _check(q: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor, lengths: torch.Tensor | None) -> None:
    if q.dim() != 3 or q.shape[2] != WIDTH or q.dtype not in HALF or not 1 <= q.shape[1] <= MAX_HEADS:
        raise UsageError(f"q is {q.dtype} {list(q.shape)}; it must be bf16 [N, 1..{MAX_HEADS} heads, {WIDTH}].")
    if q.stride(2) != 1 or q.stride(0) % 2 or q.stride(1) % 2 or q.data_ptr() % 4:
        raise UsageError(f"q must be contiguous in its last dimension and even in its other strides; they are {q.stride()}.")
    if indices.dim() != 2 or indices.shape[0] != q.shape[0] or indices.dtype != torch.int32 or not indices.shape[1]:
        raise UsageError(f"indices are {indices.dtype} {list(indices.shape)}; they must be int32 [{q.shape[0]}, 1, topk].")
    if indices.stride(1) != 1:
        raise UsageError(f"The indices of one row must be contiguous; their stride is {indices.stride(1)}.")
    if lengths is not None and (lengths.shape != (q.shape[0],) or lengths.dtype != torch.int32 or lengths.stride(0) != 1):
        raise UsageError(f"lengths are {lengths.dtype} {list(lengths.shape)}; they must be contiguous int32 [{q.shape[0]}].")
    for name, tensor in (("kv", rows), ("indices", indices), ("lengths", lengths)):
        if tensor is not None and tensor.device != q.device:
            raise UsageError(f"{name} are on {tensor.device} and q on {q.device}; all must be on one device.")


def aot_cases(sm: int) -> list[tuple[Any, ...]]:
    """Every kernel as it is launched: (name, function, signature, constexprs, warps, stages). All serve every SM."""
    cases: list[tuple[Any, ...]] = []
    layouts = {"bf16": "*bf16", "packed": "*u8", "raw": "*u8"}
    for shape in TILES:
        for layout, pointer in layouts.items():
            for heads, rows in ((8, 1), (8, 8), (8, 4096), (16, 1)):
                name = f"attend_{layout}_{shape.heads}x{shape.tokens}_{shape.warps}warps_{shape.stages}stages"
                if tile(layout, heads, rows) == shape and not any(case[0].startswith(name) for case in cases):
                    cases += [_attend_case(name, pointer, layout, shape, partial) for partial in (False, True)]
    for split_count, columns in ((2, 512), (16, 512), (128, 32)):
        signature = {
            "partial_ptr": "*fp32", "partial_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32",
            "heads": "i32", "splits": "i32",
        }  # fmt: skip
        constants = {"BLOCK_SPLITS": split_count, "BLOCK_COLUMNS": columns}
        cases.append((f"combine_{split_count}x{columns}", kernel.combine, signature, constants, 4, 3))
    return cases


def _attend_case(name: str, pointer: str, layout: str, shape: Tile, partial: bool) -> tuple[Any, ...]:
    signature = {
        "q_ptr": "*bf16", "kv_ptr": pointer, "indices_ptr": "*i32", "lengths_ptr": "*i32",
        "out_ptr": "*fp32" if partial else "*bf16", "lse_ptr": "*fp32", "scale_log2": "fp32", "value_scale": "fp32",
        "slots": "i32", "topk": "i32", "heads": "i32", "splits": "i32", "span": "i32", "q_stride_row": "i32:16",
        "q_stride_head": "i32:16", "kv_stride_16_bytes": "i32", "indices_stride": "i32:16",
    }  # fmt: skip
    constants = {
        "FORMAT": layout, "HAS_LENGTHS": True, "PARTIAL": partial, "BLOCK_HEADS": shape.heads,
        "BLOCK_TOKENS": shape.tokens, "GROUPS": shape.groups, "STAGES": shape.stages, "PORTABLE": False,
    }  # fmt: skip
    return (f"{name}_partial" if partial else name, kernel.attend, signature, constants, shape.warps, 3)
