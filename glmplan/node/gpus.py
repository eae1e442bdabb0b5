"""The GPUs of this host: through pynvml where some Python here has it, else through nvidia-smi."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from . import nvidia_smi, nvml
from .errors import NodeError


def read_gpus(
    indexes: Sequence[int] | None = None, peers: bool = False, site_packages: Iterable[str] = ()
) -> dict[str, Any]:
    """The driver's versions and every GPU (or those of `indexes`), each with its memory in bytes and its processes.

    Raises NodeError: `no-driver`, `driver-mismatch`, `gpu-lost`, `gpu-unreadable`, `no-such-gpu` or `nvml`.
    """
    found = read_readable(indexes, peers, site_packages)
    if found["problems"]:
        raise found["problems"][0]
    return found


def read_readable(
    indexes: Sequence[int] | None = None, peers: bool = False, site_packages: Iterable[str] = ()
) -> dict[str, Any]:
    """As `read_gpus`, but a GPU that cannot be read becomes an entry of `problems` and does not hide the others."""
    module = _pynvml(site_packages)
    found = nvml.read(module, indexes, peers) if module else nvidia_smi.read(indexes, peers)
    missing = sorted(set(indexes or ()) - set(range(found["count"])))
    if missing:
        raise NodeError(
            "no-such-gpu",
            f"There is no GPU {missing[0]} on this machine; it has GPUs 0 to {found['count'] - 1}.",
            "Name GPUs that it has, or the whole machine.",
        )
    return found


def _pynvml(site_packages: Iterable[str]) -> ModuleType | None:
    """This Python's pynvml, or the one that an engine's environment brings: one file without dependencies."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        pass
    for folder in site_packages:
        path = os.path.join(folder, "pynvml.py")
        module = _load(path) if os.path.isfile(path) else None
        if module is not None:
            return module
    return None


def _load(path: str) -> ModuleType | None:
    """pynvml from a file; it looks for itself among the loaded modules while it is executed."""
    try:
        spec = importlib.util.spec_from_file_location("pynvml", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["pynvml"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception:  # written for another Python: whatever it raises, the next way is tried
        sys.modules.pop("pynvml", None)
        return None
    return module
