"""KV rows and index pages against the PyTorch reference, byte for byte, in Triton's interpreter.

The interpreter truncates where f32 becomes bf16 and flushes bf16 subnormals, so rows are gathered in f32 here; bf16 and
subnormals are checked in tests/gpu/kv_quant.py.
"""

from __future__ import annotations

import pytest
import torch

from glmplan.errors import UsageError
from glmplan.kernels.kv_quant import op, reference, tiles

FP8 = torch.float8_e4m3fn


def random_tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and rope whose groups differ in size by orders of magnitude, as a trained model's do."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(3.0 * torch.randn(n, 4, 1, generator=generator))
    latent = (torch.randn(n, 4, 128, generator=generator) * size).view(n, 512).bfloat16()
    return latent, torch.randn(n, 64, generator=generator).bfloat16()


def distinct_slots(n: int, capacity: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(capacity, generator=torch.Generator().manual_seed(seed))[:n]


def poison(*shape: int) -> torch.Tensor:
    """Bytes that are NaN in e4m3, F32 and BF16 alike, so that nothing unwritten can pass."""
    return torch.full(shape, 0xFF, dtype=torch.uint8)


@pytest.mark.parametrize("n", [1, 3, 37])
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
def test_packed_rows_equal_the_reference_bytes(n: int, slot_type: torch.dtype) -> None:
    latent, rope = random_tokens(n)
    slots = distinct_slots(n, 101).to(slot_type)
    ours, wanted = poison(101, 656), poison(101, 656)
    op.write_packed_rows(ours, latent, rope, slots)
    reference.write_rows(wanted, reference.packed_rows(latent, rope), slots)
    assert torch.equal(ours, wanted)


def test_every_tile_writes_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    latent, rope = random_tokens(11)
    rows, pages = reference.packed_rows(latent, rope), poison(1, 8448)
    reference.write_index_keys(pages, latent[:, :128], torch.arange(11))
    for tile in tiles.LATENT_TILES:
        monkeypatch.setattr(op, "latent_tile", lambda _, tile=tile: tile)
        cache = poison(11, 656)
        op.write_packed_rows(cache, latent, rope, torch.arange(11))
        assert torch.equal(cache, rows)
    for tile in tiles.INDEX_TILES:
        monkeypatch.setattr(op, "index_tile", lambda _, tile=tile: tile)
        ours = poison(1, 8448)
        op.write_index_keys(ours, latent[:, :128], torch.arange(11))
        assert torch.equal(ours, pages)


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (512, 1), (513, 2), (8192, 2), (8193, 4), (1_048_576, 4)])
def test_latent_tiles_follow_the_table(tokens: int, rows: int) -> None:
    assert tiles.latent_tile(tokens).rows == rows


def test_row_layout_is_codes_then_scales_then_rope() -> None:
    latent, rope = torch.zeros(1, 512).bfloat16(), torch.arange(64).bfloat16().view(1, 64)
    latent[0, 0], latent[0, 128], latent[0, 511] = 448.0, 896.0, -4480.0
    cache = poison(1, 656)
    op.write_packed_rows(cache, latent, rope, torch.tensor([0]))
    row = cache[0]
    assert row[[0, 128, 511]].tolist() == [0x7E, 0x7E, 0xFE]
    assert row[512:528].view(torch.float32).tolist() == [1.0, 2.0, 2.0**-126, 10.0]
    assert torch.equal(row[528:].view(torch.bfloat16), rope[0])


def test_raw_rows_equal_torch_and_saturate() -> None:
    latent, rope = random_tokens(9)
    latent[0, :3] = torch.tensor([1e6, -1e6, float("nan")])
    slots = distinct_slots(9, 20)
    for scale in (1.0, 0.37):
        ours, wanted = poison(20, 576), poison(20, 576)
        op.write_raw_rows(ours, latent, rope, slots, scale)
        reference.write_rows(wanted, reference.raw_rows(latent, rope, scale), slots)
        assert torch.equal(ours, wanted)
        assert torch.equal(ours[slots[0], :2], torch.tensor([0x7E, 0xFE], dtype=torch.uint8))
        gathered = op.gather_raw_rows(ours, slots, scale, torch.full((9, 576), float("nan")))
        assert torch.equal(gathered.nan_to_num(7.0), reference.gather_raw_rows(wanted, slots, scale).nan_to_num(7.0))


