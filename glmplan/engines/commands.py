"""A plan as the commands of its nodes, by the engine family that the plan names."""

from __future__ import annotations

from glmplan.engines import sglang, vllm
from glmplan.engines.base import Endpoints, More, NodeCommand
from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.profiles import engine_profile
from glmplan.planning.plan import Plan


def node_commands(plan: Plan, endpoints: Endpoints, more: More | None = None) -> tuple[NodeCommand, ...]:
    """The commands of a plan, from the engine family's builder, with what the user adds."""
    engine = engine_profile(plan.engine)
    if engine.family != plan.engine_family:
        raise UsageError(
            f"The plan names {plan.engine} and the family {plan.engine_family}.", "Save it again with glmplan size."
        )
    if any(node.sm is None for node in plan.nodes):
        raise UnsupportedError("AMD GPUs are sized only; glmplan has no launch command for them.", "Use NVIDIA GPUs.")
    build = sglang.commands if plan.engine_family == "sglang" else vllm.commands
    added = more or More()
    return tuple(
        one.model_copy(
            update={"argv": (*one.argv, *added.words), "environment": {**one.environment, **dict(added.environment)}}
        )
        for one in build(plan, engine, endpoints)
    )
