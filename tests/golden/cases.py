"""The golden command lines: the deployments users ask for first, one per kind of GPU and engine version."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from glmplan.cli._options import PlanningOptions
from glmplan.cli._plan import make_plan
from glmplan.engines.base import Endpoints, NodeCommand
from glmplan.engines.commands import node_commands
from glmplan.planning.plan import Plan

CONFIGS = Path(__file__).resolve().parents[1] / "recorded" / "configs"


@dataclass(frozen=True)
class Case:
    """Options of one plan; `sm` and `memory_mib` are the GPU of its last node, which the engine is made to see."""

    options: dict[str, Any]
    sm: int
    memory_mib: int
    config: str = "GLM-5.2-FP8"


def _case(engine: str, sm: int, memory_mib: int, config: str = "GLM-5.2-FP8", **options: Any) -> Case:
    return Case({"engine": engine, **options}, sm, memory_mib, config)


CASES = {
    "24x 4090 48 GB, 0.5.23": _case("sglang", 89, 49140, gpus="24x rtx-4090-48g", nodes=3),
    "40x 4090 24 GB, 0.5.23": _case("sglang", 89, 24564, gpus="40x rtx-4090-24g", context="131072"),
    "24x 4090 48 GB with MTP, 0.5.23": _case(
        "sglang", 89, 49140, gpus="24x rtx-4090-48g", nodes=3, context="128k", mtp="on", allow_pipeline_mtp=True
    ),
    "32x 5090, 0.5.23": _case("sglang", 120, 32607, gpus="32x rtx-5090", context="131072"),
    "8x PRO 6000 NVFP4, 0.5.23": _case(
        "sglang", 120, 97887, "GLM-5.2-NVFP4", gpus="8x rtx-pro-6000", checkpoint="nvfp4", mtp="on", context="256k"
    ),
    "16x A100 80 GB FP8, 0.5.23": _case("sglang", 80, 81920, gpus="16x a100-80g"),
    "8x A100 80 GB INT4, 0.5.23": _case(
        "sglang", 80, 81920, "int4", gpus="8x a100-80g", checkpoint="awq-int4", context="32k", concurrency=4
    ),
    "24x 4090 48 GB without the port, 0.5.23": _case(
        "sglang", 89, 49140, gpus="24x rtx-4090-48g", nodes=3, kernel_port="off"
    ),
    "24x 4090 48 GB and 8x 5090, 0.5.23": _case("sglang", 89, 49140, gpus="8x rtx-5090 + 24x rtx-4090-48g"),
    "8x PRO 6000 NVFP4 with BF16 rows, 0.5.23": _case(
        "sglang", 120, 97887, "GLM-5.2-NVFP4", gpus="8x rtx-pro-6000", checkpoint="nvfp4", kv_dtype="bf16", context="64k"
    ),
    "8x H200 FP8, 0.5.23": _case("sglang", 90, 143771, gpus="8x h200", mtp="on"),
    "8x H200 FP8 with the port, 0.5.23": _case("sglang", 90, 143771, gpus="8x h200", kernel_port="force"),
    "16x H200 attention-DP, 0.5.23": _case(
        "sglang", 90, 143771, gpus="16x h200", pin="tp=8,dp=8,ep=8", concurrency=64, context="64k"
    ),
    "8x H200 W4AFP8, 0.5.23": _case("sglang", 90, 143771, "w4afp8", gpus="8x h200", checkpoint="w4afp8", context="1M"),
    "32x 4090 48 GB, 0.5.13.post1": _case("sglang-0.5.13.post1", 89, 49140, gpus="32x rtx-4090-48g", nodes=4),
    "8x H200 W4AFP8 with MTP, 0.5.13.post1": _case(
        "sglang-0.5.13.post1", 90, 143771, "w4afp8", gpus="8x h200", checkpoint="w4afp8", context="1M", mtp="1"
    ),
    "8x H200 FP8, 0.5.13.post1": _case("sglang-0.5.13.post1", 90, 143771, gpus="8x h200"),
    "8x H200 FP8 with the port, 0.5.13.post1": _case("sglang-0.5.13.post1", 90, 143771, gpus="8x h200", kernel_port="force"),
    "8x H200 attention-DP, 0.5.13.post1": _case(
        "sglang-0.5.13.post1", 90, 143771, gpus="8x h200", pin="dp=8", context="64k", concurrency=8
    ),
}


@cache
def plan_of(name: str) -> Plan:
    """The plan of a case."""
    plan = make_plan(PlanningOptions(**CASES[name].options), with_changes=False)
    assert plan.fits, plan.summary
    return plan


def uses_port(name: str) -> bool:
    """Whether the plan needs glmplan's kernels inside the engine."""
    return any(port.plugin for port in plan_of(name).ports)


def node_command(name: str) -> NodeCommand:
    """The last node's command, which carries the node rank."""
    return node_commands(plan_of(name), Endpoints())[-1]


def config_of(case: Case) -> dict[str, Any]:
    """The config.json the engine is given: a published one, or GLM-5.2's with the quantiser's published spelling."""
    if case.config in ("int4", "w4afp8"):
        raw: dict[str, Any] = json.loads((CONFIGS / "GLM-5.2.json").read_text())
        weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True}
        raw["quantization_config"] = (
            {"quant_method": "w4afp8"}
            if case.config == "w4afp8"
            else {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": ["lm_head"],
            }
        )
        return raw
    found: dict[str, Any] = json.loads((CONFIGS / f"{case.config}.json").read_text())
    return found
