"""What many tests start from, each made once: profiles, targets, hand-made hosts and plans."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from glmplan.cli._options import PlanningOptions
from glmplan.cli._plan import make_plan
from glmplan.cli._target import profiled_target
from glmplan.facts import profiles
from glmplan.facts.engine_profile import EngineProfile
from glmplan.facts.host import Host, Inventory
from glmplan.facts.model_config import ModelConfig
from glmplan.model.weights import Weights
from glmplan.planning.build import Context, build_plan
from glmplan.planning.plan import Plan
from glmplan.planning.request import Request, Target
from glmplan.planning.search import search

CONFIGS = Path(__file__).resolve().parent / "recorded" / "configs"
OLD, NEW, VLLM, PATCHED = "sglang-0.5.13.post1", "sglang-0.5.23", "vllm-0.33.0", "vllm-pr38476"


@cache
def engine(name: str = NEW) -> EngineProfile:
    """A packaged engine profile."""
    return profiles.engine_profile(name)


@cache
def config(model: str = "glm-5.2") -> ModelConfig:
    """The sizes of a packaged model."""
    return profiles.model_profile(model).model_config_()


@cache
def target(checkpoint: str = "fp8", engine_name: str = NEW, model: str = "glm-5.2") -> Target:
    """A packaged checkpoint for an engine."""
    return profiled_target(model, checkpoint, engine(engine_name), None).target


def weights(checkpoint: str = "fp8", model: str = "glm-5.2") -> Weights:
    """The bytes of a packaged checkpoint by its storage rule."""
    return target(checkpoint, model=model).weights


def host(name: str, gpu: str, count: int = 8, **changes: object) -> Host:
    """A host of equal GPUs; `changes` overwrite facts of every one."""
    profile = profiles.gpu_profile(gpu)
    return Host(name=name, gpus=tuple(profile.gpu(index).model_copy(update=changes) for index in range(count)))


def plan_for(hosts: list[Host], request: Request, checkpoint: str = "fp8", engine_name: str = NEW) -> Plan:
    """The plan of hand-made hosts."""
    found = search(Inventory(hosts=tuple(hosts)), target(checkpoint, engine_name), request)
    return build_plan(found, Context("declared", None, with_changes=False))


@cache
def plan(**options: object) -> Plan:
    """The plan that `glmplan size` makes of these options."""
    return make_plan(PlanningOptions(**options), with_changes=False)  # type: ignore[arg-type]
