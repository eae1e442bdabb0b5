"""Which backends and weight kernels a set of GPUs gets, and the refusals of those that have none."""

from __future__ import annotations

import pytest

from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.gpu import Gpu
from glmplan.facts.profiles import engine_names, engine_profile, gpu_names, gpu_profile
from glmplan.kernels.engines.sglang_versions import VERSIONS as SGLANG
from glmplan.kernels.engines.vllm_versions import BACKEND
from glmplan.kernels.engines.vllm_versions import VERSIONS as VLLMS
from glmplan.planning.ports import attention_options, choose_attention, quantization_for, require_support
from glmplan.planning.request import KERNEL_PORTS, KernelPort
from glmplan.units import MIB
from tests.samples import NEW, OLD, PATCHED, VLLM, engine


def card(name: str) -> Gpu:
    return gpu_profile(name).gpu(0)


def chosen(engine_name: str, *gpus: str, kv_dtype: str = "auto", kernel_port: KernelPort = "auto") -> str | None:
    options = attention_options(engine(engine_name), kv_dtype, kernel_port)
    found = choose_attention(options, [card(name) for name in gpus])
    return found.id if found else None


# The engines' own defaults: sglang.md section 1, and glmplan's kernels where the engine has no kernels of its own.
@pytest.mark.parametrize(
    ("name", "gpu", "kv_dtype", "expected"),
    [
        (NEW, "b200", "auto", "trtllm-fp8"),
        (NEW, "h200", "auto", "flashmla-fp8"),
        (NEW, "h200", "bf16", "flashmla-bf16"),
        (NEW, "rtx-5090", "auto", "flashinfer-sparse-fp8"),
        (NEW, "gb10", "auto", "flashinfer-sparse-fp8"),
        (NEW, "rtx-4090-48g", "auto", "port-fp8"),
        (NEW, "rtx-4090-48g", "fp8_raw", "tilelang-fp8"),
        (NEW, "rtx-4090-48g", "bf16", "port-bf16"),
        (NEW, "rtx-5090", "bf16", "port-bf16-blackwell"),
        (NEW, "a100-80g", "auto", "port-fp8"),
        (NEW, "rtx-3090", "auto", "port-fp8"),
        (OLD, "rtx-4090-48g", "auto", "port-fp8"),
        (OLD, "rtx-5090", "auto", "port-fp8-blackwell"),
        (OLD, "gb10", "auto", None),
        (OLD, "h200", "auto", "flashmla-fp8"),
        (VLLM, "h200", "auto", "flashmla-sparse-fp8"),
        (VLLM, "h200", "bf16", "flashattn-sparse-bf16"),
        (VLLM, "b200", "auto", "flashinfer-sparse-sm100"),
        (VLLM, "rtx-5090", "auto", "flashinfer-sparse-sm120"),
        (VLLM, "rtx-5090", "bf16", "port-bf16"),
        (VLLM, "b200", "bf16", "flashmla-sparse-bf16"),
        (VLLM, "rtx-4090-48g", "auto", "port-fp8"),
        (VLLM, "a100-80g", "bf16", "port-bf16"),
        (PATCHED, "a100-80g", "auto", "triton-sparse-bf16"),
        (PATCHED, "b200", "auto", None),
    ],
)
def test_each_gpu_s_attention(name, gpu, kv_dtype, expected):
    assert chosen(name, gpu, kv_dtype=kv_dtype) == expected


def test_a_mix_takes_the_first_option_that_all_share():
    assert chosen(NEW, "rtx-4090-48g", "rtx-5090") == "port-fp8-blackwell"
    assert chosen(NEW, "rtx-4090-48g", "a6000") == "port-fp8"
    assert chosen(NEW, "h200", "b200", kv_dtype="fp8") == "port-fp8-blackwell"
    assert chosen(NEW, "h200", "b200", kv_dtype="fp8", kernel_port="off") is None
    assert chosen(VLLM, "rtx-4090-48g", "rtx-5090") == "port-fp8"
    assert chosen(VLLM, "rtx-4090-48g", "b200") is None


@pytest.mark.parametrize(
    ("name", "gpu", "off", "force"),
    [
        (NEW, "h200", "flashmla-fp8", "port-fp8"),
        (NEW, "b200", "trtllm-fp8", "port-fp8-blackwell"),
        (NEW, "rtx-5090", "flashinfer-sparse-fp8", "port-fp8-blackwell"),
        (NEW, "rtx-4090-48g", "tilelang-fp8", "port-fp8"),
        (NEW, "a100-80g", None, "port-fp8"),
        (OLD, "rtx-4090-48g", None, "port-fp8"),
        (VLLM, "h200", "flashmla-sparse-fp8", "port-fp8"),
        (VLLM, "b200", "flashinfer-sparse-sm100", None),
        (VLLM, "rtx-4090-48g", None, "port-fp8"),
        (PATCHED, "rtx-4090-48g", "triton-sparse-bf16", None),
    ],
)
def test_the_kernel_port_can_be_refused_and_forced(name, gpu, off, force):
    assert chosen(name, gpu, kernel_port="off") == off
    assert chosen(name, gpu, kernel_port="force") == force


