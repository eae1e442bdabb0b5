"""Do the kernels this process is about to serve with give their references' numbers on this GPU?

One small case per operation, through the very functions the engine calls, in the KV format and head count of this process.
The engine's own cache writers are tested too: their machine code differs by SM, and our kernels read what they wrote.
Milliseconds once compiled; limits are those of the operations' own tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from glmplan.errors import WrongAnswersError
from glmplan.kernels.engines import vllm_indexer
from glmplan.kernels.engines.process import compiled_as_asked
from glmplan.kernels.indexer_logits import reference as logits_reference
from glmplan.kernels.indexer_logits import samples as logits_samples
from glmplan.kernels.kv_quant import reference as quant_reference
from glmplan.kernels.sparse_mla import op as mla_op
from glmplan.kernels.sparse_mla import reference as mla_reference
from glmplan.kernels.topk import reference as topk_reference

LOGITS_LIMIT, ATTENTION_LIMIT = 1e-6, 5e-3
# half a step of three mantissa bits; a little more, because a writer may multiply by a rounded reciprocal
ROUNDING_LIMIT = 1.02 / 16
SLOTS, TOPK, LENGTHS = 192, 64, (1, 130)
SCALE = 0.0625


class Writers(Protocol):
    """vLLM's `_custom_ops`, as far as it is used here."""

    def concat_and_cache_mla(
        self, kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor,
        kv_cache_dtype: str, scale: torch.Tensor,
    ) -> None: ...  # fmt: skip

    def indexer_k_quant_and_cache(
        self, k: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, quant_block_size: int,
        kv_cache_dtype: str,
    ) -> None: ...  # fmt: skip


class Check(NamedTuple):
    """One number of one operation and what it may be at most."""

    operation: str
    error: float
    limit: float


def run(kv: str, heads: int) -> None:
    """Raises WrongAnswersError at the first operation that is off; `kv` is bf16 or packed. Leaves the generators alone."""
    from vllm import _custom_ops

    device = torch.device("cuda", torch.cuda.current_device())
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        torch.manual_seed(20)
        require(checks(kv, heads, device, _custom_ops))


def require(found: Iterator[Check]) -> None:
    """Runs the checks, whatever the default dtype of the process is, up to the first that is off."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        for check in found:
            if not check.error <= check.limit:
                raise WrongAnswersError(
                    f"{check.operation} is off by {check.error:.3g} on this GPU, more than {check.limit:.3g}.",
                    "Run python -m glmplan.kernels.verify here and report what it prints.",
                )
    finally:
        torch.set_default_dtype(default)


def checks(
    kv: str, heads: int, device: torch.device, writers: Writers, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Check]:
    """`dtype` is bf16 but in Triton's interpreter, which mishandles bf16 dots."""
    yield decode_logits(device)
    yield prefill_logits(device)
    yield decode_topk(device)
    yield prefill_topk(device)
    yield index_keys(device, writers)
    rows, written = kv_rows(kv, device, writers, dtype)
    yield written
    yield attention(rows, heads, device, dtype)


def decode_logits(device: torch.device) -> Check:
    case = logits_samples.paged(list(LENGTHS), device, per_token=True)
    width = case.block_table.shape[1] * 64
    got = vllm_indexer.decode_logits(
        (case.q, None), case.pages.view(-1, 64, 1, 132), case.weights, case.context_lens, case.block_table,
        vllm_indexer.schedule(case.context_lens, 64, 1), width,
    )  # fmt: skip
    logits, scale = logits_reference.paged_logits_reference(
        case.q, case.pages, case.weights, case.context_lens, case.block_table, width
    )
    return Check("indexer logits (decode)", logits_reference.relative_error(got, logits, scale), LOGITS_LIMIT)


def prefill_logits(device: torch.device) -> Check:
    case = logits_samples.ragged(5, 130, device)
    starts = torch.tensor([0, 0, 20, 64, 64], dtype=torch.int32, device=device)
    got = vllm_indexer.prefill_logits((case.q, None), case.keys, case.weights, starts, case.stops, 130)
    logits, scale = logits_reference.ragged_logits_reference(case.q, case.keys, case.weights, starts, case.stops, max_k=130)
    return Check("indexer logits (prefill)", logits_reference.relative_error(got, logits, scale), LOGITS_LIMIT)


