"""Which tile sizes do SGLang's fused experts use on this GPU? Those of the tables in SGLANG_MOE_CONFIG_DIR, where it is set.

The engine looks for `configs/triton_X_Y_Z/E=..,N=..,device_name=..,dtype=fp8_w8a8,block_shape=[128, 128].json`: E experts on
one rank, each N wide there; for the second of the two GEMMs with `_down`. Both share BLOCK_SIZE_M. In that folder it finds
nothing of its own, so the hook here gives it its own tables for the shapes that the folder lacks, and tells on stderr which
tables are in use. Another Triton's table serves where this one's is missing.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from glmplan.errors import UsageError
from glmplan.kernels.engines import MOE_DIR
from glmplan.kernels.engines.process import say
from glmplan.kernels.engines.sglang_tables import BLOCK, USED, read_table

CONFIGS = "configs"
LOOKUP = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config"
NAME = re.compile(r"E=(\d+),N=(\d+),device_name=([^,/\x00-\x1f]+),dtype=fp8_w8a8,block_shape=\[128, 128\](_down)?\.json")
SORTABLE = re.compile(r"triton_\d+(_\d+)*")
PLACE = re.compile(rf"{CONFIGS}/triton_[0-9a-z_+]+/{NAME.pattern}")
"""A table below the folder, as tuned tables travel."""


def file_name(experts: int, n: int, device_name: str, down: bool = False) -> str:
    """What the engine looks up for experts of width n in blocks of 128 x 128."""
    device = device_name.replace(" ", "_")
    suffix = "_down" if down else ""
    return f"E={experts},N={n},device_name={device},dtype=fp8_w8a8,block_shape=[{BLOCK}, {BLOCK}]{suffix}.json"


def down_of(name: str) -> str:
    """The second GEMM's table beside the first one's."""
    return f"{name.removesuffix('.json')}_down.json"


def version_folder(triton_version: str) -> str:
    """configs/triton_3_8_0: where the engine looks with this Triton first."""
    return f"{CONFIGS}/triton_{triton_version.replace('.', '_')}"


def folder() -> Path | None:
    """SGLANG_MOE_CONFIG_DIR, or None when it is unset or empty."""
    text = os.environ.get(MOE_DIR, "").strip()
    return Path(text) if text else None


def require_readable() -> None:
    """Every block-FP8 table below the folder is well-formed, AMD GPUs' apart, which have words of their own; raises naming
    the file that is not, or the folder whose name the engine cannot sort (it would end in a traceback)."""
    where = folder()
    if where is None:
        return
    if not (where / CONFIGS).is_dir():
        raise UsageError(
            f"{MOE_DIR} is {where}, which has no folder {CONFIGS}.",
            f"Name the folder that glmplan tune wrote, or unset {MOE_DIR}.",
        )
    for path in sorted((where / CONFIGS).glob("triton_*")):
        if not SORTABLE.fullmatch(path.name) and path.name != _own_folder():
            raise UsageError(
                f"{path} is not named as a version of Triton: triton_3_8_0.", "Rename it, or move it elsewhere."
            )
    for path in sorted((where / CONFIGS).glob("triton_*/*.json")):
        name = NAME.fullmatch(path.name)
        if name and not name[3].startswith("AMD"):
            read_table(path, tma=True)


def _own_folder() -> str:
    import triton

    return version_folder(triton.__version__).removeprefix(f"{CONFIGS}/")


def moe_configs(
    original: Callable[..., Any], E: int, N: int, dtype: str | None, block_n: int | None = 0, block_k: int | None = 0,
    per_channel_quant: bool = False, down_moe: bool = False,
) -> Any:  # fmt: skip
    """The engine's lookup; the engine's own tables serve the shapes that the folder does not have."""
    return _looked_up(original, E, N, dtype, block_n, block_k, per_channel_quant, down_moe)


@functools.cache
def _looked_up(original: Callable[..., Any], *wanted: Any) -> Any:
    *shape, down = wanted
    found = find(*shape, down)
    if found is None and not (down and find(*shape, False)):
        with _without_folder():
            return original(*wanted)
    table = original(*wanted)
    if table is not None and found is not None:
        say(f"{USED}{found}")
    return table


def find(E: int, N: int, dtype: str | None, block_n: int, block_k: int, per_channel_quant: bool, down: bool) -> Path | None:
    """The file that the engine would take from the folder: this Triton's, else the newest other one's."""
    where = folder()
    if where is None:
        return None
    import triton

    lookup: Any = import_module(LOOKUP)
    name = lookup.get_config_file_name(E, N, dtype, [block_n, block_k], per_channel_quant, down_moe=down)
    exact = where / version_folder(triton.__version__) / name
    others = sorted((where / CONFIGS).glob("triton_*"), key=_version, reverse=True)
    return next((path for path in (exact, *(other / name for other in others)) if path.exists()), None)


def _version(path: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", path.name)))


@contextmanager
def _without_folder() -> Iterator[None]:
    kept = os.environ.pop(MOE_DIR, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[MOE_DIR] = kept
