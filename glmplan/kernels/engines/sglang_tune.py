"""Which tile sizes make SGLang's block-FP8 GEMM and fused experts fastest on this GPU, for GLM-5.2's weights at a TP size?

`tune` searches the engine's own Triton kernel, shape by shape, and yields one event at a time; a shape's table is written
whole when it is done, and rows that it has are not measured again, so a stopped run goes on where it stopped. A full search
replaces rows of a quick one. Times are medians over CUDA-graph replays.
`python -m glmplan.kernels.engines.sglang_tune --tp-size 8 --out DIR [--kind gemm|moe|both] [--ep-size 1] [--quick]
[--shapes N,K ...] [--experts E,N[,HIDDEN,TOP_K] ...] [--rows M,M,...] [--json-lines]`
With shapes or experts named, only those are tuned. Tables are named as the engine looks them up, those of experts below
DIR/configs; what was gained against the engine's default is in DIR/gains under the same name. Weights and their sizes:
config.json of zai-org/GLM-5.2-FP8.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from glmplan.errors import GlmplanError, UnsupportedError, UsageError, WrongAnswersError
from glmplan.kernels import run_as
from glmplan.kernels.engines.sglang_expert_bench import ExpertBench
from glmplan.kernels.engines.sglang_tables import BLOCK, Config, Table, allowed, file_name, read_table, whole
from glmplan.kernels.engines.sglang_tune_compile import Ahead, beyond_limits
from glmplan.kernels.engines.sglang_tune_experts import Experts, expert_shapes, parse_experts, tune_experts
from glmplan.kernels.engines.sglang_tune_steps import (
    AGREEMENT,
    FINALISTS,
    ROWS,
    TP_SIZES,
    Event,
    earlier_gains,
    engine_version,
    gain,
    missing_rows,
    parse_rows,
    require_gpu,
    require_tp_size,
    setting,
    shared_need,
    tile,
    variations,
    write_whole,
    written,
)
from glmplan.kernels.engines.sglang_versions import VERSIONS

__all__ = ["ROWS", "TP_SIZES", "Bench", "Event", "Shape", "candidates", "main", "search", "shapes", "tune"]
KINDS = ("gemm", "moe", "both")
KERNEL = "_w8a8_block_fp8_matmul"
"""What the engine launches for a block-FP8 GEMM on NVIDIA GPUs (0.5.23, kernels/ops/gemm/fp8_kernel.py:669)."""


UNTUNED: Config = {
    "BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": BLOCK, "BLOCK_SIZE_K": BLOCK, "GROUP_SIZE_M": 32, "num_warps": 4, "num_stages": 3,
}  # fmt: skip
"""The engine's tile where it finds no table (0.5.13.post1, srt/layers/quantization/fp8_kernel.py:1238; 0.5.23,
kernels/ops/gemm/fp8_kernel.py:813)."""


class Shape(NamedTuple):
    """A weight [n, k] of one rank."""

    name: str
    n: int
    k: int


def shapes(tp_size: int, version: str) -> tuple[Shape, ...]:
    """Every distinct FP8 weight that a rank multiplies with, by its place in the model."""
    require_tp_size(tp_size)
    found = [
        Shape("fused_qkv_a_proj", 2624, 6144),
        Shape("q_b_proj", 16384 // tp_size, 2048),
        Shape("o_proj", 6144, 16384 // tp_size),
        Shape("dense gate_up_proj", 24576 // tp_size, 6144),
        Shape("dense down_proj", 6144, 12288 // tp_size),
        Shape("shared gate_up_proj", 4096 // tp_size, 6144),
        Shape("shared down_proj", 6144, 2048 // tp_size),
        Shape("indexer.wq_b", 4096, 2048),
    ]
    if version == "0.5.13.post1":
        found.append(Shape("indexer.wk", 128, 6144))
    by_size = {(shape.n, shape.k): shape for shape in reversed(found)}
    return tuple(shape for shape in found if by_size[shape.n, shape.k] is shape)


def candidates(rows: int, shared_bytes: int, smallest_k: int = BLOCK, quick: bool = False) -> tuple[Config, ...]:
    """Tile sizes worth timing first, for one number of rows: those that fit, with three stages and no grouping."""
    tall = [m for m in (16, 32, 64, 128) if m < 2 * max(rows, 16)]
    wide, deep = ((32, 64, 128), (64, 128)) if not quick else ((64, 128), (BLOCK,))
    found = []
    for m, n, k, warps in product(tall[-2:] if quick else tall, wide, deep, (4, 8)):
        config = tile(m, n, k, warps)
        small = m * n < 2048 and warps == 8
        if k >= smallest_k and not small and shared_need(config) <= shared_bytes:
            found.append(config)
    return tuple(found)


def search(
    rows: int, shared_bytes: int, time_us: Callable[[Config], float], smallest_k: int = BLOCK, quick: bool = False,
    ahead: Callable[[Sequence[Config]], None] = lambda _: None,
) -> tuple[Config, float]:  # fmt: skip
    """The fastest tile sizes for `rows` rows and their time; configurations that cannot run take infinitely long. `ahead`
    compiles what will be timed next."""
    first = candidates(rows, shared_bytes, smallest_k, quick)
    ahead(first)
    timed = sorted([(time_us(config), config) for config in first], key=lambda pair: pair[0])
    finalists = [config for _, config in timed[: 1 if quick else FINALISTS]]
    others = [other for config in finalists for other in variations(config, shared_bytes, quick)]
    ahead(others)
    timed += [(time_us(other), other) for other in others]
    best_us, best = min(timed, key=lambda pair: pair[0])
    if best_us == float("inf"):
        raise UnsupportedError(f"No tile sizes that were tried run here with {rows} rows.")
    return best, best_us


def tune(
    asked: Sequence[Shape], out: Path, rows: Sequence[int], bench: Any, steps: int | None = None, quick: bool = False
) -> Iterator[Event]:
    """Tables for every shape; `bench` times and runs the engine's kernel (Bench, or a stand-in of a test)."""
    for step, shape in enumerate(asked, 1):
        path = out / file_name(shape.n, shape.k, bench.device_name)
        event = Event("shape", shape.name, shape.n, shape.k, step, steps or len(asked), file=str(path))
        table: Table = read_table(path) if path.exists() else {}
        gains = earlier_gains(out / "gains" / path.name)
        missing = missing_rows(rows, table, gains, quick)
        event = event._replace(row_count=len(missing))
        if not missing:
            yield event._replace(kind="kept")
            continue
        yield event
        for count in missing:
            case = bench.case(shape, count)
            default_us = case.time_us(None)
            best, tuned_us = search(count, bench.shared_bytes, case.time_us, bench.smallest_k, quick, case.compile_ahead)
            case.require_agreement(best)
            if tuned_us > default_us and allowed(case.default):
                best, tuned_us = case.default, default_us
            table[count] = best
            gains[str(count)] = gain(default_us, tuned_us, quick)
            yield event._replace(kind="rows", rows=count, default_us=default_us, tuned_us=tuned_us, config=best)
        write_whole(out / "gains" / path.name, {"setting": bench.setting, "gains": gains})
        write_whole(path, written(table))
        yield event._replace(kind="done")


