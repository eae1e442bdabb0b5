"""How does a kernel behave as a card that is not here would run it?

Compiles Triton kernels for an older SM (its instructions, its shared memory) and runs them on the GPU at hand: Triton
lowers for the older SM down to PTX, and ptxas assembles that PTX for the real device. Three ways in:
- `with as_sm(89): ...` in code;
- `GLMPLAN_RUN_AS=sm89` and a call of `enable_from_environment()` in each process, such as an engine's plugin makes;
- `python -m glmplan.kernels.run_as sm89 SCRIPT ARGUMENTS...`, which needs nothing of the script.
What differs from the card itself: clocks, bandwidth, caches, and how ptxas schedules for the real device.
Read in Triton 3.6.0, 3.7.1 and 3.8.0 (third_party/nvidia/backend/compiler.py), all alike: TRITON_OVERRIDE_ARCH reaches
TTIR, TTGIR and LLVM IR, but the PTX and cubin steps take the device's SM; so the PTX step is given the older one here.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmplan.errors import GlmplanError, UnsupportedError, UsageError
from glmplan.kernels.aot import SHARED_LIMIT_BYTES

ENVIRONMENT = "GLMPLAN_RUN_AS"
SMS = (80, 86, 89)

_active: int | None = None


def active_sm() -> int | None:
    """The SM kernels are being compiled for instead of the device's, or None."""
    return _active


def device_sm(device: Any = None) -> int:
    """The SM of the GPU itself, such as 90."""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError("No CUDA GPU is visible to PyTorch.", "Run on a machine with an NVIDIA GPU and its driver.")
    major, minor = torch.cuda.get_device_capability(device)
    return int(major) * 10 + int(minor)


def target_sm(device: Any = None) -> int:
    """The SM kernels are compiled for: what tile tables and fp8 choices must ask instead of the device capability."""
    return _active if _active is not None else device_sm(device)


def parse_sm(text: str) -> int:
    """`sm89`, `sm_89` or `89` -> 89; one of 80, 86, 89."""
    match = re.fullmatch(r"(?:sm_?)?(\d+)", text.strip().lower())
    if not match or int(match.group(1)) not in SMS:
        raise UsageError(f"Cannot run kernels as {text!r}: known are sm80, sm86 and sm89.", "Name one of these.")
    return int(match.group(1))


@contextmanager
def as_sm(sm: int) -> Iterator[None]:
    """Kernels launched inside are compiled for `sm` (80, 86 or 89) and run on the current GPU."""
    undo = enable(sm)
    try:
        yield
    finally:
        undo()


def enable_from_environment() -> int | None:
    """Do as GLMPLAN_RUN_AS says for the rest of this process; returns the SM, None when it is unset.

    For every process an engine starts: the variable reaches all its children, what this does only forked ones. May be called
    again, and before the process has its GPU: it touches none, so forking stays possible and no memory is taken. A GPU older
    than the SM asked for is therefore refused by the first compilation.
    """
    text = os.environ.get(ENVIRONMENT, "")
    if not text or _active is not None:
        return _active
    enable(parse_sm(text), ask_device=False)
    return _active


def enable(sm: int, *, ask_device: bool = True) -> Callable[[], None]:
    """Switch on; returns the function that switches off again. Kernels already compiled natively stay usable after.

    Asking the device creates its CUDA context in this process; without, compiling does.
    """
    global _active
    _refuse(sm)
    if ask_device:
        _refuse_device(sm, device_sm())
    from triton import knobs
    from triton.runtime.jit import JITFunction

    native_run, saved_dir = JITFunction.run, knobs.cache.dir
    saved_hook, saved_arch = knobs.runtime.add_stages_inspection_hook, knobs.runtime.override_arch

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        # `arch` is part of the launch key, so native and older binaries of one kernel live side by side.
        kwargs.setdefault("arch", f"sm{sm}")
        return native_run(self, *args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = run
    knobs.runtime.override_arch = f"sm{sm}"
    knobs.runtime.add_stages_inspection_hook = _stages
    # TRITON_OVERRIDE_ARCH alone makes another binary under the same cache key.
    knobs.cache.dir = str(Path(saved_dir.removesuffix(f"/run_as_sm{sm}"), f"run_as_sm{sm}"))  # children inherit it
    _active = sm

    def undo() -> None:
        global _active
        JITFunction.run = native_run
        knobs.runtime.override_arch = saved_arch
        knobs.runtime.add_stages_inspection_hook = saved_hook
        knobs.cache.dir = saved_dir
        _active = None

    return undo


def _refuse(sm: int) -> None:
    """One sentence for every combination this cannot do."""
    try:
        import triton
    except ImportError as error:
        raise UnsupportedError(
            "Running as another card needs Triton, which is not installed.", "pip install triton"
        ) from error
    if sm not in SMS:
        raise UsageError(f"Cannot run kernels as sm_{sm}: known are sm80, sm86 and sm89.", "Name one of these.")
    if _active is not None:
        raise UsageError(f"Kernels already run as sm_{_active} in this process.", "Leave that first.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 compiles nothing, so nothing can run as another card.", "Unset it.")
    if not hasattr(triton.knobs.runtime, "add_stages_inspection_hook"):
        raise UnsupportedError(
            f"Triton {triton.__version__} has no hook for compiler stages, so kernels cannot run as another card.",
            "Use Triton 3.6 or newer.",
        )


def _refuse_device(sm: int, device: int) -> None:
    if device < sm:
        raise UsageError(
            f"This GPU is sm_{device} and cannot run code made for the newer sm_{sm}.",
            "Choose an older SM, or run natively.",
        )


def _stages(*arguments: Any) -> tuple[str, str] | None:
    """PTX for the older SM, cubin for the device, and the older SM's shared-memory limit.

    Triton passes backend, stages, options, language and capability; from 3.7 on it also calls without arguments for what to
    add to its cache keys.
    """
    if not arguments:
        return (f"run_as_sm{_active}",) * 2
    from triton.runtime.errors import OutOfResources

    backend, stages, options = arguments[:3]
    sm, device = int(options.arch.removeprefix("sm")), backend.target.arch
    _refuse_device(sm, device)
    if sm == device:
        return None

    def make_cubin(source: Any, metadata: dict[str, Any]) -> Any:
        if metadata["shared"] > SHARED_LIMIT_BYTES[sm]:
            raise OutOfResources(metadata["shared"], SHARED_LIMIT_BYTES[sm], f"shared memory of sm_{sm}")
        return backend.make_cubin(source, metadata, options, device)

    stages["ptx"] = lambda source, metadata: backend.make_ptx(source, metadata, options, sm)
    stages["cubin"] = make_cubin
    return None


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print("Usage: python -m glmplan.kernels.run_as sm80|sm86|sm89 SCRIPT [ARGUMENTS...]", file=sys.stderr)
        return 2
    # `python -m` makes this file __main__; the state must live in the module that kernels import.
    from glmplan.kernels import run_as

    try:
        sm = run_as.parse_sm(arguments[0])
        run_as.enable(sm)
    except GlmplanError as error:
        print(f"{error.message} {error.next_step}".strip(), file=sys.stderr)
        return error.exit_code
    os.environ[ENVIRONMENT] = f"sm{sm}"
    sys.argv = arguments[1:]
    sys.path.insert(0, str(Path(arguments[1]).resolve().parent))
    runpy.run_path(arguments[1], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
