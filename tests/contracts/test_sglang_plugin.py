"""Do the released SGLang wheels still have what the plugin replaces, with the parameters it expects, and call it as it
thinks?

Read from the source inside the wheels with `ast`; nothing of the engine is imported.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from functools import cache

import pytest

from glmplan.kernels.engines import ENTRY_POINT, SGLANG_GROUP
from glmplan.kernels.engines import sglang_expert_tables as experts
from glmplan.kernels.engines.sglang_expert_engine import FUSED
from glmplan.kernels.engines.sglang_plugin import PARTITION
from glmplan.kernels.engines.sglang_tables import file_name
from glmplan.kernels.engines.sglang_tune import UNTUNED
from glmplan.kernels.engines.sglang_versions import VERSIONS, Release, Target
from tests.contracts.wheels import WheelUnavailable, wheel

pytestmark = pytest.mark.wheels

PACKAGES = {"deep_gemm": {"0.5.13.post1": ("sgl-deep-gemm", "0.1.2")}}
ALL = [
    pytest.param(version, target, id=f"{version}-{target.path.rsplit('.', 1)[1]}")
    for version, release in VERSIONS.items()
    for target in (*release.early, *release.targets, release.block_fp8, release.moe_configs)
]


@cache
def files(package: str, version: str) -> dict[str, str]:
    """Python source by path."""
    try:
        path = wheel(package, version)
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}


@cache
def module(version: str, name: str) -> ast.Module:
    package = PACKAGES.get(name.split(".")[0], {}).get(version, ("sglang", version))
    stem = name.replace(".", "/")
    found = files(*package)
    return ast.parse(found.get(f"{stem}.py") or found[f"{stem}/__init__.py"])


def function(version: str, path: str) -> ast.FunctionDef:
    """The definition of module.function or module.Class.method, wherever in its body it stands."""
    owner, name = path.rsplit(".", 1)
    try:
        return next(definitions(module(version, owner), name))
    except KeyError:
        owner, class_name = owner.rsplit(".", 1)
        body = next(
            node for node in module(version, owner).body if isinstance(node, ast.ClassDef) and node.name == class_name
        )
        return next(definitions(body, name))


def definitions(tree: ast.AST, name: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def calls(tree: ast.AST, text: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == text]


@pytest.mark.parametrize(("version", "target"), ALL)
def test_every_target_is_there_with_the_expected_parameters(version: str, target: Target):
    arguments = function(version, target.path).args
    found = tuple(item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    assert found == target.parameters
    assert arguments.vararg is None
    assert arguments.kwarg is None


@pytest.mark.parametrize("version", VERSIONS)
def test_plugins_load_first_in_every_scheduler(version: str):
    body = function(version, "sglang.srt.managers.scheduler.run_scheduler_process").body
    assert ast.unparse(body[0]) == "load_plugins()"
    groups = module(version, "sglang.srt.plugins").body
    assert f"GENERAL_PLUGINS_GROUP = {SGLANG_GROUP!r}" in {ast.unparse(node) for node in groups}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_engine_only_logs_what_a_plugin_raises(version: str):
    loading = ast.unparse(function(version, "sglang.srt.plugins.load_plugins"))
    assert "except Exception:\n            logger.exception(" in loading
    allowed = ast.unparse(function(version, "sglang.srt.plugins.load_plugins_by_group"))
    assert "ep.name not in allowed_set" in allowed, f"SGLANG_PLUGINS no longer blocks by the name {ENTRY_POINT}"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_gpu_is_chosen_before_the_model_is_loaded(version: str):
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    building = ast.unparse(function(version, f"{runner}.__init__"))
    chosen = "self.init_torch_distributed()"
    assert building.index(chosen) < building.index("self.initialize(")
    assert "self.load_model()" in ast.unparse(function(version, f"{runner}.initialize"))
    choosing = building if version == "0.5.23" else ast.unparse(function(version, f"{runner}.init_torch_distributed"))
    assert ".set_device(" in choosing


@pytest.mark.parametrize("version", VERSIONS)
def test_tilelang_attention_is_reached_through_the_replaced_method_alone(version: str):
    holders = [
        name
        for name, text in files("sglang", version).items()
        if "tilelang_sparse_fwd" in text and not name.startswith("sglang/test/")
    ]
    attention = {name for name in holders if "def tilelang_sparse_fwd" not in files("sglang", version)[name]}
    used = {name for name in attention if calls(ast.parse(files("sglang", version)[name]), "tilelang_sparse_fwd")}
    assert used == {"sglang/srt/layers/attention/dsa_backend.py"}
    backend = module(version, "sglang.srt.layers.attention.dsa_backend")
    assert len(calls(backend, "tilelang_sparse_fwd")) == 1
    assert calls(next(definitions(backend, "_forward_tilelang")), "tilelang_sparse_fwd")


def test_0_5_23_asks_resolvers_for_every_indexer_call():
    indexer = module("0.5.23", "sglang.srt.layers.attention.dsa.dsa_indexer")
    assert not calls(indexer, "deep_gemm.fp8_mqa_logits")
    paged = calls(indexer, "resolve_fp8_paged_mqa_logits_fn()")
    ragged = calls(indexer, "resolve_fp8_mqa_logits_fn()")
    assert len(paged) == 2
    assert len(ragged) == 2
    assert all(len(call.args) == 7 and [word.arg for word in call.keywords] == ["clean_logits"] for call in paged)
    assert all(len(call.args) == 5 and [word.arg for word in call.keywords] == ["clean_logits"] for call in ragged)


def test_0_5_13_looks_deep_gemm_up_at_every_call():
    indexer = module("0.5.13.post1", "sglang.srt.layers.attention.dsa.dsa_indexer")
    paged, ragged = calls(indexer, "deep_gemm.fp8_paged_mqa_logits"), calls(indexer, "deep_gemm.fp8_mqa_logits")
    assert paged
    assert ragged
    assert all(len(call.args) == 7 for call in paged)
    assert all(len(call.args) == 5 for call in ragged)
    backend = module("0.5.13.post1", "sglang.srt.layers.attention.dsa_backend")
    made = calls(backend, "deep_gemm.get_paged_mqa_logits_metadata")
    assert made
    assert all(len(call.args) == 3 for call in made)


def test_0_5_23_calls_the_triton_attention_by_our_names():
    backend = module("0.5.23", "sglang.srt.layers.attention.dsa_backend")
    targets = {target.path.rsplit(".", 1)[1]: target for target in VERSIONS["0.5.23"].targets}
    for name in ("triton_sparse_mla_fwd", "triton_sparse_mla_decode_splitk", "_validate_flashinfer_sparse_mla_backend"):
        (call,) = calls(backend, name)
        assert not call.args
        assert {word.arg for word in call.keywords} <= set(targets[name].parameters)


@pytest.mark.parametrize("version", VERSIONS)
def test_topk_is_called_by_our_names(version: str):
    owner = "dsa.dsa_indexer_metadata.DSAIndexerMetadata" if version == "0.5.23" else "dsa_backend.DSAIndexerMetadata"
    (call,) = calls(
        function(version, f"sglang.srt.layers.attention.{owner}.topk_transform"), "self.topk_backend.topk_transform"
    )
    target = next(target for target in VERSIONS[version].targets if target.path.endswith("topk_transform"))
    assert not call.args
    assert {word.arg for word in call.keywords} <= set(target.parameters)


@pytest.mark.parametrize("version", VERSIONS)
def test_tables_are_named_as_the_engine_looks_them_up(version: str):
    lookup = function(version, VERSIONS[version].block_fp8.path)
    name = next(
        node.value
        for node in ast.walk(lookup)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "json_file_name"
    )
    values = {"N": 2624, "K": 6144, "device_name": "NVIDIA_GeForce_RTX_4090", "block_n": 128, "block_k": 128}
    found = eval(compile(ast.Expression(name), "lookup", "eval"), {}, values)
    assert found == file_name(2624, 6144, "NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_table_the_engine_takes_the_tile_that_a_tuner_may_keep(version: str):
    source = VERSIONS[version].block_fp8.path.rpartition(".")[0]
    body = ast.walk(function(version, f"{source}.w8a8_block_fp8_matmul_triton"))
    named = (node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "config")
    tile = next(
        ast.unparse(node.value) for node in named if isinstance(node.value, ast.Dict) and None not in node.value.keys
    )
    assert ast.literal_eval(tile.replace("block_size[0]", "128").replace("block_size[1]", "128")) == UNTUNED


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_expert_tables_needs_configs_inside(version: str):
    source = ast.unparse(function(version, f"{experts.LOOKUP}.get_moe_configs"))
    assert "os.environ.get('SGLANG_MOE_CONFIG_DIR'" in source
    assert "os.path.join(config_dir, 'configs', version_dir, json_file_name)" in source
    assert "version_dir = f\"triton_{triton_version.replace('.', '_')}\"" in source
    assert "os.listdir(configs_root)" in source


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("down", [False, True])
def test_expert_tables_are_named_as_the_engine_looks_them_up(version: str, down: bool):
    naming = function(version, f"{experts.LOOKUP}.get_config_file_name")
    naming.decorator_list = []
    scope: dict = {"get_device_name": lambda: "NVIDIA GeForce RTX 4090", "Optional": {str: None, int: None}}
    exec(compile(ast.Module([naming], []), "naming", "exec"), scope)
    found = scope["get_config_file_name"](256, 256, "fp8_w8a8", [128, 128], False, down_moe=down)
    assert found == experts.file_name(256, 256, "NVIDIA GeForce RTX 4090", down)


@pytest.mark.parametrize("version", VERSIONS)
def test_experts_are_looked_up_by_the_rank_s_own_number_and_width(version: str):
    choosing = ast.unparse(function(version, f"{experts.LOOKUP}.try_get_optimal_moe_config"))
    assert "E, _, N = w2_shape" in choosing
    assert "config['BLOCK_SIZE_M'] != down_config['BLOCK_SIZE_M']" in choosing, "both GEMMs share it"
    (call,) = calls(function(version, f"{FUSED}._prepare_fused_moe_run"), "try_get_optimal_moe_config")
    assert "num_tokens" in map(ast.unparse, call.args), "rows are tokens"
    context = "get_exec().deterministic" if version == "0.5.23" else "get_global_server_args()"
    for name in ("get_moe_configs", "get_default_config"):
        assert f"{context}.enable_deterministic_inference" in ast.unparse(function(version, f"{experts.LOOKUP}.{name}"))


@pytest.mark.parametrize("version", VERSIONS)
def test_both_expert_gemms_are_called_as_the_tuner_calls_them(version: str):
    fused = module(version, FUSED)
    kernels = "sglang.kernels.ops.moe" if version == "0.5.23" else "sglang.srt.layers.moe.moe_runner.triton_utils"
    taken = function(version, f"{kernels}.fused_moe_triton_kernels.invoke_fused_moe_kernel").args
    names = [item.arg for item in taken.args]
    assert names[:15] == [
        "A", "B", "bias", "C", "A_scale", "B_scale", "B_zp", "topk_weights", "topk_ids", "sorted_token_ids", "expert_ids",
        "num_tokens_post_padded", "mul_routed_weight", "top_k", "config",
    ]  # fmt: skip
    ours = {
        "compute_type", "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant",
        "block_shape", "filter_expert", "router_topk",
    }  # fmt: skip
    assert ours <= set(names)
    up, down = calls(function(version, f"{FUSED}._fused_moe_kernel_sequence"), "invoke_fused_moe_kernel")
    assert [ast.unparse(argument) for argument in up.args[11:15]] == [
        "num_tokens_post_padded", "apply_router_weight_on_input", "topk", "config",
    ]  # fmt: skip
    assert ast.unparse(down.args[13]) == "1"
    assert ast.unparse(down.args[14]) == "down_config or config"
    for call, more in ((up, set()), (down, {"router_topk"})):
        given = {word.arg for word in call.keywords}
        assert (ours - {"router_topk"}) | more <= given
        off = given - ours
        assert off <= {"c_sorted", "a_use_tma", "b_use_tma", "fuse_sum_all_reduce", "fuse_swiglu"}, "off by default"
    aligning = f"{experts.LOOKUP.rsplit('.', 1)[0]}.moe_align_block_size.moe_align_block_size"
    assert [item.arg for item in function(version, aligning).args.args][:3] == ["topk_ids", "block_size", "num_experts"]
    (call,) = calls(function(version, f"{FUSED}._prepare_fused_moe_run"), "moe_align_block_size")
    assert list(map(ast.unparse, call.args)) == ["topk_ids", "config['BLOCK_SIZE_M']", "E"]
    assert "invoke_fused_moe_kernel" in ast.unparse(fused)
    launching = function(version, f"{kernels}.fused_moe_triton_kernels.invoke_fused_moe_kernel")
    assert "fused_moe_kernel[grid](" in ast.unparse(launching), "looked up in its module, where compiling ahead puts its own"


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_down_table_both_gemms_take_the_same_tiles(version: str):
    """So a table of the first GEMM alone would do; the tuner writes both, because their best tiles differ."""
    looking = ast.unparse(function(version, f"{experts.LOOKUP}.get_moe_configs"))
    assert ("return up_configs" in looking) == (version == "0.5.23")
    assert "down_config or config" in ast.unparse(function(version, f"{FUSED}._fused_moe_kernel_sequence"))


@pytest.mark.parametrize(("version", "release"), VERSIONS.items(), ids=VERSIONS)
def test_top_k_is_sent_between_stages_where_the_table_says_so(version: str, release: Release):
    forward = ast.unparse(function(version, "sglang.srt.models.deepseek_v2.DeepseekV2Model.forward"))
    assert ("tensors['topk_indices'] = topk_indices" in forward) == release.relays_topk
    if not release.relays_topk:
        partition = function(version, "sglang.srt.distributed.utils.get_pp_indices")
        assert [argument.arg for argument in partition.args.args] == ["num_hidden_layers", "pp_rank", "pp_size"]
        assert PARTITION in ast.unparse(partition)
