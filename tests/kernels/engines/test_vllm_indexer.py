"""What vLLM's indexer gets from us, on the shapes it passes: logits, top-k, the merge of ranks, and what is refused."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from glmplan.errors import UnsupportedError  # noqa: E402
from glmplan.kernels.engines import vllm_indexer  # noqa: E402
from glmplan.kernels.indexer_logits import reference, samples  # noqa: E402
from glmplan.kernels.topk.reference import topk_reference  # noqa: E402

LIMIT = 1e-6


def sets(rows: Any) -> list[set[int]]:
    return [set(row[row >= 0].tolist()) for row in rows]


@pytest.mark.parametrize(("next_n", "per_token"), [(1, True), (2, True), (2, False), (5, True)])
def test_decode_logits_are_the_references(next_n: int, per_token: bool):
    """Lengths are [B, next_n] for drafts; [B, 1] beside several rows a request means the request's length."""
    torch.manual_seed(next_n)
    case = samples.paged([next_n, 70, 130], "cpu", next_n=next_n, per_token=per_token)
    lens = case.context_lens if per_token else case.context_lens[:, None]
    width = 256
    got = vllm_indexer.decode_logits(
        (case.q.view(torch.float8_e4m3fn), None), case.pages.view(-1, 64, 1, 132), case.weights, lens, case.block_table,
        vllm_indexer.schedule(lens, 64, 132), width,
    )  # fmt: skip
    want, scale = reference.paged_logits_reference(
        case.q, case.pages, case.weights, case.context_lens, case.block_table, width
    )
    assert got.shape == (3 * next_n, width)
    assert got.stride(0) % 4 == 0
    assert reference.relative_error(got, want, scale) <= LIMIT


def test_decode_takes_a_block_table_of_one_transposed_column():
    case = samples.paged([5, 9], "cpu", per_token=True)
    table = case.block_table.as_strided((2, 1), (1, 2))
    assert table.stride(-1) != 1
    lens = case.context_lens
    got = vllm_indexer.decode_logits((case.q, None), case.pages, case.weights, lens, table, lens, 64)
    want, scale = reference.paged_logits_reference(case.q, case.pages, case.weights, lens, case.block_table, 64)
    assert reference.relative_error(got, want, scale) <= LIMIT


def test_prefill_logits_are_compressed():
    """Row r begins with its own first token, and its top-k counts from there."""
    torch.manual_seed(3)
    case = samples.ragged(6, 200, "cpu")
    starts = torch.tensor([0, 0, 70, 70, 130, 199], dtype=torch.int32)
    stops = torch.tensor([1, 70, 71, 130, 200, 200], dtype=torch.int32)
    got = vllm_indexer.prefill_logits((case.q, None), case.keys, case.weights, starts, stops, 70)
    want, scale = reference.ragged_logits_reference(case.q, case.keys, case.weights, starts, stops, max_k=70)
    assert got.shape == (6, 70)
    assert reference.relative_error(got, want, scale) <= LIMIT
    chosen = torch.full((6, 16), -1, dtype=torch.int32)
    lengths = stops - starts
    vllm_indexer.prefill_topk(got, torch.zeros_like(lengths), lengths, chosen, 6, got.stride(0), 1, 16)
    assert sets(chosen) == sets(topk_reference(got, lengths, 16))


def test_prefill_topk_of_uncompressed_rows_is_relative_to_their_start():
    torch.manual_seed(4)
    logits = torch.randn(3, 128)
    starts, stops = torch.tensor([0, 64, 100], dtype=torch.int32), torch.tensor([50, 128, 103], dtype=torch.int32)
    chosen = torch.full((3, 16), -1, dtype=torch.int32)
    vllm_indexer.prefill_topk(logits, starts, stops, chosen, 3, 128, 1, 16)
    assert torch.equal(chosen, topk_reference(logits, stops - starts, 16, row_starts=starts))


def test_decode_topk_writes_into_the_engines_wider_buffer():
    torch.manual_seed(5)
    logits = torch.randn(4, 512)
    buffer = torch.full((8, 80), -7, dtype=torch.int32)
    lens = torch.tensor([[511, 512], [1, 2]], dtype=torch.int32)
    vllm_indexer.decode_topk_of("persistent")(logits, lens, 2, buffer[:4, :64], 64, 512)
    assert torch.equal(buffer[:4, :64], topk_reference(logits, lens.flatten(), 64))
    assert (buffer[4:] == -7).all()
    assert (buffer[:, 64:] == -7).all()


def test_lengths_of_draft_rows_end_with_the_requests():
    lens = torch.tensor([[10], [1], [0]], dtype=torch.int32)
    assert vllm_indexer.row_lengths(lens, 3, 9).tolist() == [8, 9, 10, 0, 0, 1, 0, 0, 0]
    assert vllm_indexer.row_lengths(lens, 1, 3).tolist() == [10, 1, 0]