def decode_topk(device: torch.device) -> Check:
    """Exact, so the error is the number of positions that differ."""
    logits = torch.randn(2, 4096, device=device)
    lengths = torch.tensor([[40], [4000]], dtype=torch.int32, device=device)
    got = torch.full((2, 2048), -1, dtype=torch.int32, device=device)
    vllm_indexer.decode_topk_of("auto")(logits, lengths, 1, got, 2048, 4000)
    want = topk_reference.topk_reference(logits, lengths.flatten(), 2048)
    return Check("top-k (decode)", float((got != want).sum()), 0.0)


def prefill_topk(device: torch.device) -> Check:
    logits = torch.randn(2, 256, device=device)
    starts = torch.tensor([0, 8], dtype=torch.int32, device=device)
    stops = torch.tensor([200, 40], dtype=torch.int32, device=device)
    got = torch.full((2, TOPK), -1, dtype=torch.int32, device=device)
    vllm_indexer.prefill_topk(logits, starts, stops, got, 2, logits.stride(0), 1, TOPK)
    want = topk_reference.topk_reference(logits, stops - starts, TOPK, row_starts=starts)
    return Check("top-k (prefill)", float((got != want).sum()), 0.0)


def index_keys(device: torch.device, writers: Writers) -> Check:
    """Worst difference between a key and what its page says, over its rounding unit; three pages in another order."""
    keys = torch.randn(SLOTS, 128, device=device).bfloat16()
    slots = torch.randperm(SLOTS, device=device)
    pages = torch.zeros(SLOTS // 64, 64, 132, dtype=torch.uint8, device=device)
    writers.indexer_k_quant_and_cache(keys, pages, slots, 128, "ue8m0")
    codes, scales = quant_reference.gather_index_keys(pages.flatten(1), slots)
    read = codes.view(quant_reference.FP8).float() * scales[:, None]
    return Check("index keys as vLLM writes them", _rounding(read, keys.float(), scales[:, None]), ROUNDING_LIMIT)


def kv_rows(kv: str, device: torch.device, writers: Writers, dtype: torch.dtype) -> tuple[torch.Tensor, Check]:
    """A cache of three blocks written by the engine, [SLOTS, 576] or uint8 [SLOTS, 656], and how far off its values are."""
    values = torch.randn(SLOTS, 576, device=device).to(dtype)
    slots = torch.randperm(SLOTS, device=device)
    packed = kv == "packed"
    width, kind = (656, torch.uint8) if packed else (576, dtype)
    cache = torch.zeros(SLOTS // 64, 64, width, dtype=kind, device=device)
    one = torch.ones(1, dtype=torch.float32, device=device)
    form = vllm_indexer.PACKED if packed else "auto"
    writers.concat_and_cache_mla(values[:, :512].contiguous(), values[:, 512:].contiguous(), cache, slots, form, one)
    rows = cache.view(SLOTS, width)
    if not packed:
        return rows, Check("KV rows as vLLM writes them", float((rows[slots] != values).sum()), 0.0)
    read = quant_reference.dequantise_packed(rows[slots])
    scales = rows[slots, 512:528].contiguous().view(torch.float32).repeat_interleave(128, 1)
    error = _rounding(read[:, :512], values[:, :512].float(), scales)
    same = torch.equal(read[:, 512:], values[:, 512:].bfloat16().float())
    return rows, Check("KV rows as vLLM writes them", error if same else float("inf"), ROUNDING_LIMIT)


def attention(rows: torch.Tensor, heads: int, device: torch.device, dtype: torch.dtype) -> Check:
    """Relative error of the output over all heads, with fewer valid rows than the top-k."""
    q = torch.randn(2, heads, 576, device=device).to(dtype)
    chosen = torch.randint(0, SLOTS, (2, TOPK), device=device, dtype=torch.int32)
    chosen[:, 50:] = -1
    valid = torch.full((2,), 50, dtype=torch.int32, device=device)
    got, _ = compiled_as_asked(mla_op.sparse_mla)(q, rows, chosen, SCALE, lengths=valid)
    want, _ = mla_reference.sparse_mla(q, rows, chosen, SCALE)
    return Check("sparse attention", float((got.double() - want).norm() / want.norm()), ATTENTION_LIMIT)


def _rounding(read: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> float:
    """Largest |read - value| over max(|value|, the smallest normal e4m3 at this scale); 1/16 is correct rounding."""
    if not torch.isfinite(read).all():
        return float("inf")
    return float(((read - value).abs() / torch.maximum(value.abs(), scale * 2.0**-6)).max())
