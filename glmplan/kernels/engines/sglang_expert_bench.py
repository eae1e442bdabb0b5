"""SGLang's fused mixture of experts on the GPU of this process, one layer with random FP8 weights, timed GEMM by GEMM.

The engine's sorting and its two GEMMs are called as `_fused_moe_kernel_sequence` calls them, quantization of their inputs
included. Between the GEMMs stands PyTorch's SiLU (it does not depend on tiles and is not timed). Times are over several
routings, so that a few tokens' experts do not stay in the L2 cache. Every tile's result is compared with the default's, and
the default's with PyTorch on a few rows.
Left out: variants that load through TMA; where the engine's own table asks for them, they are timed without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from glmplan.errors import DoesNotFitError, GlmplanError, UnsupportedError, WrongAnswersError
from glmplan.kernels.engines import MOE_DIR
from glmplan.kernels.engines.sglang_expert_engine import Engine
from glmplan.kernels.engines.sglang_expert_tables import file_name, version_folder
from glmplan.kernels.engines.sglang_tables import BLOCK, Config, allowed
from glmplan.kernels.engines.sglang_tune_compile import beyond_limits
from glmplan.kernels.engines.sglang_tune_experts import Experts
from glmplan.kernels.engines.sglang_tune_steps import AGREEMENT, engine_version, require_gpu, setting, tile

PAIRS_HOT = 64
"""Token-expert pairs over all routings, at least: their weights are more than any L2 cache holds at GLM-5.2's sizes."""
REFERENCE_ROWS, REFERENCE_LIMIT = 8, 0.1
"""FP8 rounding of the inputs is some 3 % of a result; a scale or a row in the wrong place is far beyond 10 %."""
RATE_FLOPS_PER_US, RATE_BYTES_PER_US = 2e8, 2e6
"""About what a slow GPU does; only says how often a launch is repeated."""
GRAPH_US = 3000.0


class ExpertBench:
    """The engine's functions and this GPU's limits."""

    def __init__(self) -> None:
        import triton

        properties = require_gpu()
        self.version = engine_version()
        os.environ.pop(MOE_DIR, None)  # the default is the engine's own
        self.engine = Engine()
        self.device_name = str(properties.name)
        self.shared_bytes = int(properties.shared_memory_per_block_optin)
        self.folder = version_folder(triton.__version__)
        self.setting = setting(properties, self.version)

    def layer(self, shape: Experts, most_rows: int) -> Layer:
        """Weights on the GPU; refused where they do not fit."""
        import torch

        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        need = shape.weight_bytes() + shape.work_bytes(most_rows)
        if need > free:
            raise DoesNotFitError(
                f"{shape.experts} experts {shape.n} wide with {most_rows} rows take {need / 1e9:.1f} GB to tune; "
                f"{self.device_name} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free.",
                "Tune with a larger --tp-size, with fewer --rows, or on a GPU that nothing else uses.",
            )
        expected = file_name(shape.experts, shape.n, self.device_name)
        found = self.engine.file_name(shape)
        if found != expected:
            raise UnsupportedError(f"SGLang {self.version} would look for {found} here, not for {expected}.")
        return Layer(self.engine, shape, "cuda")


class Layer:
    """Weights w13 [E, 2 N, hidden] and w2 [E, hidden, N] e4m3, their scales f32 a block of 128 x 128."""

    def __init__(self, engine: Engine, shape: Experts, device: str) -> None:
        import torch

        self.engine, self.shape, self.device = engine, shape, device
        torch.manual_seed(shape.experts * 31 + shape.n)
        self.weights = {"up": self._weights(2 * shape.n, shape.hidden), "down": self._weights(shape.hidden, shape.n)}

    def _weights(self, n: int, k: int) -> tuple[Any, Any]:
        import torch

        codes = torch.empty(self.shape.experts, n, k, dtype=torch.float8_e4m3fn, device=self.device)
        for expert in codes:
            expert.copy_(torch.randn(n, k, device=self.device))
        scales = torch.rand(self.shape.experts, n // BLOCK, k // BLOCK, device=self.device) + 0.5
        return codes, scales * k**-0.5

    def weight(self, part: str, expert: int) -> Any:
        """One expert's weight [n, k] f32."""
        codes, scales = self.weights[part]
        return codes[expert].float() * scales[expert].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)

    def case(self, rows: int) -> Case:
        return Case(self, rows)


