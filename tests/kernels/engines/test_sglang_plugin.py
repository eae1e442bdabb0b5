"""When does the plugin refuse, what is then on stderr, and does the process end? Each case is a fresh process.

The plugin loader, its environment and its version are the released wheel's own files; the rest of the engine is a few
lines that stand where the engine's modules do, so that neither its dependencies nor a GPU are needed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import glmplan
from glmplan.errors import UsageError
from glmplan.kernels.engines import ENTRY_POINT, FAILURE, MARKER, SGLANG_GROUP, PortLine, parse_port_line
from glmplan.kernels.engines.process import port_mode
from glmplan.kernels.engines.sglang_tune_steps import tile
from glmplan.kernels.packed import missing_files, packed
from tests.contracts.wheels import WheelUnavailable, wheel

ROOT = Path(__file__).resolve().parents[3]
REAL = (
    "sglang/srt/plugins/__init__.py", "sglang/srt/plugins/hook_registry.py", "sglang/srt/environ.py",
    "sglang/version.py", "sglang/_version.py", "sglang/srt/distributed/utils.py",
)  # fmt: skip
CONFIG = {"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
STANDING_IN = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/managers/__init__.py": "",
    "sglang/srt/managers/scheduler.py": "from sglang.srt.plugins import load_plugins",
    "sglang/srt/model_executor/__init__.py": "",
    "sglang/srt/model_executor/model_runner.py": """
        class ModelRunner:
            def load_model(self):
                return "loaded"
    """,
    "sglang/srt/distributed/__init__.py": "",
    "sglang/srt/configs/__init__.py": "",
    "sglang/srt/debug_utils/__init__.py": "",
    "sglang/srt/debug_utils/cuda_coredump.py": "",
    "sglang/srt/configs/model_config.py": "def is_deepseek_dsa(config): return hasattr(config, 'index_topk')",
    "sglang/srt/arg_groups/__init__.py": "",
    "sglang/srt/arg_groups/overrides.py": """
        def _check_dsa_backend_constraints(kv_cache_dtype, prefill_backend, decode_backend, *, hip, dcp_size=1):
            raise ValueError("the engine refuses")
    """,
    "sglang/srt/runtime_context.py": """
        from types import SimpleNamespace as Bag
        KERNEL = Bag(dsa_prefill_backend="triton", dsa_decode_backend="triton")
        DRAFT = None
        def get_exec(): return Bag(kernel=KERNEL)
        ALGORITHM = None
        def get_spec(): return Bag(speculative_draft_attention_backend=DRAFT, speculative_algorithm=ALGORITHM)
        def get_model(): return Bag(kv_cache_dtype="fp8_e4m3")
        def get_parallel(): return Bag(attn_tp_size=8)
    """,
}
IN_A_SCHEDULER = """
    from types import SimpleNamespace as Bag
    from glmplan.kernels.engines import sglang_plugin
    sglang_plugin.device_sm = lambda: SM
    from sglang.srt.managers.scheduler import load_plugins
    load_plugins()
    from sglang.srt.model_executor.model_runner import ModelRunner
    runner = ModelRunner()
    if "VERSION" == "0.5.13.post1":  # 0.5.23's has no such attributes
        runner.pp_rank, runner.pp_size = STAGE
    runner.model_config = Bag(hf_config=Bag(**CONFIG), num_attention_heads=64)
    print(runner.load_model())
"""


@pytest.fixture(params=["0.5.23", "0.5.13.post1"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(tmp_path: Path, version: str) -> Path:
    """A folder to put on PYTHONPATH: the wheel's loader, stand-ins, and this package as an installed one."""
    try:
        path = wheel("sglang", version)
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    site = tmp_path / "site"
    with zipfile.ZipFile(path) as archive:
        for name in REAL:
            archive.extract(name, site)
    for name, text in STANDING_IN.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(textwrap.dedent(text))
    metadata = site / "glmplan-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: glmplan\nVersion: 0\n")
    target = "glmplan.kernels.engines.sglang_plugin:register"
    (metadata / "entry_points.txt").write_text(f"[{SGLANG_GROUP}]\n{ENTRY_POINT} = {target}\n")
    return site


