"""Indexer logits in Triton's interpreter against fp64, at small odd sizes and with hostile inputs.

The interpreter runs the PLAIN decoding (no inline assembly, no fp8 type); the other two are proved on a GPU.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from glmplan.errors import UsageError  # noqa: E402
from glmplan.kernels.indexer_logits import samples  # noqa: E402
from glmplan.kernels.indexer_logits.op import chunk_rows, paged_logits, ragged_logits, request_block  # noqa: E402
from glmplan.kernels.indexer_logits.reference import (  # noqa: E402
    paged_logits_reference,
    ragged_logits_reference,
    relative_error,
    split_pages,
)
from glmplan.kernels.indexer_logits.tiles import RaggedTile, ragged_tile  # noqa: E402

LIMIT = 1e-6
SMALL = RaggedTile(tokens=64, chunk=16, num_warps=4)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def nan_rows(rows: int, width: int) -> torch.Tensor:
    return torch.full((rows, (width + 3) // 4 * 4), float("nan"))[:, :width]


def check_paged(case: samples.Paged, max_len: int, **options) -> torch.Tensor:
    rows = case.q.shape[0] * case.q.shape[1]
    want, scale = paged_logits_reference(*case, max_len)
    got = paged_logits(*case, max_len, out=nan_rows(rows, max_len), clean_logits=True, **options)
    assert relative_error(got, want, scale) <= LIMIT
    assert torch.equal(got == float("-inf"), want == float("-inf"))
    return got


def check_ragged(case: samples.Ragged, max_k: int = 0, tile: RaggedTile = SMALL) -> torch.Tensor:
    width = max_k or case.keys[0].shape[0]
    want, scale = ragged_logits_reference(*case, max_k)
    got = ragged_logits(*case, max_k=max_k, out=nan_rows(case.q.shape[0], width), clean_logits=True, tile=tile)
    assert relative_error(got, want, scale) <= LIMIT
    assert torch.equal(got == float("-inf"), want == float("-inf"))
    return got


@pytest.mark.parametrize("lengths", [[1], [64], [65], [200], [3, 0, 129, 64], [0, 0], [1] * 5])
def test_paged_matches_fp64(lengths):
    check_paged(samples.paged(lengths, "cpu"), max(lengths) + 3)


@pytest.mark.parametrize("next_n", [2, 3, 5])
@pytest.mark.parametrize("per_token", [False, True])
def test_rows_of_one_request_share_its_keys(next_n, per_token):
    check_paged(samples.paged([70, 2, 130], "cpu", next_n, per_token), 133)


def test_struct_of_arrays_pages_above_2048_tokens():
    case = samples.paged([2112], "cpu")
    got = check_paged(case, 2112)
    keys, scales = split_pages(case.pages)
    interleaved = torch.cat([keys, scales.view(torch.uint8).view(-1, 64, 4)], 2).reshape(len(keys), -1)
    wrong, scale = paged_logits_reference(case.q, interleaved, *case[2:], 2112)
    assert relative_error(got, wrong.nan_to_num(), scale) > 0.1


def test_past_the_length_is_untouched_unless_asked():
    case = samples.paged([5, 70], "cpu")
    got = paged_logits(*case, 90, out=nan_rows(2, 90))
    assert got[0, 5:].isnan().all()
    assert got[1, 70:].isnan().all()
    assert got[0, :5].isfinite().all()


def test_rows_are_a_multiple_of_four_apart():
    got = paged_logits(*samples.paged([5, 7], "cpu"), 7)
    assert got.shape == (2, 7)
    assert got.stride() == (8, 1)


def test_pages_that_do_not_exist_give_minus_infinity():
    case = samples.paged([256], "cpu")
    case.block_table[0, 1] = -1
    case.block_table[0, 2] = len(case.pages)
    got = check_paged(case, 256)
    assert (got[0, 64:192] == float("-inf")).all()
    assert got[0, :64].isfinite().all()


def test_a_page_may_be_shared_and_repeated():
    case = samples.paged([256, 192], "cpu")
    case.block_table[1, :3] = case.block_table[0, 1]
    check_paged(case, 256)


def test_lengths_past_the_table_or_the_result_are_cut():
    case = samples.paged([1000, 100], "cpu", width=3)
    assert (check_paged(case, 500)[0, 192:] == float("-inf")).all()
    check_paged(case, 130)


def test_negative_lengths_are_empty_rows():
    case = samples.paged([64, 64], "cpu")
    case.context_lens[0] = -5
    assert (check_paged(case, 64)[0] == float("-inf")).all()


def test_more_requests_than_one_scan_holds():
    check_paged(samples.paged([1 + i % 7 for i in range(20)], "cpu"), 8)


def test_views_with_gaps_are_read_in_place():
    case = samples.paged([70, 64], "cpu", next_n=2)
    q = torch.zeros(2, 3, 64, 128, dtype=torch.uint8)[:, 1:, ::2]
    q.copy_(case.q)
    pages = torch.zeros(len(case.pages), 8448 + 64, dtype=torch.uint8)[:, :8448]
    pages.copy_(case.pages)
    weights = torch.zeros(4, 64)[:, ::2]
    weights.copy_(case.weights)
    lens = torch.zeros(2, 2, dtype=torch.int32)[:, 0]
    lens.copy_(case.context_lens)
    check_paged(samples.Paged(q, pages, weights, lens, case.block_table), 70)


def test_the_kernel_view_of_the_pages_is_accepted():
    case = samples.paged([70], "cpu")
    check_paged(case._replace(pages=case.pages.view(-1, 64, 1, 132)), 70)


def test_every_byte_decodes():
    """All 254 numbers of e4m3 as keys, subnormals and zeros of both signs included."""
    case = samples.paged([256], "cpu")
    numbers = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    keys = numbers[torch.randint(len(numbers), (len(case.pages), 8192))]
    case.pages[:, :8192] = keys
    check_paged(case, 256)


def test_nothing_to_do_is_not_an_error():
    case = samples.paged([5], "cpu")
    assert paged_logits(*case, 0).shape == (1, 0)
    empty = paged_logits(case.q, case.pages[:0], *case[2:], 8, clean_logits=True)
    assert (empty == float("-inf")).all()


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (5, 63), (17, 130), (33, 65)])
def test_ragged_matches_fp64(rows, tokens):
    check_ragged(samples.ragged(rows, tokens, "cpu"))


@pytest.mark.parametrize("tile", [SMALL, SMALL._replace(chunk=4), ragged_tile(80)])
@pytest.mark.parametrize("compressed", [False, True])
def test_ragged_rows_with_any_starts_and_stops(tile, compressed):
    case = samples.ragged(37, 150, "cpu")
    starts = torch.randint(-3, 150, (37,), dtype=torch.int32)
    stops = torch.randint(-3, 156, (37,), dtype=torch.int32)
    check_ragged(case._replace(starts=starts, stops=stops), 90 if compressed else 0, tile)


def test_ragged_outside_a_row_is_untouched_unless_asked():
    case = samples.ragged(3, 70, "cpu")
    got = ragged_logits(*case, out=nan_rows(3, 70), tile=SMALL)
    assert torch.equal(got.isnan(), torch.arange(70)[None, :] >= case.stops[:, None])


def test_ragged_views_with_gaps_are_read_in_place():
    case = samples.ragged(9, 70, "cpu")
    q = torch.zeros(9, 64, 128, dtype=torch.uint8)[:, ::2]
    q.copy_(case.q)
    k = torch.zeros(70, 160, dtype=torch.uint8)[:, :128]
    k.copy_(case.keys[0])
    weights = torch.zeros(18, 64)[::2, ::2]
    weights.copy_(case.weights)
    check_ragged(samples.Ragged(q, (k, case.keys[1]), weights, case.starts, case.stops))


def test_ragged_without_keys_or_rows():
    case = samples.ragged(3, 70, "cpu")
    empty = (case.keys[0][:0], case.keys[1][:0])
    assert ragged_logits(case.q, empty, *case[2:]).shape == (3, 0)
    assert (ragged_logits(case.q, empty, *case[2:], max_k=5, clean_logits=True) == float("-inf")).all()
    assert ragged_logits(case.q[:0], case.keys, case.weights[:0], case.starts[:0], case.stops[:0]).shape == (0, 70)


def test_wrong_inputs_get_a_sentence():
    case = samples.paged([5], "cpu")
    with pytest.raises(UsageError, match="32 heads of 128"):
        paged_logits(case.q[:, :, :31], *case[1:], 8)
    with pytest.raises(UsageError, match="8448 bytes a page"):
        paged_logits(case.q, case.pages[:, :8000], *case[2:], 8)
    with pytest.raises(UsageError, match=r"context_lens is torch.int64"):
        paged_logits(*case[:3], case.context_lens.long(), case.block_table, 8)
    with pytest.raises(UsageError, match="multiple of 4 apart"):
        paged_logits(*case, 6, out=torch.empty(1, 6)[:, :].as_strided((1, 6), (6, 1)))


def test_programs_get_shorter_chunks_when_there_are_few_tiles():
    tile = RaggedTile(256, 64, 8)
    assert chunk_rows(4096, 512, tile, 132) == 64
    assert chunk_rows(128, 16, tile, 132) == 4
    assert [request_block(n) for n in (1, 2, 17, 1024)] == [1, 16, 128, 1024]
