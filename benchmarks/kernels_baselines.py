"""Which of the engines' own CUDA kernels can be timed beside ours here?

Those of released wheels found on the path: `deep_gemm` (sgl-deep-gemm, which needs apache-tvm-ffi) and `sgl_kernel`
(sglang-kernel; of its folder only sm90/common_ops.abi3.so and flashmla_ops.abi3.so are loaded, so an excerpt will do).
All of them are for Hopper and Blackwell only. What is missing is said in one line, and its column stays empty.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HOPPER_HEADS = 64  # FlashMLA serves 64 or 128 heads; engines pad to that


def deep_gemm() -> ModuleType | None:
    try:
        return importlib.import_module("deep_gemm")
    except ImportError as error:
        print(f"DeepGEMM is left out: {error}.")
        return None


def sgl_kernel(library: str) -> Any | None:
    """torch.ops.sgl_kernel with the operations of one extension module, such as `sm90/common_ops`."""
    found = importlib.util.find_spec("sgl_kernel")
    if found is None or found.origin is None:
        print(f"sgl_kernel ({library}) is left out: No module named 'sgl_kernel'.")
        return None
    try:
        torch.ops.load_library(str(Path(found.origin).parent / f"{library}.abi3.so"))
    except OSError as error:
        print(f"sgl_kernel ({library}) is left out: {error}.")
        return None
    return torch.ops.sgl_kernel


def deep_gemm_paged(module: ModuleType, lengths: torch.Tensor) -> Callable[..., torch.Tensor]:
    """DeepGEMM's paged logits in the order of our arguments; lengths int32 [B, 1].

    Its schedule is made once, as engines do per step, and is not timed.
    """
    schedule = module.get_paged_mqa_logits_metadata(lengths, 64, module.get_num_sms())

    def run(q: Any, pages: Any, weights: Any, _: Any, table: Any, tokens: int, out: Any = None) -> torch.Tensor:
        keys = pages.view(len(pages), 64, 1, 132)
        return module.fp8_paged_mqa_logits(q, keys, weights, lengths, table, schedule, tokens, clean_logits=False)

    return run


def deep_gemm_ragged(module: ModuleType) -> Callable[..., torch.Tensor]:
    def run(q: Any, keys: Any, weights: Any, starts: Any, stops: Any, out: Any = None) -> torch.Tensor:
        key, scale = keys
        fp8 = torch.float8_e4m3fn
        return module.fp8_mqa_logits(q.view(fp8), (key.view(fp8), scale), weights, starts, stops, clean_logits=False)

    return run


def flash_mla(ops: Any, sm_scale: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """FlashMLA's sparse decode over packed rows, heads padded to 64 in the same call, as SGLang does."""
    schedules: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padded = torch.nn.functional.pad(q, (0, 0, 0, HOPPER_HEADS - q.shape[1]))[:, None]
        pages = kv.view(torch.float8_e4m3fn).view(-1, 64, 1, 656)
        known = schedules.get(len(q), (None, None))
        out, lse, *made = ops.sparse_decode_fwd(padded, pages, indices, None, None, *known, None, None, None, 512, sm_scale)
        schedules.setdefault(len(q), tuple(made))
        return out[:, 0, : q.shape[1]], lse

    return run
