"""Which kernels are compiled ahead of time? Every variant the entries can launch, for `glmplan.kernels.aot`."""

from __future__ import annotations

from typing import Any

from glmplan.kernels.indexer_logits import kernel
from glmplan.kernels.indexer_logits.launch import FILL_BLOCK, FP8_SM, request_block
from glmplan.kernels.indexer_logits.tiles import group_size, paged_tile, ragged_tile

Case = tuple[Any, ...]


def aot_cases(sm: int) -> list[Case]:
    """(name, kernel, signature, constexprs, num_warps, num_stages) of every kernel variant."""
    decode = kernel.CONVERT.value if sm >= FP8_SM else kernel.INTEGER.value
    return [*_aot_paged(sm, decode), *_aot_ragged(sm, decode), *_aot_fill()]


def _aot_paged(sm: int, decode: int) -> list[Case]:
    cases = []
    for next_n, per_token, requests in ((1, False, 1), (1, False, 128), (2, False, 16), (4, True, 1024), (6, True, 128)):
        group = group_size(next_n)
        tile = paged_tile(sm, group)
        signature = dict.fromkeys(("q", "keys"), "*u8") | dict.fromkeys(("scales", "weights", "out"), "*fp32")
        signature |= {"lengths": "*i32", "table": "*i32", "requests": "i32", "pages_total": "i32", "limit": "i32"}
        signature |= dict.fromkeys(("stride_qb", "stride_qn", "stride_qh", "stride_page", "stride_page_scale"), "i32:16")
        signature |= {"stride_wr": "i32:16", "stride_lb": "i32", "stride_tb": "i32", "stride_or": "i32"}
        constexprs = {
            "stride_wh": 1, "stride_ln": int(per_token), "NEXT_N": next_n, "PER_TOKEN": per_token, "G": group,
            "BLOCK_B": request_block(requests), "DECODE": decode, "STAGES": tile.stages,
        }  # fmt: skip
        name = f"paged next_n={next_n} requests<={constexprs['BLOCK_B']}"
        cases.append((name, kernel.paged_kernel, signature, constexprs, tile.num_warps, tile.stages))
    return cases


def _aot_ragged(sm: int, decode: int) -> list[Case]:
    tile = ragged_tile(sm)
    signature = dict.fromkeys(("q", "keys"), "*u8") | dict.fromkeys(("scales", "weights", "out"), "*fp32")
    signature |= {"starts": "*i32:1", "stops": "*i32:1", "rows": "i32", "tokens": "i32", "width": "i32"}
    signature |= {"rows_per_program": "i32", "stride_qr": "i32:16", "stride_qh": "i32:16", "stride_k": "i32:16"}
    signature |= {"stride_wr": "i32:16", "stride_or": "i32"}
    cases = []
    for compressed in (False, True):
        constexprs = {"stride_wh": 1, "T": tile.tokens, "CHUNK": tile.chunk, "COMPRESSED": compressed, "DECODE": decode}
        name = f"ragged {'compressed' if compressed else 'full'}"
        cases.append((name, kernel.ragged_kernel, signature, constexprs, tile.num_warps, 1))
    return cases


def _aot_fill() -> list[Case]:
    paged = {"out": "*fp32", "lengths": "*i32", "limit": "i32", "width": "i32", "stride_lb": "i32", "stride_or": "i32"}
    ragged = {"out": "*fp32", "starts": "*i32", "stops": "*i32", "tokens": "i32", "width": "i32", "stride_or": "i32"}
    paged_fixed = {"stride_ln": 1, "NEXT_N": 2, "PER_TOKEN": True, "BLOCK": FILL_BLOCK}
    ragged_fixed = {"COMPRESSED": True, "BLOCK": FILL_BLOCK}
    return [
        ("fill paged", kernel.fill_paged_kernel, paged, paged_fixed, 4, 1),
        ("fill ragged", kernel.fill_ragged_kernel, ragged, ragged_fixed, 4, 1),
    ]
