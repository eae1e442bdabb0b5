"""Random queries, KV rows and indices of every layout, for tests, proofs and benchmarks: hostile where asked."""

from __future__ import annotations

import torch

LAYOUTS = ("bf16", "packed", "raw")
FP8 = torch.float8_e4m3fn


def kv_rows(
    layout: str, slots: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """[slots, 1, 576] of `dtype`, uint8 [slots, 1, 656], or e4m3 [slots, 1, 576]; values of about one, different scales."""
    values = torch.randn(slots, 576, device=device, dtype=dtype)
    if layout == "bf16":
        return values[:, None]
    if layout == "raw":
        return values.to(FP8)[:, None]
    codes = (values[:, :512].float() * 100.0).clamp_(-448.0, 448.0).to(FP8).view(torch.uint8)
    scales = (torch.rand(slots, 4, device=device) * 0.02 + 0.002).view(torch.uint8)
    rope = values[:, 512:].bfloat16().contiguous().view(torch.uint8)
    return torch.cat([codes, scales, rope], 1)[:, None]


def queries(rows: int, heads: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[rows, heads, 576] with heads of very different size, so that some attend to few tokens and some to all."""
    size = torch.logspace(-2, 0, heads, device=device)[None, :, None]
    return (torch.randn(rows, heads, 576, device=device) * size).to(dtype)


def hostile_indices(rows: int, topk: int, slots: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int32 [rows, 1, topk] with pads, ids out of range, repeated ids, and a row of nothing but pads."""
    indices = torch.randint(0, slots, (rows, topk), device=device, dtype=torch.int32)
    indices[:, ::7] = -1
    indices[:, 3::11] = slots + 5
    indices[:, 5::13] = 2**31 - 1
    indices[:, 8::17] = -(2**31)
    indices[:, 1::5] = indices[:, :1]
    indices[-1] = -1
    return indices[:, None]


def errors(out: torch.Tensor, lse: torch.Tensor, want: torch.Tensor, want_lse: torch.Tensor) -> tuple[float, float, float]:
    """(relative error, 1 - cosine, largest lse difference) of out and lse; infinite where -inf or 0 rows differ."""
    empty = want_lse == -torch.inf
    if not torch.equal(lse == -torch.inf, empty) or out[empty].any() or not torch.isfinite(out).all():
        return torch.inf, torch.inf, torch.inf
    ours, true = out[~empty].double(), want[~empty].double()
    if not true.numel():
        return 0.0, 0.0, 0.0
    relative = ((ours - true).norm() / true.norm()).item()
    cosine = torch.nn.functional.cosine_similarity(ours, true, dim=-1).min().item()
    return relative, 1.0 - cosine, (lse[~empty].double() - want_lse[~empty]).abs().max().item()
