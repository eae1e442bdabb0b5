"""Which backends and weight kernels a set of GPUs gets, and the refusals of those that have none."""

from __future__ import annotations

import pytest

from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.gpu import Gpu
from glmplan.facts.profiles import engine_names, engine_profile, gpu_names, gpu_profile
from glmplan.planning.ports import attention_options, choose_attention, quantization_for, require_support
from tests.samples import NEW, OLD, PATCHED, VLLM, engine


def card(name: str) -> Gpu:
    return gpu_profile(name).gpu(0)


def chosen(engine_name: str, *gpus: str, kv_dtype: str = "auto") -> str | None:
    found = choose_attention(attention_options(engine(engine_name), kv_dtype), [card(name) for name in gpus])
    return found.id if found else None


# The engines' own defaults: sglang.md section 1, and the only backends that exist where there is no default.
@pytest.mark.parametrize(
    ("name", "gpu", "kv_dtype", "expected"),
    [
        (NEW, "b200", "auto", "trtllm-fp8"),
        (NEW, "h200", "auto", "flashmla-fp8"),
        (NEW, "h200", "bf16", "flashmla-bf16"),
        (NEW, "rtx-5090", "auto", "flashinfer-sparse-fp8"),
        (NEW, "gb10", "auto", "flashinfer-sparse-fp8"),
        (NEW, "rtx-4090-48g", "auto", "tilelang-fp8"),
        (NEW, "a100-80g", "auto", "triton-bf16"),
        (NEW, "rtx-3090", "auto", "triton-bf16"),
        (OLD, "rtx-4090-48g", "auto", "tilelang-port-bf16"),
        (OLD, "h200", "auto", "flashmla-fp8"),
        (VLLM, "h200", "auto", "flashmla-sparse-fp8"),
        (VLLM, "h200", "bf16", "flashattn-sparse-bf16"),
        (VLLM, "b200", "auto", "flashinfer-sparse-sm100"),
        (VLLM, "rtx-5090", "auto", "flashinfer-sparse-sm120"),
        (VLLM, "rtx-4090-48g", "auto", None),
        (VLLM, "a100-80g", "auto", None),
        (PATCHED, "a100-80g", "auto", "triton-sparse-bf16"),
        (PATCHED, "b200", "auto", None),
    ],
)
def test_each_gpu_s_attention(name, gpu, kv_dtype, expected):
    assert chosen(name, gpu, kv_dtype=kv_dtype) == expected


def test_a_mix_takes_the_first_option_that_all_share():
    assert chosen(NEW, "rtx-4090-48g", "rtx-5090") == "tilelang-fp8"
    assert chosen(NEW, "rtx-4090-48g", "a6000") == "triton-bf16"
    assert chosen(NEW, "h200", "b200", kv_dtype="fp8") is None


def test_4_bit_rows_are_taken_only_when_named():
    for name in engine_names():
        profile = engine_profile(name)
        four_bit = {kv.id for kv in profile.kv_formats if kv.dtype == "fp4"}
        assert not {option.kv_format for option in attention_options(profile, "auto")} & four_bit
    assert chosen(VLLM, "b200", kv_dtype="nvfp4_packed") == "flashmla-sparse-fp4"


@pytest.mark.parametrize("kv_dtype", ["fp8", "bf16"])
def test_a_named_dtype_is_the_only_one_taken(kv_dtype):
    for name in engine_names():
        profile = engine_profile(name)
        assert {profile.kv_format(o.kv_format).dtype for o in attention_options(profile, kv_dtype)} <= {kv_dtype}


def test_an_unknown_dtype_suggests_the_known_ones():
    with pytest.raises(UsageError, match="no KV dtype 'fp7'") as raised:
        attention_options(engine(), "fp7")
    assert "fp8" in raised.value.next_step


@pytest.mark.parametrize(
    ("name", "scheme", "gpu", "kernel"),
    [
        (NEW, "fp8", "rtx-4090-48g", "Triton block-FP8"),
        (NEW, "fp8", "a100-80g", "humming, 16-bit activations"),
        (NEW, "nvfp4", "rtx-pro-6000", "native FP4 tensor cores"),
        (NEW, "nvfp4", "h200", "Marlin W4A16"),
        (NEW, "w4afp8", "h200", "CUTLASS W4A8 grouped GEMM"),
        (NEW, "w4afp8", "b200", None),
        (OLD, "fp8", "a100-80g", None),
        (VLLM, "w4afp8", "h200", None),
        (PATCHED, "int4", "a100-80g", "Marlin W4A16"),
    ],
)
def test_each_checkpoint_s_kernel(name, scheme, gpu, kernel):
    found = quantization_for(engine(name), scheme, card(gpu))
    assert (found.kernel if found else None) == kernel


@pytest.mark.parametrize(
    ("name", "scheme", "kv_dtype", "gpu", "words", "step"),
    [
        (VLLM, "fp8", "auto", "rtx-4090-48g", "no sparse attention for rtx-4090-48g (sm_89)", "--engine sglang"),
        (VLLM, "int4", "auto", "a100-80g", "no sparse attention for a100-80g (sm_80)", "vllm-pr38476"),
        (NEW, "w4afp8", "auto", "a100-80g", "a w4afp8 checkpoint on a100-80g (sm_80): it runs it on sm_90", "--checkpoint"),
        (VLLM, "w4afp8", "auto", "h200", "it has no kernel for it", "--checkpoint"),
        (NEW, "fp8", "fp8", "a100-80g", "no sparse attention with fp8 KV cache", "--kv-dtype auto"),
        (NEW, "mxfp4", "auto", "h200", "cannot run a mxfp4 checkpoint", "--checkpoint"),
    ],
)
def test_a_gpu_that_nothing_runs_on_is_refused_with_a_way_out(name, scheme, kv_dtype, gpu, words, step):
    with pytest.raises(UnsupportedError) as raised:
        require_support(engine(name), scheme, kv_dtype, [card(gpu)])
    assert words in raised.value.message
    assert step in raised.value.next_step
    assert raised.value.exit_code == 4


def test_one_usable_gpu_is_enough_to_go_on():
    require_support(engine(VLLM), "fp8", "auto", [card("rtx-4090-48g"), card("rtx-5090")])


@pytest.mark.parametrize("gpu", gpu_names())
def test_every_packaged_gpu_runs_some_checkpoint_of_the_newest_engine(gpu):
    schemes = {q.scheme for q in engine().quantization if quantization_for(engine(), q.scheme, card(gpu))}
    assert schemes
    assert chosen(NEW, gpu) is not None
