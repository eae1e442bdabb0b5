"""Do the real engine's functions, once patched, give the references' numbers for the shapes the engine calls them with?

The released wheel is unpacked and imported with CPU PyTorch, kernels run in Triton's interpreter. Skipped with the reason
where the engine's own dependencies are not installed. `python -m tests.kernels.engines.test_sglang_engine` is the process
that each check runs in.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.contracts.wheels import WheelUnavailable, wheel

ROOT = Path(__file__).resolve().parents[3]
VERSIONS = ("0.5.23", "0.5.13.post1")
NOT_HERE = 77


@pytest.fixture(scope="module", params=VERSIONS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        path = wheel("sglang", request.param)
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    site = tmp_path_factory.mktemp("engine")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    metadata = next(site.glob("sglang-*.dist-info/METADATA")).read_text()
    pinned = metadata.partition("Requires-Dist: transformers==")[2].split()[0]
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        pytest.skip("the engine cannot be imported here: transformers is not installed")
    if installed != pinned:
        pytest.skip(f"the engine cannot be imported here: it wants transformers {pinned}, not {installed}")
    return site


@pytest.mark.wheels
@pytest.mark.parametrize("check", ["patched", "logits", "topk", "packed", "raw", "bf16", "off", "tables", "experts"])
def test_real_engine(engine: Path, check: str):
    in_the_engine(engine, __name__, check)


def in_the_engine(engine: Path, module: str, check: str) -> None:
    """Runs `module` for one check in a process that finds the engine."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("GLMPLAN_", "SGLANG_"))},
        "PYTHONPATH": os.pathsep.join([str(engine), str(ROOT)]), "TRITON_INTERPRET": "1",
        "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, check],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if result.returncode == NOT_HERE:
        pytest.skip(f"the engine cannot be imported here: {result.stdout.strip()}")
    assert result.returncode == 0, result.stderr[-3000:]


# What follows runs in the process of a check.

PAGE, SLOTS, LAYER = 64, 320, 0


def patched_engine() -> str:
    """Imports the engine as a scheduler does, then patches it; the version."""
    try:
        import torch  # noqa: F401

        deep_gemm = types.ModuleType("deep_gemm")
        exec(DEEP_GEMM, deep_gemm.__dict__)
        sys.modules["deep_gemm"] = deep_gemm
        for name in ("dsa_backend", "dsa.dsa_indexer", "dsa.dsa_topk_backend"):
            importlib.import_module(f"sglang.srt.layers.attention.{name}")
        importlib.import_module("sglang.srt.model_executor.model_runner")
    except ImportError as error:
        print(error)
        sys.exit(NOT_HERE)
    importlib.import_module("tests.kernels.conftest")  # what the interpreter needs
    from glmplan.kernels.engines import sglang_hooks, sglang_plugin
    from glmplan.kernels.engines.sglang_versions import VERSIONS as RELEASES

    version = sglang_plugin.engine_version()
    release = RELEASES[version]
    sglang_hooks.install((*release.early, *release.targets, release.block_fp8, release.moe_configs), version)
    return version


DEEP_GEMM = """
def get_num_sms(): return 8
def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None): raise RuntimeError("DeepGEMM")
def fp8_mqa_logits(q, kv, weights, ks, ke, clean_logits=False, max_seqlen_k=0): raise RuntimeError("DeepGEMM")
def fp8_paged_mqa_logits(
    q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits=False, indices=None
): raise RuntimeError("DeepGEMM")
"""


def check_patched(version: str) -> None:
    """Names that other modules imported are ours too."""
    if version == "0.5.23":
        from sglang.srt.layers.attention import dsa_backend
        from sglang.srt.layers.attention.dsa import dsa_indexer, utils

        from glmplan.kernels.engines import sglang_indexer

        for module in (utils, dsa_indexer):
            assert module.resolve_fp8_mqa_logits_fn() is sglang_indexer.ragged
            assert module.resolve_fp8_paged_mqa_logits_fn() is sglang_indexer.paged
        for module in (utils, dsa_backend):
            assert module.resolve_paged_mqa_logits_metadata_fn() is sglang_indexer.schedule


