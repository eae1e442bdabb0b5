"""Every kernel compiles for every SM, without a GPU, within that SM's limits.

Compiling happens in a process of its own: this one loads kernels for Triton's interpreter.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from glmplan.kernels import aot

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)})


@functools.cache
def compiled(op: str, sm: int) -> list[dict[str, Any]]:
    done = run("-m", "glmplan.kernels.aot", op, str(sm))
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("sm", aot.SMS)
@pytest.mark.parametrize("op", aot.OPS)
def test_every_kernel_fits_every_sm(op: str, sm: int) -> None:
    rows = compiled(op, sm)
    assert rows, f"{op} lists no kernel for sm_{sm}"
    assert {row["name"]: row["problems"] for row in rows if row["problems"]} == {}


def with_(**change: Any) -> aot.Compiled:
    return aot.Compiled(0, 0, 32, "", "")._replace(**change)


@pytest.mark.parametrize(("sm", "limit"), [(80, 166_912), (86, 101_376), (89, 101_376), (90, 101_376), (120, 101_376)])
def test_one_byte_of_shared_memory_too_many_is_a_problem(sm: int, limit: int) -> None:
    assert aot.problems(with_(shared_bytes=limit), sm) == []
    assert aot.problems(with_(shared_bytes=limit + 1), sm) == [f"{limit + 1} bytes of shared memory, limit {limit}"]


def test_spills_are_read_from_the_assembler_log() -> None:
    log = "0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nptxas info : Used 255 registers"
    assert aot.spill_bytes(log) == 20
    assert aot.problems(with_(spill_bytes=20), 89) == ["20 bytes spilled"]


def test_wgmma_is_a_problem_below_sm_90_only() -> None:
    code = with_(ptx="wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 ...")
    assert aot.problems(code, 89) == ["wgmma below sm_90"]
    assert aot.problems(code, 90) == []


def test_fp8_types_are_a_problem_below_sm_89_only() -> None:
    cast = with_(ptx="cvt.rn.satfinite.e4m3x2.f32 %rs1, %f2, %f1;", ttir="tensor<128xf8E4M3FN>")
    dot = with_(ptx="mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32")
    assert aot.problems(cast, 86) == ["fp8 type in ttir below sm_89", "fp8 type in ptx below sm_89"]
    assert aot.problems(dot, 80) == ["fp8 type in ptx below sm_89"]
    assert aot.problems(cast, 89) == aot.problems(dot, 89) == []


def test_names_that_contain_e4m3_are_no_fp8_type() -> None:
    code = with_(ptx='.file 1 "kernels/e4m3.py"', ttir='loc("decode_e4m3"("/kernels/e4m3.py":20:1))')
    assert aot.problems(code, 80) == []


BAD_KERNELS = """
    import triton
    import triton.language as tl
    from glmplan.kernels import aot

    @triton.jit
    def casts(source, target, n, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        values = tl.load(source + offsets, mask=offsets < n)
        tl.store(target + offsets, values.to(tl.float8e4nv).to(tl.float32), mask=offsets < n)

    @triton.jit
    def hoards(source, target, n, BLOCK: tl.constexpr):
        rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        first = tl.load(source + rows * BLOCK + columns)
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for i in range(n):
            total = tl.dot(first, tl.load(source + i * BLOCK * BLOCK + columns * BLOCK + rows), total)
        tl.store(target + rows * BLOCK + columns, total)

    types = {"source": "*fp32", "target": "*fp32", "n": "i32"}
    for sm in (80, 89):
        try:
            aot.compile_case(("casts", casts, types, {"BLOCK": 128}, 1, 1), sm)
            print("compiled", sm)
        except Exception as error:
            print("refused", sm, type(error).__name__)
    big = aot.compile_case(("hoards", hoards, types | {"source": "*fp16"}, {"BLOCK": 256}, 4, 3), 89)
    print(aot.problems(big, 89))
"""


def test_bad_kernels_are_found(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text(textwrap.dedent(BAD_KERNELS))
    lines = run(str(script)).stdout.splitlines()
    assert lines[:2] == ["refused 80 CompilationError", "compiled 89"]
    assert "bytes of shared memory, limit 101376" in lines[2]
    assert "bytes spilled" in lines[2]


def test_interpreted_kernels_are_refused_with_the_reason() -> None:
    from glmplan.errors import UsageError
    from glmplan.kernels.kv_quant import op

    with pytest.raises(UsageError, match="TRITON_INTERPRET=1"):
        aot.compile_case(op.aot_cases(89)[0], 89)


def test_wrong_command_lines_name_the_choices() -> None:
    done = run("-m", "glmplan.kernels.aot", "kv_quantise", "89")
    assert done.returncode == 2
    assert "indexer_logits, topk, sparse_mla, kv_quant" in done.stderr
