"""Do the kernels this process is about to serve with give their references' numbers on this GPU?

One small case per operation, in the KV format and head count of this process, through the very functions the engine calls.
Milliseconds once compiled; limits are those of the operations' own tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from glmplan.errors import WrongAnswersError
from glmplan.kernels.engines import sglang_attention, sglang_cache, sglang_indexer, sglang_topk
from glmplan.kernels.indexer_logits import reference as logits_reference
from glmplan.kernels.indexer_logits import samples as logits_samples
from glmplan.kernels.kv_quant import reference as quant_reference
from glmplan.kernels.sparse_mla import op as mla_op
from glmplan.kernels.sparse_mla import reference as mla_reference
from glmplan.kernels.topk import reference as topk_reference

LOGITS_LIMIT, ATTENTION_LIMIT = 1e-6, 5e-3
SLOTS, TOPK, LENGTHS = 192, 64, (1, 130)
HALF = mla_op.HALF[-1]  # bf16; float16 in Triton's interpreter


class Check(NamedTuple):
    """One number of one operation and what it may be at most."""

    operation: str
    error: float
    limit: float


def run(kv: str, heads: int, device: torch.device | str | None = None) -> None:
    """Raises WrongAnswersError at the first operation that is off; `kv` is bf16, packed or raw."""
    device = torch.device(device or torch.device("cuda", torch.cuda.current_device()))
    state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        torch.manual_seed(20)
        for check in checks(kv, heads, device):
            if not check.error <= check.limit:
                raise WrongAnswersError(
                    f"{check.operation} is off by {check.error:.3g} on this GPU, more than {check.limit:.3g}.",
                    "Run python -m glmplan.kernels.verify here and report what it prints.",
                )
    finally:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)


def checks(kv: str, heads: int, device: torch.device) -> Iterator[Check]:
    yield paged_logits(device)
    yield ragged_logits(device)
    yield topk(device)
    rows, written = kv_rows(kv, device)
    yield written
    yield attention(rows, heads, device)


def paged_logits(device: torch.device) -> Check:
    case = logits_samples.paged(list(LENGTHS), device, per_token=True)
    width = case.block_table.shape[1] * 64
    got = sglang_indexer.paged(
        case.q, case.pages.view(-1, 64, 1, 132), case.weights, case.context_lens, case.block_table,
        sglang_indexer.schedule(case.context_lens, 64, 1), width, clean_logits=True,
    )  # fmt: skip
    logits, scale = logits_reference.paged_logits_reference(
        case.q, case.pages, case.weights, case.context_lens.flatten(), case.block_table, width
    )
    return Check("indexer logits (paged)", logits_reference.relative_error(got, logits, scale), LOGITS_LIMIT)


def ragged_logits(device: torch.device) -> Check:
    case = logits_samples.ragged(5, 130, device)
    got = sglang_indexer.ragged(case.q, case.keys, case.weights, case.starts, case.stops, clean_logits=True)
    logits, scale = logits_reference.ragged_logits_reference(case.q, case.keys, case.weights, case.starts, case.stops)
    return Check("indexer logits (ragged)", logits_reference.relative_error(got, logits, scale), LOGITS_LIMIT)


def topk(device: torch.device) -> Check:
    """Exact, so the error is the number of slots that differ."""
    logits = torch.randn(2, 4096, device=device)
    lengths = torch.tensor([40, 4000], dtype=torch.int32, device=device)
    table = torch.randperm(128, device=device).to(torch.int32).view(2, 64)
    got = sglang_topk._topk_paged(logits, lengths, table, page_size=64, k=2048)
    want = topk_reference.map_pages(topk_reference.topk_reference(logits, lengths, 2048), table, 64)
    return Check("top-k", float((got != want).sum()), 0.0)


def kv_rows(kv: str, device: torch.device) -> tuple[torch.Tensor, Check]:
    """A small cache in the format, written by our kernel where it is FP8, and how many bytes differ from the reference."""
    values = torch.randn(SLOTS, 1, 576, device=device).bfloat16()
    if kv == "bf16":
        return values.to(HALF), Check("KV rows", 0.0, 0.0)
    latent, rope = values[..., :512], values[..., 512:]
    want = (quant_reference.packed_rows if kv == "packed" else quant_reference.raw_rows)(latent[:, 0], rope[:, 0])
    buffer = torch.zeros(SLOTS, 1, want.shape[-1], dtype=torch.uint8, device=device)
    done = sglang_cache.write_rows(buffer, torch.arange(SLOTS, device=device), latent, rope)
    wrong = float((buffer[:, 0] != want).sum()) if done else float("inf")
    return buffer.view(torch.float8_e4m3fn), Check(f"KV rows ({kv})", wrong, 0.0)


def attention(rows: torch.Tensor, heads: int, device: torch.device) -> Check:
    """Relative error of the output over all heads, with pads among the slots."""
    q = torch.randn(2, heads, 576, device=device).to(HALF)
    slots = torch.randint(0, SLOTS, (2, TOPK), device=device, dtype=torch.int32)
    slots[:, 50:] = -1
    got = sglang_attention.triton_sparse_mla_decode_splitk(q[..., :512], q[..., 512:], rows, slots[:, None], 0.0625)[0]
    want, _ = mla_reference.sparse_mla(q, rows, slots, 0.0625)
    return Check("sparse attention", float((got.double() - want).norm() / want.norm()), ATTENTION_LIMIT)
