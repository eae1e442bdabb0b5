"""Which K positions of each logits row are the largest, as positions, KV slots or offsets into gathered keys?

Three calls, one exact radix select: `topk` (positions relative to the row start), `topk_paged` (slots through a page
table) and `topk_ragged` (position + offset). Common rules:
- logits [N, L] f32, unit stride within a row, any row stride; lengths [N] int32; row_starts [N] int32 or None. Row n
  is logits[n, start : start + length]; starts and lengths are clamped to the row; nothing outside it is looked at.
- Result [N, K] int32, ascending by position; -1 in the last columns where the row has fewer than K elements.
- Equal logits are taken by lowest position; -0.0 equals 0.0; NaN is lower than -inf.
- Three launches (four with many rows) per 256 rows; grid and workspace fixed by N, L and K; no host synchronisation.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from glmplan.errors import UsageError
from glmplan.kernels.run_as import target_sm
from glmplan.kernels.topk.finish import LOGICAL, PAGED, RAGGED, finish_kernel
from glmplan.kernels.topk.kernel import bound_kernel, filter_kernel, group_max_kernel
from glmplan.kernels.topk.tiles import FINISH_REGISTERS, SLAB_ROWS, Tiles, choose

K_MAX = 2048
PAGE_SIZES = (1, 64)
INT32_LIMIT = 2**31


def topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    *,
    k: int = K_MAX,
    row_starts: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Positions relative to the row start, [N, k] int32."""
    return _run(logits, lengths, k, row_starts, out, LOGICAL)


