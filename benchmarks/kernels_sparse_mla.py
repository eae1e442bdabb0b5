"""How fast is sparse MLA, against the bytes it must gather and beside the engines' portable kernels?

`python benchmarks/kernels_sparse_mla.py [--heads 8] [--baselines FOLDER]`; FOLDER holds triton_sparse_mla.py, its
_decode.py and its _prefill.py of an SGLang release and xpu_mla_sparse.py of a vLLM release, to time beside ours. FlashMLA,
which reads packed rows and pads to 64 heads, is timed where sgl_kernel's library can be loaded (kernels_baselines.py).
`python -m glmplan.kernels.run_as sm89 benchmarks/kernels_sparse_mla.py` times the code of another SM.
Medians over CUDA-graph replays; each launch of a graph has its own queries and indices, drawn from 1,048,576 slots, so
what it gathers is not in the L2 cache. Floor: the rows gathered, over the bandwidth of a plain read in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import kernels_baselines
from glmplan.kernels import run_as
from glmplan.kernels.results import graph_microseconds
from glmplan.kernels.sparse_mla import op, samples

DEVICE, TOPK, SCALE = "cuda", 2048, 0.1
SLOTS = 1_048_576
ROW_BYTES = {"bf16": 1152, "packed": 656, "raw": 576}
AIM_HEADS = 8
AIMS = {("bf16", 1): 9, ("packed", 1): 9, ("bf16", 32): 35, ("packed", 32): 22, ("bf16", 128): 95, ("packed", 128): 65}
PREFILL, PREFILL_AIM = 4096, 1500


def read_bytes_per_us() -> float:
    """A plain read of 554 MB, by torch's sum of each row."""
    data = torch.ones(8192, 16_908, device=DEVICE)
    return 4 * data.numel() / graph_microseconds([lambda: data.sum(1)])


