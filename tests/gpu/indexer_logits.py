"""Are the indexer logits right on a real GPU? Exits 1 on the first kind of failure it finds, after printing every check.

`python -m tests.gpu.indexer_logits`, or under `python -m glmplan.kernels.run_as sm89 tests/gpu/indexer_logits.py`.
Beyond the cases of `verify`: every number of e4m3, hostile page tables, views with gaps, more requests than one launch
holds, and one captured graph replayed with other lengths and other pages. `--small` does one run of each kernel, for
compute-sanitizer.
"""

from __future__ import annotations

import sys

import torch

from glmplan.kernels import run_as
from glmplan.kernels.indexer_logits import samples
from glmplan.kernels.indexer_logits.op import paged_logits, ragged_logits
from glmplan.kernels.indexer_logits.reference import paged_logits_reference, ragged_logits_reference, relative_error
from glmplan.kernels.indexer_logits.verify import LIMIT, cases
from glmplan.kernels.results import Result, checked


def nan_rows(rows: int, width: int) -> torch.Tensor:
    return torch.full((rows, (width + 3) // 4 * 4), float("nan"), device="cuda")[:, :width]


def paged_check(name: str, case: samples.Paged, max_len: int) -> Result:
    want, scale = paged_logits_reference(*case, max_len)
    got = paged_logits(*case, max_len, out=nan_rows(len(want), max_len), clean_logits=True)
    outside = torch.equal(got == float("-inf"), want == float("-inf"))
    return checked("indexer_logits", name, relative_error(got, want, scale) if outside else float("inf"), LIMIT, 0.0)


def every_number() -> Result:
    case = samples.paged([4096], "cuda")
    numbers = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8, device="cuda")
    case.pages[:, :8192] = numbers[torch.randint(len(numbers), (len(case.pages), 8192), device="cuda")]
    case.q.copy_(numbers[torch.randint(len(numbers), case.q.shape, device="cuda")])
    return paged_check("every e4m3 number", case, 4096)


def subnormals() -> Result:
    case = samples.paged([4096], "cuda")
    numbers = torch.tensor([*range(9), *range(128, 137)], dtype=torch.uint8, device="cuda")
    case.pages[:, :8192] = numbers[torch.randint(len(numbers), (len(case.pages), 8192), device="cuda")]
    case.q.copy_(numbers[torch.randint(len(numbers), case.q.shape, device="cuda")])
    return paged_check("e4m3 subnormals", case, 4096)


def hostile_table() -> Result:
    case = samples.paged([5000, 300, 64, 0, -7 % 5], "cuda")
    case.block_table[0, 3::7] = -1
    case.block_table[0, 4::9] = len(case.pages)
    case.block_table[1] = case.block_table[0, 0]
    case.context_lens[3] = -12
    return paged_check("hostile pages and lengths", case, 5000)


def gaps() -> Result:
    case = samples.paged([700, 64], "cuda", next_n=2)
    pages = torch.zeros((len(case.pages), 8448 + 64), dtype=torch.uint8, device="cuda")[:, :8448]
    q = torch.zeros((2, 3, 64, 128), dtype=torch.uint8, device="cuda")[:, 1:, ::2]
    pages.copy_(case.pages)
    q.copy_(case.q)
    return paged_check("views with gaps", case._replace(pages=pages, q=q), 701)


def many_requests() -> Result:
    lengths = [(37 * i) % 200 for i in range(1500)]
    return paged_check("1500 requests", samples.paged(lengths, "cuda"), 200)


def replay() -> Result:
    """One graph, captured at full length; the lengths, pages, queries and weights change under it."""
    case = samples.paged([9000, 3000, 640], "cuda", next_n=2, width=141)
    out = nan_rows(6, 9024)
    paged_logits(*case, 9024, out=out, clean_logits=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_logits(*case, 9024, out=out, clean_logits=True)
    worst = 0.0
    for lengths in ([1, 9000, 129], [0, 0, 2], [9024, 64, 65]):
        other = samples.paged(lengths, "cuda", next_n=2, width=141)
        pages = torch.zeros_like(case.pages)
        count = min(len(pages), len(other.pages))
        pages[:count] = other.pages[:count]
        for mine, theirs in zip(case, other._replace(pages=pages), strict=True):
            mine.copy_(theirs)
        out.fill_(float("nan"))
        graph.replay()
        want, scale = paged_logits_reference(*case, 9024)
        outside = torch.equal(out == float("-inf"), want == float("-inf"))
        worst = max(worst, relative_error(out, want, scale) if outside else float("inf"))
    return checked("indexer_logits", "graph replayed with other lengths", worst, LIMIT, 0.0)


def untouched() -> Result:
    case = samples.paged([500, 77], "cuda")
    got = paged_logits(*case, 600, out=nan_rows(2, 600))
    ragged = samples.ragged(70, 600, "cuda")
    ragged_got = ragged_logits(*ragged, out=nan_rows(70, 600))
    column = torch.arange(600, device="cuda")
    right = torch.equal(got.isnan(), column[None, :] >= case.context_lens[:, None])
    right &= torch.equal(ragged_got.isnan(), column[None, :] >= ragged.stops[:, None])
    return checked("indexer_logits", "untouched outside a row", 0.0 if right else float("inf"), LIMIT, 0.0)


def small() -> list[Result]:
    case = samples.ragged(9, 301, "cuda")
    want, scale = ragged_logits_reference(*case)
    got = ragged_logits(*case, out=nan_rows(9, 301), clean_logits=True)
    ragged = checked("indexer_logits", "ragged 9 x 301", relative_error(got, want, scale), LIMIT, 0.0)
    return [paged_check("paged 300, 65", samples.paged([300, 65], "cuda"), 301), ragged]


def main(arguments: list[str]) -> int:
    run_as.enable_from_environment()
    torch.manual_seed(5)
    extra = (every_number, subnormals, hostile_table, gaps, many_requests, replay, untouched)
    results = small() if "--small" in arguments else [*cases("cuda"), *(check() for check in extra)]
    for result in results:
        print(f"sm_{run_as.target_sm()} {result.format:36} error {result.error:9.2e}  {'ok' if result.ok else 'WRONG'}")
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
