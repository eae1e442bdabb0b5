"""Which vLLM releases can be served, what is replaced in each, and what must be found there first?

VERSIONS is the one table: a release that is not in it is refused by name. Every name was read in the released wheel, and
`tests/contracts/test_vllm_plugin.py` reads them there again.
The backend takes the enum's CUSTOM: a name of its own would be a member that exists only after plugins are loaded, and the
processes of `vllm serve` are spawned with the configuration pickled, so they look the member up before that.
"""

from __future__ import annotations

from typing import NamedTuple

HERE = "glmplan.kernels.engines"
BACKEND = "CUSTOM"
BACKEND_CLASS = f"{HERE}.vllm_backend.SparseMLABackend"
BACKEND_FLAG = ("--attention-backend", BACKEND)


class Target(NamedTuple):
    """One function or method of the engine.

    path        module.function or module.Class.method
    parameters  its parameter names in order; a different signature is refused
    hook        module:function of ours; empty when we only call it or build on it
    around      ours gets the original as its first argument, instead of replacing it
    below_sm    replaced only when kernels are compiled for an older SM than this; 0: always
    """

    path: str
    parameters: tuple[str, ...]
    hook: str = ""
    around: bool = False
    below_sm: int = 0


class Release(NamedTuple):
    """One vLLM release.

    serves   SMs where it runs GLM-5.2 without us
    models   architecture -> module:class to register below sm_89, where the engine's own cannot be compiled
    ready    called in every worker when it has its device, before the model is built
    targets  what is replaced
    needs    what ours call or build on
    """

    serves: frozenset[int]
    models: dict[str, str]
    ready: Target
    targets: tuple[Target, ...]
    needs: tuple[Target, ...]


# fp8e4nv, the type of e4m3 in Triton, exists from here on
FP8_SM = 89
# CuTe DSL, in which the engine merges the top-k of decode-context-parallel ranks, is for these
CUTE_SM = 90

_INDEXER_OP = "vllm.model_executor.layers.sparse_attn_indexer"
_INDEXER_METADATA = "vllm.v1.attention.backends.mla.indexer"
_SPARSE_MLA = "vllm.model_executor.layers.attention.sparse_mla_attention"
_SPARSE_UTILS = "vllm.v1.attention.backends.mla.sparse_utils"
_MLA = "vllm.model_executor.layers.attention.mla_attention"
_OPS = "vllm._custom_ops"

_TARGETS = (
    Target(
        f"{_INDEXER_OP}.fp8_fp4_mqa_logits",
        ("q", "kv", "weights", "cu_seqlen_ks", "cu_seqlen_ke", "max_seqlen_k"),
        f"{HERE}.vllm_indexer:prefill_logits",
    ),
    Target(
        f"{_INDEXER_OP}.fp8_fp4_paged_mqa_logits",
        ("q", "kv_cache", "weights", "context_lens", "block_tables", "schedule_metadata", "max_model_len", "indices"),
        f"{HERE}.vllm_indexer:decode_logits",
    ),
    Target(
        f"{_INDEXER_METADATA}.get_paged_mqa_logits_metadata",
        ("context_lens", "block_size", "num_sms", "indices"),
        f"{HERE}.vllm_indexer:schedule",
    ),
    Target(f"{_INDEXER_OP}.get_indexer_topk", ("backend",), f"{HERE}.vllm_indexer:decode_topk_of"),
    Target(
        f"{_OPS}.top_k_per_row_prefill",
        ("logits", "cu_seqlen_ks", "cu_seqlen_ke", "raw_topk_indices", "num_rows", "stride0", "stride1", "topk_tokens"),
        f"{HERE}.vllm_indexer:prefill_topk",
    ),
    Target(
        f"{_MLA}._canonicalize_sparse_mla_kv_cache_dtype",
        ("attn_backend", "kv_cache_dtype"),
        f"{HERE}.vllm_indexer:kv_cache_format",
        around=True,
    ),
    Target(
        f"{_INDEXER_OP}._merge_dcp_topk_global",
        ("logits", "topk_indices", "topk_tokens", "dcp_rank", "dcp_world_size", "cp_interleave", "row_starts"),
        f"{HERE}.vllm_indexer:merge_ranks",
        below_sm=CUTE_SM,
    ),
    # asked only whether to compile the kernels that merge_ranks stands in for
    Target(f"{_INDEXER_OP}.has_cutedsl", (), f"{HERE}.vllm_indexer:no_cutedsl", below_sm=CUTE_SM),
    Target(
        f"{_INDEXER_OP}.pack_seq_triton",
        ("x", "lengths", "pad_value", "block_t", "block_d"),
        f"{HERE}.vllm_indexer:pack_bytes",
        around=True,
        below_sm=FP8_SM,
    ),
    # its FP8 variant is compiled at start, and a failure there ends the server
    Target(
        "vllm.v1.attention.ops.common.PackSeqTritonKernel.register_warmup",
        ("self", "args", "kwargs"),
        f"{HERE}.vllm_indexer:warm_up_bytes",
        around=True,
        below_sm=FP8_SM,
    ),
    # ours leaves use_fused_indexer_q off: that kernel stores fp8e4nv, the other path quantises in CUDA
    Target(
        "vllm.model_executor.models.deepseek_v2.Indexer.__init__",
        (
            "self", "vllm_config", "config", "hidden_size", "q_lora_rank", "quant_config", "cache_config",
            "topk_indices_buffer", "prefix", "is_inplace_rope",
        ),
        f"{HERE}.vllm_indexer:indexer_without_fused_q",
        around=True,
        below_sm=FP8_SM,
    ),
)  # fmt: skip