def run(site: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("GLMPLAN_", "SGLANG_", "TRITON_", "COV"))
    }
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", textwrap.dedent(code)],
        env={**inherited, "PYTHONPATH": path, **environment}, cwd=site, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def version_of(site: Path) -> str:
    return (site / "sglang/_version.py").read_text().partition("__version__ = version = '")[2].partition("'")[0]


def in_a_scheduler(
    site: Path,
    sm: int = 89,
    before: str = "",
    config: Mapping[str, int | str] = CONFIG,
    stage: tuple[int, int] = (0, 1),
    **environment: str,
):
    code = IN_A_SCHEDULER.replace("SM", str(sm)).replace("CONFIG", json.dumps(config)).replace("STAGE", str(stage))
    code = code.replace("VERSION", version_of(site))
    return run(site, textwrap.dedent(before) + textwrap.dedent(code), **environment)


def refusal(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The sentence the process ended with."""
    assert result.returncode == code, result.stderr
    assert "loaded" not in result.stdout
    assert MARKER not in result.stderr
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith(FAILURE)]
    return sentence


LOADING = "from sglang.srt.plugins import load_plugins; load_plugins(); print('loaded')"


def test_a_mode_that_does_not_exist_is_refused(engine: Path):
    assert "GLMPLAN_PORT is 'on'; known are auto, force, off." in refusal(run(engine, LOADING, GLMPLAN_PORT="on"), 2)


def test_a_card_that_does_not_exist_is_refused(engine: Path):
    assert "'sm70'" in refusal(run(engine, LOADING, GLMPLAN_RUN_AS="sm70"), 2)


def test_off_touches_nothing(engine: Path):
    code = LOADING + "; import sys; print('glmplan.kernels.engines.sglang_hooks' in sys.modules)"
    result = run(engine, code, GLMPLAN_PORT="off")
    assert result.stdout.split() == ["loaded", "False"]


def test_another_version_is_refused_by_name(engine: Path, version: str):
    (engine / "sglang/_version.py").write_text("__version__ = '0.6.0'\n__version_tuple__ = (0, 6, 0)\n")
    sentence = refusal(run(engine, LOADING, GLMPLAN_PORT="force"), 4)
    assert "SGLang 0.5.13.post1 and 0.5.23, not 0.6.0" in sentence


@pytest.mark.parametrize(("sm", "code"), [(89, 4), (80, 4), (90, 0), (120, 0)])
def test_another_version_is_left_alone_where_the_engine_serves(engine: Path, sm: int, code: int):
    (engine / "sglang/_version.py").write_text("__version__ = '0.6.0'\n__version_tuple__ = (0, 6, 0)\n")
    before = f"from glmplan.kernels.engines import sglang_plugin as p; p.device_sm = lambda: {sm}; "
    assert run(engine, before + LOADING).returncode == code


def test_a_target_that_is_missing_is_named(engine: Path):
    (engine / "sglang/srt/model_executor/model_runner.py").write_text("class ModelRunner: pass\n")
    sentence = refusal(in_a_scheduler(engine), 4)
    assert "has no sglang.srt.model_executor.model_runner.ModelRunner.load_model" in sentence


def test_a_changed_signature_is_named(engine: Path):
    text = "class ModelRunner:\n    def load_model(self, quickly): pass\n"
    (engine / "sglang/srt/model_executor/model_runner.py").write_text(text)
    assert "takes (self, quickly) and not (self)" in refusal(in_a_scheduler(engine), 4)


def test_targets_are_looked_for_when_the_gpu_is_known(engine: Path, version: str):
    missing = "sglang.srt.layers" if version == "0.5.23" else "deep_gemm"
    sentence = refusal(in_a_scheduler(engine, before=backends(version)), 4)
    assert f"SGLang {version} has no {missing}" in sentence


@pytest.fixture
def unpacked(engine: Path) -> Path:
    """The site with the package as `launch` sends it, in place of this checkout's."""
    shutil.rmtree(engine / "glmplan-0.dist-info")
    with zipfile.ZipFile(io.BytesIO(packed())) as archive:
        archive.extractall(engine)
    return engine


def test_the_package_that_launch_sends_is_whole_and_found(unpacked: Path):
    assert missing_files(unpacked) == ()
    result = in_a_scheduler(unpacked, sm=90)
    assert (result.returncode, result.stdout.split()) == (0, ["loaded"]), result.stderr


@pytest.mark.parametrize(
    "lost",
    [
        "glmplan/kernels/topk/kernel.py",  # imported late, or not at all
        "glmplan/kernels/engines/process.py",  # imported first
        "glmplan/kernels/engines/__init__.py",
        "glmplan/errors.py",
        f"glmplan-{glmplan.__version__}.dist-info/RECORD",
    ],
)
def test_a_half_installed_package_ends_the_process(unpacked: Path, lost: str):
    (unpacked / lost).unlink()
    sentence = refusal(run(unpacked, LOADING), 1)
    assert "glmplan is half-installed" in sentence
    assert sentence.endswith(".")


def test_a_file_cut_short_is_named(unpacked: Path):
    kernel = unpacked / "glmplan/kernels/sparse_mla/kernel.py"
    kernel.write_bytes(kernel.read_bytes()[:-40])
    sentence = refusal(run(unpacked, LOADING), 1)
    assert f"half-installed in {unpacked}: 1 of its files are missing or cut short, glmplan/kernels/sparse_mla" in sentence


def test_a_half_installed_package_that_is_off_leaves_the_engine_alone(unpacked: Path):
    (unpacked / "glmplan/kernels/engines/process.py").unlink()
    result = run(unpacked, LOADING, GLMPLAN_PORT="off")
    assert (result.returncode, FAILURE in result.stderr) == (0, False), result.stderr
    assert result.stdout.split() == ["loaded"]


def test_an_installed_wheel_is_judged_by_the_files_that_run_in_an_engine(tmp_path: Path):
    """RECORD as pip writes it: scripts outside, bytecode without sizes, profiles that a user may edit."""
    rows = ["../../../bin/glmplan,sha256=x,200", "glmplan/kernels/__pycache__/a.pyc,,", "glmplan/profiles/a.toml,sha256=x,9"]
    record = tmp_path / f"glmplan-{glmplan.__version__}.dist-info" / "RECORD"
    record.parent.mkdir()
    record.write_text("\n".join([*rows, "glmplan/kernels/a.py,sha256=x,3"]))
    assert missing_files(tmp_path) == ("glmplan/kernels/a.py",)
    (tmp_path / "glmplan/kernels").mkdir(parents=True)
    (tmp_path / "glmplan/kernels/a.py").write_text("abc")
    assert missing_files(tmp_path) == ()


@pytest.mark.parametrize("sm", [90, 100])
def test_nothing_happens_where_the_engine_serves(engine: Path, sm: int):
    result = in_a_scheduler(engine, sm=sm)
    assert (result.returncode, result.stdout.split()) == (0, ["loaded"]), result.stderr
    assert MARKER not in result.stderr


def test_other_models_are_left_alone(engine: Path):
    result = in_a_scheduler(engine, config={"hidden_size": 1})
    assert (result.returncode, result.stdout.split()) == (0, ["loaded"]), result.stderr


def test_a_model_of_other_shapes_is_refused(engine: Path, version: str):
    result = in_a_scheduler(engine, config={**CONFIG, "index_n_heads": 64}, before=backends(version))
    assert "index_n_heads is 64; glmplan's kernels are for GLM-5.2's 32" in refusal(result, 4)


SEVEN = {**CONFIG, "num_hidden_layers": 7, "index_topk_freq": 4, "index_skip_topk_offset": 3}
"""Layers 3, 4 and 5 share the top-k of layer 2."""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the engine needs torch")
@pytest.mark.parametrize(
    ("config", "stage", "cut", "next_step"),
    [
        (SEVEN, (1, 2), "3,4", "Begin it on layer 2 or 6 ("),
        (SEVEN, (1, 2), "2,5", None),
        (SEVEN, (0, 2), "3,4", None),
        (SEVEN, (2, 3), "2,3,2", "Begin it on layer 2 or 6 ("),
        (SEVEN, (1, 2), "3,3", None),  # does not add up: for the engine to say
        ({**SEVEN, "index_topk_pattern": "FFFFSSF"}, (1, 2), "3,4", None),
        ({**SEVEN, "index_topk_pattern": "FSSSSSS"}, (1, 2), "3,4", "Use one stage."),
    ],
)
def test_a_stage_without_top_k_of_its_own_is_refused_before_its_weights_are_read(
    engine: Path,
    version: str,
    config: Mapping[str, int | str],
    stage: tuple[int, int],
    cut: str,
    next_step: str | None,
):
    result = in_a_scheduler(engine, before=backends(version), config=config, stage=stage, SGLANG_PP_LAYER_PARTITION=cut)
    if version == "0.5.23" or next_step is None:  # goes on, to the targets that are not in the stand-in
        assert f"SGLang {version} has no " in refusal(result, 4)
        return
    sentence = refusal(result, 4)
    assert f"Pipeline stage {stage[0]} begins on layer " in sentence
    assert "SGLang 0.5.13.post1 does not send it between stages" in sentence
    assert next_step in sentence


def test_backends_that_lead_elsewhere_are_refused(engine: Path, version: str):
    result = in_a_scheduler(engine, before=backends(version, "flashmla_kv"))
    assert "--dsa-prefill-backend is flashmla_kv" in refusal(result, 4)


@pytest.mark.parametrize(("algorithm", "refuses"), [("EAGLE", True), ("NEXTN", True), ("DFLASH", False), ("EAGLE3", False)])
def test_mtp_drafts_on_another_backend_are_refused(engine: Path, version: str, algorithm: str, refuses: bool):
    """A drafter of another kind may need one: 0.5.23 itself resolves DFLASH's to FlashInfer."""
    chosen = f"c.DRAFT, c.ALGORITHM = 'fa3', {algorithm!r}\n"
    if version != "0.5.23":
        chosen = f"chosen.speculative_draft_attention_backend, chosen.speculative_algorithm = 'fa3', {algorithm!r}\n"
    sentence = refusal(in_a_scheduler(engine, before=backends(version) + chosen), 4)
    words = "--speculative-draft-attention-backend is fa3, which leaves glmplan's kernels; they serve dsa."
    assert words in sentence if refuses else f"SGLang {version} has no " in sentence


def test_a_gpu_that_is_too_old_is_refused(engine: Path, version: str):
    assert "sm_75" in refusal(in_a_scheduler(engine, sm=75, before=backends(version)), 4)


def test_a_malformed_table_is_refused_before_serving(engine: Path, tmp_path: Path):
    table = tmp_path / "N=512,K=1024,device_name=GPU,dtype=fp8_w8a8,block_shape=[128, 128].json"
    table.write_text('{"1": {"BLOCK_SIZE_M": 16}}')
    sentence = refusal(run(engine, LOADING, GLMPLAN_TUNED_DIR=str(tmp_path)), 2)
    assert str(table) in sentence


def test_a_malformed_table_of_experts_is_refused_before_serving(engine: Path, tmp_path: Path):
    assert "has no folder configs" in refusal(run(engine, LOADING, SGLANG_MOE_CONFIG_DIR=str(tmp_path)), 2)
    table = tmp_path / "configs/triton_3_8_0/E=16,N=512,device_name=GPU,dtype=fp8_w8a8,block_shape=[128, 128].json"
    table.parent.mkdir(parents=True)
    table.write_text('{"1": {"BLOCK_SIZE_M": 16}}')
    assert str(table) in refusal(run(engine, LOADING, SGLANG_MOE_CONFIG_DIR=str(tmp_path)), 2)


LOOKUP = """
    import functools, os
    def get_config_file_name(E, N, dtype, block_shape, per_channel_quant, down_moe):
        return f"E={E},N={N},device_name=GPU,dtype={dtype},block_shape={block_shape}{'_down' if down_moe else ''}.json"
    @functools.lru_cache
    def get_moe_configs(E, N, dtype, block_n=0, block_k=0, per_channel_quant=False, down_moe=False):
        return {1: os.environ.get("SGLANG_MOE_CONFIG_DIR", "the engine's own")}
"""


STOCK = """
        from sglang.srt import runtime_context
        runtime_context.KERNEL.dsa_prefill_backend = runtime_context.KERNEL.dsa_decode_backend = "flashinfer_sparse_mla"
"""


@pytest.mark.parametrize("sm", [86, 90, 120])
def test_tables_of_experts_are_used_where_the_port_serves_and_where_it_does_not(
    engine: Path, tmp_path: Path, version, sm: int
):
    """At 86 the port would act, and is stood in for; the others are the engine's own attention, which it leaves alone."""
    if (version, sm) == ("0.5.13.post1", 120):
        pytest.skip("0.5.13.post1 has no attention of its own there")
    pytest.importorskip("triton")
    package = engine / "sglang/srt/layers/moe/moe_runner/triton_utils"
    package.mkdir(parents=True)
    for folder in (package, *list(package.parents)[:3]):
        (folder / "__init__.py").write_text("")
    (package / "fused_moe_triton_config.py").write_text(textwrap.dedent(LOOKUP))
    (tmp_path / "configs/triton_3_1_0").mkdir(parents=True)
    name = "E=16,N=512,device_name=GPU,dtype=fp8_w8a8,block_shape=[128, 128].json"
    config = tile(16, 64, 128, 4)
    table = tmp_path / "configs/triton_3_1_0" / name
    table.write_text(json.dumps({"1": config}))
    code = f"""
        from types import SimpleNamespace as Bag
        from glmplan.kernels.engines import sglang_plugin
        sglang_plugin.device_sm = lambda: {sm}
        {"sglang_plugin.activate = lambda runner: None" if sm == 86 else STOCK.strip()}
        from sglang.srt.managers.scheduler import load_plugins
        load_plugins()
        from sglang.srt.model_executor.model_runner import ModelRunner
        runner = ModelRunner()
        runner.model_config = Bag(hf_config=Bag(**{CONFIG}), num_attention_heads=64)
        assert [runner.load_model() for _ in range(2)] == ["loaded"] * 2
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as lookup
        for _ in range(2):
            print(lookup.get_moe_configs(16, 512, "fp8_w8a8", 128, 128)[1])
        print(lookup.get_moe_configs(256, 256, "fp8_w8a8", 128, 128)[1])
    """
    result = run(engine, code, SGLANG_MOE_CONFIG_DIR=str(tmp_path))
    assert result.stdout.splitlines()[-3:] == [str(tmp_path), str(tmp_path), "the engine's own"], result.stderr
    assert [line for line in result.stderr.splitlines() if "tables" in line] == [f"glmplan tables: {table}"]
    assert MARKER not in result.stderr


def test_the_allow_list_of_the_engine_blocks_without_a_word(engine: Path):
    """So launch looks for the line, and for the name in SGLANG_PLUGINS."""
    result = run(engine, LOADING, SGLANG_PLUGINS="another", GLMPLAN_PORT="nonsense")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("sm", "port", "outcome"), [(90, "auto", "refuses"), (90, "force", "passes"), (86, "auto", "passes")]
)
def test_the_check_of_backends_is_lifted_where_the_port_serves(engine: Path, version: str, sm: int, port: str, outcome: str):
    if version != "0.5.23":
        pytest.skip("0.5.13.post1 checks no backends")
    code = f"""
        from glmplan.kernels.engines import sglang_plugin
        sglang_plugin.device_sm = lambda: {sm}
        from sglang.srt.plugins import load_plugins
        load_plugins()
        from sglang.srt.arg_groups.overrides import _check_dsa_backend_constraints as check
        try:
            check("bfloat16", "triton", "triton", hip=False, dcp_size=1)
            print("passes")
        except ValueError:
            print("refuses")
    """
    assert run(engine, code, GLMPLAN_PORT=port).stdout.split() == [outcome]


