"""Do speculative batches reach our functions through the real engine, and are their slots and attention right?

SGLang 0.5.23 with EAGLE: target verify and draft extend, eagerly and from the buffers of a CUDA graph, then a draft step
that reuses the slots of the extend. Metadata, indexer, pool and attention are the engine's own code on the CPU, kernels run
in Triton's interpreter; the engine's Triton helpers that want a GPU are stood in for. Skipped like test_sglang_engine.
`python -m tests.kernels.engines.test_sglang_drafts` is the process that each check runs in.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.kernels.engines.test_sglang_engine import PAGE, engine, in_the_engine, patched_engine, pool

__all__ = ["engine"]

CHECKS = ("verify", "verify_short", "verify_native", "verify_graph", "verify_raw", "extend", "extend_graph", "extend_raw")


@pytest.mark.wheels
@pytest.mark.parametrize("engine", ["0.5.23"], indirect=True)
@pytest.mark.parametrize("check", CHECKS)
def test_drafts(engine: Path, check: str):
    in_the_engine(engine, __name__, check)


# What follows runs in the process of a check.

DRAFTS, HEADS, TOPK, WIDTH = 4, 4, 2048, 2404
MIXED, SHORT = (70, 2300), (5, 70)  # tokens before the drafts; short ones need no top-k


class World:
    """Two requests in the engine's pool, and its attention backend as a ModelRunner would have made it."""

    def __init__(self, kv: str, impl: str, lengths: tuple[int, int] = MIXED, sm100: bool = False) -> None:
        import torch
        from sglang.srt.layers.attention import dsa_backend
        from sglang.srt.layers.attention.dsa import dsa_indexer
        from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend

        torch.manual_seed(5)
        self.lengths = lengths
        tokens = [length + DRAFTS for length in lengths]
        pages = [-(-count // PAGE) for count in tokens]
        order = (torch.randperm(sum(pages)) + 1).split(pages)
        self.table = torch.zeros(3, WIDTH, dtype=torch.int32)  # row 0 is where padded rows of a graph look
        for row, own in enumerate(order, 1):
            slots = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()
            self.table[row, : slots.numel()] = slots.to(torch.int32)
        self.requests = torch.tensor([1, 2])
        self.pool = self._pool(kv, (sum(pages) + 1) * PAGE)
        self.backend = self._backend(dsa_backend, DSATopKBackend.SGL_KERNEL, impl)
        dsa_backend.is_cuda = lambda: True
        dsa_backend.get_platform = lambda: SimpleNamespace(is_sm100=sm100)
        dsa_backend.resolve_num_sms = lambda: 8
        dsa_backend.seqlens_expand_triton = expanded
        dsa_backend.pad_dsa_cache_seqlens = lambda _, lengths: lengths
        dsa_indexer._is_cuda = True
        dsa_indexer.get_token_to_kv_pool = lambda: self.pool
        torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)

    def _pool(self, kv: str, slots: int) -> Any:
        import torch

        from glmplan.kernels.indexer_logits import samples

        made = pool("0.5.23", kv, slots)
        self.pages = samples.paged([slots], "cpu", spare=0).pages
        made.get_index_k_with_scale_buffer = lambda layer_id: self.pages
        made.index_page_size = PAGE
        latent, rope = torch.randn(slots, 1, 512).bfloat16(), torch.randn(slots, 1, 64).bfloat16()
        made.set_mla_kv_buffer(SimpleNamespace(layer_id=0), torch.arange(slots), latent, rope)
        return made

    def _backend(self, module: Any, topk: Any, impl: str) -> Any:
        import torch

        made = object.__new__(module.DeepseekSparseAttnBackend)
        settings = {
            "device": "cpu", "dsa_index_topk": TOPK, "dsa_index_kpool": 1, "physical_page_size": PAGE,
            "speculative_num_draft_tokens": DRAFTS, "dsa_prefill_impl": impl, "dsa_decode_impl": impl,
            "dsa_topk_backend": topk, "use_fused_topk": True, "hisparse_coordinator": None, "_kv_shard_pool": None,
            "token_to_kv_pool": self.pool, "req_to_token": self.table, "use_mha": False, "dsa_drop_wide_page_table": False,
            "req_to_token_pool": SimpleNamespace(req_to_token=self.table), "enable_auto_select_prefill_impl": False,
            "dsa_kv_cache_store_fp8": impl == "triton", "_arange_buf": torch.arange(64, dtype=torch.int32),
            "_is_in_breakable_cuda_graph": lambda: False, "_is_in_tc_piecewise_cuda_graph": lambda: False,
            "_get_device_sm": lambda: 89, "_is_blackwell": lambda: False, "_triton_sparse_mla_workspaces": {},
        }  # fmt: skip
        for name, value in settings.items():
            setattr(made, name, value)
        return made

    def batch(self, mode: str) -> Any:
        """A batch as the engine makes it: draft extend counts its tokens in seq_lens, target verify does not."""
        import torch
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        before = torch.tensor(self.lengths)
        seen = before + (DRAFTS if mode == "DRAFT_EXTEND_V2" else 0)
        at = torch.cat([self.table[row, length : length + DRAFTS] for row, length in enumerate(self.lengths, 1)]).long()
        return SimpleNamespace(
            forward_mode=ForwardMode[mode], batch_size=2, seq_lens=seen, seq_lens_cpu=seen, seq_lens_sum=int(seen.sum()),
            req_pool_indices=self.requests, extend_seq_lens=torch.full((2,), DRAFTS, dtype=torch.int32),
            extend_seq_lens_cpu=[DRAFTS] * 2, extend_prefix_lens=before, extend_prefix_lens_cpu=list(self.lengths),
            extend_num_tokens=2 * DRAFTS, out_cache_loc=at, spec_info=None, global_num_tokens_cpu=None,
        )  # fmt: skip

    def captured(self, batch: Any) -> None:
        """Metadata of a graph: captured with lengths of 1, then given this batch's as a replay does."""
        import torch
        from sglang.srt.layers.attention import dsa_backend

        rows = 2 * DRAFTS
        self.backend.decode_cuda_graph_metadata = {"page_table": torch.zeros(rows, WIDTH, dtype=torch.int32)}
        arguments = {"bs": 2, "req_pool_indices": self.requests, "forward_mode": batch.forward_mode, "spec_info": None}
        self.backend._apply_cuda_graph_metadata(seq_lens=torch.ones(2).long(), seq_lens_cpu=None, **arguments)
        dsa_backend.is_cuda = lambda: False  # the engine's own copies, not its Triton kernel for them
        self.backend._apply_cuda_graph_metadata(seq_lens=batch.seq_lens, seq_lens_cpu=None, **arguments)

    def slots(self, batch: Any) -> Any:
        """The indexer's answer, checked against the reference: int32 [8, 2048]."""
        import torch
        from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

        from glmplan.kernels.indexer_logits import reference, samples
        from glmplan.kernels.topk import reference as topk

        rows = 2 * DRAFTS
        q, weights = samples.e4m3((rows, 32, 128), "cpu"), torch.randn(rows, 32, 1)
        indexer = SimpleNamespace(
            _get_index_k_read_buffer=Indexer._get_index_k_read_buffer, _mask_init_and_local_tokens=lambda *_: None,
            paged_mqa_logits_backend=SimpleNamespace(is_cutedsl=lambda: False, is_aiter=lambda: False),
            sm_count=3, n_heads=32, index_topk=TOPK,
        )  # fmt: skip
        metadata = self.backend.get_indexer_metadata(0, batch)
        got = Indexer._get_topk_paged(indexer, batch, 0, q.view(torch.float8_e4m3fn), weights, metadata)
        seen = torch.tensor([length + 1 + draft for length in self.lengths for draft in range(DRAFTS)], dtype=torch.int32)
        table = (self.table[self.requests, ::PAGE] // PAGE).repeat_interleave(DRAFTS, 0)
        logits, _ = reference.paged_logits_reference(
            q[:, None], self.pages, weights[..., 0], seen[:, None], table, table.shape[1] * PAGE
        )
        want = topk.map_pages(topk.topk_reference(logits, seen, TOPK), table, PAGE)
        assert got.dtype == torch.int32
        assert torch.equal(got, want)
        return got

    def attention(self, batch: Any, slots: Any, forward: str) -> None:
        """Rows are written, then read: the result against the reference over the pool's own bytes."""
        import torch

        from glmplan.kernels.engines.sglang_selftest import HALF
        from glmplan.kernels.kv_quant import reference as quant
        from glmplan.kernels.sparse_mla import reference

        count = slots.shape[0]
        layer = SimpleNamespace(
            is_cross_attention=False, layer_id=0, tp_q_head_num=HEADS, v_head_dim=512, head_dim=576, scaling=0.0625
        )
        q_nope = torch.randn(HEADS, count, 512).to(HALF).transpose(0, 1)  # as a batched product leaves it
        q_rope = torch.randn(count, HEADS, 256).to(HALF)[..., 192:]
        kv = torch.randn(count, 576).bfloat16()
        latent, rope = kv[:, None, :512], kv[:, None, 512:]
        out = getattr(self.backend, forward)(
            q_nope, latent, latent, layer, batch, q_rope=q_rope, k_rope=rope, topk_indices=slots
        ).view(-1, HEADS, 512)
        rows = self.pool.get_key_buffer(0)
        written = (quant.packed_rows if rows.shape[-1] == 656 else quant.raw_rows)(latent[:, 0], rope[:, 0])
        assert torch.equal(self.pool.kv_buffer[0][batch.out_cache_loc, 0], written)
        want, _ = reference.sparse_mla(torch.cat([q_nope, q_rope], -1), rows, slots, 0.0625)
        assert float((out.double() - want).norm() / want.norm()) <= 5e-3


def expanded(queries: Any, lengths: Any, total: int, most: int) -> Any:
    """The engine's seqlens_expand_triton."""
    import torch

    pairs = zip(queries.tolist(), lengths.tolist(), strict=True)
    found = torch.cat([torch.arange(length - count + 1, length + 1, dtype=torch.int32) for count, length in pairs])
    assert (found.numel(), max(queries.tolist())) == (total, most)
    return found.clamp(min=0)


def verified(world: World, graph: bool = False, next_n: int = 1) -> None:
    batch = world.batch("TARGET_VERIFY")
    world.captured(batch) if graph else world.backend.init_forward_metadata(batch)
    assert world.backend.forward_metadata.paged_mqa_ctx_lens_2d.shape[1] == next_n
    world.attention(batch, world.slots(batch), "forward_extend")


def extended(world: World, graph: bool = False) -> None:
    """Then a draft step: the slots that the last accepted token of each request chose."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = world.batch("DRAFT_EXTEND_V2")
    world.captured(batch) if graph else world.backend.init_forward_metadata(batch)
    slots = world.slots(batch)
    world.attention(batch, slots, "forward_extend")
    last = [1, 2 * DRAFTS - 1]
    batch.forward_mode, batch.out_cache_loc = ForwardMode.DECODE, batch.out_cache_loc.view(2, DRAFTS)[:, 1]
    world.attention(batch, slots[last], "forward_decode")


def check_verify() -> None:
    verified(World("packed", "triton"))


def check_verify_short() -> None:
    """Eagerly the attention is told how many columns can hold a slot, and looks at those alone."""
    verified(World("packed", "triton", SHORT))


def check_verify_native() -> None:
    """On sm_100 the four drafts of a request are four rows of one call."""
    verified(World("packed", "triton", sm100=True), next_n=DRAFTS)


def check_verify_graph() -> None:
    verified(World("packed", "triton"), graph=True)


def check_verify_raw() -> None:
    verified(World("raw", "tilelang"))


def check_extend() -> None:
    extended(World("packed", "triton"))


def check_extend_graph() -> None:
    extended(World("packed", "triton"), graph=True)


def check_extend_raw() -> None:
    extended(World("raw", "tilelang"), graph=True)


if __name__ == "__main__":
    os.environ["SGLANG_OPT_USE_TOPK_V2"] = "0"  # its plan is compiled CUDA code
    patched_engine()
    globals()[f"check_{sys.argv[1]}"]()
