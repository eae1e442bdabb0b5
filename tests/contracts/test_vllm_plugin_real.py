"""Does the plugin work inside the real vLLM package? Its source is imported on CPU PyTorch and runs in Triton's interpreter.

Real: selector, registries, metadata builders, `sparse_attn_indexer`, the map from positions to KV rows, index groups and our
backend below them. Stand-ins: the platform (an sm_80 without a GPU), compiled operations (cache writers and the gather, by
the layouts of kv_quant's reference), streams, and a configuration with GLM-5.2's shapes.
Needs vLLM's Python dependencies: GLMPLAN_VLLM_PYTHON names an interpreter that has them, beside torch and triton.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from glmplan.kernels.engines import parse_port_line
from glmplan.kernels.engines.vllm_versions import BACKEND_CLASS
from tests.contracts.wheels import WheelUnavailable, wheel

pytestmark = pytest.mark.wheels

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("GLMPLAN_VLLM_PYTHON", sys.executable)
NEEDED = "torch triton transformers msgspec xgrammar mcp openai_harmony uvloop compressed_tensors cloudpickle zmq fastapi"
ATTENTION_LIMIT, LSE_LIMIT = 5e-3, 1e-4

PRELUDE = """
import sys, types, torch, vllm
class Hollow(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None
for name in "_C _C_stable_libtorch _moe_C_stable_libtorch vllm_flash_attn vllm_flash_attn.flash_attn_interface".split():
    sys.modules["vllm." + name] = Hollow("vllm." + name)
compiled = torch.library.Library("_C", "DEF")
for name in ("block_fp8", "fp8", "fp4"):
    compiled.define(f"cutlass_scaled_mm_supports_{name}(int sm) -> bool")
    compiled.impl(f"cutlass_scaled_mm_supports_{name}", lambda sm: False, "CompositeImplicitAutograd")
compiled.define("cutlass_group_gemm_supported(int sm) -> bool")
compiled.impl("cutlass_group_gemm_supported", lambda sm: False, "CompositeImplicitAutograd")
import vllm.platforms
from vllm.platforms.interface import DeviceCapability
from vllm.platforms.cuda import NonNvmlCudaPlatform
class Ampere(NonNvmlCudaPlatform):
    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(8, 0)
vllm.platforms._current_platform = Ampere()
from types import SimpleNamespace as N
from glmplan.kernels import run_as
from glmplan.kernels.engines import vllm_plugin, vllm_selftest
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
run_as.device_sm = lambda device=None: 80
CPU = torch.device("cpu")
vllm_plugin.register()
"""

COMMAND_LINE = """
import json, pickle
from vllm.config.attention import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
asked = parser.parse_args(["--attention-backend", "CUSTOM", "--kv-cache-dtype", "fp8_ds_mla"])
config = AttentionConfig(backend=asked.attention_backend)
register_backend("OURS", "a.module.Class")
named = pickle.dumps(AttentionConfig(backend="OURS"))
AttentionBackendEnum._value2member_map_.pop("a.module.Class")  # as in a process that has loaded no plugin yet
try:
    pickle.loads(named)
    lost = ""
except ValueError as error:
    lost = str(error)
print(json.dumps({
    "path": pickle.loads(pickle.dumps(config)).backend.get_path(),
    "models": [ModelRegistry.models[name].module_name for name in ("GlmMoeDsaForCausalLM", "DeepseekV32MTPModel")],
    "lost": lost,
}))
"""

SELECTOR = """
import json
from vllm.v1.attention.selector import AttentionSelectorConfig
backend = AttentionBackendEnum.CUSTOM.get_class()
found = {}
for kv in ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla", "fp8_e5m2"):
    for sm in (75, 80, 86, 89, 90, 100, 120):
        asked = AttentionSelectorConfig(576, torch.bfloat16, kv, 64, use_mla=True, use_sparse=True, use_dcp=True)
        capability = DeviceCapability(sm // 10, sm % 10)
        found[f"{kv} {sm}"] = backend.validate_configuration(device_capability=capability, **asked._asdict())
from vllm.model_executor.layers.attention import mla_attention
from vllm.v1.attention.backend import AttentionCGSupport
from glmplan.kernels.engines import vllm_hooks
from glmplan.kernels.engines.vllm_versions import VERSIONS
vllm_hooks.install(vllm_plugin.chosen(VERSIONS["0.33.0"], 80), "0.33.0")
format_of = mla_attention._canonicalize_sparse_mla_kv_cache_dtype
found["formats"] = [format_of(backend, kv) for kv in ("auto", "fp8", "fp8_ds_mla")]
found["graphs"] = backend.get_builder_cls().get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH
print(json.dumps(found))
"""

STEP = """
import json
torch.set_default_dtype(torch.float16)  # the interpreter mishandles bf16 dots
torch.manual_seed(0)
from glmplan.kernels.kv_quant import reference
def write_rows(kv_c, k_pe, cache, slots, form, scale, skip):
    rows = reference.packed_rows(kv_c, k_pe) if form == "fp8_ds_mla" else torch.cat([kv_c, k_pe], -1)
    cache.view(-1, cache.shape[-1])[slots] = rows
def write_keys(k, cache, slots, block, form):
    assert (block, form) == (128, "ue8m0")
    reference.write_index_keys(cache.view(cache.shape[0], -1), k, slots, True)
def gather_keys(cache, keys, scales, table, ends):
    for row in range(table.shape[0]):
        first, stop = ends[row].item(), ends[row + 1].item()
        at = torch.arange(stop - first)
        slots = table[row, at // 64].long() * 64 + at % 64
        found, scale = reference.gather_index_keys(cache.reshape(cache.shape[0], -1), slots)
        keys.view(torch.uint8)[first:stop], scales[first:stop] = found, scale.view(torch.uint8).view(-1, 4)
cache_ops = torch.library.Library("_C_cache_ops", "DEF")
for schema, body in (
    ("concat_and_cache_mla(Tensor a, Tensor b, Tensor(c!) c, Tensor s, str f, Tensor x, bool k) -> ()", write_rows),
    ("indexer_k_quant_and_cache(Tensor k, Tensor(c!) c, Tensor s, int b, str f) -> ()", write_keys),
    ("cp_gather_indexer_k_quant_cache(Tensor c, Tensor(k!) k, Tensor(s!) s, Tensor t, Tensor e) -> ()", gather_keys),
):
    cache_ops.define(schema)
    cache_ops.impl(schema.split("(")[0], body, "CPU")

import vllm.model_executor.layers.attention.sparse_mla_attention as sparse_mla_attention
import vllm.model_executor.layers.sparse_attn_indexer as indexer_op
from vllm import _custom_ops
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla import index_group, indexer
from vllm.v1.kv_cache_interface import MLAAttentionSpec
from vllm.v1.worker.workspace import init_workspace_manager
class Stream:
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def wait_event(self, event): pass
    def wait_stream(self, stream): pass
class Event:
    def record(self, stream): pass
index_group._create_side_stream, index_group._create_event = lambda device: Stream(), Event
index_group.current_stream, index_group.in_piecewise_cudagraph = Stream, lambda: False
indexer.num_compute_units = lambda index=None: 4
sparse_mla_attention.PIN_MEMORY, torch.accelerator.empty_cache = False, lambda: None
sparse_mla_attention.get_tensor_model_parallel_world_size = lambda: 1
sparse_mla_attention.get_current_vllm_config = lambda: config
init_workspace_manager(CPU)

KV, DRAFTS = sys.argv[1], int(sys.argv[2])
LENGTH, TOKENS, HEADS, BLOCKS, SCALE = 4096, 128, 8, 150, 0.0625
shapes = N(
    index_topk=2048, index_n_heads=32, index_head_dim=128, kv_lora_rank=512, q_lora_rank=2048,
    qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
)
drafting = N(num_speculative_tokens=DRAFTS, enable_adaptive_verification=False, parallel_drafting=False)
config = N(
    scheduler_config=N(max_num_batched_tokens=TOKENS, max_num_seqs=8),
    parallel_config=N(
        decode_context_parallel_size=1, tensor_parallel_size=1, prefill_context_parallel_size=1,
        cp_kv_cache_interleave_size=1, pipeline_parallel_size=1,
    ),
    speculative_config=drafting if DRAFTS else None, num_speculative_tokens=DRAFTS,
    model_config=N(
        max_model_len=LENGTH, hf_text_config=shapes, dtype=torch.float16, architectures=["GlmMoeDsaForCausalLM"],
        model_arch_config=N(total_num_attention_heads=64), get_num_attention_heads=lambda parallel: HEADS,
    ),
    attention_config=N(
        sparse_mla_prefill_workspace_factor=1, resolve_indexer_kv_dtype=lambda kv: kv, indexer_tp_shard_min_rows=10**9,
        hisparse_config=None, sparse_mla_force_mqa=False, backend=AttentionBackendEnum.CUSTOM,
    ),
    compilation_config=N(cudagraph_mode=CUDAGraphMode.NONE, static_forward_context={"mla": N(prefill_backend=None)}),
    cache_config=N(block_size=64, cache_dtype=KV), kernel_config=N(enable_jit_warmup=False),
)
vllm_selftest.run = lambda kv, heads: vllm_selftest.require(
    vllm_selftest.checks(kv, heads, CPU, _custom_ops, torch.float16)
)
wrapper = N(vllm_config=config)
vllm_plugin.device_ready(lambda wrapper: None, wrapper)

backend = AttentionBackendEnum.CUSTOM.get_class()
key_spec = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=132, dtype=torch.uint8)
kv_spec = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.float16)
index_builder = indexer.DeepseekV32IndexerMetadataBuilder(key_spec, ["keys"], config, CPU, block_table_width=LENGTH // 64)
mla_builder = backend.get_builder_cls()(kv_spec, ["mla"], config, CPU)
buffer = torch.zeros(TOKENS, 2048, dtype=torch.int32)
groups = index_group.SparseMLAIndexGroupBuilder(buffer, 64)
def layer(indexer):
    return backend.get_impl_cls()(
        num_heads=HEADS, head_size=576, scale=SCALE, num_kv_heads=1, alibi_slopes=None, sliding_window=None,
        kv_cache_dtype=KV, logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None, q_lora_rank=2048,
        kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, qk_head_dim=256, v_head_dim=256, kv_b_proj=None,
        indexer=indexer, topk_indices_buffer=buffer, index_group_builder=groups,
    )
layers = [layer(N(topk_indices_buffer=buffer)), layer(None)]  # the second shares the first one's choice
layers[0].need_to_return_lse_for_decode = True  # as under decode context parallelism
width, kind = (656, torch.uint8) if KV == "fp8_ds_mla" else (576, torch.float16)
rows, keys = torch.zeros(BLOCKS, 64, width, dtype=kind), torch.zeros(BLOCKS, 64, 132, dtype=torch.uint8)
one = torch.ones(1, dtype=torch.float32)

def step(lengths, new):
    total = sum(new)
    table, order = torch.zeros(len(new), LENGTH // 64, dtype=torch.int32), torch.randperm(BLOCKS - 1).int() + 1
    for request, length in enumerate(lengths):
        pages = (length + 63) // 64
        table[request, :pages], order = order[:pages], order[pages:]
    def slots_of(request, at):
        return table[request, at // 64].long() * 64 + at % 64
    for request, (length, count) in enumerate(zip(lengths, new)):
        before = slots_of(request, torch.arange(length - count))
        if len(before):
            _custom_ops.indexer_k_quant_and_cache(torch.randn(len(before), 128), keys, before, 128, "ue8m0")
            values = torch.randn(len(before), 576)
            layers[0].do_kv_cache_update(values[:, :512], values[:, None, 512:], rows, before, KV, one)
    positions = torch.cat([torch.arange(length - count, length) for length, count in zip(lengths, new)])
    request_of = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
    slots = torch.stack([slots_of(request, at) for request, at in zip(request_of, positions)])
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts.clone(), seq_lens=lens, num_reqs=len(new),
        num_actual_tokens=total, max_query_len=max(new), max_seq_len=max(lengths), block_table_tensor=table,
        slot_mapping=slots, seq_lens_cpu_upper_bound=lens.clone(),
    )
    metadata = {"keys": index_builder.build(0, common), "mla": mla_builder.build(0, common)}
    indexer_op.get_forward_context = lambda: N(attn_metadata=metadata, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    index_q = (torch.randn(total, 32, 128) * 2).to(torch.float8_e4m3fn)
    weights, values = torch.randn(total, 32, dtype=torch.float32), torch.randn(total, 576)
    layers[0].do_kv_cache_update(values[:, :512], values[:, None, 512:], rows, slots, KV, one)
    indexer_op.sparse_attn_indexer(
        torch.empty(total, 8), "keys", keys, index_q, None, torch.randn(total, 128), weights, 128, "ue8m0", 2048, 128,
        LENGTH, indexer.get_max_prefill_buffer_size(config), buffer, False, False, False, "",
    )
    query = (torch.randn(total, HEADS, 512), torch.randn(total, HEADS, 64))
    outs = []
    for each in layers:
        each.record_logical_topk_ready()
        outs.append(each.forward_mqa(query, rows, metadata["mla"], None))
    assert outs[1][1] is None
    return judge(outs, query, slots_of, request_of, positions, index_q, weights)

def judge(outs, query, slots_of, request_of, positions, index_q, weights):
    from glmplan.kernels.indexer_logits.reference import decode, row_logits
    from glmplan.kernels.sparse_mla.reference import sparse_mla
    worst = worst_lse = wrong = 0.0
    for token, (request, position) in enumerate(zip(request_of.tolist(), positions.tolist())):
        seen = slots_of(request, torch.arange(position + 1))
        found, scale = reference.gather_index_keys(keys.view(BLOCKS, -1), seen)
        logits, _ = row_logits(decode(index_q[token]), decode(found), scale.double(), weights[token].double())
        best = set(logits.float().topk(min(position + 1, 2048)).indices.tolist())
        chosen = buffer[token][buffer[token] >= 0].long()
        wrong += len(best ^ set(chosen.tolist()))
        joined = torch.cat([part[token : token + 1] for part in query], -1)
        want, want_lse = sparse_mla(joined, rows.view(-1, width), seen[chosen][None].int(), SCALE)
        for out, lse in outs:
            worst = max(worst, ((out[token].double() - want[0]).norm() / want.norm()).item())
            if lse is not None:
                worst_lse = max(worst_lse, (lse[token].double() - want_lse[0]).abs().max().item())
    return [worst, worst_lse, wrong]

drafts = {"drafts": ([2100, 70, 130], [DRAFTS + 1] * 3), "ragged": ([2100, 70], [DRAFTS + 1, 1])}
plain = {"decode": ([2100, 3], [1, 1]), "mixed": ([2100, 3, 130, 2085], [1, 1, 12, 4]), "prefill": ([20], [20])}
print(json.dumps({name: step(*batch) for name, batch in (drafts if DRAFTS else plain).items()}))
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's Python files, for an interpreter that can import them."""
    try:
        path = wheel("vllm", "0.33.0")
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    probe = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    missing = subprocess.run(
        [PYTHON, "-c", probe, *NEEDED.split()], capture_output=True, text=True, check=True
    ).stdout.split()
    if missing:
        pytest.skip(f"{PYTHON} lacks {', '.join(missing)}; set GLMPLAN_VLLM_PYTHON to one with vLLM's dependencies")
    folder = tmp_path_factory.mktemp("vllm")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith((".py", "METADATA"))])
    return folder


def run(engine: Path, script: str, *arguments: str) -> tuple[dict, str]:
    """The JSON object on the last line of stdout, and stderr."""
    asked = {
        "PYTHONPATH": f"{engine}{os.pathsep}{ROOT}", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
        "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("GLMPLAN_")}
    command = [PYTHON, "-c", PRELUDE + script, *arguments]
    result = subprocess.run(command, env=cleared | asked, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_the_flag_reaches_spawned_processes_and_a_name_of_our_own_would_not(engine: Path):
    found, _ = run(engine, COMMAND_LINE)
    assert found["path"] == BACKEND_CLASS
    assert found["models"] == ["vllm.model_executor.models.deepseek_v2", "vllm.model_executor.models.deepseek_mtp"]
    assert "'a.module.Class' is not a valid AttentionBackendEnum" in found["lost"]


def test_the_selector_accepts_both_kv_formats_from_sm80_on(engine: Path):
    found, _ = run(engine, SELECTOR)
    for kv in ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla"):
        for sm in (80, 86, 89, 90, 120):
            assert found[f"{kv} {sm}"] == []
        assert found[f"{kv} 75"] == found[f"{kv} 100"] == ["compute capability not supported"]
    assert found["fp8_e5m2 80"] == ["kv_cache_dtype not supported"]
    assert found["formats"] == ["auto", "fp8_ds_mla", "fp8_ds_mla"]
    assert found["graphs"] is True


@pytest.mark.parametrize(("kv", "drafts"), [("auto", 0), ("fp8_ds_mla", 0), ("auto", 1), ("fp8_ds_mla", 3)])
def test_steps_of_the_engine_attend_to_the_right_tokens(engine: Path, kv: str, drafts: int):
    """One draft token goes to our decode as [B, 2] rows, three are flattened to single rows by the engine."""
    found, stderr = run(engine, STEP, kv, str(drafts))
    assert found.keys() == ({"drafts", "ragged"} if drafts else {"decode", "mixed", "prefill"})
    for worst, worst_lse, wrong in found.values():
        assert worst <= ATTENTION_LIMIT
        assert worst_lse <= LSE_LIMIT
        assert wrong == 0
    (line,) = [line for line in map(parse_port_line, stderr.splitlines()) if line]
    assert (line.engine, line.engine_version, line.sm, line.compiled_for) == ("vllm", "0.33.0", 80, 80)
    assert line.settings == {"mode": "auto", "backend": "CUSTOM", "kv": "packed" if kv == "fp8_ds_mla" else "bf16"}
    assert len(line.replaced) == 14
