"""e4m3 by integers against torch's own type, for every 16-bit input and every byte."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from glmplan.kernels.e4m3 import decode_e4m3, decode_e4m3_finite, encode_e4m3

FP8 = torch.float8_e4m3fn


@triton.jit
def _encode(source, target, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    tl.store(target + offsets, encode_e4m3(tl.load(source + offsets, mask=inside, other=0.0)), mask=inside)


@triton.jit
def _decode(source, target, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    bits = tl.load(source + offsets)
    if KIND == 0:
        tl.store(target + offsets, decode_e4m3(bits))
    else:
        tl.store(target + offsets, decode_e4m3_finite(bits))


def encoded(values: torch.Tensor) -> torch.Tensor:
    out = torch.full((values.numel(),), 0x55, dtype=torch.uint8)
    _encode[(triton.cdiv(values.numel(), 4096),)](values, out, values.numel(), BLOCK=4096)
    return out


def by_torch(values: torch.Tensor) -> torch.Tensor:
    return values.float().clamp(-448.0, 448.0).to(FP8).view(torch.uint8)


def every_16_bit(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_input_is_encoded_as_torch_does_after_clamping(dtype: torch.dtype) -> None:
    values = every_16_bit(dtype)
    assert torch.equal(encoded(values), by_torch(values))


def test_up_to_464_torch_agrees_without_clamping_and_above_it_saturates() -> None:
    values = every_16_bit(torch.bfloat16)
    within = values.float().abs() <= 464.0
    assert torch.equal(encoded(values)[within], values[within].to(FP8).view(torch.uint8))
    assert encoded(torch.tensor([480.0, -1e30, float("inf"), float("-inf")])).tolist() == [0x7E, 0xFE, 0x7E, 0xFE]


def test_fp32_ties_go_to_even_and_their_neighbours_do_not() -> None:
    grid = torch.arange(0, 0x7F, dtype=torch.uint8).view(FP8).double()
    ties = ((grid[1:] + grid[:-1]) / 2).float()
    up, down = torch.nextafter(ties, torch.tensor(1e9)), torch.nextafter(ties, torch.tensor(0.0))
    values = torch.cat([ties, up, down, -ties, -up, -down])
    assert torch.equal(encoded(values), by_torch(values))
    assert (encoded(ties) & 1).sum() == 0


def test_fp32_random_bit_patterns() -> None:
    generator = torch.Generator().manual_seed(7)
    values = torch.randint(-(2**31), 2**31, (100_003,), generator=generator).to(torch.int32).view(torch.float32)
    assert torch.equal(encoded(values), by_torch(values))


@pytest.mark.parametrize("kind", [0, 1])
def test_every_byte_is_decoded_exactly(kind: int) -> None:
    """decode_e4m3_bf16 is tested in tests/gpu/kv_quant.py: the interpreter has no bf16 arithmetic."""
    source = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    out = torch.full((256,), 12345.0, dtype=torch.float16)
    _decode[(1,)](source, out, KIND=kind, BLOCK=256)
    wanted = source.view(FP8).float()
    nan = wanted.isnan()
    assert torch.equal(out.float()[~nan], wanted[~nan])
    assert torch.equal(out[~nan].signbit(), wanted[~nan].signbit())
    if kind == 0:
        assert out[nan].isnan().all()
