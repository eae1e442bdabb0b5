"""How tests get an NVML without a GPU: build the stand-in library and point a subprocess at it.

The real pynvml loads it by name, `libnvidia-ml.so.1`, through LD_LIBRARY_PATH. That variable is read when a process
starts, so the code under test runs in a subprocess. In a facts file `{"error": "NVML_ERROR_..."}` is a refusal, an
absent key is "Not Supported", and the pid "test" is the pid of the calling test.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pynvml

TESTS = Path(__file__).parent
SOURCE = TESTS / "probe" / "fake_nvml.c"
RECORDED = TESTS / "recorded" / "nvml"
LIBRARY = "libnvidia-ml.so.1"
NOT_AVAILABLE = 2**64 - 1

SYSTEM_KEYS = {"source", "init", "driver_version", "nvml_version", "cuda_version", "gpus"}
MEMORY_FIELDS = {"memory": ("total", "free", "used"), "memory_v2": ("total", "reserved", "free", "used")}
GPU_KEYS = {
    *("handle", "name", "uuid", "compute_capability", "mig_mode", "ecc_mode", "nvlinks", "processes", *MEMORY_FIELDS),
    *("pcie_generation", "pcie_generation_max", "pcie_width", "pcie_width_max"),
    *("enforced_power_limit_mw", "clocks_event_reasons", "clocks_throttle_reasons"),
    *("bus_id", "nvlink_remote_types", "nvlink_remote_gpus", "topology", "p2p_read", "p2p_write"),
}


def build(folder: Path) -> Path:
    """Compile the library into `folder` and return its path."""
    library = folder / LIBRARY
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return library


def environment(folder: Path, facts_name: str | Path) -> dict[str, str]:
    """The whole environment of a subprocess whose NVML is the one in `folder`.

    `facts_name` is a file of tests/recorded/nvml without its ending, or the path of any other facts file. The names of
    the calls made are appended to the file that FAKE_NVML_CALLS names, which starts empty.
    """
    source = facts_name if isinstance(facts_name, Path) else RECORDED / f"{facts_name}.json"
    lines = folder / f"{source.stem}.facts"
    lines.write_text(facts_lines(json.loads(source.read_text())))
    calls = folder / f"{source.stem}.calls"
    calls.write_text("")
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(paths),
        "FAKE_NVML_FACTS": str(lines),
        "FAKE_NVML_CALLS": str(calls),
    }


def facts_lines(facts: dict[str, Any]) -> str:
    """The facts as the `key=value` lines that fake_nvml.c reads; a misspelt key is an error."""
    gpus = facts.get("gpus", [])
    system = {key: value for key, value in facts.items() if key not in ("source", "gpus")}
    rows = [("count", str(len(gpus)))]
    rows += [(_known(key, SYSTEM_KEYS), _value(key, value)) for key, value in system.items()]
    for index, gpu in enumerate(gpus):
        rows += [(f"gpu.{index}.{_known(key, GPU_KEYS)}", _value(key, value)) for key, value in gpu.items()]
    return "".join(f"{key}={value}\n" for key, value in rows)


def _known(key: str, known: set[str]) -> str:
    if key not in known:
        raise KeyError(f"{key} is no key of a facts file; known: {', '.join(sorted(known))}")
    return key


def _value(key: str, value: Any) -> str:
    if isinstance(value, dict) and "error" in value:
        return f"!{getattr(pynvml, value['error'])}"
    if key in MEMORY_FIELDS:
        return " ".join(str(value[field]) for field in MEMORY_FIELDS[key])
    if key == "processes":
        return " ".join(f"{_pid(one['pid'])} {_used(one['used_bytes'])}" for one in value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _pid(pid: int | str) -> int:
    return os.getpid() if pid == "test" else int(pid)


def _used(used_bytes: int | None) -> int:
    return NOT_AVAILABLE if used_bytes is None else used_bytes
