"""Which SGLang releases can be served, what is replaced in each, and what must be found there first?

VERSIONS is the one table: a release that is not in it is refused by name. Every target was read in the released wheels.
Early targets are patched when the plugin loads, the others when a scheduler process has its device and its model's
configuration, just before the model is built.
"""

from __future__ import annotations

from typing import NamedTuple

HERE = "glmplan.kernels.engines"


class Target(NamedTuple):
    """One function or method of the engine.

    path        module.function or module.Class.method
    parameters  its parameter names in order; a different signature is refused
    hook        module:function of ours
    around      ours gets the original as its first argument, instead of replacing it
    """

    path: str
    parameters: tuple[str, ...]
    hook: str
    around: bool = False


class Release(NamedTuple):
    """One SGLang release.

    serves   SMs where it runs GLM-5.2 without us
    backends values of --dsa-prefill-backend and --dsa-decode-backend that lead to our attention
    relays_topk  a pipeline stage gets the top-k of the stage before it
    raw      --dsa-*-backend tilelang makes FP8 rows of 576 bytes; otherwise they are packed ones of 656
    block_fp8, moe_configs  where it looks tuned tables up; replaced where there are some
    """

    serves: frozenset[int]
    backends: tuple[str, ...]
    relays_topk: bool
    raw: bool
    early: tuple[Target, ...]
    targets: tuple[Target, ...]
    block_fp8: Target
    moe_configs: Target


_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
_TOPK = (
    "self", "logits", "lengths", "topk", "topk_transform_method", "attn_metadata", "cu_seqlens_q_topk",
    "topk_indices_offset", "row_starts", "batch_idx_list", "force_unfused_topk",
)  # fmt: skip
_TILELANG = ("self", "q_all", "kv_cache", "v_head_dim", "page_table_1", "sm_scale")
_BLOCK_FP8 = ("N", "K", "block_n", "block_k")
_MOE_CONFIGS = ("E", "N", "dtype", "block_n", "block_k", "per_channel_quant", "down_moe")
_DSA = "sglang.srt.layers.attention.dsa"
_BACKEND = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend"
_POOL = "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool"
_OPS = "sglang.kernels.ops"

_DEVICE_READY = Target(_RUNNER, ("self",), f"{HERE}.sglang_plugin:before_load_model", around=True)
_TOPK_TARGET = Target(
    f"{_DSA}.dsa_topk_backend.DSATopKBackend.topk_transform", _TOPK, f"{HERE}.sglang_topk:topk_transform", around=True
)
_MOE_TARGET = Target(
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config.get_moe_configs",
    _MOE_CONFIGS,
    f"{HERE}.sglang_expert_tables:moe_configs",
    around=True,
)

SGLANG_0_5_13 = Release(
    serves=frozenset({90, 100, 103}),
    backends=("tilelang",),
    relays_topk=False,
    raw=False,
    early=(_DEVICE_READY,),
    targets=(
        Target(
            "deep_gemm.get_paged_mqa_logits_metadata",
            ("context_lens", "block_kv", "num_sms", "indices"),
            f"{HERE}.sglang_indexer:schedule",
        ),
        Target(
            "deep_gemm.fp8_paged_mqa_logits",
            ("q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len", "clean_logits",
             "indices"),
            f"{HERE}.sglang_indexer:paged",
        ),
        Target(
            "deep_gemm.fp8_mqa_logits",
            ("q", "kv", "weights", "ks", "ke", "clean_logits", "max_seqlen_k"),
            f"{HERE}.sglang_indexer:ragged",
        ),
        # the one way to tilelang_sparse_fwd; taken here, tilelang itself is not imported
        Target(f"{_BACKEND}._forward_tilelang", _TILELANG, f"{HERE}.sglang_attention:batched_tilelang"),
        Target(
            f"{_POOL}.set_mla_kv_buffer",
            ("self", "layer", "loc", "cache_k_nope", "cache_k_rope"),
            f"{HERE}.sglang_cache:set_mla_kv_buffer",
            around=True,
        ),
        _TOPK_TARGET,
    ),
    block_fp8=Target(
        "sglang.srt.layers.quantization.fp8_kernel.get_w8a8_block_fp8_configs",
        _BLOCK_FP8,
        f"{HERE}.sglang_tables:block_fp8_configs",
        around=True,
    ),
    moe_configs=_MOE_TARGET,
)  # fmt: skip

SGLANG_0_5_23 = Release(
    serves=frozenset({90, 100, 103, 120, 121}),
    backends=("triton", "tilelang"),
    relays_topk=True,
    raw=True,
    early=(
        _DEVICE_READY,
        Target(
            "sglang.srt.arg_groups.overrides._check_dsa_backend_constraints",
            ("kv_cache_dtype", "prefill_backend", "decode_backend", "hip", "dcp_size"),
            f"{HERE}.sglang_plugin:check_backends",
            around=True,
        ),
    ),
    targets=(
        Target(f"{_DSA}.utils.resolve_num_sms", (), f"{HERE}.sglang_indexer:num_sms"),
        Target(f"{_DSA}.utils.resolve_paged_mqa_logits_metadata_fn", (), f"{HERE}.sglang_indexer:schedule_function"),
        Target(f"{_DSA}.utils.resolve_fp8_paged_mqa_logits_fn", (), f"{HERE}.sglang_indexer:paged_function"),
        Target(f"{_DSA}.utils.resolve_fp8_mqa_logits_fn", (), f"{HERE}.sglang_indexer:ragged_function"),
        Target(
            f"{_OPS}.attention.dsa.triton_sparse_mla.triton_sparse_mla_fwd",
            ("q_nope", "q_rope", "kv", "indices", "sm_scale", "d_v", "topk_length", "max_topk_length"),
            f"{HERE}.sglang_attention:triton_sparse_mla_fwd",
        ),
        Target(
            f"{_OPS}.attention.dsa.triton_sparse_mla_decode.triton_sparse_mla_decode_splitk",
            ("q_nope", "q_rope", "kv", "indices", "sm_scale", "d_v", "kv_splits", "workspace"),
            f"{HERE}.sglang_attention:triton_sparse_mla_decode_splitk",
        ),
        Target(f"{_BACKEND}._forward_tilelang", _TILELANG, f"{HERE}.sglang_attention:tilelang"),
        # on sm_120 it allows one backend only
        Target(
            f"{_OPS}.attention.flash_mla_sm120._validate_flashinfer_sparse_mla_backend",
            ("model_arch", "device_sm_major", "kv_cache_dtype", "prefill_impl", "decode_impl"),
            f"{HERE}.sglang_attention:validate_flashinfer",
            around=True,
        ),
        Target(
            f"{_POOL}._write_mla_kv_buffer",
            ("self", "dst_buffer", "loc", "cache_k_nope", "cache_k_rope"),
            f"{HERE}.sglang_cache:write_mla_kv_buffer",
            around=True,
        ),
        _TOPK_TARGET,
    ),
    block_fp8=Target(
        f"{_OPS}.gemm.fp8_kernel.get_w8a8_block_fp8_configs",
        _BLOCK_FP8,
        f"{HERE}.sglang_tables:block_fp8_configs",
        around=True,
    ),
    moe_configs=_MOE_TARGET,
)

VERSIONS: dict[str, Release] = {"0.5.13.post1": SGLANG_0_5_13, "0.5.23": SGLANG_0_5_23}
