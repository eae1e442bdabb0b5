"""Which tile sizes make SGLang's fused mixture of experts fastest on this GPU, for GLM-5.2's experts as one rank holds them?

A layer's experts are two GEMMs, `up` (gate and up together) and `down`, over tokens sorted by expert. They may have tiles of
their own but share BLOCK_SIZE_M, to which the tokens are sorted: so the best pair is sought for every BLOCK_SIZE_M and then
the best of those. What was found for each number of rows is kept at once (in `partial/`, where it stays), so a stopped run
goes on there; the two tables appear when all rows are done. Left out: variants that load through TMA (USE_TMA).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from glmplan.errors import UnsupportedError, UsageError
from glmplan.kernels.engines.sglang_expert_tables import down_of, file_name
from glmplan.kernels.engines.sglang_tables import BLOCK, Config, allowed, read_table, whole
from glmplan.kernels.engines.sglang_tune_steps import (
    FINALISTS,
    Event,
    earlier_gains,
    gain,
    missing_rows,
    require_tp_size,
    shared_need,
    tile,
    variations,
    write_whole,
    written,
)

ROUTED, TOP_K, HIDDEN, WIDTH = 256, 8, 6144, 2048
"""config.json of zai-org/GLM-5.2-FP8: n_routed_experts, num_experts_per_tok, hidden_size, moe_intermediate_size."""
PARTS = ("up", "down")
PARTIAL = "partial"
LARGEST_PER_THREAD = 128
"""f32 sums a thread holds: more spills."""


class Experts(NamedTuple):
    """The experts of one rank: `experts` of them, each n wide; tokens choose top_k of all `total`."""

    name: str
    experts: int
    n: int
    hidden: int = HIDDEN
    top_k: int = TOP_K
    total: int = ROUTED

    def weight_bytes(self) -> int:
        """FP8 weights and their f32 scales."""
        codes = 3 * self.experts * self.n * self.hidden
        return codes + 4 * codes // BLOCK**2

    def work_bytes(self, rows: int) -> int:
        """Activations of `rows` tokens: inputs, both results twice (the default's, a tile's), one difference, SiLU in f32,
        and 1 GiB for graphs, sorting and the allocator."""
        pairs = rows * self.top_k
        up, down = pairs * 2 * self.n, pairs * self.hidden
        return 2 * rows * self.hidden + 4 * (up + down) + 4 * max(up, down) + 8 * up + (1 << 30)

    @property
    def fused(self) -> int:
        """Shared experts among them, which every token chooses."""
        return int(self.total == ROUTED + 1)


def require_sizes(tp_size: int, ep_size: int) -> None:
    """TP and EP sizes that go together."""
    require_tp_size(tp_size)
    if ep_size < 1 or tp_size % ep_size:
        raise UsageError(f"EP size is {ep_size}; it must divide the TP size, {tp_size}.")


def expert_shapes(tp_size: int, ep_size: int, sm: int) -> tuple[Experts, ...]:
    """As glmplan launches SGLang: the shared expert is fused (one more, always chosen), not on sm_8x, sm_12x and with EP."""
    require_sizes(tp_size, ep_size)
    fused = 0 if ep_size > 1 or sm // 10 in (8, 12) else 1
    width = WIDTH * ep_size // tp_size
    return (Experts("experts", ROUTED // ep_size + fused, width, HIDDEN, TOP_K + fused, ROUTED + fused),)


def parse_experts(text: str) -> Experts:
    """E,N or E,N,HIDDEN,TOP_K."""
    sizes = tuple(map(whole, text.split(",")))
    if len(sizes) not in (2, 4) or 0 in sizes:
        raise UsageError(f"{text[:80]!r} are not experts; write E,N or E,N,HIDDEN,TOP_K, such as 256,256.")
    experts, n, *rest = sizes
    hidden, top_k = rest or (HIDDEN, TOP_K + (experts == ROUTED + 1))
    if n % BLOCK or hidden % BLOCK or top_k > experts:
        raise UsageError(f"{text!r} are no experts in FP8 blocks: N, HIDDEN are multiples of {BLOCK}, TOP_K is at most E.")
    return Experts(text, experts, n, hidden, top_k, experts)


def expert_candidates(rows: int, shape: Experts, shared_bytes: int, quick: bool = False) -> tuple[Config, ...]:
    """Tiles worth timing first, for both GEMMs: as tall as an expert has tokens, give or take."""
    tokens = rows * shape.top_k / shape.total
    tall = [m for m in (16, 32, 64, 128) if tokens / 4 <= m <= max(16, 4 * tokens)] or [128]
    if quick:
        tall = [m for m in tall if m <= max(16, 2 * tokens)][-2:]
    wide, deep = ((64, 128), (BLOCK,)) if quick else ((32, 64, 128, 256), (64, BLOCK))
    found = []
    for m, n, k, warps in product(tall, wide, deep, (4, 8)):
        config = tile(m, n, k, warps)
        each = m * n // (32 * warps)
        idle = m * n < 2048 and warps == 8
        if each <= LARGEST_PER_THREAD and not idle and shared_need(config) <= shared_bytes:
            found.append(config)
    return tuple(found)


class Found:
    """Times of one number of rows, by GEMM and BLOCK_SIZE_M."""

    def __init__(self, case: Any) -> None:
        self.case = case
        self.timed: dict[str, dict[int, list[tuple[float, Config]]]] = {part: {} for part in PARTS}

    def time(self, wanted: Sequence[tuple[str, Config]]) -> None:
        """All of them; compiled ahead where that is possible."""
        self.case.compile_ahead(wanted)
        for part, config in wanted:
            self.timed[part].setdefault(config["BLOCK_SIZE_M"], []).append((self.case.time_us(part, config), config))

    def best(self, part: str, m: int, count: int = 1) -> list[tuple[float, Config]]:
        return sorted(self.timed[part].get(m, []), key=lambda pair: pair[0])[:count]

    def heights(self, count: int) -> list[int]:
        """The BLOCK_SIZE_M whose two best tiles take least together; those with tiles that run for both."""
        sums = {m: sum(self.best(part, m)[0][0] for part in PARTS) for m in self.timed[PARTS[0]]}
        return sorted((m for m in sums if sums[m] < float("inf")), key=lambda m: sums[m])[:count]


def search_experts(case: Any, rows: int, shape: Experts, shared_bytes: int, quick: bool = False) -> tuple[Config, Config]:
    """The fastest tiles of `up` and `down`, with one BLOCK_SIZE_M."""
    found = Found(case)
    found.time([(part, config) for part in PARTS for config in expert_candidates(rows, shape, shared_bytes, quick)])
    finalists = 1 if quick else FINALISTS - 1
    found.time(
        [
            (part, other)
            for m in found.heights(1 if quick else 2)
            for part in PARTS
            for _, config in found.best(part, m, finalists)
            for other in variations(config, shared_bytes, quick)
        ]
    )
    heights = found.heights(1)
    if not heights:
        raise UnsupportedError(f"No tile sizes that were tried run here for {shape} with {rows} rows.")
    up, down = (found.best(part, heights[0])[0][1] for part in PARTS)
    return up, down


class Files:
    """What lies below a folder for one shape: both tables, of which only rows that both have count, and their gains."""

    def __init__(self, out: Path, place: Path) -> None:
        self.path, self.gains_path = out / place, out / "gains" / place
        self.partial = out / PARTIAL / place.with_name(f"{place.name}.part")
        self.down_path = self.path.with_name(down_of(self.path.name))
        up, down = (read_table(one, tma=True) if one.exists() else {} for one in (self.path, self.down_path))
        both = up.keys() & down.keys()
        self.up, self.down = ({count: one[count] for count in both} for one in (up, down))
        self.gains = earlier_gains(self.gains_path)

    def put(self, count: int, row: dict[str, Any], quick: bool) -> None:
        self.up[count], self.down[count] = row["up"], row["down"]
        self.gains[str(count)] = gain(row["default_us"], row["tuned_us"], quick)

    def write(self, setting: dict[str, str]) -> None:
        """The first table last: it is the one that the engine cannot do without."""
        write_whole(self.gains_path, {"setting": setting, "gains": self.gains})
        write_whole(self.down_path, written(self.down))
        write_whole(self.path, written(self.up))


def tune_experts(
    asked: Sequence[Experts], out: Path, rows: Sequence[int], bench: Any, before: int, steps: int, quick: bool = False
) -> Iterator[Event]:
    """Both tables for every shape; `bench` is an ExpertBench or a stand-in, `before` the steps that were made already."""
    for step, shape in enumerate(asked, before + 1):
        files = Files(out, Path(bench.folder) / file_name(shape.experts, shape.n, bench.device_name))
        missing = missing_rows(rows, files.up, files.gains, quick)
        event = Event("shape", shape.name, shape.n, shape.hidden, step, steps, file=str(files.path), experts=shape.experts)
        event = event._replace(row_count=len(missing))
        if not missing:
            yield event._replace(kind="kept")
            continue
        yield event
        setting = bench.setting | {"search": "quick" if quick else "full"}
        known = Known(files.partial, {"shape": list(shape[1:]), "setting": setting})
        layer = None
        for count in missing:
            if count not in known.rows:
                layer = layer or bench.layer(shape, max(missing))
                known.add(count, one_row(layer.case(count), count, shape, bench.shared_bytes, quick))
            row = known.rows[count]
            files.put(count, row, quick)
            yield event._replace(
                kind="rows", rows=count, default_us=row["default_us"], tuned_us=row["tuned_us"], config=row["up"],
                down_config=row["down"], partial=str(files.partial),
            )  # fmt: skip
        del layer
        files.write(setting)
        yield event._replace(kind="done")


def one_row(case: Any, rows: int, shape: Experts, shared_bytes: int, quick: bool) -> dict[str, Any]:
    """Tiles and times for one number of rows; the engine's default where nothing is faster and it can be kept."""
    up, down = search_experts(case, rows, shape, shared_bytes, quick)
    default_us, tuned_us = case.pair_us(None), case.pair_us((up, down))
    if tuned_us > default_us and case.kept_default is not None:
        (up, down), tuned_us = case.kept_default, default_us
    return {"up": up, "down": down, "default_us": round(default_us, 2), "tuned_us": round(tuned_us, 2)}


class Known:
    """Rows that are done, in a file beside the tables; damaged ones, another shape's and another setting's are left out."""

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.path, self.of = path, of
        self.rows: dict[int, dict[str, Any]] = {}
        try:
            found = json.loads(path.read_text())
            if found["of"] == of:
                self.rows = {int(count): row for count, row in found["rows"].items() if whole(count) and _is_row(row)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return

    def add(self, count: int, row: dict[str, Any]) -> None:
        self.rows[count] = row
        write_whole(self.path, {"of": self.of, "rows": {str(one): self.rows[one] for one in sorted(self.rows)}})


def _is_row(row: object) -> bool:
    """Whether this is what `one_row` returns."""
    return (
        isinstance(row, dict)
        and all(allowed(row.get(part)) for part in PARTS)
        and all(type(row.get(name)) is float and row[name] > 0 for name in ("default_us", "tuned_us"))
    )
