"""What checking one kernel on a GPU gave, and how long it took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One line of `python -m glmplan.kernels.verify`; `limit` is the error up to which `ok` holds."""

    op: str
    format: str
    error: float
    limit: float
    microseconds: float
    ok: bool


def checked(op: str, form: str, error: float, limit: float, microseconds: float) -> Result:
    """A result whose verdict follows from its error; NaN never passes."""
    return Result(op, form, error, limit, microseconds, error <= limit)


def graph_microseconds(launches: Sequence[Callable[[], object]], replays: int = 20, least: int = 16) -> float:
    """Median time of one launch, by CUDA events over replays of a graph that holds all of them in order.

    Give launches over different buffers, larger together than the L2 cache, to time device memory and not the cache.
    Fewer than `least` are repeated in the graph, so that starting it (some 8 microseconds) does not count.
    """
    import torch

    launches = list(launches) * (-(-least // len(launches)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000.0 / len(launches))
    return float(statistics.median(times[2:]))
