"""Does the self-test of a vLLM worker pass right kernels and stop wrong ones? The engine's cache writers are stand-ins."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from glmplan.errors import WrongAnswersError  # noqa: E402
from glmplan.kernels.engines import vllm_selftest  # noqa: E402
from glmplan.kernels.kv_quant import reference  # noqa: E402

CPU = torch.device("cpu")


class Writers:
    """The layouts and rounding of vLLM's concat_and_cache_mla and indexer_k_quant_and_cache."""

    def concat_and_cache_mla(self, kv_c: Any, k_pe: Any, kv_cache: Any, slot_mapping: Any, kv_cache_dtype: str, scale: Any):
        rows = reference.packed_rows(kv_c, k_pe) if kv_cache_dtype == "fp8_ds_mla" else torch.cat([kv_c, k_pe], -1)
        kv_cache.view(-1, kv_cache.shape[-1])[slot_mapping] = rows

    def indexer_k_quant_and_cache(
        self, k: Any, kv_cache: Any, slot_mapping: Any, quant_block_size: int, kv_cache_dtype: str
    ):
        assert (quant_block_size, kv_cache_dtype) == (128, "ue8m0")
        reference.write_index_keys(kv_cache.view(kv_cache.shape[0], -1), k, slot_mapping, True)


class RecordsInPages(Writers):
    """132-byte records where a page is two arrays: invisible in short contexts."""

    def indexer_k_quant_and_cache(self, k: Any, kv_cache: Any, slot_mapping: Any, *format_: Any):
        codes, scales = reference.quantise_keys(k, True)
        kv_cache.view(-1, 132)[slot_mapping] = torch.cat([codes, scales[:, None].view(torch.uint8)], 1)


class CoarseRows(Writers):
    """Two mantissa bits where e4m3 has three."""

    def concat_and_cache_mla(self, kv_c: Any, k_pe: Any, kv_cache: Any, slot_mapping: Any, kv_cache_dtype: str, scale: Any):
        super().concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale)
        kv_cache.view(-1, kv_cache.shape[-1])[:, :512] &= 0xFE


def checks(kv: str, writers: Writers, heads: int = 8) -> list[vllm_selftest.Check]:
    torch.manual_seed(1)
    return list(vllm_selftest.checks(kv, heads, CPU, writers, torch.float16))


@pytest.mark.parametrize(("kv", "heads"), [("bf16", 8), ("packed", 8), ("packed", 16)])
def test_right_kernels_pass(kv: str, heads: int):
    found = checks(kv, Writers(), heads)
    assert len({check.operation for check in found}) == 7
    vllm_selftest.require(iter(found))


@pytest.mark.parametrize(
    ("writers", "operation"),
    [(RecordsInPages(), "index keys as vLLM writes them"), (CoarseRows(), "KV rows as vLLM writes them")],
)
def test_wrong_cache_writers_stop_the_process(writers: Writers, operation: str):
    with pytest.raises(WrongAnswersError, match=operation) as raised:
        vllm_selftest.require(iter(checks("packed", writers)))
    assert raised.value.exit_code == 7
    assert "glmplan.kernels.verify" in raised.value.next_step


def test_wrong_attention_stops_the_process(monkeypatch: pytest.MonkeyPatch):
    right = vllm_selftest.mla_op.sparse_mla
    monkeypatch.setattr(vllm_selftest.mla_op, "sparse_mla", lambda q, *rest, **named: right(q * 1.2, *rest, **named))
    with pytest.raises(WrongAnswersError, match="sparse attention"):
        vllm_selftest.require(iter(checks("bf16", Writers())))


def test_nan_is_not_within_a_limit():
    with pytest.raises(WrongAnswersError, match="nan"):
        vllm_selftest.require(iter([vllm_selftest.Check("anything", float("nan"), 1.0)]))