class Bench:
    """The engine's kernel on the GPU of this process."""

    def __init__(self) -> None:
        properties = require_gpu()
        self.version = engine_version()
        self.module: Any = import_module(VERSIONS[self.version].block_fp8.path.rsplit(".", 1)[0])
        self.ahead = Ahead(self.module, KERNEL)
        self.device_name = properties.name
        self.shared_bytes = properties.shared_memory_per_block_optin
        self.smallest_k = BLOCK if self.version == "0.5.13.post1" else 64
        self.setting = setting(properties, self.version)

    def case(self, shape: Shape, rows: int) -> Case:
        return Case(self.ahead, shape, rows)


class Case:
    """One GEMM [rows, k] x [n, k]^T with random FP8 operands."""

    def __init__(self, ahead: Ahead, shape: Shape, rows: int) -> None:
        import torch

        self.ahead, self.module = ahead, ahead.module
        self.lookup = self.module.get_w8a8_block_fp8_configs
        fp8 = torch.float8_e4m3fn
        blocks_n, blocks_k = -(-shape.n // BLOCK), -(-shape.k // BLOCK)
        torch.manual_seed(shape.n * 31 + shape.k * 7 + rows)
        self.a = torch.randn(rows, shape.k, device="cuda").to(fp8)
        self.a_scale = torch.rand(rows, blocks_k, device="cuda") + 0.5
        self.b = torch.randn(shape.n, shape.k, device="cuda").to(fp8)
        self.b_scale = torch.rand(blocks_n, blocks_k, device="cuda") + 0.5
        table = self.lookup(shape.n, shape.k, BLOCK, BLOCK)
        self.default = table[min(table, key=lambda m: abs(m - rows))] if table else UNTUNED

    def run(self, config: Config | None) -> Any:
        """The engine's function; `config` takes the place of what it looks up, None is its own choice."""
        import torch

        chosen = {self.a.shape[0]: config} if config is not None else None
        self.module.get_w8a8_block_fp8_configs = (lambda *_: chosen) if chosen else self.lookup
        try:
            return self.module.w8a8_block_fp8_matmul_triton(
                self.a, self.b, self.a_scale, self.b_scale, [BLOCK, BLOCK], output_dtype=torch.bfloat16
            )
        finally:
            self.module.get_w8a8_block_fp8_configs = self.lookup

    def compile_ahead(self, wanted: Sequence[Config]) -> None:
        self.ahead.compile(lambda: [self.run(config) for config in wanted])

    def time_us(self, config: Config | None) -> float:
        """Median microseconds; infinite where the configuration needs more than the GPU has."""
        from glmplan.kernels.results import graph_microseconds

        try:
            self.run(config)
            return graph_microseconds([lambda: self.run(config)], replays=10)
        except Exception as error:
            if beyond_limits(error):
                return float("inf")
            raise

    def require_agreement(self, config: Config) -> None:
        want, got = self.run(None).float(), self.run(config).float()
        error = float((got - want).abs().max() / want.abs().max())
        if not error <= AGREEMENT:
            raise WrongAnswersError(f"{config} gives results {error:.3g} away from the engine's default.")


def parse_shape(text: str) -> Shape:
    """N,K."""
    sizes = tuple(map(whole, text.split(",")))
    if len(sizes) != 2 or 0 in sizes:
        raise UsageError(f"{text[:80]!r} is not a shape; write N,K, such as 2624,6144.")
    return Shape(text, *sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m glmplan.kernels.engines.sglang_tune")
    parser.add_argument("--tp-size", type=int, default=8)
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, default="both")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=[], metavar="N,K")
    parser.add_argument("--experts", nargs="*", default=[], metavar="E,N")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), metavar="M,M,...")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json-lines", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        for event in events(asked):
            print(json.dumps(event._asdict()) if asked.json_lines else sentence(event), flush=True)
    except GlmplanError as error:
        print(f"{error.message} {error.next_step}".strip(), file=sys.stderr)
        return error.exit_code
    return 0


