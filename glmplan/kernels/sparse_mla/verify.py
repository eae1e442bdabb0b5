"""Does sparse MLA read what fp64 says, in every KV format, for one query and for many?

Error: ||out - fp64|| / ||fp64||, infinite when the cosine of any head is below 0.99999 or an empty row is not 0. bf16 output
alone gives about 1.7e-3, and p rounded to bf16 as much again.
"""

from __future__ import annotations

import torch

from glmplan.kernels.results import Result, checked, graph_microseconds
from glmplan.kernels.sparse_mla import op, reference, samples

LIMIT, COSINE_LIMIT = 5e-3, 1e-5
SLOTS, TOPK, HEADS, SCALE = 65_536, 2048, 8, 0.1


def cases(device: torch.device) -> list[Result]:
    """Three formats x (one query, 33, and 8 heads or 16); times are for rows the L2 cache may hold."""
    results = []
    for layout in samples.LAYOUTS:
        kv = samples.kv_rows(layout, SLOTS, device)
        for rows, heads in ((1, HEADS), (33, HEADS), (7, 16)):
            q = samples.queries(rows, heads, device)
            indices = torch.randint(-1, SLOTS, (rows, 1, TOPK), device=device, dtype=torch.int32)
            indices[0, 0, ::9] = SLOTS + 7
            results.append(_check(f"{layout} N={rows} H={heads}", q, kv, indices))
    return results


def _check(name: str, q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> Result:
    out = torch.full((*q.shape[:2], 512), torch.nan, dtype=q.dtype, device=q.device)
    _, lse = op.sparse_mla(q, kv, indices, SCALE, out=out)
    want = reference.sparse_mla(q, kv, indices, SCALE)
    relative, off_cosine, _ = samples.errors(out, lse, *want)
    time = graph_microseconds([lambda: op.sparse_mla(q, kv, indices, SCALE, out=out)])
    return checked("sparse_mla", name, relative if off_cosine <= COSINE_LIMIT else torch.inf, LIMIT, time)