@pytest.mark.parametrize("name", [NEW, OLD, VLLM])
def test_auto_takes_the_port_only_where_the_engine_has_no_kernels_of_its_own(name):
    """The one exception has no indexer kernel: sm_89's torch fallback in 0.5.23."""
    for gpu in gpu_names():
        usual, own = chosen(name, gpu), chosen(name, gpu, kernel_port="off")
        if own != "tilelang-fp8":
            assert usual == own or own is None


@pytest.mark.parametrize(
    ("name", "release"), [(NEW, SGLANG["0.5.23"]), (OLD, SGLANG["0.5.13.post1"]), (VLLM, VLLMS["0.33.0"])]
)
def test_the_profile_and_the_plugin_agree_on_what_the_engine_serves(name, release):
    """A plan tells the plugin `force` where by itself it would not act; both must draw that line at the same SMs."""
    every = {sm for option in engine(name).attention for sm in option.sms}
    first = {sm: next(option for option in engine(name).attention if sm in option.sms) for sm in every}
    assert {sm for sm, option in first.items() if not option.plugin} == release.serves


@pytest.mark.parametrize("name", [NEW, OLD])
def test_sglang_s_port_options_name_a_backend_that_the_plugin_takes_over(name):
    release = SGLANG[engine(name).version]
    for option in attention_options(engine(name), "auto", "force"):
        assert {option.prefill, option.decode} == {release.backends[0]}
        raw = release.raw and option.prefill == "tilelang"
        assert option.kv_format in ("bf16", "fp8_raw" if raw else "fp8_packed")


def test_vllm_s_port_options_name_the_plugin_s_backend():
    for option in attention_options(engine(VLLM), "auto", "force"):
        assert option.prefill == option.decode == BACKEND


def test_off_and_force_part_the_options_in_two():
    for name in engine_names():
        every, off, force = (attention_options(engine_profile(name), "auto", mode) for mode in KERNEL_PORTS)
        assert [option for option in every if not option.plugin] == list(off)
        assert [option for option in every if option.plugin] == list(force)


# SGLang makes its TRT-LLM buffer from sm_100 on (0.5.23 dsa_backend.py:766, 0.5.13.post1 :379), whatever the backend.
@pytest.mark.parametrize("name", [NEW, OLD])
def test_sglang_s_buffer_is_counted_from_sm_100_on(name):
    for option in engine(name).attention:
        if any(sm >= 100 for sm in option.sms):
            assert option.workspace_bytes == 384 * MIB
        else:
            assert option.workspace_bytes == 0


@pytest.mark.parametrize("name", [NEW, OLD])
def test_sglang_s_indexer_gathers_all_keys_of_the_context(name):
    for option in engine(name).attention:
        if option.sms:
            fallback = 256 if "fallback" in option.indexer else 0
            assert option.prefill_key_bytes_per_context_token == 132 + fallback


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
    ("name", "scheme", "kv_dtype", "kernel_port", "gpu", "words", "step"),
    [
        (VLLM, "fp8", "auto", "off", "rtx-4090-48g", "no sparse attention of its own for rtx-4090", "--kernel-port auto"),
        (NEW, "fp8", "fp8", "off", "a100-80g", "no sparse attention with fp8 KV cache of its own", "--kernel-port auto"),
        (VLLM, "fp8", "auto", "force", "b200", "glmplan's kernels do not serve vLLM 0.33.0 on b200", "--kernel-port auto"),
        (NEW, "fp8", "fp8_raw", "force", "rtx-4090-48g", "do not serve SGLang 0.5.23 with fp8_raw KV", "--kernel-port auto"),
        (PATCHED, "fp8", "auto", "auto", "b200", "no sparse attention for b200 (sm_100)", "--engine sglang"),
        (NEW, "fp8", "fp8_raw", "auto", "a100-80g", "no sparse attention with fp8_raw KV cache", "--kv-dtype auto"),
        (NEW, "w4afp8", "auto", "auto", "a100-80g", "a100-80g (sm_80): it runs it on sm_90", "--checkpoint"),
        (VLLM, "w4afp8", "auto", "auto", "h200", "it has no kernel for it", "--checkpoint"),
        (NEW, "mxfp4", "auto", "auto", "h200", "cannot run a mxfp4 checkpoint", "--checkpoint"),
    ],
)
def test_a_gpu_that_nothing_runs_on_is_refused_with_a_way_out(name, scheme, kv_dtype, kernel_port, gpu, words, step):
    with pytest.raises(UnsupportedError) as raised:
        require_support(engine(name), scheme, kv_dtype, [card(gpu)], kernel_port)
    assert words in raised.value.message
    assert step in raised.value.next_step
    assert raised.value.exit_code == 4


def test_one_usable_gpu_is_enough_to_go_on():
    require_support(engine(VLLM), "fp8", "auto", [card("rtx-4090-48g"), card("rtx-5090")], "off")


@pytest.mark.parametrize("gpu", gpu_names())
def test_every_packaged_gpu_runs_some_checkpoint_of_the_newest_engine(gpu):
    schemes = {q.scheme for q in engine().quantization if quantization_for(engine(), q.scheme, card(gpu))}
    assert schemes
    assert chosen(NEW, gpu) is not None
