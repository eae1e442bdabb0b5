"""The attention backend `--attention-backend CUSTOM` of vLLM: sparse MLA on every SM from 80 on.

Queries, metadata, the map from positions to KV rows and the cache write are the engine's; the attention itself is
`sparse_mla`. KV rows are bf16 (1152 bytes) or fp8_ds_mla (656 bytes, written by the engine's concat_and_cache_mla, whose
machine code is in the 0.33.0 wheel for sm_75, 80, 86, 89, 90, 100 and 120). All tokens, prefill too, go through the chosen
2048; the engine's dense prefill of short prompts is left out, so no FlashAttention variant is needed.
CUDA graphs: the launches of `sparse_mla` depend on tokens and heads alone, and everything it reads lives in the engine's
persistent buffers. Declared is UNIFORM_BATCH, because a full graph of a mixed batch would also hold the indexer's prefill,
which is planned on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.sparse_mla_attention import (
    SparseMLACommonImpl,
    SparseMLACommonMetadata,
    SparseMLACommonMetadataBuilder,
)
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionType, MultipleOf
from vllm.v1.attention.backends.mla.sparse_utils import align_blocks_to_rows, flat_kv_row_view
from vllm.v1.attention.ops.metadata import compute_token_to_req_indices
from vllm.v1.worker.workspace import current_workspace_manager

from glmplan.kernels.engines.process import compiled_as_asked
from glmplan.kernels.engines.vllm_versions import BACKEND
from glmplan.kernels.sparse_mla import op

_sparse_mla = compiled_as_asked(op.sparse_mla)


class SparseMLABackend(AttentionBackend):
    """What the engine's selector asks; refusals are its `Reason: [...]`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla"]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[SparseMLAImpl]:
        return SparseMLAImpl

    @staticmethod
    def get_builder_cls() -> type[SparseMLABuilder]:
        return SparseMLABuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(64)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [op.WIDTH]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return align_blocks_to_rows(spec)

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major in (8, 9, 12)

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is None or config.model_config is None:
            return None
        if config.attention_config.hisparse_config is not None:
            return "glmplan's kernels read KV rows in GPU memory only (no HiSparse)"
        heads = config.model_config.get_num_attention_heads(config.parallel_config)
        heads *= config.parallel_config.decode_context_parallel_size
        if heads > op.MAX_HEADS:
            return f"glmplan's kernels take {op.MAX_HEADS} heads a GPU at most, got {heads}"
        return None


@dataclass(kw_only=True)
class SparseMLAMetadata(SparseMLACommonMetadata):
    """The engine's own, under a name of its own."""


class SparseMLABuilder(SparseMLACommonMetadataBuilder[SparseMLAMetadata]):
    metadata_cls = SparseMLAMetadata
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(
            1,
            supports_spec_as_decode=True,
            supports_dcp_with_varlen=vllm_config.parallel_config.cp_kv_cache_interleave_size == 1,
        )
        self.supports_draft_decode_metadata_update = self.dcp_world_size == 1

    def update_draft_decode_metadata(self, metadata: SparseMLAMetadata) -> None:
        """One token a request; all else are views of the engine's buffers."""
        tokens = metadata.num_decode_tokens
        if tokens:
            compute_token_to_req_indices(metadata.query_start_loc, metadata.req_id_per_token, tokens, tokens)


class SparseMLAImpl(SparseMLACommonImpl[SparseMLAMetadata]):
    supports_dense_mha_prefill = False
    supports_pcp = False
    supports_dcp = True
    can_return_lse_for_decode = True
    lse_base_on_e = True
    group_conversion_decode_only: ClassVar[bool] = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        topk_indices_buffer: torch.Tensor | None = None,
        indexer: Any = None,
        **mla_args: Any,
    ) -> None:
        if any([alibi_slopes, sliding_window, logits_soft_cap]) or attn_type != AttentionType.DECODER:
            raise NotImplementedError("glmplan's sparse MLA has no ALiBi, sliding window, soft cap or encoder attention.")
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name,
            indexer=indexer, topk_indices_buffer=topk_indices_buffer, **mla_args,
        )  # fmt: skip
        if self.topk_indices_buffer is None:
            raise NotImplementedError("glmplan's sparse MLA needs the indexer's buffer of chosen tokens.")
        self.supports_quant_query_input = False
        # built under the model's dtype, as all of vLLM's layers are
        self._query_spec = ((self.topk_indices_buffer.shape[0], num_heads, head_size), torch.get_default_dtype())
        # reserved now, so that the engine's memory profile counts it
        current_workspace_manager().get_simultaneous(self._query_spec)

    def _forward_mqa_kernel(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        topk_indices: torch.Tensor,
        valid_counts: torch.Tensor,
        *,
        layer: Any,
        block_size: int,
        is_decode: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out bf16 [tokens, heads, 512] and, for decode context parallelism, lse f32 [tokens, heads], natural log.

        q bf16 [tokens, heads, 576], or its parts of 512 and 64; kv_cache bf16 [blocks, block_size, 576] or uint8
        [blocks, block_size, 656]; topk_indices int32 [tokens, topk], KV rows, the valid_counts[t] valid ones first.
        A token without a valid row gives 0 and -inf.
        """
        query = self._joined(q) if isinstance(q, tuple) else q
        rows, _ = flat_kv_row_view(kv_cache, block_size)
        out, lse = _sparse_mla(query, rows, topk_indices, self.scale, lengths=valid_counts)
        return out, lse if self.need_to_return_lse_for_decode else None

    def _joined(self, q: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        (buffer,) = current_workspace_manager().get_simultaneous(self._query_spec)
        query = buffer[: q[0].shape[0]]
        query[..., : op.LATENT] = q[0]
        query[..., op.LATENT :] = q[1]
        return query
