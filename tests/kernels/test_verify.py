"""`python -m glmplan.kernels.verify`: one table, exit code 1 on failure, a sentence where it cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from glmplan.errors import UnsupportedError
from glmplan.kernels import verify
from glmplan.kernels.results import Result, checked

ROOT = Path(__file__).resolve().parents[2]
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


def offer(monkeypatch: pytest.MonkeyPatch, op: str, cases: Any) -> None:
    module = ModuleType(f"glmplan.kernels.{op}.verify")
    module.cases = cases  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_setting", lambda: "Test GPU")
    monkeypatch.setattr(verify, "OPS", ("topk", "kv_quant"))


@needs_torch
@pytest.mark.usefixtures("on_a_gpu")
def test_every_right_kernel_is_one_line_and_exit_code_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch, "topk", lambda device: [checked("topk", "paged", 0.0, 0.0, 12.34)])
    offer(monkeypatch, "kv_quant", lambda device: [checked("kv_quant", "rows", 1e-7, 1e-6, 5.0)])
    assert verify.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Test GPU"
    assert lines[1].split() == ["op", "format", "error", "limit", "time", "us", "ok"]
    assert [line.split() for line in lines[2:4]] == [
        ["topk", "paged", "0", "0", "12.3", "yes"],
        ["kv_quant", "rows", "1e-07", "1e-06", "5.0", "yes"],
    ]
    assert lines[4] == "All kernels are right on this GPU."


@needs_torch
@pytest.mark.usefixtures("on_a_gpu")
def test_one_wrong_kernel_is_marked_and_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch, "topk", lambda device: [checked("topk", "paged", 2.0, 0.0, 1.0)])
    offer(monkeypatch, "kv_quant", lambda device: [checked("kv_quant", "rows", 0.0, 0.0, 1.0)])
    assert verify.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-1] == "NO"
    assert lines[3].split()[-1] == "yes"
    assert "NO" in lines[4]


@needs_torch
@pytest.mark.usefixtures("on_a_gpu")
def test_an_operation_that_stops_fails_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(device: Any) -> list[Result]:
        raise RuntimeError("out of resource\nand a second line")

    offer(monkeypatch, "topk", stop)
    offer(monkeypatch, "kv_quant", lambda device: [checked("kv_quant", "rows", 0.0, 0.0, 1.0)])
    assert verify.main() == 1
    printed = capsys.readouterr()
    assert printed.err == "topk: RuntimeError: out of resource\n"
    assert printed.out.splitlines()[2].split()[-1] == "NO"
    assert printed.out.splitlines()[3].startswith("kv_quant")


def test_nan_never_passes() -> None:
    assert not checked("topk", "paged", float("nan"), 1.0, 1.0).ok
    assert checked("topk", "paged", 1.0, 1.0, 1.0).ok


def test_without_torch_or_triton_it_says_which_and_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert verify.main() == UnsupportedError.exit_code == 4
    assert capsys.readouterr().err == (
        "glmplan: The kernels need torch and triton, not installed.\n  next: pip install 'glmplan[kernels]'\n"
    )


@needs_torch
def test_without_a_gpu_the_command_says_so_and_exits_4() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "glmplan.kernels.verify"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("glmplan: No CUDA GPU is visible to PyTorch.\n")
