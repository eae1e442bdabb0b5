"""Sparse MLA in Triton's interpreter against fp64, at small odd sizes and with hostile indices.

The interpreter mishandles bf16 dots, so q and bf16-layout rows are float16 here; e4m3 bytes decode to float16 exactly.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from glmplan.errors import UsageError  # noqa: E402
from glmplan.kernels.sparse_mla import op, reference, samples  # noqa: E402
from glmplan.kernels.sparse_mla.tiles import FEW, TILES, WIDE, Tile, splits  # noqa: E402

# float16 out: 2**-11 of each value, and p rounded the same way.
LIMIT = 1e-3
SCALE = 0.3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def small(layout: str, slots: int = 77) -> torch.Tensor:
    return samples.kv_rows(layout, slots, dtype=torch.float16)


def check(q, kv, indices, launch=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full((*q.shape[:2], 512), torch.nan, dtype=q.dtype)
    got, lse = op.sparse_mla(q, kv, indices, SCALE, out=out, launch=launch, **options)
    assert got is out
    relative, off_cosine, lse_error = samples.errors(out, lse, *reference.sparse_mla(q, kv, indices, SCALE, **options))
    assert relative <= LIMIT
    assert off_cosine <= 1e-5
    assert lse_error <= 1e-4
    return out, lse


@pytest.mark.parametrize("layout", samples.LAYOUTS)
@pytest.mark.parametrize(("heads", "topk", "split_count"), [(5, 41, 1), (8, 83, 3), (11, 33, 2)])
def test_hostile_indices_of_every_layout(layout: str, heads: int, topk: int, split_count: int) -> None:
    q = samples.queries(3, heads, dtype=torch.float16)
    shape = op.tile(layout, heads, 3)
    _, lse = check(q, small(layout), samples.hostile_indices(3, topk, 77), op.Launch(shape, split_count))
    assert (lse[-1] == -torch.inf).all()


@pytest.mark.parametrize("layout", ["bf16", "packed"])
def test_lengths_cut_the_indices(layout: str) -> None:
    indices = torch.randint(0, 77, (4, 40), dtype=torch.int32)
    lengths = torch.tensor([40, 17, 0, 1000], dtype=torch.int32)
    _, lse = check(samples.queries(4, 3, dtype=torch.float16), small(layout), indices, lengths=lengths)
    assert (lse[2] == -torch.inf).all()


def test_non_contiguous_inputs() -> None:
    q = samples.queries(2, 6, dtype=torch.float16).repeat(1, 2, 1)[:, ::2].transpose(0, 1).contiguous().transpose(0, 1)
    rows = torch.full((50, 1, 584), torch.nan, dtype=torch.float16)
    rows[..., :576] = small("bf16", 50)
    indices = torch.randint(-2, 50, (2, 1, 60), dtype=torch.int32)[:, :, :37]
    check(q, rows[..., :576], indices)


def test_kv_scale_of_raw_rows() -> None:
    check(samples.queries(1, 2, dtype=torch.float16), small("raw"), torch.arange(20, dtype=torch.int32)[None], kv_scale=0.5)


def test_a_repeated_index_counts_each_time() -> None:
    q, kv = samples.queries(1, 1, dtype=torch.float16), small("packed")
    _, once = check(q, kv, torch.tensor([[4]], dtype=torch.int32))
    _, twice = check(q, kv, torch.tensor([[4, 4]], dtype=torch.int32))
    assert (twice - once).item() == pytest.approx(0.6931472, abs=1e-5)


def test_nan_in_rows_not_chosen_stays_out() -> None:
    kv = small("bf16")
    kv[0] = torch.nan
    check(samples.queries(1, 2, dtype=torch.float16), kv, torch.tensor([[3, -1, 900, 5]], dtype=torch.int32))


def test_every_e4m3_value_is_read() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F] + [0, 1], dtype=torch.uint8)
    rows = torch.zeros(2, 1, 576, dtype=torch.uint8)
    rows[0, 0, :256], rows[1, 0, 256:512] = codes, codes
    out, _ = check(torch.zeros(1, 1, 576, dtype=torch.float16), rows, torch.tensor([[0, 1]], dtype=torch.int32))
    assert torch.equal(out[0, 0, :256].double(), codes.view(torch.float8_e4m3fn).double() / 2)


def test_no_queries() -> None:
    out, lse = op.sparse_mla(torch.empty(0, 8, 576).half(), small("bf16"), torch.empty(0, 1, 8, dtype=torch.int32), SCALE)
    assert out.shape == (0, 8, 512)
    assert lse.shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 65, 576).half()}, "1..64 heads"),
        ({"q": torch.zeros(2, 8, 512).half()}, "heads, 576"),
        ({"kv": torch.zeros(9, 1, 640).half()}, "packed uint8"),
        ({"kv": torch.zeros(9, 1, 580).half()[..., :576]}, "multiples of 16 bytes"),
        ({"indices": torch.zeros(2, 1, 16).long()}, "int32"),
        ({"indices": torch.zeros(3, 1, 16).int()}, "int32 [2, 1, topk]"),
        ({"lengths": torch.zeros(3).int()}, "int32 [2]"),
        ({"out": torch.zeros(2, 8, 576).half()}, "contiguous [2, 8, 512]"),
    ],
)
def test_unfit_arguments_are_named(change: dict, words: str) -> None:
    good = {"q": torch.zeros(2, 8, 576).half(), "kv": small("bf16"), "indices": torch.zeros(2, 1, 16).int()}
    with pytest.raises(UsageError) as error:
        op.sparse_mla(sm_scale=SCALE, **(good | change))
    assert words in error.value.message


def test_tiles_fit_every_shared_memory() -> None:
    for shape in TILES:
        assert shape.shared_bytes(1152) <= 101_376
        assert shape.groups % shape.warps == 0


def test_splits_fill_the_gpu_and_never_exceed_the_tiles() -> None:
    assert splits(1, 2048, 16, 132, 4) == 128
    assert splits(4096, 2048, 16, 132, 6) == 1
    for programs in (1, 8, 32, 128, 200, 1000):
        count = splits(programs, 2048, 16, 132, 6)
        assert 1 <= count <= 128
        assert (count - 1) * -(-128 // count) < 128  # no split is empty


def test_one_head_block_when_heads_are_few() -> None:
    assert op.tile("bf16", 8, 1) is FEW
    assert op.tile("packed", 9, 1) is WIDE
    assert isinstance(op.tile("raw", 64, 4096), Tile)