def backends(version: str, name: str = "") -> str:
    """Code that makes the engine's stand-in choose this backend (default: one that leads to the port)."""
    name = name or ("triton" if version == "0.5.23" else "tilelang")
    if version == "0.5.23":
        both = "c.KERNEL.dsa_prefill_backend = c.KERNEL.dsa_decode_backend"
        return f"import sglang.srt.runtime_context as c; {both} = {name!r}\n"
    return (
        "import sys; sys.modules['sglang.srt.runtime_context'] = None\n"
        "from types import SimpleNamespace as Bag\n"
        "import sglang.srt.model_executor.model_runner as m\n"
        f"chosen = Bag(dsa_prefill_backend={name!r}, dsa_decode_backend={name!r}, kv_cache_dtype='bfloat16', "
        "speculative_draft_attention_backend=None, speculative_algorithm=None)\n"
        "m.ModelRunner.server_args = chosen\n"
    )


def test_modes(monkeypatch: pytest.MonkeyPatch):
    for text, mode in (("", "auto"), (" force ", "force"), ("off", "off")):
        monkeypatch.setenv("GLMPLAN_PORT", text)
        assert port_mode() == mode
    monkeypatch.setenv("GLMPLAN_PORT", "1")
    with pytest.raises(UsageError):
        port_mode()


