"""Does a kernel compile for an SM that is not here, and does it fit there?

Compiles with Triton for a named SM without any GPU and checks shared memory, register spills and forbidden instructions.
Spills are read from the log of Triton's own ptxas call, whose options differ by version (3.7 added --regAllocOptLevel=2).
Sizes are bytes. Limits per block: CUDA C++ programming guide,
"technical specifications per compute capability" (maximum per block less the 1 KiB the system keeps is already taken off).
`python -m glmplan.kernels.aot OP SM` prints one JSON list for one operation.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any, NamedTuple

from glmplan.errors import UnsupportedError, UsageError

OPS = ("indexer_logits", "topk", "sparse_mla", "kv_quant")
SMS = (80, 86, 89, 90, 120)
# Every SM but 80 is held to the smallest of them, so that one tile table serves them all.
SHARED_LIMIT_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 101_376, 120: 101_376}
FP8_SM = 89


class AotCase(NamedTuple):
    """One kernel with fixed types: what `aot_cases(sm)` of an operation lists; a plain tuple of these is as good.

    `signature`: argument name -> Triton type, such as `*bf16`, `i32`, `i64`, `fp32`; `i32:16` says the value is a
    multiple of 16. Pointers count as aligned to 16 bytes, as torch's are; `*u8:1` says that this one is not.
    `constexprs`: argument name -> value; an integer argument the launcher specialises to 1 belongs here.
    `maxnreg`: registers a thread may have, where the launcher says so.
    """

    name: str
    jit_fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


class Compiled(NamedTuple):
    """What compiling one kernel for one SM gave."""

    shared_bytes: int
    spill_bytes: int
    registers: int
    ptx: str
    ttir: str


def compile_case(case: AotCase | tuple[Any, ...], sm: int) -> Compiled:
    """Compile `case` for `sm` with Triton, down to machine code; no GPU is touched."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = AotCase(*case)
    if not isinstance(case.jit_fn, triton.runtime.jit.JITFunction):
        raise UsageError(
            "Kernels were loaded for Triton's interpreter (TRITON_INTERPRET=1), which cannot compile ahead of time.",
            "Compile in a process of its own without TRITON_INTERPRET.",
        )
    types, attrs = _typed(case)
    source = ASTSource(case.jit_fn, types, dict(case.constexprs), attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a cached kernel has no log
        kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    if not registers:
        raise UnsupportedError(f"Triton {triton.__version__} printed no assembler log, so spills cannot be counted.")
    asm = kernel.asm
    return Compiled(kernel.metadata.shared, spill_bytes(log.getvalue()), max(map(int, registers)), asm["ptx"], asm["ttir"])


def _typed(case: AotCase) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    names = case.jit_fn.arg_names
    unknown = sorted((set(case.signature) | set(case.constexprs)) - set(names))
    missing = sorted(set(names) - set(case.signature) - set(case.constexprs))
    if unknown or missing:
        raise UsageError(f"AOT case {case.name}: arguments unknown to the kernel {unknown}, not given {missing}.")
    types: dict[str, str] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(names):
        kind, _, divisor = case.signature.get(name, "constexpr").partition(":")
        types[name] = "constexpr" if name in case.constexprs else kind
        aligned = divisor == "16" or (kind.startswith("*") and not divisor)
        if aligned and types[name] != "constexpr":
            attrs[(position,)] = [["tt.divisibility", 16]]
    return types, attrs


def spill_bytes(ptxas_log: str) -> int:
    """Bytes spilled (stores plus loads) in a `ptxas -v` log."""
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas_log)))


def check_shared(compiled: Compiled, sm: int) -> list[str]:
    limit = SHARED_LIMIT_BYTES[sm]
    return [f"{compiled.shared_bytes} bytes of shared memory, limit {limit}"] if compiled.shared_bytes > limit else []


def check_spills(compiled: Compiled) -> list[str]:
    return [f"{compiled.spill_bytes} bytes spilled"] if compiled.spill_bytes else []


def check_wgmma(compiled: Compiled, sm: int) -> list[str]:
    return ["wgmma below sm_90"] if sm < 90 and "wgmma" in compiled.ptx else []


def check_fp8(compiled: Compiled, sm: int) -> list[str]:
    """e4m3 as a type: `f8E4M3FN` in Triton's IR, `.e4m3` in PTX; file and function names containing e4m3 are no use."""
    if sm >= FP8_SM:
        return []
    found = ["ttir"] if re.search(r"f8E[45]M[23]", compiled.ttir) else []
    found += ["ptx"] if re.search(r"\.e[45]m[23](?:x2)?\b(?!\.py)", compiled.ptx) else []
    return [f"fp8 type in {where} below sm_89" for where in found]


def problems(compiled: Compiled, sm: int) -> list[str]:
    """Everything that would keep this kernel from being used on that SM; empty when nothing."""
    return check_shared(compiled, sm) + check_spills(compiled) + check_wgmma(compiled, sm) + check_fp8(compiled, sm)


def compile_op(op: str, sm: int) -> list[dict[str, Any]]:
    """Compile every kernel of one operation for one SM: name, sizes and problems of each."""
    module = importlib.import_module(f"glmplan.kernels.{op}.op")
    rows = []
    for case in (AotCase(*fields) for fields in module.aot_cases(sm)):
        row: dict[str, Any] = {"name": case.name, "sm": sm}
        try:
            compiled = compile_case(case, sm)
        except Exception as error:  # any compiler failure is this kernel's finding, not the end of the list
            rows.append(row | {"problems": [f"{type(error).__name__}: {error}"]})
            continue
        sizes = {"shared_bytes": compiled.shared_bytes, "spill_bytes": compiled.spill_bytes, "registers": compiled.registers}
        rows.append(row | sizes | {"problems": problems(compiled, sm)})
    return rows


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in OPS or not arguments[1].isdigit():
        print(f"Usage: python -m glmplan.kernels.aot OP SM, with OP of {', '.join(OPS)} and SM of {SMS}.", file=sys.stderr)
        return 2
    rows = compile_op(arguments[0], int(arguments[1]))
    print(json.dumps(rows, indent=1))
    return 1 if any(row["problems"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
