"""Does a prefill batch of mixed requests, some in the middle of their prompt, get the right slots in both engines?

A new request, one whose chunk crosses the 2048 tokens that need no choice, and one beyond: the engine's own metadata,
gathered keys and loop over parts of the logits, our logits, and the engine's top-k stood in for by its contract (read in
sgl-kernel's topk.cu) and the reference.
`python -m tests.kernels.engines.test_sglang_prefill` is the process that each check runs in.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.kernels.engines.test_sglang_engine import PAGE, engine, in_the_engine, patched_engine

__all__ = ["engine"]


@pytest.mark.wheels
@pytest.mark.parametrize("check", ["mixed", "in_parts"])
def test_prefill(engine: Path, check: str):
    in_the_engine(engine, __name__, check)


# What follows runs in the process of a check.

PREFIXES, EXTENDS, TOPK = (0, 2030, 2304), (50, 40, 23), 2048


class OnDevice:
    """Queries on an indexed device, as the indexer wants them; a CPU tensor has no index."""

    def __init__(self, tensor: Any) -> None:
        import torch

        self.tensor, self.shape, self.device = tensor, tensor.shape, torch.device("cpu", 0)

    def __getitem__(self, key: Any) -> Any:
        return self.tensor[key]


def fast_topk_transform_fused(
    score: Any, lengths: Any, page_table_size_1: Any, cu_seqlens_q: Any, topk: int, row_starts: Any
) -> Any:
    """Rows cu_seqlens_q[i] .. cu_seqlens_q[i + 1] - 1 look slots up in row i of the table of single tokens."""
    import torch

    from glmplan.kernels.topk import reference

    assert score.stride(1) == 1
    assert lengths.is_contiguous()
    assert cu_seqlens_q.is_contiguous()
    assert page_table_size_1.stride(1) == 1
    assert page_table_size_1.shape[0] == cu_seqlens_q.numel() - 1
    assert {one.dtype for one in (lengths, page_table_size_1, cu_seqlens_q, row_starts)} == {torch.int32}
    owner = torch.repeat_interleave(torch.arange(page_table_size_1.shape[0]), cu_seqlens_q.diff())
    positions = reference.topk_reference(score, lengths, topk, row_starts)
    return reference.map_pages(positions, page_table_size_1[owner], 1)


def backend(table: Any) -> Any:
    import torch
    from sglang.srt.layers.attention import dsa_backend
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend

    made = object.__new__(dsa_backend.DeepseekSparseAttnBackend)
    settings = {
        "device": "cpu", "dsa_index_topk": TOPK, "dsa_index_kpool": 1, "physical_page_size": PAGE, "real_page_size": PAGE,
        "speculative_num_draft_tokens": None, "dsa_prefill_impl": "tilelang", "dsa_decode_impl": "tilelang",
        "dsa_topk_backend": DSATopKBackend.SGL_KERNEL, "use_fused_topk": True, "hisparse_coordinator": None,
        "_kv_shard_pool": None, "req_to_token_pool": SimpleNamespace(req_to_token=table), "req_to_token": table,
        "use_mha": False, "dsa_kv_cache_store_fp8": True, "_arange_buf": torch.arange(256, dtype=torch.int32),
        "set_dsa_prefill_impl": lambda _: None, "token_to_kv_pool": SimpleNamespace(dtype=torch.float8_e4m3fn),
    }  # fmt: skip
    for name, value in settings.items():
        setattr(made, name, value)
    for name in ("can_dsa_prefill_cp_interleave", "can_dsa_prefill_cp_round_robin_split"):
        setattr(dsa_backend, name, lambda _: False)
    dsa_backend.pad_dsa_cache_seqlens = lambda _, lengths: lengths
    return made


def run(budget: int) -> None:
    import torch
    from sglang.srt.layers.attention.dsa import dsa_indexer
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from glmplan.kernels.indexer_logits import reference, samples
    from glmplan.kernels.topk import reference as topk

    torch.manual_seed(7)
    seen = [prefix + extend for prefix, extend in zip(PREFIXES, EXTENDS, strict=True)]
    case = samples.paged(seen, "cpu", width=40)
    table = (case.block_table.clamp(min=0)[:, :, None] * PAGE + torch.arange(PAGE)).flatten(1).to(torch.int32)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, batch_size=3, seq_lens=torch.tensor(seen), seq_lens_cpu=torch.tensor(seen),
        seq_lens_sum=sum(seen), req_pool_indices=torch.arange(3), extend_seq_lens=torch.tensor(EXTENDS, dtype=torch.int32),
        extend_seq_lens_cpu=list(EXTENDS), extend_prefix_lens_cpu=list(PREFIXES),
    )  # fmt: skip
    serving = backend(table)
    serving.init_forward_metadata(batch)
    store = object.__new__(DSATokenToKVPool)
    sizes = {"index_page_size": PAGE, "page_size": PAGE, "index_head_dim": 128, "quant_block_size": 128, "start_layer": 0}
    buffers = {"layer_transfer_counter": None, "index_kpool": 1, "index_key_cache": cache(store, case.pages)}
    for name, value in (sizes | buffers).items():
        setattr(store, name, value)
    if not isinstance(getattr(DSATokenToKVPool, "index_k_with_scale_buffer", None), property):
        store.index_k_with_scale_buffer = [case.pages]
    dsa_indexer.get_token_to_kv_pool = lambda: store
    dsa_indexer.deep_gemm = sys.modules["deep_gemm"]  # imported on a GPU only
    rows = sum(EXTENDS)
    q, weights = samples.e4m3((rows, 32, 128), "cpu"), torch.randn(rows, 32, 1)
    indexer = object.__new__(type("Indexer", (dsa_indexer.Indexer,), {"__setattr__": object.__setattr__}))
    settings = {
        "index_topk": TOPK, "logits_with_pp_recv": False, "num_init_tokens": 0, "num_local_tokens": 0,
        "_get_mqa_logits_budget_bytes": lambda _: budget, "_should_chunk_mqa_logits": lambda *_: (budget < 1e6, budget),
    }  # fmt: skip
    for name, value in settings.items():
        setattr(indexer, name, value)
    dsa_indexer.mqa_logits_should_chunk = lambda **_: (budget < 1e6, budget)
    metadata = serving.get_indexer_metadata(0, batch)
    got = indexer._get_topk_ragged(False, batch, 0, OnDevice(q.view(torch.float8_e4m3fn)), weights, metadata)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(EXTENDS))
    lengths = torch.cat([torch.arange(seen[row] - EXTENDS[row] + 1, seen[row] + 1) for row in range(3)]).to(torch.int32)
    logits, _ = reference.paged_logits_reference(
        q[:, None], case.pages, weights[..., 0], lengths[:, None], case.block_table[owner], 40 * PAGE
    )
    assert torch.equal(got, topk.map_pages(topk.topk_reference(logits, lengths, TOPK), case.block_table[owner], PAGE))


def cache(store: Any, pages: Any) -> Any:
    """0.5.23 keeps the index keys behind a class of their own."""
    try:
        from sglang.srt.mem_cache.index_key_cache import IndexKeyCache
    except ImportError:
        return None
    made = object.__new__(IndexKeyCache)
    made.pool, made.buffer = store, [pages]
    return made


def check_mixed() -> None:
    run(1 << 30)


def check_in_parts() -> None:
    """As when memory is short: 30 rows of logits at a time, which cuts requests in two."""
    run(30 * 4 * sum(PREFIXES + EXTENDS))


if __name__ == "__main__":
    os.environ["SGLANG_OPT_USE_TOPK_V2"] = "0"  # its plan is compiled CUDA code
    patched_engine()
    stand_in = types.ModuleType("sgl_kernel")
    stand_in.fast_topk_transform_fused = fast_topk_transform_fused  # type: ignore[attr-defined]
    stand_in.fast_topk_transform_ragged_fused = None  # type: ignore[attr-defined]
    sys.modules["sgl_kernel"] = stand_in
    globals()[f"check_{sys.argv[1]}"]()