def events(asked: argparse.Namespace) -> Iterator[Event]:
    """GEMMs first, they take least; then experts."""
    version, rows = engine_version(), parse_rows(asked.rows)
    gemms: tuple[Shape, ...] = tuple(map(parse_shape, asked.shapes))
    experts: tuple[Experts, ...] = tuple(map(parse_experts, asked.experts))
    if not gemms and not experts:
        gemms = shapes(asked.tp_size, version) if asked.kind != "moe" else ()
        experts = expert_shapes(asked.tp_size, asked.ep_size, device_sm()) if asked.kind != "gemm" else ()
    steps = len(gemms) + len(experts)
    if gemms:
        yield from tune(gemms, asked.out, rows, Bench(), steps, asked.quick)
    if experts:
        yield from tune_experts(experts, asked.out, rows, ExpertBench(), len(gemms), steps, asked.quick)


def device_sm() -> int:
    """89 for sm_89; refused where the engine's kernels do not run."""
    require_gpu()
    return run_as.device_sm()


def sentence(event: Event) -> str:
    size = f"{event.n}x{event.k}" if event.experts is None else f"{event.experts}x{event.n}x{event.k}"
    where = f"[{event.step}/{event.steps}] {event.shape} {size}"
    if event.kind == "rows" and event.default_us is not None and event.tuned_us is not None:
        gain = event.default_us / event.tuned_us
        return f"{where} rows {event.rows}: {event.default_us:.1f} -> {event.tuned_us:.1f} us, {gain:.2f}x"
    return f"{where} {event.kind}"


if __name__ == "__main__":
    sys.exit(main())
