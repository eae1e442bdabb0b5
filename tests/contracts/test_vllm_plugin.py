"""Is everything that the vLLM plugin replaces or builds on in the released wheel, with the signature it expects?

Read from the source inside the wheel; nothing of the engine is imported. `test_vllm_plugin_real.py` runs it.
"""

import ast
import zipfile
from collections.abc import Iterator

import pytest

from glmplan.kernels.engines import VLLM_GROUP
from glmplan.kernels.engines.vllm_plugin import PARTITION
from glmplan.kernels.engines.vllm_versions import BACKEND, FP8_SM, VERSIONS, Target
from tests.contracts.wheels import Scope, Source, Unreadable, WheelUnavailable, wheel

pytestmark = pytest.mark.wheels

TARGETS = [
    pytest.param(version, target, id=f"{version}-{target.path}")
    for version, release in VERSIONS.items()
    for target in (release.ready, *release.targets, *release.needs)
]


@pytest.fixture(scope="module", params=VERSIONS)
def engine(request: pytest.FixtureRequest) -> Iterator[Source]:
    try:
        path = wheel("vllm", request.param)
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    with zipfile.ZipFile(path) as archive:
        yield Source(archive)


def function(engine: Source, path: str) -> ast.FunctionDef:
    """The definition a dotted path leads to, through imports and base classes."""
    owner, name = path.rsplit(".", 1)
    try:
        node, _ = engine.find(name, engine.module(owner))
    except Unreadable:
        module, cls = owner.rsplit(".", 1)
        node = method(engine, *engine.find(cls, engine.module(module)), name)
    assert isinstance(node, ast.FunctionDef)
    return node


def method(engine: Source, cls: ast.AST, scope: Scope, name: str) -> ast.AST:
    assert isinstance(cls, ast.ClassDef)
    body = engine.inside(cls, scope)
    if name in body.bound:
        return body.bound[name]
    for base in cls.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(plain, ast.Name) and plain.id not in ("Generic", "ABC"):
            return method(engine, *engine.find(plain.id, scope), name)
    raise Unreadable(f"{cls.name} has no {name}")


def parameters(node: ast.FunctionDef) -> tuple[str, ...]:
    """In the order of inspect.signature."""
    given = node.args
    groups = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return tuple(argument.arg for argument in groups if argument is not None)


def calls(engine: Source, module: str) -> set[str]:
    """Everything the functions of a module call, as written there."""
    body = ast.Module(list(engine.module(module).body), [])
    return {ast.unparse(node.func) for node in ast.walk(body) if isinstance(node, ast.Call)}


@pytest.mark.parametrize(("version", "target"), TARGETS)
def test_every_target_is_there_with_its_signature(engine: Source, version: str, target: Target):
    assert parameters(function(engine, target.path)) == target.parameters


@pytest.mark.parametrize("release", VERSIONS.values(), ids=VERSIONS)
def test_callers_look_the_replaced_functions_up_where_ours_are_put(engine: Source, release):
    for target in release.targets:
        owner, name = target.path.rsplit(".", 1)
        if owner == "vllm._custom_ops":
            assert f"ops.{name}" in calls(engine, "vllm.model_executor.layers.sparse_attn_indexer")
        elif name not in ("__init__", "register_warmup"):
            assert name in calls(engine, owner), target.path


@pytest.mark.parametrize("release", VERSIONS.values(), ids=VERSIONS)
def test_generic_models_are_shipped_and_the_default_ones_need_fp8e4nv(engine: Source, release):
    default = ast.unparse(ast.Module(list(engine.module("vllm.model_executor.models.registry").body), []))
    for architecture, path in release.models.items():
        module, cls = path.split(":")
        assert isinstance(engine.find(cls, engine.module(module))[0], ast.ClassDef)
        assert f"'{architecture}': ('vllm.models.deepseek_v32'" in default
    kernels = ast.unparse(ast.Module(list(engine.module("vllm.models.deepseek_v32.common.kernels").body), []))
    assert "tl.float8e4nv" in kernels
    assert FP8_SM == 89


def test_the_fused_query_kernel_is_asked_for_per_indexer(engine: Source):
    indexer = "vllm.model_executor.models.deepseek_v2.Indexer"
    assert "self.use_fused_indexer_q = " in ast.unparse(function(engine, f"{indexer}.__init__"))
    assert "elif self.use_fused_indexer_q and" in ast.unparse(function(engine, f"{indexer}.forward"))


def test_our_backend_takes_the_enums_free_member(engine: Source):
    """A member made by a plugin could not be unpickled in a spawned process, which has loaded none yet."""
    registry = engine.module("vllm.v1.attention.backends.registry")
    member = engine.inside(*engine.find("AttentionBackendEnum", registry)).bound[BACKEND]
    assert ast.unparse(member) == "None"
    startup = ast.unparse(ast.Module(list(engine.module("vllm.entrypoints.common.startup").body), []))
    assert "os.environ['VLLM_WORKER_MULTIPROC_METHOD'] = 'spawn'" in startup


def test_plugins_are_loaded_before_a_worker_has_its_gpu(engine: Source):
    group = engine.find("DEFAULT_PLUGINS_GROUP", engine.module("vllm.plugins"))[0]
    assert ast.literal_eval(group) == VLLM_GROUP
    worker = "vllm.v1.worker.worker_base.WorkerWrapperBase"
    assert "load_general_plugins()" in ast.unparse(function(engine, f"{worker}.init_worker"))
    assert "self.worker.init_device()" in ast.unparse(function(engine, f"{worker}.init_device"))


def test_prefill_logits_are_compressed(engine: Source):
    """Row r's own first token is in column 0, so the engine's top-k starts every row there."""
    body = ast.unparse(function(engine, "vllm.model_executor.layers.sparse_attn_indexer.sparse_attn_indexer"))
    assert "row_ends = cu_seqlen_ke - cu_seqlen_ks" in body
    assert "torch.zeros_like(row_ends) if row_starts is None else row_starts" in body
    assert "chunk.max_seqlen_k" in body


def test_fp8_rows_are_656_bytes(engine: Source):
    spec = function(engine, "vllm.model_executor.layers.attention.mla_attention.MLAAttention.get_kv_cache_spec")
    assert "'fp8_ds_mla': 656" in ast.unparse(spec)


def test_a_stage_may_begin_without_top_k_and_nothing_says_so(engine: Source):
    """Its first layers then read `torch.empty`; so the plugin looks."""
    cut = function(engine, "vllm.distributed.utils.get_pp_indices")
    assert parameters(cut) == ("num_hidden_layers", "pp_rank", "pp_size")
    assert PARTITION in ast.unparse(cut)
    assert not parameters(function(engine, "vllm.distributed.parallel_state.get_pp_group"))
    groups = "vllm.v1.attention.backends.mla.index_group.SparseMLAIndexGroupBuilder"
    grouped = ast.unparse(function(engine, f"{groups}.register_layer"))
    assert "if is_index_producing_layer or self.current_group is None" in grouped
    handed = ast.unparse(function(engine, "vllm.model_executor.models.deepseek_v2.DeepseekV2Model.forward"))
    assert "IntermediateTensors({'hidden_states': hidden_states, 'residual': residual" in handed
