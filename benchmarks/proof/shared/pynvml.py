"""pynvml for a machine that is told to have four GPUs where it has two, so that two ranks of a deployment run on each.

GPUs 0 and 1 are told as they are, and again as 3 and 2: a second node with 2 and 3 has them in the other order. Further GPUs
are not told. What NVML says of a GPU is said of both; what it says of two is asked of the two real ones, also where they are
one. Processes are told apart by the CUDA_VISIBLE_DEVICES that they were started with: that needs pids of this /proc, and
processes that do not write their title over their environment (SPT_NOENV, which glmplan sets). The second UUID has a suffix.
Everything else is the real module's.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

WHOLE = (0, 1, 1, 0)
SECOND = ",".join(map(str, WHOLE[2:]))
"""The CUDA_VISIBLE_DEVICES of a worker on the told GPUs 2 and 3."""


def _real() -> Any:
    """The installed pynvml. It looks for itself among the loaded modules while it is executed."""
    here = Path(__file__).parent
    spec = PathFinder.find_spec("pynvml", [folder for folder in sys.path if Path(folder or ".").resolve() != here])
    if spec is None or spec.loader is None:
        raise ImportError("no pynvml is installed: pip install nvidia-ml-py")
    own, module = sys.modules.get("pynvml"), importlib.util.module_from_spec(spec)
    sys.modules["pynvml"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        if own is None:
            del sys.modules["pynvml"]
        else:
            sys.modules["pynvml"] = own
    return module


class Told:
    """A handle of a told GPU."""

    def __init__(self, index: int) -> None:
        self.second = index >= 2
        self.handle = real.nvmlDeviceGetHandleByIndex(WHOLE[index])


real = _real()


def nvmlDeviceGetCount() -> int:
    found: int = real.nvmlDeviceGetCount()
    if found < 2:
        raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
    return len(WHOLE)


def nvmlDeviceGetHandleByIndex(index: int) -> Told:
    return Told(index)


def nvmlDeviceGetUUID(told: Told) -> str:
    return str(real.nvmlDeviceGetUUID(told.handle)) + ("-again" if told.second else "")


def nvmlDeviceGetComputeRunningProcesses_v3(told: Told) -> list[Any]:
    processes = real.nvmlDeviceGetComputeRunningProcesses_v3(told.handle)
    return [one for one in processes if _is_second(one.pid) == told.second]


def _is_second(pid: int) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"CUDA_VISIBLE_DEVICES={SECOND}".encode() in variables


def __getattr__(name: str) -> Any:
    found = getattr(real, name)
    if not name.startswith("nvmlDevice"):
        return found

    @functools.wraps(found)
    def asked(*arguments: Any) -> Any:
        return found(*(one.handle if isinstance(one, Told) else one for one in arguments))

    return asked
