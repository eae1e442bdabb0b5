"""When does the vLLM plugin act, when does it leave the engine alone, and with which sentence does it end a process?

Each case is a process of its own with a small stand-in for the `vllm` package; the real one is read in tests/contracts.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from glmplan.kernels.packed import packed

ROOT = Path(__file__).resolve().parents[3]

ENGINE = {
    "__init__.py": "import os\n__version__ = os.environ['FAKE_VERSION']\n",
    "platforms.py": """
        import os
        from types import SimpleNamespace
        sm = int(os.environ["FAKE_SM"])
        capability = SimpleNamespace(major=sm // 10, minor=sm % 10) if sm else None
        current_platform = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: capability)
        """,
    "v1/attention/backends/registry.py": """
        from enum import Enum
        paths = {}
        class AttentionBackendEnum(Enum):
            FLASHMLA_SPARSE = "theirs"
            CUSTOM = None
            def get_path(self):
                return paths[self]
        def register_backend(backend, class_path):
            paths[backend] = class_path
        """,
    "model_executor/models/registry.py": """
        class ModelRegistry:
            models = {}
            @classmethod
            def register_model(cls, architecture, path):
                cls.models[architecture] = path
        """,
    "distributed/parallel_state.py": """
        import json, os
        from types import SimpleNamespace
        rank, size = json.loads(os.environ.get("FAKE_STAGE", "[0, 1]"))
        def get_pp_group():
            return SimpleNamespace(rank_in_group=rank, world_size=size)
        """,
    "distributed/utils.py": """
        import os
        def get_pp_indices(num_hidden_layers, pp_rank, pp_size):
            parts = [int(part) for part in os.environ["VLLM_PP_LAYER_PARTITION"].split(",")]
            if sum(parts) != num_hidden_layers:
                raise ValueError("does not add up")
            return sum(parts[:pp_rank]), sum(parts[:pp_rank + 1])
        """,
    "v1/worker/worker_base.py": """
        class WorkerWrapperBase:
            vllm_config = None
            def init_device(self):
                return "device"
        """,
}

SCRIPT = """
    from types import SimpleNamespace as N
    from glmplan.kernels import run_as
    from glmplan.kernels.engines import vllm_plugin
    run_as.device_sm = lambda device=None: 80
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1.attention.backends import registry
    from vllm.v1.worker.worker_base import WorkerWrapperBase
    plain = WorkerWrapperBase.init_device

    def glm(**changes):
        shapes = dict(index_n_heads=32, index_head_dim=128, index_topk=2048, kv_lora_rank=512, qk_rope_head_dim=64)
        chosen = changes.pop("backend", registry.AttentionBackendEnum.CUSTOM)
        parallel = N(pipeline_parallel_size=changes.pop("stages", 1))
        model = N(architectures=["GlmMoeDsaForCausalLM"], hf_text_config=N(**(shapes | changes)))
        cache = N(cache_dtype="auto")
        return N(model_config=model, attention_config=N(backend=chosen), cache_config=cache, parallel_config=parallel)

    def start(config):
        wrapper = WorkerWrapperBase()
        wrapper.vllm_config = config
        return wrapper.init_device()

    vllm_plugin.register()
    acted = WorkerWrapperBase.init_device is not plain
