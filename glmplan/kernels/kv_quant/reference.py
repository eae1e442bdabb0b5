"""The truth of kv_quant in plain PyTorch: same layouts and rounding, row by row, on any device."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
FP8 = torch.float8_e4m3fn


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """f32 -> uint8 codes: clamped first, because torch releases differ above 464; NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(FP8).view(torch.uint8)


def largest_finite(groups: torch.Tensor) -> torch.Tensor:
    magnitudes = groups.abs()
    return torch.where(magnitudes < torch.inf, magnitudes, torch.zeros_like(magnitudes)).amax(-1)


def over_448(largest: torch.Tensor) -> torch.Tensor:
    """IEEE division: with a Python number torch would multiply by a rounded reciprocal on CUDA."""
    return largest / torch.full_like(largest, E4M3_MAX)


def quantise_latent(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, 512] -> codes uint8 [N, 512], scales f32 [N, 4]: largest magnitude of each 128 over 448, at least 2**-126."""
    groups = latent.float().view(-1, 4, 128)
    scale = over_448(largest_finite(groups)).clamp_min(2.0**-126)
    return to_e4m3(groups * (1.0 / scale).unsqueeze(-1)).view(-1, 512), scale


def quantise_keys(keys: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, 128] -> codes uint8 [N, 128], scales f32 [N]: largest magnitude, at least 1e-4, over 448."""
    values = keys.float()
    scale = over_448(largest_finite(values).clamp_min(1e-4))
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return to_e4m3(values * (1.0 / scale).unsqueeze(-1)), scale


def packed_rows(latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """[N, 512] and [N, 64] -> uint8 [N, 656]."""
    codes, scale = quantise_latent(latent)
    return torch.cat([codes, scale.contiguous().view(torch.uint8), rope.bfloat16().contiguous().view(torch.uint8)], dim=-1)


def raw_rows(latent: torch.Tensor, rope: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """[N, 512] and [N, 64] -> uint8 [N, 576]; one scale for the whole cache."""
    inverse = 1.0 / torch.tensor(scale, dtype=torch.float32)
    return to_e4m3(torch.cat([latent, rope], dim=-1).float() * inverse.to(latent.device))


def write_rows(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Rows to their slots; ids outside the cache are skipped."""
    keep = (slots >= 0) & (slots < cache.shape[0])
    cache[slots[keep].long()] = rows[keep]


def write_index_keys(pages: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, power_of_two: bool = False) -> None:
    """Codes and scales to a page's two arrays; one token at a time, so that the layout can be read off."""
    codes, scale = quantise_keys(keys, power_of_two)
    for token, slot in enumerate(slots.tolist()):
        if not 0 <= slot < pages.shape[0] * 64:
            continue
        page, within = divmod(slot, 64)
        pages[page, within * 128 : within * 128 + 128] = codes[token]
        pages[page, 8192 + within * 4 : 8192 + within * 4 + 4] = scale[token : token + 1].view(torch.uint8)


def dequantise_packed(rows: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 656] -> f32 [N, 576]."""
    values = rows[:, :512].contiguous().view(FP8).float().view(-1, 4, 128)
    scale = rows[:, 512:528].contiguous().view(torch.float32)
    rope = rows[:, 528:].contiguous().view(torch.bfloat16).float()
    return torch.cat([(values * scale.unsqueeze(-1)).view(-1, 512), rope], dim=-1)


def gather_packed_rows(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """f32 [N, 576]; zeros for ids outside the cache."""
    keep = (slots >= 0) & (slots < cache.shape[0])
    rows = dequantise_packed(cache[torch.where(keep, slots, 0).long()])
    return torch.where(keep[:, None], rows, torch.zeros_like(rows))


def gather_raw_rows(cache: torch.Tensor, slots: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """f32 [N, 576]; zeros for ids outside the cache."""
    keep = (slots >= 0) & (slots < cache.shape[0])
    rows = cache[torch.where(keep, slots, 0).long()].contiguous().view(FP8).float() * scale
    return torch.where(keep[:, None], rows, torch.zeros_like(rows))


def gather_index_keys(pages: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """codes uint8 [N, 128] and scales f32 [N]; zeros for ids outside the pages."""
    keep = (slots >= 0) & (slots < pages.shape[0] * 64)
    slot = torch.where(keep, slots, 0).long()
    codes = pages[:, :8192].reshape(-1, 128)[slot]
    scale = pages[:, 8192:].contiguous().view(torch.float32).reshape(-1)[slot]
    return torch.where(keep[:, None], codes, torch.zeros_like(codes)), torch.where(keep, scale, torch.zeros_like(scale))