def topk_paged(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    *,
    page_size: int = 64,
    k: int = K_MAX,
    row_starts: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """KV slots, [N, k] int32: page_table[n, position // page_size] * page_size + position % page_size.

    page_table [N, pages] int32 (page_size 64), or one slot per token (page_size 1); with N a multiple of its rows,
    consecutive rows share one (several query tokens per request). Positions whose page is -1 or missing give -1.
    """
    if page_size not in PAGE_SIZES:
        raise UsageError(f"page_size is {page_size}; known are 64 (page ids) and 1 (one slot per token).")
    return _run(logits, lengths, k, row_starts, out, PAGED, table=page_table, page_size=page_size)


def topk_ragged(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    offsets: torch.Tensor,
    *,
    k: int = K_MAX,
    row_starts: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Position + offsets[n], [N, k] int32: places in a buffer of gathered keys; offsets [N] int32."""
    return _run(logits, lengths, k, row_starts, out, RAGGED, offsets=offsets)


def _run(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    row_starts: torch.Tensor | None,
    out: torch.Tensor | None,
    mode: int,
    table: torch.Tensor | None = None,
    page_size: int = 1,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    _check_logits(logits, k)
    rows = logits.shape[0]
    for name, vector in (("lengths", lengths), ("row_starts", row_starts), ("offsets", offsets)):
        _check_vector(name, vector, logits)
    _check_table(table, logits)
    if out is None:
        out = torch.empty((rows, k), dtype=torch.int32, device=logits.device)
    _check_out(out, logits, k)
    shared = 1 if table is None or not rows else rows // table.shape[0]
    slab = SLAB_ROWS - SLAB_ROWS % shared if shared <= SLAB_ROWS else shared
    tiles, work = _workspace(logits, min(rows, slab), k)
    for first in range(0, rows, slab):
        part = slice(first, first + slab)
        pages = None if table is None else table[first // shared : -(-(first + slab) // shared)]
        _launch(logits[part], lengths[part], _part(row_starts, part), out[part], work, tiles, k, mode,
                pages, page_size, shared, _part(offsets, part))  # fmt: skip
    return out


def _part(vector: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if vector is None else vector[part]


def _workspace(logits: torch.Tensor, rows: int, k: int) -> tuple[Tiles, torch.Tensor]:
    sm, multiprocessors = _device(logits.device)
    tiles = choose(sm, rows, logits.shape[1], k, multiprocessors)
    return tiles, torch.empty((rows, tiles.work_ints), dtype=torch.int32, device=logits.device)


def _launch(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    row_starts: torch.Tensor | None,
    out: torch.Tensor,
    work: torch.Tensor,
    tiles: Tiles,
    k: int,
    mode: int,
    table: torch.Tensor | None,
    page_size: int,
    rows_per_table: int,
    offsets: torch.Tensor | None,
) -> None:
    rows, width = logits.shape
    starts = lengths if row_starts is None else row_starts
    row = (logits, lengths, starts, work)
    sizes = (logits.stride(0), width, work.stride(0))
    flags = {"HAS_STARTS": row_starts is not None}
    fixed = _constants(tiles, k)
    group_max_kernel[(tiles.groups // tiles.group_cols, rows)](
        *row,
        *sizes,
        **fixed["group_max"],
        **flags,
        PADDED=_padded(logits, row_starts),
        num_warps=tiles.group_warps,
        num_stages=1,
    )
    if not tiles.own_bound:
        bound_kernel[(rows,)](lengths, work, work.stride(0), **fixed["bound"], num_warps=tiles.bound_warps, num_stages=1)
    filter_kernel[(tiles.blocks, rows)](*row, *sizes, **fixed["filter"], **flags, num_warps=tiles.filter_warps, num_stages=1)
    pages = lengths if table is None else table
    finish_kernel[(tiles.finish_blocks, rows)](
        *row, out, pages, lengths if offsets is None else offsets, *sizes, out.stride(0),
        0 if table is None else table.stride(0), 0 if table is None else table.shape[1], rows_per_table,
        **fixed["finish"], MODE=mode, PAGE=page_size, **flags,
        num_warps=tiles.finish_warps, num_stages=1, maxnreg=FINISH_REGISTERS,
    )  # fmt: skip


def _constants(tiles: Tiles, k: int) -> dict[str, dict[str, int]]:
    """Compile-time sizes of each kernel."""
    bound = {
        "K": k,
        "GROUPS": tiles.groups,
        "GROUPS_AT": tiles.groups_at,
        "SLACK": tiles.slack,
        "THREADS": 32 * tiles.bound_warps,
    }
    return {
        "group_max": {
            "K": k,
            "GROUPS": tiles.groups,
            "GROUPS_AT": tiles.groups_at,
            "COLS": tiles.group_cols,
            "ROWS": tiles.group_rows,
        },
        "bound": bound,
        "filter": bound
        | {
            "THREADS": 32 * tiles.filter_warps,
            "KEYS_AT": tiles.keys_at,
            "CAP": tiles.cap,
            "B": tiles.blocks,
            "TILE": tiles.tile,
            "BINS_LOG2": tiles.bins_log2,
            "OWN_BOUND": tiles.own_bound,
        },
        "finish": {
            "K": k,
            "BINS_AT": tiles.groups_at + tiles.groups,
            "BINS_LOG2": tiles.bins_log2,
            "KEYS_AT": tiles.keys_at,
            "CAP": tiles.cap,
            "SMALL": tiles.small,
            "B": tiles.blocks,
            "SHARE": tiles.share,
            "TILE": min(tiles.tile, 2048),
            "SEGMENT": tiles.segment,
            "PART": tiles.part,
            "THREADS": 32 * tiles.finish_warps,
        },
    }


def _padded(logits: torch.Tensor, row_starts: torch.Tensor | None) -> bool:
    """Whether up to 3 elements past a row's length are inside the row and 16-byte aligned loads stay in it."""
    return row_starts is None and logits.shape[1] % 4 == 0


def _device(device: torch.device) -> tuple[int, int]:
    """(SM compiled for, multiprocessors); the interpreter on the CPU counts as a small sm_80."""
    if device.type != "cuda":
        return 80, 4
    return target_sm(device), _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_logits(logits: torch.Tensor, k: int) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise UsageError(f"logits are {logits.dtype} of shape {tuple(logits.shape)}; top-k takes float32 [N, L].")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise UsageError(f"logits have stride {logits.stride(1)} within a row; top-k takes 1.", "Call .contiguous().")
    if not 1 <= k <= K_MAX:
        raise UsageError(f"k is {k}; top-k takes 1 to {K_MAX}.")
    if logits.shape[1] >= INT32_LIMIT:
        raise UsageError(f"A row has {logits.shape[1]} logits; positions are int32.")
    if logits.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f"logits are on {logits.device}; the kernels run on CUDA GPUs.", "Use reference.py elsewhere.")


def _check_vector(name: str, vector: torch.Tensor | None, logits: torch.Tensor) -> None:
    if vector is None:
        return
    if vector.shape != logits.shape[:1] or vector.dtype != torch.int32 or not vector.is_contiguous():
        raise UsageError(
            f"{name} is {vector.dtype} of shape {tuple(vector.shape)}; "
            f"top-k takes contiguous int32 of shape ({logits.shape[0]},)."
        )
    _check_device(name, vector, logits)


def _check_table(table: torch.Tensor | None, logits: torch.Tensor) -> None:
    if table is None:
        return
    if table.dim() != 2 or table.dtype != torch.int32 or (table.shape[1] > 1 and table.stride(1) != 1):
        raise UsageError(f"page_table is {table.dtype} of shape {tuple(table.shape)}; top-k takes int32 [rows, pages].")
    rows = logits.shape[0]
    if rows and (not table.shape[0] or rows % table.shape[0]):
        raise UsageError(f"page_table has {table.shape[0]} rows for {rows} rows of logits; it takes a divisor of them.")
    _check_device("page_table", table, logits)


def _check_out(out: torch.Tensor, logits: torch.Tensor, k: int) -> None:
    if out.shape != (logits.shape[0], k) or out.dtype != torch.int32 or out.stride(1) != 1:
        raise UsageError(f"out is {out.dtype} of shape {tuple(out.shape)}; it takes int32 {(logits.shape[0], k)}.")
    _check_device("out", out, logits)


def _check_device(name: str, tensor: torch.Tensor, logits: torch.Tensor) -> None:
    if tensor.device != logits.device:
        raise UsageError(f"{name} is on {tensor.device}, logits on {logits.device}; they belong on one.")


def aot_cases(sm: int) -> list[tuple[Any, ...]]:
    """Every kernel as launched for GLM-5.2: (name, kernel, types, constants, warps, stages, registers).

    Modes differ in how a position becomes an index, shapes in everything before; so one shape has all modes with and without
    starts, the others decode's (pages, no starts) and prefill's (starts).
    """
    cases = []
    modes = ((PAGED, 64), (RAGGED, 1), (PAGED, 1), (LOGICAL, 1))
    for rows, width in ((1, 4096), (1, 131_072), (1, 1_048_576), (32, 131_072), (SLAB_ROWS, 131_072)):
        tiles = choose(sm, rows, width, K_MAX, 128)
        fixed = _constants(tiles, K_MAX)
        for padded in (True, False):
            flags = {"HAS_STARTS": not padded}
            row_types = {"logits": "*fp32", "lengths": "*i32", "row_starts": "*i32", "work": "*i32"}
            divisor = ":16" if padded else ""
            row_types |= {"stride": f"i32{divisor}", "width": f"i32{divisor}", "work_stride": "i32:16"}
            name = f"{rows}x{width}{'' if padded else '_starts'}"
            grouped = fixed["group_max"] | flags | {"PADDED": padded}
            cases.append((f"group_max_{name}", group_max_kernel, row_types, grouped, tiles.group_warps, 1))
            if not tiles.own_bound:
                bound_types = {name: row_types[name] for name in ("lengths", "work", "work_stride")}
                cases.append((f"bound_{name}", bound_kernel, bound_types, fixed["bound"], tiles.bound_warps, 1))
            cases.append((f"filter_{name}", filter_kernel, row_types, fixed["filter"] | flags, tiles.filter_warps, 1))
            for mode, page in modes if rows == SLAB_ROWS else modes[:1] if padded else modes[1:2]:
                more = {"out": "*i32", "table": "*i32", "offsets": "*i32", "out_stride": "i32:16"}
                more |= {"table_stride": "i32", "table_width": "i32", "rows_per_table": "i32"}
                constants = fixed["finish"] | flags | {"MODE": mode, "PAGE": page}
                launch = (tiles.finish_warps, 1, FINISH_REGISTERS)
                cases.append((f"finish_{name}_{mode}_{page}", finish_kernel, row_types | more, constants, *launch))
    return cases
