"""Another card's code on the GPU at hand: what is compiled, what is refused, and that it is undone. No GPU needed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from glmplan.errors import UnsupportedError, UsageError
from glmplan.kernels import run_as

ROOT = Path(__file__).resolve().parents[2]

COMPILING = """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction
    from glmplan.kernels import run_as

    run_as.device_sm = lambda device=None: 90

    @triton.jit
    def add(source, target, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + offsets, tl.load(source + offsets, mask=offsets < n) + 1.0, mask=offsets < n)

    @triton.jit
    def multiply(source, target, n, BLOCK: tl.constexpr):
        rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for i in range(n):
            page = source + i * BLOCK * BLOCK
            total = tl.dot(tl.load(page + rows * BLOCK + columns), tl.load(page + columns * BLOCK + rows), total)
        tl.store(target + rows * BLOCK + columns, total)

    def compile(kernel, **fixed):
        types = {"source": "*bf16", "target": "*fp32", "n": "i32", "BLOCK": "constexpr"}
        attrs = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
        source = ASTSource(kernel, types, {"BLOCK": fixed.pop("BLOCK")}, attrs)
        return triton.compile(source, target=GPUTarget("cuda", fixed.pop("device", 90), 32), options=fixed)

    def target(kernel):
        # ELF header: bits 8 to 15 of e_flags (offset 48) hold the SM of the machine code in CUDA 12.8's and later cubins.
        ptx = next(line for line in kernel.asm["ptx"].splitlines() if line.startswith(".target")).split()[1].rstrip(",")
        flags = int.from_bytes(kernel.asm["cubin"][48:52], "little")
        return ptx, 90 in (flags & 0xFF, flags >> 8 & 0xFF)
"""


def run(body: str, **environment: str) -> list[str]:
    """Output lines of a fresh process without the interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = textwrap.dedent(COMPILING) + textwrap.dedent(body)
    folder = Path(environment.pop("folder"))
    script = folder / "script.py"
    script.write_text(source)
    inherited |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")} | environment
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=inherited)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ptx_is_the_older_cards_and_machine_code_the_devices(tmp_path: Path) -> None:
    lines = run(
        """
        print(target(compile(add, BLOCK=128)), run_as.target_sm())
        for sm in (89, 80):
            with run_as.as_sm(sm):
                print(target(compile(add, BLOCK=128)), run_as.target_sm())
        print(target(compile(add, BLOCK=128)), run_as.target_sm())
        """,
        folder=str(tmp_path),
    )
    assert lines == ["('sm_90a', True) 90", "('sm_89', True) 89", "('sm_80', True) 80", "('sm_90a', True) 90"]


def test_hopper_instructions_are_gone(tmp_path: Path) -> None:
    lines = run(
        """
        print("wgmma" in compile(multiply, BLOCK=64, num_warps=4).asm["ptx"])
        with run_as.as_sm(89):
            print("wgmma" in compile(multiply, BLOCK=64, num_warps=4).asm["ptx"])
        """,
        folder=str(tmp_path),
    )
    assert lines == ["True", "False"]


def test_shared_memory_is_limited_as_on_the_older_card(tmp_path: Path) -> None:
    """Fits the H200's 227 KiB and the A100's 163 KiB, not the 99 KiB of an Ada card."""
    lines = run(
        """
        print(compile(multiply, BLOCK=128, num_warps=8, num_stages=3).metadata.shared > 101376)
        for sm in (80, 89):
            with run_as.as_sm(sm):
                try:
                    compile(multiply, BLOCK=128, num_warps=8, num_stages=3)
                    print("fits", sm)
                except OutOfResources as error:
                    print(str(error).split(",")[0], error.limit)
        """,
        folder=str(tmp_path),
    )
    assert lines == ["True", "fits 80", "out of resource: shared memory of sm_89 101376"]


def test_launches_are_keyed_by_the_older_card_and_restored(tmp_path: Path) -> None:
    lines = run(
        """
        import os
        from triton import knobs

        JITFunction.run = lambda self, *args, grid, warmup, **kwargs: print(kwargs)
        native = JITFunction.run
        before = knobs.cache.dir
        add[(1,)](1)
        with run_as.as_sm(89):
            add[(1,)](1)
            print(os.environ["TRITON_OVERRIDE_ARCH"], knobs.cache.dir != before)
        add[(1,)](1)
        print(os.environ.get("TRITON_OVERRIDE_ARCH"), knobs.cache.dir == before, JITFunction.run is native)
        """,
        folder=str(tmp_path),
    )
    assert lines == ["{}", "{'arch': 'sm89'}", "sm89 True", "{}", "None True True"]