def inputs(rows: int, slots: int, heads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and indices for one graph: together about 300 MB of rows or more, at most 64 sets."""
    count = max(1, min(64, -(-256 // rows)))
    q = samples.queries(count * rows, heads, DEVICE).view(count, rows, heads, 576)
    indices = torch.randint(0, slots, (count, rows, 1, TOPK), dtype=torch.int32, device=DEVICE)
    return [(q[i], indices[i]) for i in range(count)]


def timed(call: Callable[..., Any], sets: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return graph_microseconds([lambda one=one: call(*one) for one in sets], 8)


def baselines(folder: Path | None) -> dict[str, Callable[..., Any]]:
    """Name -> call(q, kv, indices) of the engines' kernels, which see bf16 rows; those that fail to load are left out."""
    if folder is None:
        return {}
    _stand_in("sglang.kernels.ops.attention.metadata", q8kv8_topk_length_from_indices=None)
    _stand_in("sglang.kernels.ops.quantization.fp8_kernel", is_fp8_fnuz=lambda: False)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    _stand_in("sglang.srt.utils", get_device_core_count=lambda *_: count, is_gfx95_supported=lambda: False)
    _stand_in("vllm.triton_utils", LOG2E=1.4426950408889634, LOGE2=0.6931471805599453, tl=triton.language, triton=triton)
    dsa = "sglang.kernels.ops.attention.dsa"
    _load(folder / "triton_sparse_mla.py", f"{dsa}.triton_sparse_mla")
    decode = _load(folder / "triton_sparse_mla_decode.py", f"{dsa}.triton_sparse_mla_decode")
    prefill = _load(folder / "triton_sparse_mla_prefill.py", f"{dsa}.triton_sparse_mla_prefill")
    vllm = _load(folder / "xpu_mla_sparse.py", "vllm.xpu_mla_sparse")

    def split(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> Any:
        return decode.triton_sparse_mla_decode_splitk(q[..., :512], q[..., 512:], kv, indices, SCALE)

    return {
        "SGLang decode": split,
        "SGLang prefill": lambda q, kv, indices: prefill.sparse_mla_prefill(q, kv, indices, SCALE),
        "vLLM": lambda q, kv, indices: vllm.triton_bf16_mla_sparse_interface(q, kv, indices, SCALE),
    }


def _stand_in(name: str, **members: Any) -> None:
    parts = name.split(".")
    for depth in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    for depth in range(1, name.count(".") + 1):
        package = ".".join(name.split(".")[:depth])
        sys.modules.setdefault(package, ModuleType(package))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def line(
    name: str, rows: int, heads: int, layout: str, time: float, rate: float, aim: int | None, beside: dict[str, float]
) -> str:
    moved = rows * TOPK * ROW_BYTES[layout] + rows * heads * 1088 * 2
    operations = 2 * rows * TOPK * heads * 1088
    aim = aim if heads == AIM_HEADS else None
    floor = moved / rate
    others = ", ".join(f"{other} {value:.1f}" for other, value in beside.items())
    return (
        f"| {name} | {layout} | {time:.2f} | {aim or ''} | {moved / 1e6:.1f} MB, {operations / 1e9:.2f} G"
        f" | {floor:.1f} | {time / floor:.2f} | {others} |"
    )


def decode_lines(rate: float, heads: int, others: dict[str, Callable[..., Any]]) -> None:
    for layout in samples.LAYOUTS:
        kv = samples.kv_rows(layout, SLOTS, DEVICE)
        for rows in (1, 8, 32, 128):
            sets = inputs(rows, SLOTS, heads)
            time = timed(lambda q, indices, kv=kv: op.sparse_mla(q, kv, indices, SCALE), sets)
            names = {"bf16": ("SGLang decode", "vLLM"), "packed": ("FlashMLA",)}.get(layout, ())
            calls = {name: others[name] for name in names if name in others}
            beside = {n: timed(lambda q, i, call=c, kv=kv: call(q, kv, i), sets) for n, c in calls.items()}
            aim = AIMS.get((layout, rows))
            print(line(f"decode N={rows}", rows, heads, layout, time, rate, aim, beside), flush=True)


def prefill_lines(rate: float, heads: int, others: dict[str, Callable[..., Any]]) -> None:
    for layout in samples.LAYOUTS:
        for slots in (8192, 131_072, SLOTS):
            kv, sets = samples.kv_rows(layout, slots, DEVICE), inputs(PREFILL, slots, heads)
            time = timed(lambda q, indices, kv=kv: op.sparse_mla(q, kv, indices, SCALE), sets)
            beside = {}
            if layout == "bf16" and slots == 131_072:
                calls = {name: others[name] for name in ("SGLang prefill", "vLLM") if name in others}
                beside = {n: timed(lambda q, i, call=c, kv=kv: call(q, kv, i), sets) for n, c in calls.items()}
            name = f"prefill N={PREFILL}, {slots:,} slots"
            print(line(name, PREFILL, heads, layout, time, rate, PREFILL_AIM, beside), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times sparse MLA on this GPU.")
    parser.add_argument("--baselines", type=Path, default=None)
    parser.add_argument("--heads", type=int, default=AIM_HEADS, help="heads per rank, 1 to 64")
    asked = parser.parse_args()
    torch.manual_seed(1)
    others = baselines(asked.baselines)
    flash_mla = kernels_baselines.sgl_kernel("flashmla_ops")
    if flash_mla is not None:
        others["FlashMLA"] = kernels_baselines.flash_mla(flash_mla, SCALE)
    rate = read_bytes_per_us()
    print(
        f"{torch.cuda.get_device_name()}, kernels for sm_{run_as.target_sm()}, torch {torch.__version__},"
        f" triton {triton.__version__}; plain read {rate / 1e6:.2f} TB/s; {asked.heads} heads, top-k {TOPK}; microseconds"
    )
    print(
        "| case | rows | ours | aim | bytes, operations | floor | ours / floor | beside |\n|---|---|---|---|---|---|---|---|"
    )
    decode_lines(rate, asked.heads, others)
    prefill_lines(rate, asked.heads, others)


if __name__ == "__main__":
    main()
