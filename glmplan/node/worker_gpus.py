"""The GPUs of a deployment: who else uses them, how much it holds, and whether all of it is free again.

Without a driver there are no readings, and nothing is claimed.
"""

from __future__ import annotations

import os
import time
from typing import Any

from .errors import NodeError
from .gpus import read_gpus
from .procfs import process

FOREIGN_BYTES = 512 << 20
"""A desktop or a monitor holds less on a GPU; a model holds more."""
LEFT_BYTES = 256 << 20
"""By how much memory in use may differ from before the start: the driver's own."""


def _read(gpu_indexes: list[int]) -> tuple[list[dict[str, Any]], str | None]:
    """The driver's view of these GPUs, or why nothing can be said about them."""
    try:
        return (list(read_gpus(gpu_indexes)["gpus"]) if gpu_indexes else []), None
    except NodeError as error:
        return [], error.message


def readings(told: dict[str, Any], pids: set[int]) -> list[dict[str, Any]]:
    """Each GPU's memory, and how much of it these processes hold (None where nothing tells).

    In a container the driver's pids are of another world; there the growth since the start stands in for it.
    """
    before = _before(told)
    return [_reading(gpu, pids, before.get(gpu["index"])) for gpu in _read(told.get("gpu_indexes") or [])[0]]


def _before(told: dict[str, Any]) -> dict[int, int | None]:
    """Bytes in use before the start, by GPU."""
    return {gpu["index"]: gpu.get("in_use_bytes") for gpu in told.get("gpus_before") or ()}


def _reading(gpu: dict[str, Any], pids: set[int], before: int | None) -> dict[str, Any]:
    listed, in_use = gpu.get("processes") or (), gpu.get("memory_in_use_bytes")
    used = [entry.get("used_bytes") for entry in listed if entry["pid"] in pids]
    known = None if None in used else sum(value for value in used if value is not None)
    if pids and not used and before is not None and in_use is not None and not any(_here(entry) for entry in listed):
        known = max(0, in_use - before)
    return {
        "index": gpu["index"], "used_bytes": known, "in_use_bytes": in_use, "total_bytes": gpu.get("memory_total_bytes"),
    }  # fmt: skip


def _here(entry: dict[str, Any]) -> bool:
    """Whether a process that the driver lists is one of this /proc."""
    return os.path.exists(f"/proc/{entry['pid']}")


def require_no_foreign(gpu_indexes: list[int]) -> None:
    """Refuse a GPU on which a process holds more than FOREIGN_BYTES."""
    for gpu in _read(gpu_indexes)[0]:
        for entry in gpu.get("processes") or ():
            if (entry.get("used_bytes") or 0) > FOREIGN_BYTES:
                who = process(entry["pid"])
                raise NodeError(
                    "busy",
                    f"GPU {gpu['index']} is used by pid {entry['pid']} ({who['command'] or 'unknown'}) of "
                    f"{who['owner'] or 'an unknown user'}, which holds {entry['used_bytes'] / 2**30:.1f} GiB.",
                    f"Stop it (`kill {entry['pid']}`), or use other GPUs.",
                )


def after_stop(told: dict[str, Any], pids: set[int], wait_s: float) -> tuple[list[dict[str, Any]], str | None]:
    """The readings once the memory is free, or after `wait_s`; `freed` is None where the driver does not tell. Then why
    there are none, where some were wanted."""
    before = _before(told)
    deadline = time.monotonic() + wait_s
    while True:
        found, problem = _read(told.get("gpu_indexes") or [])
        gpus = [{**_reading(gpu, set(), None), "freed": _freed(gpu, pids, before.get(gpu["index"]))} for gpu in found]
        if all(gpu["freed"] is not False for gpu in gpus) or time.monotonic() > deadline:
            return gpus, problem
        time.sleep(0.25)


def _freed(gpu: dict[str, Any], pids: set[int], before: int | None) -> bool | None:
    """No process of ours is listed, and unless somebody else works there, memory in use is back to what it was."""
    others = gpu.get("processes")
    if others is None:
        return None
    if any(entry["pid"] in pids for entry in others):
        return False
    in_use = gpu.get("memory_in_use_bytes")
    if before is None or in_use is None or any(_here(entry) for entry in others):
        return True
    return bool(in_use <= before + LEFT_BYTES)