def test_the_environment_switches_a_fresh_process(tmp_path: Path) -> None:
    body = """
        print(run_as.enable_from_environment(), run_as.enable_from_environment(), run_as.target_sm())
        print(target(compile(add, BLOCK=128))[0])
        """
    assert run(body, folder=str(tmp_path), GLMPLAN_RUN_AS="sm89") == ["89 89 89", "sm_89"]
    assert run(body, folder=str(tmp_path), GLMPLAN_RUN_AS="") == ["None None 90", "sm_90a"]


def test_a_spawned_process_is_switched_without_touching_its_gpu(tmp_path: Path) -> None:
    lines = run(
        """
        import multiprocessing

        def serve():
            run_as.device_sm = None  # whoever asks for the device fails
            print(run_as.enable_from_environment(), run_as.enable_from_environment(), flush=True)
            print(target(compile(add, BLOCK=128))[0], flush=True)

        if __name__ == "__main__":
            print(run_as.active_sm(), flush=True)
            child = multiprocessing.get_context("spawn").Process(target=serve)
            child.start()
            child.join()
            print(child.exitcode)
        """,
        folder=str(tmp_path),
        GLMPLAN_RUN_AS="sm89",
    )
    assert lines == ["None", "89 89", "sm_89", "0"]


def test_children_of_a_switched_process_share_its_cache(tmp_path: Path) -> None:
    lines = run(
        """
        import subprocess
        import sys
        from triton import knobs

        run_as.enable_from_environment()
        print(knobs.cache.dir.endswith("run_as_sm89"))
        ask = "from triton import knobs; from glmplan.kernels import run_as as r; r.enable_from_environment(); "
        child = subprocess.run([sys.executable, "-c", ask + "print(knobs.cache.dir)"], capture_output=True, text=True)
        print(child.stdout.strip() == knobs.cache.dir)
        """,
        folder=str(tmp_path),
        GLMPLAN_RUN_AS="sm89",
    )
    assert lines == ["True", "True"]


def test_the_environment_asks_for_a_newer_card_than_the_gpu(tmp_path: Path) -> None:
    lines = run(
        """
        run_as.enable_from_environment()
        try:
            compile(add, BLOCK=128, device=86)
        except Exception as error:
            print(type(error).__name__, error)
        """,
        folder=str(tmp_path),
        GLMPLAN_RUN_AS="sm89",
    )
    assert lines == ["UsageError This GPU is sm_86 and cannot run code made for the newer sm_89."]


def test_a_script_is_run_under_it_without_knowing(tmp_path: Path) -> None:
    lines = run(
        """
        import sys
        from pathlib import Path

        script = Path(__file__).with_name("inner.py")
        script.write_text("import sys; from glmplan.kernels import run_as; print(run_as.active_sm(), sys.argv[1:])")
        print(run_as.main(["sm_86", str(script), "--small"]))
        """,
        folder=str(tmp_path),
    )
    assert lines == ["86 ['--small']", "0"]


@pytest.mark.parametrize(("text", "sm"), [("sm89", 89), ("sm_80", 80), ("86", 86), (" SM89 ", 89)])
def test_sm_names_are_understood(text: str, sm: int) -> None:
    assert run_as.parse_sm(text) == sm


@pytest.mark.parametrize("text", ["sm90", "ada", "8.9", "sm120", ""])
def test_other_names_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"known are sm80, sm86 and sm89\."):
        run_as.parse_sm(text)


def test_a_gpu_older_than_the_wanted_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(run_as, "device_sm", lambda device=None: 86)
    with pytest.raises(UsageError, match=r"This GPU is sm_86 and cannot run code made for the newer sm_89\."):
        run_as.enable(89)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="TRITON_INTERPRET=1"):
        run_as.enable(89)


def test_a_triton_without_the_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton.knobs, "runtime", object())
    with pytest.raises(UnsupportedError, match="no hook for compiler stages"):
        run_as.enable(89)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="No CUDA GPU"):
        run_as.device_sm()