def test_gathered_packed_rows_equal_the_reference_bits() -> None:
    latent, rope = random_tokens(23)
    slots = distinct_slots(23, 64)
    cache = poison(64, 656)
    op.write_packed_rows(cache, latent, rope, slots)
    wanted = reference.gather_packed_rows(cache, slots)
    out = torch.full((23, 576), float("nan"))
    assert op.gather_packed_rows(cache, slots, out) is out
    assert torch.equal(out, wanted)
    # Half a step of a 3-bit mantissa, relative to the group's largest value.
    largest = latent.float().view(23, 4, 128).abs().amax(-1, keepdim=True)
    error = (out[:, :512] - latent.float()).view(23, 4, 128).abs()
    assert (error / largest).max() <= 16.01 / 448
    assert torch.equal(out[:, 512:], rope.float())


@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
def test_invalid_slots_are_skipped_and_read_as_zeros(slot_type: torch.dtype) -> None:
    latent, rope = random_tokens(5)
    slots = torch.tensor([-1, 2, 7, -(2**31), 2**31 - 1]).to(slot_type)
    ours, wanted = poison(7, 656), poison(7, 656)
    op.write_packed_rows(ours, latent, rope, slots)
    reference.write_rows(wanted, reference.packed_rows(latent, rope), slots)
    assert torch.equal(ours, wanted)
    gathered = op.gather_packed_rows(ours, slots, torch.full((5, 576), float("nan")))
    assert torch.equal(gathered, reference.gather_packed_rows(ours, slots))
    assert (gathered[[0, 2, 3, 4]] == 0).all()
    pages = poison(1, 8448)
    op.write_index_keys(pages, latent[:, :128], slots)
    assert (pages == 0xFF).sum() >= 8448 - 2 * 132
    codes, scales = op.gather_index_keys(pages, slots)
    assert (codes[[0, 3, 4]] == 0).all()
    assert (scales[[0, 3, 4]] == 0).all()


def test_a_slot_beyond_32_bits_is_no_alias_of_a_small_one() -> None:
    latent, rope = random_tokens(1)
    cache = poison(3, 656)
    op.write_packed_rows(cache, latent, rope, torch.tensor([2**32 + 1]))
    assert (cache == 0xFF).all()


def test_repeated_slots_read_the_same_row_twice() -> None:
    latent, rope = random_tokens(4)
    cache = poison(4, 656)
    op.write_packed_rows(cache, latent, rope, torch.arange(4))
    rows = op.gather_packed_rows(cache, torch.tensor([3, 0, 3, 3]))
    assert torch.equal(rows[[0, 2]], rows[[3, 3]])


def test_no_tokens_touch_nothing() -> None:
    cache, pages, empty = poison(2, 656), poison(1, 8448), torch.empty(0, dtype=torch.int32)
    op.write_packed_rows(cache, torch.empty(0, 512).bfloat16(), torch.empty(0, 64).bfloat16(), empty)
    op.write_index_keys(pages, torch.empty(0, 128).bfloat16(), empty)
    assert (cache == 0xFF).all()
    assert (pages == 0xFF).all()
    assert op.gather_packed_rows(cache, empty).shape == (0, 576)
    assert op.gather_index_keys(pages, empty)[0].shape == (0, 128)


def test_strided_inputs_and_padded_caches() -> None:
    """Latent and rope as slices of one projection, transposed keys, every second slot id, rows 704 bytes apart."""
    latent, rope = random_tokens(6)
    fused = torch.cat([latent, rope, latent[:, :128]], dim=-1)
    slots = torch.stack([torch.arange(6), torch.full((6,), -1)], dim=-1).view(-1)[::2]
    wide = poison(6, 704)
    op.write_packed_rows(wide[:, :656], fused[:, :512], fused[:, 512:576], slots)
    assert torch.equal(wide[:, :656], reference.packed_rows(latent, rope))
    assert (wide[:, 656:] == 0xFF).all()
    transposed = latent[:, :128].t().contiguous().t()
    pages, wanted = poison(1, 8448), poison(1, 8448)
    op.write_index_keys(pages, transposed, slots)
    reference.write_index_keys(wanted, latent[:, :128], slots)
    assert torch.equal(pages, wanted)


def test_engine_views_of_the_same_memory_are_taken() -> None:
    latent, rope = random_tokens(3)
    cache, pages = poison(3, 1, 656), poison(1, 64, 132)
    op.write_packed_rows(cache.view(FP8), latent, rope, torch.arange(3))
    op.write_index_keys(pages, latent[:, :128], torch.arange(3))
    assert torch.equal(cache[:, 0], reference.packed_rows(latent, rope))
    wanted = poison(1, 8448)
    reference.write_index_keys(wanted, latent[:, :128], torch.arange(3))
    assert torch.equal(pages.view(1, 8448), wanted)


