"""The truth of sparse_mla in plain PyTorch: gather, decode, softmax and weighted sum in fp64, row by row, on any device."""

from __future__ import annotations

import torch

LATENT, ROPE, GROUP = 512, 64, 128
FP8 = torch.float8_e4m3fn


def decode_rows(kv: torch.Tensor, kv_scale: float = 1.0) -> torch.Tensor:
    """KV rows of any of the three formats -> fp64 [slots, 576], exactly what the bytes mean."""
    rows = kv.flatten(1)
    if rows.element_size() == 2:
        return rows.double()
    rows = rows.view(torch.uint8)
    if rows.shape[1] == LATENT + ROPE:
        return rows.view(FP8).double() * kv_scale
    latent = rows[:, :LATENT].contiguous().view(FP8).double().view(-1, 4, GROUP)
    scales = rows[:, LATENT : LATENT + 16].contiguous().view(torch.float32).double()
    rope = rows[:, LATENT + 16 :].contiguous().view(torch.bfloat16).double()
    return torch.cat([(latent * scales.unsqueeze(-1)).flatten(1), rope], 1)


def sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    lengths: torch.Tensor | None = None,
    kv_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out fp64 [N, H, 512] and lse fp64 [N, H] (natural log; -inf, and out 0, where a row has no valid index)."""
    indices = indices.reshape(q.shape[0], -1).long()
    out = torch.zeros(q.shape[0], q.shape[1], LATENT, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    for n in range(q.shape[0]):
        chosen = indices[n] if lengths is None else indices[n, : max(int(lengths[n]), 0)]
        chosen = chosen[(chosen >= 0) & (chosen < kv.shape[0])]
        if chosen.numel():
            rows = decode_rows(kv[chosen], kv_scale)
            logits = q[n].double() @ rows.T * sm_scale
            lse[n] = torch.logsumexp(logits, -1)
            out[n] = torch.softmax(logits, -1) @ rows[:, :LATENT]
    return out, lse
