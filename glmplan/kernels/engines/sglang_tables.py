"""Which tile sizes does SGLang's block-FP8 GEMM use on this GPU? Those of the tables in GLMPLAN_TUNED_DIR, where there are
any.

The engine looks only inside its own package, whose file names are kept: `N=..,K=..,device_name=..,dtype=fp8_w8a8,
block_shape=[128, 128].json`, a dictionary from M to tile sizes, of which the nearest M is used. Tables of experts are in
`sglang_expert_tables`. A folder with a table that cannot be read is refused before anything is served.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glmplan.errors import UsageError
from glmplan.kernels.engines import TUNED_DIR
from glmplan.kernels.engines.process import say

Config = dict[str, int]
Table = dict[int, Config]
BLOCK = 128
USED = "glmplan tables: "
NAME = re.compile(r"N=(\d+),K=(\d+),device_name=([^,/\x00-\x1f]+),dtype=fp8_w8a8,block_shape=\[128, 128\]\.json")
ALLOWED = {
    "BLOCK_SIZE_M": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_N": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_K": (32, 64, 128, 256),
    "GROUP_SIZE_M": (1, 4, 8, 16, 32, 64),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
}


def whole(text: str) -> int:
    """A number from 1 to 999,999,999 in decimal digits; 0 for any other text."""
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def folder() -> Path | None:
    """GLMPLAN_TUNED_DIR, or None when it is unset or empty."""
    text = os.environ.get(TUNED_DIR, "").strip()
    return Path(text) if text else None


def file_name(n: int, k: int, device_name: str) -> str:
    """What the engine looks up for a weight [n, k] in blocks of 128 x 128."""
    return f"N={n},K={k},device_name={device_name.replace(' ', '_')},dtype=fp8_w8a8,block_shape=[{BLOCK}, {BLOCK}].json"


def require_readable() -> None:
    """Every table in the folder is well-formed; raises naming the file that is not."""
    where = folder()
    if where is None:
        return
    if not where.is_dir():
        raise UsageError(
            f"{TUNED_DIR} is {where}, which is not a folder.", f"Name a folder of tables, or unset {TUNED_DIR}."
        )
    for path in sorted(where.glob("*.json")):
        if not NAME.fullmatch(path.name):
            raise UsageError(
                f"{path} is not named as a block-FP8 table: {file_name(512, 1024, 'GPU')}.", "Move it elsewhere."
            )
        read_table(path)


def read_table(path: Path, tma: bool = False) -> Table:
    """M -> tile sizes; raises UsageError with the file's name and what is wrong in it. `tma`: USE_TMA may be there, too."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"The tuned table {path} cannot be read: {error}.", _remake()) from error
    if not isinstance(raw, dict) or not raw:
        raise UsageError(f"The tuned table {path} is not a dictionary from M to tile sizes.", _remake())
    return {_row_count(path, text): _config(path, text, value, tma) for text, value in raw.items()}


def block_fp8_configs(original: Callable[..., Any], N: int, K: int, block_n: int, block_k: int) -> Table | None:
    """The engine's lookup; its own tables serve the shapes that the folder does not have."""
    import torch

    if torch._dynamo.is_compiling():
        return None
    table = tuned(N, K, _device_name()) if (block_n, block_k) == (BLOCK, BLOCK) else None
    return table if table is not None else original(N, K, block_n, block_k)


@functools.cache
def tuned(n: int, k: int, device_name: str) -> Table | None:
    """The table of this shape and GPU in the folder, None where there is none."""
    where = folder()
    path = where / file_name(n, k, device_name) if where else None
    if path is None or not path.exists():
        return None
    say(f"{USED}{path}")
    return read_table(path)


def allowed(config: object) -> bool:
    """Whether these tile sizes can stand in a table."""
    return (
        isinstance(config, Mapping)
        and set(config) == set(ALLOWED)
        and all(type(config[name]) is int and config[name] in values for name, values in ALLOWED.items())
    )


def _device_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def _row_count(path: Path, text: str) -> int:
    if not whole(text):
        raise UsageError(f"The tuned table {path} has the key {text!r}; keys are numbers of rows, 1 or more.", _remake())
    return whole(text)


def _config(path: Path, text: str, value: object, tma: bool) -> Config:
    extra = {"USE_TMA"} if tma and isinstance(value, Mapping) and type(value.get("USE_TMA")) is bool else set()
    if not isinstance(value, Mapping) or set(value) - extra != set(ALLOWED):
        raise UsageError(f"The tuned table {path} has for M={text} not exactly {', '.join(ALLOWED)}.", _remake())
    for name, allowed in ALLOWED.items():
        if type(value[name]) is not int or value[name] not in allowed:
            known = ", ".join(map(str, allowed))
            raise UsageError(
                f"The tuned table {path} has {name}={value[name]!r} for M={text}; known are {known}.", _remake()
            )
    return dict(value)


def _remake() -> str:
    return "Make it again with glmplan tune, or remove it."