def logits_functions(version: str) -> tuple[Any, Any, Any]:
    if version == "0.5.23":
        from sglang.srt.layers.attention.dsa import utils

        return (
            utils.resolve_paged_mqa_logits_metadata_fn(),
            utils.resolve_fp8_paged_mqa_logits_fn(),
            utils.resolve_fp8_mqa_logits_fn(),
        )
    import deep_gemm

    return deep_gemm.get_paged_mqa_logits_metadata, deep_gemm.fp8_paged_mqa_logits, deep_gemm.fp8_mqa_logits


def check_logits(version: str) -> None:
    import torch

    from glmplan.kernels.indexer_logits import reference, samples

    metadata, paged, ragged = logits_functions(version)
    torch.manual_seed(0)
    case = samples.paged([1, 70, 200], "cpu", per_token=True, width=5)
    schedule = metadata(case.context_lens, PAGE, 8)
    assert schedule.shape == (9, 2)
    assert schedule.dtype == torch.int32
    q, width = case.q[:, 0].view(torch.float8_e4m3fn), case.block_table.shape[1] * PAGE
    view = case.pages.view(-1, PAGE, 1, 132)
    got = paged_call(version, paged, q, view, case, schedule, width)
    assert got.shape == (3, width)
    assert (got.stride(1), got.stride(0) % 4) == (1, 0)
    lengths = case.context_lens.flatten()
    want, scale = reference.paged_logits_reference(case.q, case.pages, case.weights, lengths, case.block_table, width)
    assert reference.relative_error(got, want, scale) <= 1e-6
    rows = samples.ragged(6, 130, "cpu")
    keys = (rows.keys[0].view(torch.float8_e4m3fn), rows.keys[1])
    got = ragged(rows.q.view(torch.float8_e4m3fn), keys, rows.weights, rows.starts, rows.stops, clean_logits=False)
    assert got.shape == (6, 130)
    assert got.stride(0) % 4 == 0
    want, scale = reference.ragged_logits_reference(rows.q, rows.keys, rows.weights, rows.starts, rows.stops)
    assert reference.relative_error(got, want, scale) <= 1e-6


def paged_call(version: str, paged: Any, q: Any, view: Any, case: Any, schedule: Any, width: int) -> Any:
    """As the indexer makes it: through the engine's splitting helper in 0.5.23, directly before."""
    if version == "0.5.23":
        from sglang.kernels.ops.attention.dsa import deepgemm_paged_mqa_logits_split

        return deepgemm_paged_mqa_logits_split(
            paged, q, view, case.weights, case.context_lens, case.block_table, schedule, width, q_offset=q.shape[0]
        )
    arguments = (q.unsqueeze(1), view, case.weights, case.context_lens, case.block_table, schedule, width)
    return paged(*arguments, clean_logits=False)


def check_topk(version: str) -> None:
    import torch
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend, TopkTransformMethod

    from glmplan.kernels.topk import reference

    torch.manual_seed(1)
    logits, lengths = torch.randn(2, 4096), torch.tensor([30, 4000], dtype=torch.int32)
    table = torch.randperm(128).to(torch.int32).view(2, 64)
    metadata = SimpleNamespace(real_page_table=table, page_size=PAGE, page_table_1=None, topk_v2_plan=None)
    got = DSATopKBackend.SGL_KERNEL.topk_transform(
        logits=logits, lengths=lengths, topk=2048, topk_transform_method=TopkTransformMethod.PAGED, attn_metadata=metadata,
        cu_seqlens_q_topk=None, topk_indices_offset=None, row_starts=None, batch_idx_list=None, force_unfused_topk=False,
    )  # fmt: skip
    assert torch.equal(got, reference.map_pages(reference.topk_reference(logits, lengths, 2048), table, PAGE))
    unfused = DSATopKBackend.TORCH.topk_transform(
        logits, lengths, 2048, TopkTransformMethod.PAGED, metadata, force_unfused_topk=True
    )
    assert torch.equal(unfused.sort(1)[0], reference.topk_reference(logits, lengths, 2048).sort(1)[0])