def test_nan_stays_in_its_place_and_infinity_saturates() -> None:
    latent, rope = torch.ones(1, 512).bfloat16(), torch.zeros(1, 64).bfloat16()
    latent[0, 5], latent[0, 6], latent[0, 7] = float("nan"), float("inf"), float("-inf")
    latent[0, 128:256] = float("nan")
    cache = poison(1, 656)
    op.write_packed_rows(cache, latent, rope, torch.tensor([0]))
    assert torch.equal(cache, reference.packed_rows(latent, rope))
    row = op.gather_packed_rows(cache, torch.tensor([0]))[0].float()
    assert row[5].isnan()
    assert row[[6, 7, 8]].tolist() == [1.0, -1.0, 1.0]
    assert row[128:256].isnan().all()
    assert (row[256:512] == 1.0).all()


def test_zero_and_tiny_groups_stay_finite() -> None:
    latent, rope = torch.zeros(2, 512).bfloat16(), torch.zeros(2, 64).bfloat16()
    latent[1] = 2.0**-126
    cache = poison(2, 656)
    op.write_packed_rows(cache, latent, rope, torch.arange(2))
    assert torch.equal(cache, reference.packed_rows(latent, rope))
    rows = op.gather_packed_rows(cache, torch.arange(2))
    assert (rows[0] == 0).all()
    assert rows.isfinite().all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_index_pages_hold_two_arrays_above_2048_tokens(power_of_two: bool) -> None:
    """A layout that interleaves a scale after each key reads right up to 2048 tokens and not above."""
    n, page_count = 2048 + 131, 40
    generator = torch.Generator().manual_seed(1)
    keys = (torch.randn(n, 128, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))).bfloat16()
    slots = distinct_slots(n, page_count * 64)
    ours, wanted = poison(page_count, 8448), poison(page_count, 8448)
    op.write_index_keys(ours, keys, slots, power_of_two)
    reference.write_index_keys(wanted, keys, slots, power_of_two)
    assert torch.equal(ours, wanted)
    codes, scales = op.gather_index_keys(ours, slots)
    page, within = slots // 64, slots % 64
    assert torch.equal(codes, torch.stack([ours[p, w * 128 : w * 128 + 128] for p, w in zip(page, within, strict=True)]))
    assert torch.equal(scales, ours[:, 8192:].contiguous().view(torch.float32)[page, within])
    wanted_codes, wanted_scales = reference.gather_index_keys(wanted, slots)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(scales, wanted_scales)
    values = codes.view(FP8).float() * scales[:, None]
    # A scale rounded up to a power of two costs one bit at most.
    assert (
        (values - keys.float()).abs().amax(-1) <= keys.float().abs().amax(-1) * (2 if power_of_two else 1) * 17 / 448
    ).all()


def test_key_scales_follow_the_engines() -> None:
    keys = torch.zeros(3, 128).bfloat16()
    keys[1, 3], keys[2, 3] = 3.0, 448.0
    pages = poison(1, 8448)
    op.write_index_keys(pages, keys, torch.arange(3))
    plain = pages[0, 8192:].view(torch.float32)[:3]
    assert torch.equal(plain, torch.tensor([1e-4, 3.0, 448.0]) / 448.0)
    op.write_index_keys(pages, keys, torch.arange(3), power_of_two=True)
    assert pages[0, 8192:].view(torch.float32)[:3].tolist() == [2.0**-22, 2.0**-7, 1.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent": torch.zeros(2, 511).bfloat16()}, "latent is torch.bfloat16"),
        ({"latent": torch.zeros(2, 512)}, "it must be torch.bfloat16"),
        ({"rope": torch.zeros(1, 64).bfloat16()}, "rope is torch.bfloat16"),
        ({"slots": torch.zeros(2)}, "slots is torch.float32"),
        ({"cache": torch.zeros(4, 655, dtype=torch.uint8)}, "uint8 or e4m3 [slots, 656]"),
        ({"cache": torch.zeros(4, 657, dtype=torch.uint8)[:, :656]}, "rows must be contiguous"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(change: dict[str, torch.Tensor], words: str) -> None:
    arguments = {
        "cache": torch.zeros(4, 656, dtype=torch.uint8),
        "latent": torch.zeros(2, 512).bfloat16(),
        "rope": torch.zeros(2, 64).bfloat16(),
        "slots": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(UsageError) as caught:
        op.write_packed_rows(**(arguments | change))
    assert words in caught.value.message


def test_wrong_pages_are_refused() -> None:
    with pytest.raises(UsageError, match="uint8"):
        op.gather_index_keys(torch.zeros(2, 8000, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(UsageError, match="positive"):
        op.write_raw_rows(torch.zeros(1, 576, dtype=torch.uint8), *random_tokens(1), torch.zeros(1, dtype=torch.int32), 0.0)