def test_the_line_can_be_read_back_from_a_log():
    line = PortLine("0.1.0", "sglang", "0.5.23", 89, 89, {"mode": "auto", "kv": "raw"}, ("a.b", "c.d"))
    text = line.render()
    assert text.startswith(MARKER)
    assert parse_port_line(f"[2026-01-01 00:00:00 TP0] {text}") == line
    assert parse_port_line("glmplan port failed: GLMPLAN_PORT is 'on'.") is None
    assert parse_port_line("nothing of ours") is None
    for torn in (text.replace("sm=89", "sm=8"), text.replace(" sm=89", ""), text[:40], text.replace("sm=89", "sm=glmplan")):
        assert parse_port_line(torn) in (None, line._replace(sm=8))


@pytest.mark.skipif(
    SGLANG_GROUP not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("entry-points", {}),
    reason=f"pyproject.toml names no entry point of {SGLANG_GROUP}",
)
@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="the package build is not installed")
def test_an_unpacked_wheel_is_found_by_its_metadata(engine: Path, tmp_path: Path):
    for path in (engine / "glmplan-0.dist-info").iterdir():
        path.unlink()
    (engine / "glmplan-0.dist-info").rmdir()
    out = tmp_path / "wheel"
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)], check=True, capture_output=True
    )
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        archive.extractall(engine)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GLMPLAN_", "SGLANG_"))}
    result = subprocess.run(
        [sys.executable, "-c", LOADING], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**inherited, "PYTHONPATH": str(engine), "GLMPLAN_PORT": "on"},
    )  # fmt: skip
    assert "GLMPLAN_PORT is 'on'" in refusal(result, 2)
