"""Does the reader of released wheels see the flags those wheels really have?

The facts are those of the engines' own parsers, built once on CPU PyTorch: 406 options in SGLang 0.5.13.post1, 531 in
0.5.23 and 483 spellings of `vllm serve` 0.33.0; every name, `nargs`, type and readable choice agreed with the reader.
"""

from pathlib import Path

import pytest

from tests.contracts.wheels import Flag, WheelUnavailable, argument_definitions, check_argv, vllm_flag_names, wheel

pytestmark = pytest.mark.wheels

DSA_BACKENDS_13 = ("flashmla_sparse", "flashmla_kv", "flashmla_auto", "fa3", "tilelang", "aiter", "trtllm")
DSA_DECODE_23 = (
    "flashmla_sparse",
    "flashmla_sparse_q8",
    "flashmla_kv",
    "flashmla_auto",
    "flashinfer_sparse_mla",
    "fa3",
    "tilelang",
    "triton",
    "aiter",
    "trtllm",
    "intel_xpu",
)
LAUNCH = """
    --model-path /models/GLM-5.2-FP8 --tp-size 8 --pp-size=3 --nnodes 3 --node-rank 0 --dist-init-addr 10.0.0.1:30200
    --kv-cache-dtype fp8_e4m3 --dsa-prefill-backend tilelang --mem-fraction-static 0.9 --chunked-prefill-size -1
    --cuda-graph-bs-decode 1 2 4 8 --tool-call-parser glm47 --trust-remote-code --enable-metrics
"""


@pytest.fixture(scope="module")
def old() -> dict[str, Flag]:
    return argument_definitions(wheel("sglang", "0.5.13.post1"))


@pytest.fixture(scope="module")
def new() -> dict[str, Flag]:
    return argument_definitions(wheel("sglang", "0.5.23"))


@pytest.fixture(scope="module")
def vllm_names() -> set[str]:
    try:
        return vllm_flag_names(wheel("vllm", "0.33.0"))
    except WheelUnavailable as reason:
        pytest.skip(str(reason))


def test_every_option_is_read(old, new):
    assert len(set(old.values())) == 406
    assert len(set(new.values())) == 531


def test_graph_flags_were_renamed(old, new):
    assert "--cuda-graph-max-bs" in old
    assert "--cuda-graph-max-bs" not in new
    assert {"--cuda-graph-max-bs-decode", "--cuda-graph-max-bs-prefill", "--cuda-graph-bs-decode"} <= new.keys()
    assert "--disable-piecewise-cuda-graph" in old
    assert "--disable-piecewise-cuda-graph" not in new
    assert new["--cuda-graph-backend-decode"].choices == ("full", "breakable", "disabled")
    assert new["--cuda-graph-bs-decode"].nargs == "+"


def test_dsa_backends_of_each_version(old, new):
    assert old["--dsa-prefill-backend"].choices == old["--dsa-decode-backend"].choices == DSA_BACKENDS_13
    assert new["--dsa-decode-backend"].choices == DSA_DECODE_23
    assert set(new["--dsa-prefill-backend"].choices) == {*DSA_DECODE_23, "triton_sparse_mla"}
    assert new["--dsa-paged-mqa-logits-backend"].choices == ("auto", "deepgemm", "cutedsl", "aiter")
    assert new["--dsa-triton-union"].choices == ("0", "2", "4")
    assert old["--dsa-topk-backend"].choices == new["--dsa-topk-backend"].choices == ("sgl-kernel", "torch", "flashinfer")


def test_nsa_spellings_ended_with_the_old_version(old, new):
    for name in ("--nsa-prefill-backend", "--nsa-decode-backend", "--nsa-prefill-cp-mode"):
        assert old[name].deprecated
        assert old[name].choices == old[name.replace("nsa", "dsa")].choices
        assert name not in new


def test_kv_cache_dtypes(old, new):
    assert old["--kv-cache-dtype"].choices == ("auto", "fp8_e5m2", "fp8_e4m3", "bf16", "bfloat16", "fp4_e2m1")
    assert set(new["--kv-cache-dtype"].choices) == {
        *("auto", "fp8_e5m2", "fp8_e4m3", "mxfp8", "bf16", "bfloat16", "nvfp4", "fp4_mx_block16")
    }