def pool(version: str, kv: str, slots: int = SLOTS) -> Any:
    """The engine's own KV pool, without the parts that need a running engine."""
    import torch
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    width = {"bf16": 576, "packed": 656, "raw": 576}[kv]
    dtype = torch.bfloat16 if kv == "bf16" else torch.float8_e4m3fn
    made = object.__new__(MLATokenToKVPool)
    store = dtype if kv == "bf16" else torch.uint8
    settings = {
        "kv_buffer": [torch.zeros(slots, 1, width, dtype=store)], "start_layer": 0, "layer_transfer_counter": None,
        "dtype": dtype, "store_dtype": store, "use_dsa": True, "dsa_kv_cache_store_fp8": kv == "packed",
        "kv_cache_dim": width, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "size": slots - PAGE, "page_size": PAGE, "dcp_replicated": True,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def write(version: str, made: Any, slots: Any, latent: Any, rope: Any) -> None:
    if version == "0.5.23":
        made._write_mla_kv_buffer(made.kv_buffer[LAYER], slots, latent, rope)
    else:
        made.set_mla_kv_buffer(SimpleNamespace(layer_id=LAYER), slots, latent, rope)


def check_attention(version: str, kv: str) -> None:
    """Rows written by the engine's pool, read by the engine's attention, prefill and decode."""
    import torch
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    from glmplan.kernels.engines.sglang_selftest import HALF
    from glmplan.kernels.kv_quant import reference as quant
    from glmplan.kernels.sparse_mla import reference

    torch.manual_seed(2)
    made = pool(version, kv)
    slots = torch.randperm(SLOTS)[:200].long()
    latent, rope = torch.randn(200, 1, 512).bfloat16(), torch.randn(200, 1, 64).bfloat16()
    if kv == "bf16":
        made.kv_buffer[LAYER][slots] = torch.cat([latent, rope], -1)
    else:
        write(version, made, slots, latent, rope)
        want_rows = (quant.packed_rows if kv == "packed" else quant.raw_rows)(latent[:, 0], rope[:, 0])
        assert torch.equal(made.kv_buffer[LAYER][slots, 0], want_rows)
    rows = made.get_key_buffer(LAYER)
    rows = rows.to(HALF) if kv == "bf16" else rows
    q = torch.randn(3, 8, 576).to(HALF)
    chosen = torch.full((3, 128), -1, dtype=torch.int32)
    for row, count in enumerate((1, 60, 128)):
        chosen[row, :count] = slots[torch.randperm(200)[:count]].to(torch.int32)
    want, _ = reference.sparse_mla(q, rows, chosen, 0.0625)
    backend = object.__new__(DeepseekSparseAttnBackend)
    outputs = [backend._forward_tilelang(q_all=q, kv_cache=rows, v_head_dim=512, page_table_1=chosen, sm_scale=0.0625)]
    if version == "0.5.23":
        outputs += triton_outputs(q, rows, chosen)
    for out in outputs:
        assert float((out.reshape(3, 8, 512).double() - want).norm() / want.norm()) <= 5e-3


def triton_outputs(q: Any, rows: Any, chosen: Any) -> list[Any]:
    """Both calls of 0.5.23's `triton` backend, with parts of one tensor and with two tensors."""
    from sglang.kernels.ops.attention.dsa.triton_sparse_mla import triton_sparse_mla_fwd
    from sglang.kernels.ops.attention.dsa.triton_sparse_mla_decode import triton_sparse_mla_decode_splitk

    arguments = {"kv": rows, "indices": chosen.unsqueeze(1), "sm_scale": 0.0625, "d_v": 512}
    nope, rope = q[..., :512], q[..., 512:]
    apart = nope.transpose(0, 1).contiguous().transpose(0, 1), rope.contiguous()
    return [
        triton_sparse_mla_fwd(q_nope=nope, q_rope=rope, topk_length=None, max_topk_length=128, **arguments),
        triton_sparse_mla_decode_splitk(q_nope=apart[0], q_rope=apart[1], workspace=[], **arguments),
    ]


def check_packed(version: str) -> None:
    check_attention(version, "packed")


def check_raw(version: str) -> None:
    check_attention(version, "raw")


def check_bf16(version: str) -> None:
    check_attention(version, "bf16")


def check_off(version: str) -> None:
    """A kernel that is off by one slot fails the self-test, and the process ends with 7."""
    from glmplan.kernels.engines import sglang_attention, sglang_selftest
    from glmplan.kernels.engines.process import fatal_errors

    right = sglang_attention._attend
    sglang_attention._attend = lambda q, kv, indices, scale: right(q, kv, indices + 1, scale)
    child = os.fork()
    if not child:
        with fatal_errors("the self-test"):
            sglang_selftest.run("bf16", 8, "cpu")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    sglang_attention._attend = right
    sglang_selftest.run("bf16", 8, "cpu")


def check_tables(version: str) -> None:
    """The engine's lookup gives the folder's table where there is one."""
    import json
    import tempfile

    from glmplan.kernels.engines import sglang_tables
    from glmplan.kernels.engines.sglang_tune_steps import tile
    from glmplan.kernels.engines.sglang_versions import VERSIONS as RELEASES

    config = tile(16, 64, 128, 4)
    module_name, name = RELEASES[version].block_fp8.path.rsplit(".", 1)
    module = importlib.import_module(module_name)
    sglang_tables._device_name = lambda: "A GPU"
    module.get_device_name = lambda *_: "A GPU"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GLMPLAN_TUNED_DIR"] = folder
        Path(folder, sglang_tables.file_name(512, 1024, "A GPU")).write_text(json.dumps({"8": config}))
        assert getattr(module, name)(512, 1024, 128, 128) == {8: config}
        assert getattr(module, name)(512, 2048, 128, 128) is None


def sort_by_expert(ids: Any, height: int, experts: int) -> tuple[Any, Any, Any]:
    """What the engine's CUDA sorting gives: token-expert pairs by expert, each padded to whole blocks; -1 first."""
    import torch

    flat = ids.flatten().tolist()
    order: list[int] = []
    blocks: list[int] = []
    for expert in range(-1, experts):
        own = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        order += own + [len(flat)] * (-len(own) % height)
        blocks += [expert] * -(-len(own) // height)
    return tuple(torch.tensor(values, dtype=torch.int32) for values in (order, blocks, [len(order)]))


def check_experts(version: str) -> None:
    """Tiles of both GEMMs give the engine's default result and PyTorch's; its lookup finds what the tuner would write."""
    import json
    import tempfile

    import triton

    from glmplan.errors import WrongAnswersError
    from glmplan.kernels.engines import sglang_expert_bench, sglang_expert_tables
    from glmplan.kernels.engines.sglang_expert_engine import Engine
    from glmplan.kernels.engines.sglang_tune_experts import PARTS, Experts
    from glmplan.kernels.engines.sglang_tune_steps import tile

    engine = Engine()
    engine.align = sort_by_expert
    engine.lookup.get_device_name = lambda *_: "A GPU"
    if version == "0.5.23":
        engine.kernels.is_arch_support_pdl = lambda: False
    for total in (4, 8):
        layer = sglang_expert_bench.Layer(engine, Experts("four", 4, 128, 256, 2, total), "cpu")
        case = layer.case(5)
        assert case.kept_default == case.default
        assert set(case.default[0]) == set(tile(16, 64, 128, 4))
        for part in PARTS:
            for config in (tile(16, 64, 128, 4), tile(32, 32, 64, 8), tile(16, 256, 64, 4)):
                case.out[part].fill_(float("nan"))
                case.run(part, config)
                assert case._error(part) <= 1e-2
        case.out["up"].fill_(float("nan"))
        case.run("up", tile(16, 64, 256, 4))
        assert not case._error("up") <= sglang_expert_bench.AGREEMENT, "two blocks of K with one scale"
    layer.weights["up"][1].mul_(1.5)
    case.want["up"] = case.out["up"]
    with pytest.raises(WrongAnswersError, match="4 experts 128 wide, 5 rows"):
        case._require_reference("up")
    name = RELEASE_MOE.rsplit(".", 1)[1]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SGLANG_MOE_CONFIG_DIR"] = folder
        own = Path(folder, sglang_expert_tables.version_folder(triton.__version__))
        own.mkdir(parents=True)
        for down in (False, True):
            path = own / sglang_expert_tables.file_name(4, 384, "A GPU", down)
            path.write_text(json.dumps({"8": tile(16, 64, 128, 8 if down else 4)}))
        up, down = (getattr(engine.lookup, name)(4, 384, "fp8_w8a8", 128, 128, down_moe=down) for down in (False, True))
        assert (up[8]["num_warps"], down[8]["num_warps"]) == (4, 8)
        assert engine.default(Experts("four", 4, 384, 256, 2, 4), 5)[1]["num_warps"] == 8
        assert getattr(engine.lookup, name)(4, 256, "fp8_w8a8", 128, 128) is None


RELEASE_MOE = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config.get_moe_configs"


if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"](patched_engine())