"""


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    for name, body in ENGINE.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.parents:
            if folder == tmp_path:
                break
            (folder / "__init__.py").touch()
        path.write_text(textwrap.dedent(body))
    return tmp_path


def run(engine: Path, body: str = "", sm: int = 80, version: str = "0.33.0", **environment: str):
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("GLMPLAN_")}
    asked = {"PYTHONPATH": f"{engine}{os.pathsep}{ROOT}", "FAKE_SM": str(sm), "FAKE_VERSION": version}
    script = textwrap.dedent(SCRIPT) + textwrap.dedent(body or "print(acted)")
    command = [sys.executable, "-c", script]
    environment = cleared | asked | environment
    return subprocess.run(command, env=environment, cwd=engine, capture_output=True, text=True, check=False)


def refused(result: subprocess.CompletedProcess[str], exit_code: int, sentence: str) -> None:
    assert result.returncode == exit_code, result.stderr
    assert result.stderr.startswith("glmplan port failed: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("sm", "mode", "acts"),
    [
        *((sm, "auto", sm < 90) for sm in (80, 86, 87, 89, 90, 100, 103, 120, 121)),
        *((sm, "force", True) for sm in (80, 90, 120)),
        *((sm, "off", False) for sm in (80, 90)),
        (75, "auto", False),
        (110, "auto", False),
        (0, "auto", False),
        (0, "force", False),
    ],
)
def test_it_acts_where_the_engine_cannot_or_where_forced(engine: Path, sm: int, mode: str, acts: bool):
    result = run(engine, sm=sm, GLMPLAN_PORT=mode)
    assert (result.returncode, result.stdout.strip()) == (0, str(acts)), result.stderr
    assert not result.stderr


@pytest.mark.parametrize(
    ("sm", "run_as", "models"),
    [(80, "", 2), (86, "", 2), (89, "", 0), (90, "", 0), (90, "sm89", 0), (90, "sm80", 2)],
)
def test_models_without_fp8_kernels_are_registered_below_sm89(engine: Path, sm: int, run_as: str, models: int):
    body = "print(len(ModelRegistry.models), registry.paths)"
    result = run(engine, body, sm=sm, GLMPLAN_PORT="force", GLMPLAN_RUN_AS=run_as)
    assert result.stdout.startswith(f"{models} "), result.stderr
    assert "glmplan.kernels.engines.vllm_backend.SparseMLABackend" in result.stdout


@pytest.mark.parametrize(("first", "own"), [(89, 86), (86, 89), (90, 80)])
def test_a_rank_that_needs_other_model_classes_than_its_node_is_refused(engine: Path, first: int, own: int):
    result = run(engine, f"run_as.device_sm = lambda device=None: {own}; start(glm())", sm=first, GLMPLAN_PORT="force")
    refused(result, 4, f"This rank's GPU is sm_{own} and the first of its node is sm_{first}")


def test_a_half_installed_package_is_refused(engine: Path):
    with zipfile.ZipFile(io.BytesIO(packed())) as archive:
        archive.extractall(engine)
    (engine / "glmplan/kernels/topk/kernel.py").unlink()
    refused(run(engine), 1, f"glmplan is half-installed in {engine}: 1 of its files")


def test_a_second_call_changes_nothing(engine: Path):
    body = "once = WorkerWrapperBase.init_device; vllm_plugin.register(); print(WorkerWrapperBase.init_device is once)"
    assert run(engine, body).stdout.strip() == "True"


@pytest.mark.parametrize("version", ["0.34.0", "0.32.1", "0.33.1rc1+cu129"])
def test_an_unknown_version_is_refused_by_name(engine: Path, version: str):
    refused(
        run(engine, version=version), 4, f"known to fit vLLM 0.33.0, not {version}. Install it, or set GLMPLAN_PORT=off."
    )
    refused(run(engine, version=version, sm=90, GLMPLAN_PORT="force"), 4, version)


def test_an_unknown_version_that_serves_the_gpu_itself_is_left_alone(engine: Path):
    assert run(engine, version="0.34.0", sm=90).stdout.strip() == "False"


def test_a_build_of_the_known_version_is_known(engine: Path):
    assert run(engine, version="0.33.0+cu129").stdout.strip() == "True"


def test_requests_that_cannot_be_understood(engine: Path):
    refused(run(engine, GLMPLAN_PORT="on"), 2, "GLMPLAN_PORT is 'on'; known are auto, force, off.")
    refused(run(engine, GLMPLAN_RUN_AS="sm75"), 2, "sm75")
    refused(run(engine, sm=100, GLMPLAN_PORT="force"), 4, "GLMPLAN_PORT=force cannot serve sm_100")


def test_another_model_is_left_alone(engine: Path):
    body = "print(start(N(model_config=N(architectures=['LlamaForCausalLM']))), start(N(model_config=None)))"
    result = run(engine, body)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "device device", "")


def test_the_backend_must_be_chosen_by_flag(engine: Path):
    told = "Start vLLM with --attention-backend CUSTOM, or set GLMPLAN_PORT=off."
    refused(run(engine, "start(glm(backend=None))"), 4, f"attention backend is auto; glmplan's kernels are CUSTOM. {told}")
    chosen = "start(glm(backend=registry.AttentionBackendEnum.FLASHMLA_SPARSE))"
    refused(run(engine, chosen), 4, "attention backend is FLASHMLA_SPARSE;")


def test_another_plugins_backend_is_not_taken_for_ours(engine: Path):
    body = "registry.paths[registry.AttentionBackendEnum.CUSTOM] = 'other.Backend'; start(glm())"
    refused(run(engine, body), 4, "Another plugin has registered other.Backend")


@pytest.mark.parametrize(("cut", "refuses"), [("3,4", True), ("2,5", False), ("3,3", False)])
def test_a_stage_that_nothing_gives_top_k_is_refused_before_its_weights_are_read(engine: Path, cut: str, refuses: bool):
    """vLLM itself would read a buffer that nothing has written, and answer wrongly."""
    body = "start(glm(stages=2, num_hidden_layers=7, index_topk_freq=4, index_skip_topk_offset=3))"
    result = run(engine, body, FAKE_STAGE="[1, 2]", VLLM_PP_LAYER_PARTITION=cut)
    words = (
        "Pipeline stage 1 begins on layer 3, which shares the top-k of an earlier layer, and vLLM 0.33.0 does not send it"
    )
    refused(result, 4, words if refuses else "vLLM 0.33.0 has no vllm.")
    assert refuses == ("Begin it on layer 2 or 6 (VLLM_PP_LAYER_PARTITION counts layers per stage)." in result.stderr)


def test_other_shapes_than_glm_5_2_are_refused(engine: Path):
    refused(run(engine, "start(glm(index_n_heads=64))"), 4, "index_n_heads is 64; glmplan's kernels are for GLM-5.2's 32.")
    refused(run(engine, "start(glm(index_topk=None))"), 4, "index_topk is None")


@pytest.mark.skipif(find_spec("torch") is None, reason="the engine needs torch")
def test_a_missing_function_of_the_engine_is_named(engine: Path):
    refused(run(engine, "start(glm())"), 4, "vLLM 0.33.0 has no vllm.model_executor.layers.attention.sparse_mla_attention.")


def test_another_signature_is_named(engine: Path):
    worker = engine / "vllm/v1/worker/worker_base.py"
    worker.write_text(worker.read_text().replace("init_device(self)", "init_device(self, device)"))
    refused(run(engine), 4, "WorkerWrapperBase.init_device of vLLM 0.33.0 takes (self, device) and not (self).")


def test_an_unexpected_error_keeps_its_type(engine: Path):
    refused(run(engine, "start(N(model_config=N(architectures=['GlmMoeDsaForCausalLM'])))"), 1, "AttributeError")