class Case:
    """`rows` tokens through one layer. Buffers, all bf16, pairs = rows * top_k: x [rows, hidden], up [pairs, 2 N], middle
    [pairs, N], down [rows, top_k, hidden]. Experts of other ranks are -1, their results 0."""

    def __init__(self, layer: Layer, rows: int) -> None:
        import torch

        self.layer, self.engine, self.shape, self.rows = layer, layer.engine, layer.shape, rows
        shape, device = layer.shape, layer.device
        pairs = rows * shape.top_k
        torch.manual_seed(rows)
        self.x = torch.randn(rows, shape.hidden, device=device).bfloat16()
        self.out = {
            "up": torch.empty(pairs, 2 * shape.n, device=device, dtype=torch.bfloat16),
            "down": torch.empty(rows, shape.top_k, shape.hidden, device=device, dtype=torch.bfloat16),
        }
        self.routings = [self._routing() for _ in range(max(1, min(8, -(-PAIRS_HOT // pairs))))]
        self.sorted: dict[int, list[Any]] = {}
        up, down, through_tma = self.engine.default(shape, rows)
        self.default = (up, down)
        self.kept_default = (up, down) if allowed(up) and allowed(down) else None
        if through_tma:
            _say(f"{shape.name}, {rows} rows: the engine's own table loads through TMA; it is timed without.")
        self.want: dict[str, Any] = {}
        self._expect()

    def _routing(self) -> tuple[Any, Any]:
        """(weights f32, ids int32) [rows, top_k]: any experts but no one twice; a fused shared expert is always the last."""
        import torch

        shape, device = self.shape, self.layer.device
        scores = torch.rand(self.rows, shape.total - shape.fused, device=device)
        chosen = scores.topk(shape.top_k - shape.fused, dim=1).indices
        if shape.fused:
            chosen = torch.cat([chosen, torch.full_like(chosen[:, :1], shape.total - 1)], 1)
        ids = torch.where(chosen < shape.experts, chosen, -1).to(torch.int32).contiguous()
        return torch.rand(self.rows, shape.top_k, device=device) / shape.top_k + 0.01, ids

    def _expect(self) -> None:
        """The default's results, checked against PyTorch, and what comes between the GEMMs."""
        import torch

        self.middle = torch.zeros(self.rows * self.shape.top_k, self.shape.n, device=self.layer.device, dtype=torch.bfloat16)
        for part in ("up", "down"):
            self._first_that_runs(part)
            self.want[part] = self.out[part].clone()
            self._require_reference(part)
            if part == "up":
                gate, up = self.want["up"].float().chunk(2, dim=1)
                self.middle.copy_(torch.nn.functional.silu(gate) * up)

    def _first_that_runs(self, part: str) -> None:
        """The default; where it needs more than the GPU has, the smallest tile."""
        small = tile(16, 32, 64, 4) | {"num_stages": 2}
        refused = []
        for config in (self.default[part == "down"], small):
            try:
                self.out[part].fill_(float("nan"))
                self.run(part, config)
                self._settle()
                return
            except Exception as error:
                if not beyond_limits(error):
                    raise
                refused.append(f"{config}: {type(error).__name__}: {error}"[:300])
        raise UnsupportedError(f"{self._title(part)}: neither the default nor the smallest tile runs. {' '.join(refused)}")

    def _require_reference(self, part: str) -> None:
        import torch

        weights, ids = self.routings[0]
        pairs = torch.linspace(0, ids.numel() - 1, min(REFERENCE_ROWS, ids.numel())).long().unique().tolist()
        got, want = [], []
        for pair in pairs:
            token, expert = pair // self.shape.top_k, int(ids.flatten()[pair])
            given = self.x[token] if part == "up" else self.middle[pair] * weights.flatten()[pair]
            exact = self.layer.weight(part, max(expert, 0)) @ given.float()
            want.append(exact if expert >= 0 else torch.zeros_like(exact))
            got.append(self.want[part].view(len(self.middle), -1)[pair].float())
        error = float((torch.stack(got) - torch.stack(want)).norm() / torch.stack(want).norm().clamp_min(1e-9))
        if not error <= REFERENCE_LIMIT:
            raise WrongAnswersError(
                f"{self._title(part)}: the engine's default {self.default[part == 'down']} is {error:.3g} away from PyTorch "
                f"on {len(pairs)} rows; at most {REFERENCE_LIMIT} is rounding."
            )

    def run(self, part: str, config: Config, routing: int = 0, aligned: Any = None) -> None:
        """One GEMM as the engine launches it; whatever it raises but limits of the GPU is told with the configuration."""
        import triton.language as tl

        shape = self.shape
        weights, ids = self.routings[routing]
        order, experts, padded = aligned or self.aligned(config["BLOCK_SIZE_M"])[routing]
        codes, scales = self.layer.weights[part]
        given, times, top_k = (self.x, False, shape.top_k) if part == "up" else (self.middle, True, 1)
        try:
            self.engine.invoke(
                given, codes, None, self.out[part], None, scales, None, weights, ids, order, experts, padded, times, top_k,
                config, compute_type=tl.bfloat16, use_fp8_w8a8=True, use_int8_w8a8=False, use_int8_w8a16=False,
                use_int4_w4a16=False, per_channel_quant=False, block_shape=[BLOCK, BLOCK],
                filter_expert=shape.total != shape.experts, **({} if part == "up" else {"router_topk": shape.top_k}),
            )  # fmt: skip
        except Exception as error:
            if beyond_limits(error):
                raise
            raise self._told(part, config, error) from error

    def aligned(self, m: int) -> list[Any]:
        """Tokens sorted by expert, in blocks of m, for every routing."""
        if m not in self.sorted:
            self.sorted[m] = [self.engine.align(ids, m, self.shape.experts) for _, ids in self.routings]
        return self.sorted[m]

    def compile_ahead(self, wanted: Sequence[tuple[str, Config]]) -> None:
        for _, config in wanted:
            self.aligned(config["BLOCK_SIZE_M"])
        self.engine.ahead.compile(lambda: [self.run(part, config) for part, config in wanted])

    def time_us(self, part: str, config: Config) -> float:
        """Median microseconds of one launch; infinite where the tile needs more than the GPU has, or is wrong."""
        try:
            self.out[part].fill_(float("nan"))
            self.run(part, config)
            error = self._error(part)
            if not error <= AGREEMENT:
                _say(f"{self._title(part)}: {config} is {error:.3g} away from the default and left out.")
                return float("inf")
            launches = [lambda one=one: self.run(part, config, one) for one in range(len(self.routings))]
            return self._graph_us(launches, (part,))
        except Exception as error:
            return self._never(part, config, error)

    def pair_us(self, configs: tuple[Config, Config] | None) -> float:
        """Sorting and both GEMMs; None for the engine's default."""
        up, down = configs or self.default

        def launch(routing: int) -> None:
            aligned = self.engine.align(self.routings[routing][1], up["BLOCK_SIZE_M"], self.shape.experts)
            self.run("up", up, routing, aligned)
            self.run("down", down, routing, aligned)

        try:
            return self._graph_us([lambda one=one: launch(one) for one in range(len(self.routings))], ("up", "down"))
        except Exception as error:
            return self._never("up and down", up, error)

    def _never(self, part: str, config: Config, error: Exception) -> float:
        """Infinite time for what the GPU cannot run; any other failure goes on, with the case that failed."""
        if beyond_limits(error):
            return float("inf")
        if isinstance(error, RuntimeError):
            raise self._told(part, config, error) from error
        raise error

    def _graph_us(self, launches: Sequence[Any], parts: Sequence[str]) -> float:
        from glmplan.kernels.results import graph_microseconds

        least = min(16, max(1, round(GRAPH_US / sum(map(self._expected_us, parts)))))
        return graph_microseconds(launches, replays=10 if least > 4 else 5, least=least)

    def _expected_us(self, part: str) -> float:
        codes = self.layer.weights[part][0]
        pairs, (_, n, k) = self.rows * self.shape.top_k, codes.shape
        moved = min(pairs, self.shape.experts) * n * k + 2 * pairs * (n + k)
        return max(2 * pairs * n * k / RATE_FLOPS_PER_US, moved / RATE_BYTES_PER_US)

    def _error(self, part: str) -> float:
        """Largest difference over the largest result; NaN where something was not written."""
        want = self.want[part]
        return float((self.out[part] - want).abs().amax().float() / want.abs().amax().float().clamp_min(1e-6))

    def _settle(self) -> None:
        import torch

        if self.layer.device == "cuda":
            torch.cuda.synchronize()

    def _title(self, part: str) -> str:
        return f"{self.shape.name} ({part}, {self.shape.experts} experts {self.shape.n} wide, {self.rows} rows)"

    def _told(self, part: str, config: Config, error: Exception) -> GlmplanError:
        if isinstance(error, GlmplanError):
            return error
        return GlmplanError(
            f"{self._title(part)} with {config} stopped with {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