_NEEDS = (
    Target(f"{_SPARSE_MLA}.SparseMLACommonImpl.forward_mqa", ("self", "q", "kv_c_and_k_pe_cache", "attn_metadata", "layer")),
    Target(
        f"{_SPARSE_MLA}.SparseMLACommonImpl._forward_mqa_kernel",
        ("self", "q", "kv_cache", "topk_indices", "valid_counts", "layer", "block_size", "is_decode"),
    ),
    Target(
        f"{_SPARSE_MLA}.SparseMLACommonMetadataBuilder.__init__",
        ("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
    ),
    Target(
        f"{_SPARSE_MLA}.SparseMLACommonMetadataBuilder._init_reorder_batch_threshold",
        ("self", "reorder_batch_threshold", "supports_spec_as_decode", "supports_dcp_with_varlen"),
    ),
    Target(f"{_SPARSE_UTILS}.flat_kv_row_view", ("kv_cache", "block_size")),
    Target(f"{_SPARSE_UTILS}.align_blocks_to_rows", ("spec", "rows")),
    Target(
        "vllm.v1.attention.ops.metadata.compute_token_to_req_indices",
        ("query_start_loc", "out", "num_mapped_tokens", "num_tokens"),
    ),
    Target("vllm.v1.worker.workspace.current_workspace_manager", ()),
    Target("vllm.v1.worker.workspace.WorkspaceManager.get_simultaneous", ("self", "shapes_and_dtypes")),
    Target(
        f"{_OPS}.concat_and_cache_mla",
        ("kv_c", "k_pe", "kv_cache", "slot_mapping", "kv_cache_dtype", "scale", "skip_scale"),
    ),
    Target(f"{_OPS}.indexer_k_quant_and_cache", ("k", "kv_cache", "slot_mapping", "quant_block_size", "kv_cache_dtype")),
    Target(f"{_OPS}.cp_gather_indexer_k_quant_cache", ("kv_cache", "dst_k", "dst_scale", "block_table", "cu_seq_lens")),
    Target("vllm.distributed.parallel_state.get_dcp_group", ()),
)

VERSIONS: dict[str, Release] = {
    "0.33.0": Release(
        serves=frozenset({90, 100, 103, 120, 121}),
        models={
            "GlmMoeDsaForCausalLM": "vllm.model_executor.models.deepseek_v2:GlmMoeDsaForCausalLM",
            "DeepseekV32MTPModel": "vllm.model_executor.models.deepseek_mtp:DeepSeekMTP",
        },
        ready=Target(
            "vllm.v1.worker.worker_base.WorkerWrapperBase.init_device", ("self",), f"{HERE}.vllm_plugin:device_ready", True
        ),
        targets=_TARGETS,
        needs=_NEEDS,
    )
}
