"""top-k against the stable reference, in Triton's interpreter: every path at sizes it can walk through in seconds."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from glmplan.errors import UsageError  # noqa: E402
from glmplan.kernels.topk import op  # noqa: E402
from glmplan.kernels.topk.op import topk, topk_paged, topk_ragged  # noqa: E402
from glmplan.kernels.topk.reference import add_offsets, map_pages, topk_reference  # noqa: E402
from glmplan.kernels.topk.tiles import TABLE, choose, known_sm  # noqa: E402
from glmplan.kernels.topk.verify import PATTERNS, make_logits  # noqa: E402

CPU = torch.device("cpu")


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def poisoned(rows, k):
    """An output whose rows are not contiguous, filled with a value no answer has."""
    return torch.full((rows, k + 5), -77, dtype=torch.int32)[:, :k]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("k", [16, 100])
def test_patterns_agree_with_a_stable_sort(pattern, k):
    logits, lengths = make_logits(pattern, 3, 5003, CPU), i32(5003, 4096, k + 1)
    got = topk(logits, lengths, k=k, out=poisoned(3, k))
    assert torch.equal(got, topk_reference(logits, lengths, k))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 299, 300, 301, -4])
def test_every_short_length_and_lengths_outside_the_row(length):
    logits = make_logits("ties", 1, 300, CPU)
    assert torch.equal(topk(logits, i32(length), k=16, out=poisoned(1, 16)), topk_reference(logits, i32(length), 16))


def test_the_real_k_with_several_filter_blocks():
    logits, lengths = make_logits("normal", 1, 9001, CPU), i32(9001)
    assert torch.equal(topk(logits, lengths), topk_reference(logits, lengths, 2048))


def test_rows_with_more_near_ties_than_the_list_are_selected_from_the_logits():
    logits, lengths = make_logits("equal", 2, 3000, CPU), i32(3000, 2999)
    logits[:, 1500:1507] = 3.0
    tiles = choose(80, 2, 3000, 16, 4)
    assert tiles.cap < 2999
    assert torch.equal(topk(logits, lengths, k=16), topk_reference(logits, lengths, 16))


def test_a_list_longer_than_one_tile_is_read_in_parts():
    # Groups are columns modulo 64: all the high values in two of them leave a bound that lets hundreds pass.
    logits = make_logits("normal", 1, 6400, CPU)
    logits[:, ::64] += 50.0
    tiles = choose(80, 1, 6400, 16, 4)
    assert tiles.small == 64
    assert torch.equal(topk(logits, i32(6400), k=16), topk_reference(logits, i32(6400), 16))


def test_many_rows_take_the_bound_from_a_launch_of_its_own():
    rows, width = 6, 2100
    assert not choose(80, rows, width, 16, 4).own_bound
    logits, lengths = make_logits("ties", rows, width, CPU), i32(2100, 2099, 16, 17, 1024, 5)
    assert torch.equal(topk(logits, lengths, k=16, out=poisoned(rows, 16)), topk_reference(logits, lengths, 16))


def test_rows_beyond_one_slab(monkeypatch):
    monkeypatch.setattr(op, "SLAB_ROWS", 4)
    logits, lengths = make_logits("ties", 6, 400, CPU), i32(400, 399, 398, 3, 200, 100)
    table = torch.randperm(3 * 7, dtype=torch.int32).view(3, 7)
    want = map_pages(topk_reference(logits, lengths, 16), table, 64, 2)
    assert torch.equal(topk_paged(logits, lengths, table, k=16), want)


@pytest.mark.parametrize("page_size", [1, 64])
def test_pages_missing_or_negative_give_minus_one(page_size):
    logits, lengths = make_logits("ties", 4, 700, CPU), i32(700, 650, 9, 0)
    table = torch.randint(-1, 50, (2, 700 // page_size), dtype=torch.int32)[:, :-1]
    got = topk_paged(logits, lengths, table, page_size=page_size, k=32, out=poisoned(4, 32))
    want = map_pages(topk_reference(logits, lengths, 32), table, page_size, 2)
    assert torch.equal(got, want)


def test_ragged_rows_start_anywhere_in_a_strided_buffer():
    logits = make_logits("ties", 5, 907, CPU)[:, 3:-4]
    starts, lengths = i32(0, 37, 899, -5, 2000), i32(900, 500, 400, 333, 10)
    offsets = i32(0, 5, 100_000, 7, 3)
    got = topk_ragged(logits, lengths, offsets, row_starts=starts, k=16, out=poisoned(5, 16))
    assert torch.equal(got, add_offsets(topk_reference(logits, lengths, 16, starts), offsets))


def test_no_rows():
    assert topk(torch.empty(0, 100), i32(), k=16).shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(2, 8, dtype=torch.float16)}, "float32"),
        ({"logits": torch.zeros(8, 2).T}, "stride"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths"),
        ({"k": 4096}, "k is 4096"),
        ({"out": torch.zeros(2, 3, dtype=torch.int32)}, "out is"),
        ({"row_starts": torch.zeros(3, dtype=torch.int32)}, "row_starts"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = {"logits": torch.zeros(2, 8), "lengths": i32(8, 8), "k": 4} | change
    with pytest.raises(UsageError, match=words):
        topk(**arguments)


def test_wrong_tables_are_named():
    logits, lengths = torch.zeros(4, 8), i32(8, 8, 8, 8)
    with pytest.raises(UsageError, match="page_size is 16"):
        topk_paged(logits, lengths, torch.zeros(4, 1, dtype=torch.int32), page_size=16)
    with pytest.raises(UsageError, match="3 rows"):
        topk_paged(logits, lengths, torch.zeros(3, 1, dtype=torch.int32))


@pytest.mark.parametrize("sm", sorted(TABLE))
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 4096), (1, 131_072), (1, 1_048_576), (32, 131_072), (256, 70_001)])
def test_tiles_cover_the_row(sm, rows, width):
    tiles = choose(sm, rows, width, 2048, 108)
    assert tiles.blocks * tiles.tile >= width
    assert tiles.finish_blocks * tiles.share >= tiles.blocks
    assert tiles.finish_blocks * tiles.part >= 2048
    assert tiles.groups % tiles.group_cols == 0
    assert tiles.groups >= 2 * 2048
    assert 4 * tiles.work_ints <= 256 * 1024


def test_a_newer_sm_uses_the_nearest_older_entry():
    assert known_sm(87) == 86
    assert known_sm(75) == 80
