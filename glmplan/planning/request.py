"""What the user asks for, and the model it is asked of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glmplan.facts.engine_profile import EngineProfile
from glmplan.facts.model_config import ModelConfig
from glmplan.model.weights import Weights
from glmplan.planning.measured import MeasuredRuntime

Objective = Literal["fewest-gpus", "kv-tokens", "latency"]
KernelPort = Literal["auto", "off", "force"]
KERNEL_PORTS: tuple[KernelPort, ...] = ("auto", "off", "force")
"""auto: glmplan's kernels where the engine has none for the GPU; off: the engine's own alone; force: ours on any GPU."""
OBJECTIVES: tuple[Objective, ...] = ("fewest-gpus", "kv-tokens", "latency")


@dataclass(frozen=True)
class Pins:
    """Sizes the user fixed; None is free. `stages` are layer counts."""

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    dcp: int | None = None
    nodes: int | None = None
    stages: tuple[int, ...] | None = None

    def allows(self, **sizes: int) -> bool:
        """Whether these sizes agree with what is fixed."""
        return all(getattr(self, name) in (None, size) for name, size in sizes.items())


@dataclass(frozen=True)
class Request:
    """The load to carry and the choices the user made."""

    context_tokens: int
    concurrency: int = 1
    kv_dtype: str = "auto"
    mtp_steps: int = 0
    mem_fraction: float | None = None
    chunk_tokens: int | None = None
    graph_max_bs: int | None = None
    pins: Pins = Pins()
    objective: Objective = "fewest-gpus"
    allow_cross_node_tp: bool = False
    allow_pipeline_mtp: bool = False
    kernel_port: KernelPort = "auto"
    measured: tuple[MeasuredRuntime, ...] = ()

    @property
    def batch(self) -> int:
        """Requests the decode graphs are captured for: at least 16, in steps of 8."""
        return self.graph_max_bs if self.graph_max_bs is not None else max(16, -(-self.concurrency // 8) * 8)

    @property
    def running(self) -> int:
        """Requests that may run at once: all that were asked for, and no fewer than the graphs hold."""
        return max(self.batch, self.concurrency)


@dataclass(frozen=True)
class Target:
    """The model, its weights and the engine version a plan is made for."""

    model_name: str
    config: ModelConfig
    weights: Weights
    scheme: str
    checkpoint_name: str
    model_path: str
    engine: EngineProfile
    certainty: str
    weight_note: str
