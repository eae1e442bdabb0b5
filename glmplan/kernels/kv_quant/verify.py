"""Are KV rows and index pages written and read bit for bit on this GPU?

Errors are counts of differing bytes or values, so every limit is 0. Times: 4,096 tokens written or read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from glmplan.kernels.e4m3 import encode_e4m3
from glmplan.kernels.kv_quant import op, reference
from glmplan.kernels.results import Result, checked, graph_microseconds

TOKENS, CAPACITY = 4096, 8192


@triton.jit
def encode(source, target, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, encode_e4m3(tl.load(source + offsets)))


def cases(device: torch.device) -> list[Result]:
    """All checks of this operation on one CUDA device."""
    latent = (torch.randn(TOKENS, 4, 128, device=device) * torch.randn(TOKENS, 4, 1, device=device).exp()).view(TOKENS, 512)
    latent, rope = latent.bfloat16(), torch.randn(TOKENS, 64, device=device).bfloat16()
    slots = torch.randperm(CAPACITY, device=device)[:TOKENS].int()
    slots[::97] = -1
    return [_cast(device), *_packed(latent, rope, slots), *_raw(latent, rope, slots), *_keys(latent[:, :128], slots)]


def _cast(device: torch.device) -> Result:
    """Every bf16 and fp16 input against torch's cast, clamped first."""
    bits = torch.arange(65536, device=device, dtype=torch.int32).to(torch.int16)
    wrong = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        values, codes = bits.view(dtype), torch.empty(65536, dtype=torch.uint8, device=device)
        encode[(64,)](values, codes, BLOCK=1024)
        wrong += _differing(codes, reference.to_e4m3(values.float()))
    time = graph_microseconds([lambda: encode[(64,)](values, codes, BLOCK=1024)])
    return checked("kv_quant", "e4m3 cast, every 16-bit value", wrong, 0.0, time)


def _packed(latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor) -> list[Result]:
    ours, wanted = _poison(latent, 656), _poison(latent, 656)
    reference.write_rows(wanted, reference.packed_rows(latent, rope), slots)
    write = _check("write 656-byte rows", lambda: op.write_packed_rows(ours, latent, rope, slots), lambda: (ours, wanted))
    out = torch.full((TOKENS, 576), float("nan"), dtype=torch.bfloat16, device=latent.device)
    rows = reference.gather_packed_rows(wanted, slots).bfloat16()
    return [write, _check("read 656-byte rows", lambda: op.gather_packed_rows(ours, slots, out), lambda: (out, rows))]


def _raw(latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor) -> list[Result]:
    ours, wanted = _poison(latent, 576), _poison(latent, 576)
    reference.write_rows(wanted, reference.raw_rows(latent, rope, 0.5), slots)
    write = _check("write 576-byte rows", lambda: op.write_raw_rows(ours, latent, rope, slots, 0.5), lambda: (ours, wanted))
    out = torch.full((TOKENS, 576), float("nan"), dtype=torch.bfloat16, device=latent.device)
    rows = reference.gather_raw_rows(wanted, slots, 0.5).bfloat16()
    return [write, _check("read 576-byte rows", lambda: op.gather_raw_rows(ours, slots, 0.5, out), lambda: (out, rows))]


def _keys(keys: torch.Tensor, slots: torch.Tensor) -> list[Result]:
    results = []
    for power in (False, True):
        ours, wanted = (torch.full((CAPACITY // 64, 8448), 0xFF, dtype=torch.uint8, device=keys.device) for _ in range(2))
        reference.write_index_keys(wanted, keys, slots, power)
        name = f"write index pages, {'ue8m0' if power else 'f32'} scale"
        results.append(
            _check(name, lambda o=ours, p=power: op.write_index_keys(o, keys, slots, p), lambda o=ours, w=wanted: (o, w))
        )
    codes, scales = reference.gather_index_keys(wanted, slots)
    got = op.gather_index_keys(ours, slots)
    wrong = _differing(got[0], codes) + _differing(got[1], scales)
    time = graph_microseconds([lambda: op.gather_index_keys(ours, slots)])
    return [*results, checked("kv_quant", "read index pages", wrong, 0.0, time)]


def _check(form: str, run: Callable[[], object], pair: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Result:
    run()
    error = _differing(*pair())
    return checked("kv_quant", form, error, 0.0, graph_microseconds([run]))


def _poison(like: torch.Tensor, width: int) -> torch.Tensor:
    return torch.full((CAPACITY, width), 0xFF, dtype=torch.uint8, device=like.device)


def _differing(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Bytes that differ; comparing bytes makes NaN equal to the same NaN."""
    if ours.shape != wanted.shape or ours.dtype != wanted.dtype:
        return float("nan")
    return float((ours.contiguous().view(torch.uint8) != wanted.contiguous().view(torch.uint8)).sum())