@pytest.mark.parametrize(("ranks", "interleave"), [(2, 1), (3, 4), (4, 64)])
def test_merged_ranks_choose_what_one_gpu_would(ranks: int, interleave: int):
    """The last rank may own nothing of a short request; its logits then have no columns."""
    torch.manual_seed(ranks)
    lengths, k = [300, 40, 3], 32
    logits = torch.randn(len(lengths), max(lengths))
    owner = torch.arange(max(lengths)) // interleave % ranks
    gathered = []
    for rank in range(ranks):
        mine = [torch.nonzero(owner[:length] == rank).flatten() for length in lengths]
        width = max(map(len, mine))
        local = torch.full((len(lengths), width), torch.nan)
        for row, tokens in enumerate(mine):
            local[row, : len(tokens)] = logits[row, tokens]
        own = torch.tensor([len(tokens) for tokens in mine], dtype=torch.int32)
        best = topk_reference(local, own, k)
        gathered.append(vllm_indexer.candidates(local, best, rank, ranks, interleave))
    out = torch.full((len(lengths), k), -5, dtype=torch.int32)
    vllm_indexer.best_of_all(torch.cat(gathered, 1), k, out)
    assert sets(out) == sets(topk_reference(logits, torch.tensor(lengths, dtype=torch.int32), k))
    assert ((out >= 0) | (out == -1)).all()


def test_a_rank_without_columns_offers_nothing():
    pads = torch.full((2, 4), -1, dtype=torch.int32)
    offered = vllm_indexer.candidates(torch.empty(2, 0), pads, 1, 2, 1)
    assert (offered[..., 0] == -torch.inf).all()
    assert (offered[..., 1].contiguous().view(torch.int32) == -1).all()


def test_one_rank_needs_no_merge():
    vllm_indexer.merge_ranks(torch.empty(1, 1), torch.empty(1, 1), 1, 0, 1, 1)


def test_schedule_gives_the_engine_no_rows_to_copy():
    assert vllm_indexer.schedule(torch.ones(3, 1, dtype=torch.int32), 64, 132).shape == (0, 2)


def test_mxfp4_queries_and_varlen_rows_are_refused():
    anything = torch.empty(1)
    with pytest.raises(UnsupportedError, match="MXFP4"):
        vllm_indexer.prefill_logits((anything, anything), (anything, anything), anything, anything, anything, 1)
    with pytest.raises(UnsupportedError, match="sm_100"):
        vllm_indexer.decode_logits((anything, None), anything, anything, anything, anything, anything, 1, indices=anything)


@pytest.mark.parametrize(
    ("backend", "asked", "format_"),
    [
        ("CUSTOM", "fp8", "fp8_ds_mla"),
        ("CUSTOM", "fp8_e4m3", "fp8_ds_mla"),
        ("CUSTOM", "auto", "theirs"),
        ("X", "fp8", "theirs"),
    ],
)
def test_fp8_means_packed_rows_for_our_backend_only(backend: str, asked: str, format_: str):
    named: Any = SimpleNamespace(get_name=lambda: backend)
    assert vllm_indexer.kv_cache_format(lambda *_: "theirs", named, asked) == format_


def test_e4m3_is_packed_as_bytes():
    seen: list[Any] = []

    def original(x: Any, lengths: Any, pad_value: float, block_t: int, block_d: int) -> Any:
        seen.append((x.dtype, pad_value))
        return x

    x = torch.ones(2, 4)
    assert vllm_indexer.pack_bytes(original, x.to(torch.float8_e4m3fn), x).dtype == torch.float8_e4m3fn
    assert vllm_indexer.pack_bytes(original, x, x).dtype == torch.float32
    assert seen == [(torch.uint8, 0), (torch.float32, -float("inf"))]


def test_the_byte_variant_is_warmed_up_in_place_of_the_fp8_one():
    seen: list[Any] = []
    vllm_indexer.warm_up_bytes(lambda *a, **k: seen.append((a, k)), "kernel", dtype=torch.float8_e4m3fn, pad_value=-1.0)
    vllm_indexer.warm_up_bytes(lambda *a, **k: seen.append((a, k)), "kernel")
    assert seen == [(("kernel",), {"dtype": torch.uint8, "pad_value": 0}), (("kernel",), {})]


def test_indexers_are_built_without_the_fused_query_kernel():
    indexer = SimpleNamespace()

    def original(self: Any, config: str, *, prefix: str) -> None:
        self.use_fused_indexer_q, self.prefix = True, prefix + config

    vllm_indexer.indexer_without_fused_q(original, indexer, "b", prefix="a")
    assert (indexer.use_fused_indexer_q, indexer.prefix) == (False, "ab")
