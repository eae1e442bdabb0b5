"""Is kv_quant right on this GPU, at sizes and in situations the interpreter cannot reach? Exits 1 when it is not.

`python tests/gpu/kv_quant.py [--small]`; `python -m glmplan.kernels.run_as sm89 tests/gpu/kv_quant.py` runs the code of
another SM. `--small` is for compute-sanitizer and captures no graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from glmplan.kernels import run_as
from glmplan.kernels.e4m3 import decode_e4m3, decode_e4m3_bf16, decode_e4m3_finite, encode_e4m3
from glmplan.kernels.kv_quant import op, reference

DEVICE = "cuda"
SMALL = "--small" in sys.argv
FP8 = torch.float8_e4m3fn


@triton.jit
def encode(source, target, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, encode_e4m3(tl.load(source + offsets)))


@triton.jit
def decode(source, half, finite, brain, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    bits = tl.load(source + offsets)
    tl.store(half + offsets, decode_e4m3(bits))
    tl.store(finite + offsets, decode_e4m3_finite(bits))
    tl.store(brain + offsets, decode_e4m3_bf16(bits))


def same(ours: torch.Tensor, wanted: torch.Tensor) -> bool:
    return ours.shape == wanted.shape and torch.equal(
        ours.contiguous().view(torch.uint8), wanted.to(ours.dtype).contiguous().view(torch.uint8)
    )


def poison(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0xFF, dtype=torch.uint8, device=DEVICE)


def tokens(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = torch.exp(3.0 * torch.randn(n, 4, 1, device=DEVICE))
    latent = (torch.randn(n, 4, 128, device=DEVICE) * size).view(n, 512).bfloat16()
    return latent, torch.randn(n, 64, device=DEVICE).bfloat16()


def encodes_every_16_bit_value() -> bool:
    bits = torch.arange(65536, device=DEVICE, dtype=torch.int32).to(torch.int16)
    passed = True
    for dtype in (torch.bfloat16, torch.float16):
        codes = poison(65536)
        encode[(64,)](bits.view(dtype), codes, BLOCK=1024)
        passed &= same(codes, reference.to_e4m3(bits.view(dtype).float()))
    return passed


def encodes_fp32_patterns() -> bool:
    """Every 32-bit pattern in steps of a prime, so all exponents and many mantissas."""
    count = 1 << (16 if SMALL else 26)
    stride = 65_521 if SMALL else 61
    values = (torch.arange(count, device=DEVICE, dtype=torch.int64) * stride - 2**31).to(torch.int32).view(torch.float32)
    codes = poison(count)
    encode[(count // 1024,)](values, codes, BLOCK=1024)
    return same(codes, reference.to_e4m3(values))


def decodes_every_byte() -> bool:
    source = torch.arange(256, device=DEVICE, dtype=torch.int32).to(torch.uint8)
    half, finite = (torch.full((256,), -7.0, dtype=torch.float16, device=DEVICE) for _ in range(2))
    brain = torch.full((256,), -7.0, dtype=torch.bfloat16, device=DEVICE)
    decode[(1,)](source, half, finite, brain, BLOCK=256)
    wanted = source.view(FP8).float()
    number = ~wanted.isnan()
    passed = bool(half[~number].isnan().all()) and bool(brain[~number].isnan().all())
    return passed and all(same(got.float()[number], wanted[number]) for got in (half, finite, brain))


def rows_of_many_sizes() -> bool:
    passed = True
    for n in (1, 2, 31, 129) if SMALL else (1, 2, 31, 129, 1024, 1025, 4097, 70_001):
        latent, rope = tokens(n)
        slots = torch.randperm(n + 77, device=DEVICE)[:n].to(torch.int32 if n % 2 else torch.int64)
        slots[:: max(n // 3, 2)] = -1
        ours, wanted = poison(n + 77, 656), poison(n + 77, 656)
        op.write_packed_rows(ours, latent, rope, slots)
        reference.write_rows(wanted, reference.packed_rows(latent, rope), slots)
        out = torch.full((n, 576), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        passed &= same(ours, wanted) and same(
            op.gather_packed_rows(ours, slots, out), reference.gather_packed_rows(wanted, slots)
        )
        ours, wanted = poison(n + 77, 576), poison(n + 77, 576)
        op.write_raw_rows(ours, latent, rope, slots, 0.37)
        reference.write_rows(wanted, reference.raw_rows(latent, rope, 0.37), slots)
        out.fill_(float("nan"))
        passed &= same(ours, wanted) and same(
            op.gather_raw_rows(ours, slots, 0.37, out), reference.gather_raw_rows(wanted, slots, 0.37)
        )
    return passed


def hostile_values() -> bool:
    """NaN, infinities, zeros, bf16 subnormals and the largest bf16 in their own groups."""
    latent, rope = tokens(7)
    latent[0, 3], latent[0, 130], latent[1, 400] = float("nan"), float("inf"), float("-inf")
    latent[2, :256], latent[3], latent[4], latent[5] = 0.0, 2.0**-130, torch.finfo(torch.bfloat16).max, -0.0
    cache = poison(7, 656)
    slots = torch.arange(7, device=DEVICE)
    op.write_packed_rows(cache, latent, rope, slots)
    pages, wanted = poison(1, 8448), poison(1, 8448)
    op.write_index_keys(pages, latent[:, :128], slots)
    reference.write_index_keys(wanted, latent[:, :128], slots)
    return same(cache, reference.packed_rows(latent, rope)) and same(pages, wanted)


def rows_beyond_2_gib() -> bool:
    """Byte offsets past 2**31 and 2**32: 32-bit address arithmetic would land elsewhere."""
    capacity = 64 if SMALL else 7_000_000
    cache = torch.empty((capacity, 656), dtype=torch.uint8, device=DEVICE)
    latent, rope = tokens(6)
    ids = [0, 3, 5, 7, 11, 63] if SMALL else [0, 3_273_601, 3_273_603, 6_547_206, 6_547_207, 6_999_999]
    slots = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
    op.write_packed_rows(cache, latent, rope, slots)
    rows = reference.packed_rows(latent, rope)
    gathered = op.gather_packed_rows(cache, slots)
    return same(cache[slots.long()], rows) and same(
        gathered, reference.gather_packed_rows(rows, torch.arange(6, device=DEVICE))
    )


def index_pages() -> bool:
    passed = True
    for n in (1, 65) if SMALL else (1, 65, 2048 + 131, 20_001):
        keys = (torch.randn(n, 128, device=DEVICE) * torch.randn(n, 1, device=DEVICE).exp()).bfloat16()
        page_count = n // 64 + 3
        slots = torch.randperm(page_count * 64, device=DEVICE)[:n]
        slots[:: max(n // 2, 2)] = -1
        for power in (False, True):
            ours, wanted = poison(page_count, 8448), poison(page_count, 8448)
            op.write_index_keys(ours, keys, slots, power)
            reference.write_index_keys(wanted, keys, slots, power)
            got, truth = op.gather_index_keys(ours, slots), reference.gather_index_keys(wanted, slots)
            passed &= same(ours, wanted) and same(got[0], truth[0]) and same(got[1], truth[1])
    return passed


def graph_replay_with_other_tokens() -> bool:
    """Captured once; new values and new slots, some now invalid, are honoured by the replay."""
    n, capacity = 33, 100
    latent, rope = tokens(n)
    slots = torch.arange(n, dtype=torch.int32, device=DEVICE)
    cache, pages = poison(capacity, 656), poison(2, 8448)
    out = torch.empty((n, 576), dtype=torch.bfloat16, device=DEVICE)

    def step() -> None:
        op.write_packed_rows(cache, latent, rope, slots)
        op.write_index_keys(pages, latent[:, :128], slots)
        op.gather_packed_rows(cache, slots, out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    passed = True
    for valid in (n, 5, 0):
        cache.fill_(0xFF), pages.fill_(0xFF), out.fill_(float("nan"))
        fresh, fresh_rope = tokens(n)
        latent.copy_(fresh), rope.copy_(fresh_rope)
        slots.copy_(torch.randperm(capacity, device=DEVICE)[:n])
        slots[valid:] = -1
        graph.replay()
        wanted, wanted_pages = poison(capacity, 656), poison(2, 8448)
        reference.write_rows(wanted, reference.packed_rows(latent, rope), slots)
        reference.write_index_keys(wanted_pages, latent[:, :128], slots)
        passed &= (
            same(cache, wanted) and same(pages, wanted_pages) and same(out, reference.gather_packed_rows(wanted, slots))
        )
    return passed


def strided_inputs() -> bool:
    fused = torch.randn(50, 2624, device=DEVICE).bfloat16()
    latent, rope = fused[:, 2048:2560], fused[:, 2560:]
    slots = torch.arange(100, dtype=torch.int32, device=DEVICE)[::2]
    cache = poison(100, 704)[:, :656]
    op.write_packed_rows(cache, latent, rope, slots)
    pages, wanted = poison(2, 8448), poison(2, 8448)
    op.write_index_keys(pages, latent[:, :128].t().contiguous().t(), slots)
    reference.write_index_keys(wanted, latent[:, :128], slots)
    return (
        same(cache[::2], reference.packed_rows(latent, rope)) and same(pages, wanted) and bool((cache[1::2] == 0xFF).all())
    )


CHECKS: tuple[Callable[[], bool], ...] = (
    encodes_every_16_bit_value,
    encodes_fp32_patterns,
    decodes_every_byte,
    rows_of_many_sizes,
    hostile_values,
    rows_beyond_2_gib,
    index_pages,
    graph_replay_with_other_tokens,
    strided_inputs,
)


def main() -> int:
    run_as.enable_from_environment()
    torch.manual_seed(torch.seed())
    print(f"{torch.cuda.get_device_name()}, kernels for sm_{run_as.target_sm()}, torch {torch.__version__}")
    failed = 0
    for check in CHECKS:
        if SMALL and check is graph_replay_with_other_tokens:
            continue
        passed = check()
        torch.cuda.synchronize()
        failed += not passed
        print(f"{'ok    ' if passed else 'FAILED'} {check.__name__}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
