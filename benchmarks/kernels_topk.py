"""How long does top-k take beside sgl_kernel's and torch.topk? `python benchmarks/kernels_topk.py [--json]`, on an idle GPU.

Medians in microseconds by CUDA events over CUDA-graph replays; each graph walks through enough fresh random buffers
to exceed any L2 (96 MB), so inputs come from memory. `python -m glmplan.kernels.run_as sm89 benchmarks/kernels_topk.py`
compiles as that card would. sgl_kernel is `fast_topk_transform_fused`, whose page table has one entry per token; it is
timed where it can be loaded (kernels_baselines.py). torch.topk maps no pages.
Bytes: every logit read twice (once from memory, once from L2), 2048 slots written, 2048 page entries read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import kernels_baselines
from glmplan.kernels.results import graph_microseconds
from glmplan.kernels.run_as import active_sm, enable_from_environment
from glmplan.kernels.topk.op import K_MAX, topk_paged

ROTATE_BYTES = 96 * 2**20
REPLAYS = 30
CASES = ((1, 4096, None), (1, 131_072, 12), (1, 1_048_576, 30), (32, 131_072, 35), (128, 131_072, None))


def one_case(rows: int, width: int, beside: Any | None) -> dict[str, float]:
    count = min(256, max(2, -(-ROTATE_BYTES // (rows * width * 4))))
    inputs = [torch.randn(rows, width, device="cuda") for _ in range(count)]
    lengths = torch.full((rows,), width, dtype=torch.int32, device="cuda")
    pages = -(-width // 64)
    table = torch.randperm(rows * pages, device="cuda").to(torch.int32).view(rows, pages)
    out = torch.empty(rows, K_MAX, dtype=torch.int32, device="cuda")
    calls: dict[str, Callable[[torch.Tensor], object]] = {"topk_paged": lambda x: topk_paged(x, lengths, table, out=out)}
    if beside is not None:
        slots = torch.randperm(rows * width, device="cuda").to(torch.int32).view(rows, width)
        first = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        calls["sgl_kernel"] = lambda x: beside.fast_topk_transform_fused(x, lengths, out, slots, first, None)
    calls["torch.topk"] = lambda x: torch.topk(x, K_MAX, sorted=False)
    calls["amax (one read)"] = lambda x: torch.amax(x)
    return {
        name: graph_microseconds([lambda x=x, call=call: call(x) for x in inputs], REPLAYS) for name, call in calls.items()
    }


def main() -> int:
    enable_from_environment()
    torch.manual_seed(0)
    beside = kernels_baselines.sgl_kernel("sm90/common_ops")
    name = (
        f"{torch.cuda.get_device_name()}, {f'as sm_{active_sm()}' if active_sm() else 'native'}, torch {torch.__version__}"
    )
    print(name)
    results = []
    for rows, width, aim in CASES:
        times = one_case(rows, width, beside)
        floor = rows * width * 4 / 4.3e6
        results.append({"rows": rows, "width": width, "aim": aim, "floor": round(floor, 2)} | times)
        columns = "  ".join(f"{key} {value:7.2f}" for key, value in times.items())
        print(f"B={rows:<4} L={width:<8} aim {aim or '-':>4}  floor {floor:6.1f}  {columns}", flush=True)
    if "--json" in sys.argv:
        print(json.dumps({"device": name, "cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
