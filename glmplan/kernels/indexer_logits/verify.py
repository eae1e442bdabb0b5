"""Are the indexer logits right on this GPU? The cases that `python -m glmplan.kernels.verify` prints for this op.

Outputs start as NaN, so an entry that was not written cannot pass; entries outside a row must be exactly -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from glmplan.kernels.indexer_logits import reference, samples
from glmplan.kernels.indexer_logits.op import paged_logits, ragged_logits
from glmplan.kernels.results import Result, checked, graph_microseconds

LIMIT = 1e-6


def cases(device: Any) -> list[Result]:
    torch.manual_seed(11)
    return [*_paged(device), *_ragged(device)]


def _paged(device: Any) -> list[Result]:
    shapes: list[tuple[str, dict[str, Any]]] = [
        ("paged B=1 4,096 tokens", {"lengths": [4096]}),
        ("paged B=1 131,072 tokens", {"lengths": [131_072]}),
        ("paged B=7 mixed", {"lengths": [1, 0, 64, 5000, 65, 20_001, 2048]}),
        ("paged B=3 next_n=2", {"lengths": [3000, 2, 777], "next_n": 2}),
        ("paged B=3 next_n=4 per token", {"lengths": [3000, 5, 777], "next_n": 4, "per_token": True}),
        ("paged B=2 next_n=6", {"lengths": [1300, 77], "next_n": 6}),
        ("paged B=150 mixed", {"lengths": [1 + 37 * i % 1000 for i in range(150)]}),
    ]
    return [_paged_case(name, samples.paged(device=device, **options), max(options["lengths"])) for name, options in shapes]


def _paged_case(name: str, case: samples.Paged, max_len: int) -> Result:
    rows = case.q.shape[0] * case.q.shape[1]
    want, scale = reference.paged_logits_reference(*case, max_len)
    out = _nan(rows, max_len, case.q.device)
    return _judge(name, lambda: paged_logits(*case, max_len, clean_logits=True, out=out), out, want, scale)


def _ragged(device: Any) -> list[Result]:
    causal = samples.ragged(1000, 5003, device)
    mixed = samples.ragged(300, 3001, device)
    ends = torch.randint(-3, 3010, (2, 300), device=device, dtype=torch.int32)
    mixed = mixed._replace(starts=ends[0], stops=ends[1])
    shapes = [("ragged 1000 x 5003 causal", causal, 0), ("ragged 300 x 3001 any rows", mixed, 0)]
    shapes += [("ragged 300 x 3001 compressed", mixed, 2000), ("ragged 1 x 700", samples.ragged(1, 700, device), 0)]
    return [_ragged_case(name, case, max_k) for name, case, max_k in shapes]


def _ragged_case(name: str, case: samples.Ragged, max_k: int) -> Result:
    want, scale = reference.ragged_logits_reference(*case, max_k)
    out = _nan(case.q.shape[0], max_k or case.keys[0].shape[0], case.q.device)
    return _judge(name, lambda: ragged_logits(*case, max_k=max_k, clean_logits=True, out=out), out, want, scale)


def _nan(rows: int, width: int, device: Any) -> torch.Tensor:
    return torch.full((rows, (width + 3) // 4 * 4), float("nan"), device=device)[:, :width]


def _judge(name: str, run: Callable[[], object], out: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> Result:
    run()
    same_outside = torch.equal(out == float("-inf"), want == float("-inf"))
    error = reference.relative_error(out, want, scale) if same_outside else float("inf")
    return checked("indexer_logits", name, error, LIMIT, graph_microseconds([run]))