def test_humming_came_with_the_new_version(old, new):
    assert "humming" not in old["--quantization"].choices
    assert "humming" in new["--quantization"].choices
    assert "humming" in new["--moe-runner-backend"].choices


def test_aliases_are_one_flag(old, new):
    for flags in (old, new):
        assert flags["--tp-size"] is flags["--tensor-parallel-size"]
        assert flags["--pp-size"] is flags["--pipeline-parallel-size"]
        assert flags["--model"] is flags["--model-path"]
        assert flags["--dist-init-addr"] is flags["--nccl-init-addr"]


def test_booleans_take_no_value(old, new):
    for flags in (old, new):
        assert not flags["--disable-shared-experts-fusion"].takes_value
        assert not flags["--disable-cuda-graph"].takes_value
    assert new["--disable-cuda-graph"].deprecated
    assert not old["--disable-cuda-graph"].deprecated
    assert new["--no-ple-offload-embedding"] is new["--ple-offload-embedding"]


def test_parsers_read_from_other_modules(old, new):
    for flags in (old, new):
        assert {"auto", "glm45"} <= set(flags["--reasoning-parser"].choices)
        assert {"auto", "glm47"} <= set(flags["--tool-call-parser"].choices)


def test_computed_choices_are_unknown_not_empty(old, new):
    assert old["--kv-canary-real-data"].choices is None
    assert new["--kv-canary-real-data"].choices is None


def test_accepted_command_line(new):
    assert check_argv([*LAUNCH.split(), '--cuda-graph-config={"decode": {"max_bs": 16}}'], new) == []
    assert check_argv(["--tp", "8"], new) == [], "argparse takes an abbreviation with one meaning"


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("--cuda-graph-max-bs 16", "ambiguous, could be --cuda-graph-max-bs-decode, --cuda-graph-max-bs-prefill"),
        ("--nsa-decode-backend tilelang", "--nsa-decode-backend: unknown flag"),
        ("--dsa-decode-backend triton_sparse_mla", "'triton_sparse_mla' is not one of flashmla_sparse, "),
        ("--kv-cache-dtype=fp4_e2m1", "'fp4_e2m1' is not one of auto, "),
        ("--tp-size --pp-size 3", "--tp-size: value missing"),
        ("--cuda-graph-bs-decode", "--cuda-graph-bs-decode: value missing"),
        ("--tp-size eight", "--tp-size: 'eight' is not a whole number"),
        ("--mem-fraction-static half", "--mem-fraction-static: 'half' is not a number"),
        ("--dsa-triton-union 3", "--dsa-triton-union: '3' is not one of 0, 2, 4"),
        ("--trust-remote-code=yes", "--trust-remote-code: takes no value, got 'yes'"),
        ("--trust-remote-code yes", "yes: unexpected argument"),
        ("--tp-size 8 16", "16: unexpected argument"),
    ],
)
def test_refused_command_line(argv, problem, new):
    (found,) = check_argv(argv.split(), new)
    assert problem in found


def test_wheel_in_the_cache_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLMPLAN_WHEEL_CACHE", str(tmp_path))
    present = tmp_path / "some_engine-1.0-py3-none-any.whl"
    present.touch()
    assert wheel("some-engine", "1.0") == present


def test_vllm_is_never_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLMPLAN_WHEEL_CACHE", str(tmp_path))
    monkeypatch.delenv("GLMPLAN_DOWNLOAD_VLLM", raising=False)
    with pytest.raises(WheelUnavailable, match="GLMPLAN_DOWNLOAD_VLLM=1"):
        wheel("vllm", "0.33.0")


def test_vllm_flags_with_the_twins_of_booleans(vllm_names):
    assert len(vllm_names) == 483
    assert {"--tensor-parallel-size", "-tp", "--node-rank", "--headless", "--port", "--kv-cache-dtype"} <= vllm_names
    assert {"--gpu-memory-utilization", "--device-memory-utilization", "--spec-method", "-sc"} <= vllm_names
    assert {"--enable-expert-parallel", "--no-enable-expert-parallel", "--disable-expert-parallel"} <= vllm_names
    assert "--no-tensor-parallel-size" not in vllm_names
    assert "--tp-size" not in vllm_names
