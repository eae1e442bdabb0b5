"""How long does top-k take beside torch.topk? Run as `python -m benchmarks.kernels_topk`, on an otherwise idle GPU.

Medians in microseconds by CUDA events over CUDA-graph replays; each graph walks through enough fresh random buffers
to exceed any L2 (96 MB), so inputs come from memory. `GLMPLAN_RUN_AS=sm89` (or sm80) compiles as that card would.
Bytes: every logit read twice (once from memory, once from L2), 2048 slots written, 2048 page entries read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from glmplan.kernels.run_as import active_sm, enable_from_environment
from glmplan.kernels.topk.op import K_MAX, topk_paged

ROTATE_BYTES = 96 * 2**20
CASES = ((1, 4096, None), (1, 131_072, 12), (1, 1_048_576, 30), (32, 131_072, 35), (128, 131_072, None))


def timed(calls: list[Callable[[], object]], repeats: int = 30) -> float:
    """Median microseconds of one call, all of them in one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def one_case(rows: int, width: int) -> dict[str, float]:
    count = max(2, -(-ROTATE_BYTES // (rows * width * 4)))
    count = min(count, 256)
    inputs = [torch.randn(rows, width, device="cuda") for _ in range(count)]
    lengths = torch.full((rows,), width, dtype=torch.int32, device="cuda")
    pages = -(-width // 64)
    table = torch.randperm(rows * pages, device="cuda").to(torch.int32).view(rows, pages)
    out = torch.empty(rows, K_MAX, dtype=torch.int32, device="cuda")
    ours = timed([lambda x=x: topk_paged(x, lengths, table, out=out) for x in inputs])
    again = timed([lambda x=x: topk_paged(x, lengths, table, out=out) for x in inputs])
    native = timed([lambda x=x: torch.topk(x, K_MAX, sorted=False) for x in inputs])
    read = timed([lambda x=x: torch.amax(x) for x in inputs])
    return {"topk_paged": ours, "again": again, "torch.topk": native, "amax (one read)": read}


def main() -> int:
    enable_from_environment()
    torch.manual_seed(0)
    name = (
        f"{torch.cuda.get_device_name()}, {f'as sm_{active_sm()}' if active_sm() else 'native'}, torch {torch.__version__}"
    )
    print(name)
    results = []
    for rows, width, aim in CASES:
        times = one_case(rows, width)
        floor = rows * width * 4 / 4.3e6
        results.append({"rows": rows, "width": width, "aim": aim, "floor": round(floor, 2)} | times)
        print(
            f"B={rows:<4} L={width:<8} aim {aim or '-':>4}  floor {floor:6.1f}  "
            + "  ".join(f"{key} {value:7.2f}" for key, value in times.items())
        )
    if "--json" in sys.argv:
        print(json.dumps({"device": name, "cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
