"""What both tuners of SGLang share: the events they print, tiles and their variations, whole files, the engine's version."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Container, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from glmplan.errors import UnsupportedError, UsageError
from glmplan.kernels.engines.sglang_tables import Config, whole
from glmplan.kernels.engines.sglang_versions import VERSIONS

TP_SIZES = (1, 2, 4, 8, 16)
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
FINALISTS = 3
AGREEMENT = 2e-2
"""Largest difference to the default's result that is allowed, over the largest result: bf16 sums in another order."""


class Event(NamedTuple):
    """One step: `shape` before a shape, `rows` after one M of it, `kept` for a shape that is there already, `done` after a
    shape. `experts` is None for a GEMM; for experts n is the width of each on one rank, k the hidden size. `row_count` is
    how many M there are, `partial` the file with those that are done."""

    kind: str
    shape: str
    n: int
    k: int
    step: int
    steps: int
    rows: int | None = None
    default_us: float | None = None
    tuned_us: float | None = None
    config: Config | None = None
    file: str | None = None
    experts: int | None = None
    down_config: Config | None = None
    partial: str | None = None
    row_count: int | None = None


def tile(m: int, n: int, k: int, warps: int) -> Config:
    """Three stages and no grouping, from which the others are varied."""
    return {
        "BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": 1, "num_warps": warps, "num_stages": 3,
    }  # fmt: skip


def shared_need(config: Config) -> int:
    """Bytes of shared memory for the FP8 tiles under way."""
    size = (config["BLOCK_SIZE_M"] + config["BLOCK_SIZE_N"]) * config["BLOCK_SIZE_K"]
    return size * max(config["num_stages"] - 1, 1)


def variations(config: Config, shared_bytes: int, quick: bool = False) -> tuple[Config, ...]:
    """The same tile with other stages and groupings."""
    stages = (2, 4) if quick else (2, 3, 4, 5)
    groups = (1,) if quick else (1, 32)
    others = [config | {"num_stages": count, "GROUP_SIZE_M": group} for count, group in product(stages, groups)]
    return tuple(other for other in others if other != config and shared_need(other) <= shared_bytes)


def write_whole(path: Path, content: object) -> None:
    """The file appears with all of its content or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tune-")
    with os.fdopen(handle, "w") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def written(table: Mapping[int, Config]) -> dict[str, Config]:
    """As the engine reads it, rows in order."""
    return {str(rows): table[rows] for rows in sorted(table)}


def gain(default_us: float, tuned_us: float, quick: bool) -> dict[str, Any]:
    """What is recorded of one number of rows."""
    return {"default_us": round(default_us, 2), "tuned_us": round(tuned_us, 2), **({"search": "quick"} if quick else {})}


def earlier_gains(path: Path) -> dict[str, Any]:
    """What earlier runs recorded, by number of rows; nothing where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())["gains"]
        return {count: one for count, one in found.items() if whole(count) and isinstance(one, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def missing_rows(rows: Sequence[int], there: Container[int], gains: Mapping[str, Any], quick: bool) -> list[int]:
    """Those that no table has yet, and for a full search those that were searched quickly."""
    rough = set() if quick else {int(count) for count, one in gains.items() if one.get("search") == "quick"}
    return [count for count in rows if count not in there or count in rough]


def engine_version() -> str:
    """SGLang's version in this environment; refused when it is not one that is known."""
    try:
        from sglang.version import __version__
    except ImportError as error:
        raise UnsupportedError("SGLang is not installed here.", "Tune in the environment that serves.") from error
    if __version__ not in VERSIONS:
        raise UnsupportedError(f"SGLang {__version__} is not known; known are {' and '.join(VERSIONS)}.")
    return str(__version__)


def require_tp_size(tp_size: int) -> None:
    """GLM-5.2's FP8 blocks of 128 limit how far its weights can be cut."""
    if tp_size not in TP_SIZES:
        raise UsageError(f"TP size is {tp_size}; GLM-5.2's FP8 blocks allow {', '.join(map(str, TP_SIZES))}.")


def parse_rows(text: str) -> tuple[int, ...]:
    """Numbers of rows in order, each once."""
    found = set(map(whole, text.split(",")))
    if 0 in found:
        raise UsageError(f"{text[:80]!r} are not row counts; write them as 1,16,256.")
    return tuple(sorted(found))


def require_gpu() -> Any:
    """The properties of the GPU of this process."""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError("No CUDA GPU is visible to PyTorch.", "Tune on a machine with the GPU to tune for.")
    if torch.cuda.get_device_capability() < (8, 9):
        raise UnsupportedError("The engine's FP8 kernels need sm_89 or newer; older GPUs use other weight kernels.")
    return torch.cuda.get_device_properties(torch.cuda.current_device())


def setting(properties: Any, version: str) -> dict[str, str]:
    """On what it was measured."""
    import torch
    import triton

    return {"gpu": properties.name, "sglang": version, "torch": torch.__version__, "triton": triton.__version__}
