"""A plan as the commands of its nodes, by the engine family that the plan names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glmplan.engines import sglang, vllm
from glmplan.engines.base import Endpoints, More, NodeCommand
from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.profiles import engine_profile
from glmplan.planning.plan import Plan

MODEL_CHANGES = {"sglang": ("--json-model-override-args",), "vllm": ("--hf-overrides",)}
"""Options that change config.json after it was planned with (SGLang 0.5.23 srt/server_args.py; vLLM 0.33.0
engine/arg_utils.py:1035)."""


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


def contradictions(plan: Plan, endpoints: Endpoints, more: More) -> tuple[str, ...]:
    """What the user adds in place of what the plan set, a sentence each: the plan's bytes and layers are not those then."""
    planned = node_commands(plan, endpoints)
    said = [
        f"--engine-env {name}={value} takes the place of {name}={old}, which the plan set."
        for name, value in more.environment
        for old in _others((one.environment.get(name) for one in planned), value)
    ]
    for name, value in options(more.words):
        if name in MODEL_CHANGES[plan.engine_family]:
            said.append(
                f"{name} changes the model after it was planned: the plan is that of the checkpoint's own config.json."
            )
        own = [dict(options(one.argv)) for one in planned]
        said += [
            f"{name} {value} takes the place of {name} {old}, which the plan set."
            for old in _others((one.get(name) for one in own), value)
        ]
    return tuple(dict.fromkeys(said))


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Long options with what follows each: its values with a space between, or nothing. `--name=value` is one word."""
    name, values = "", []
    for word in (*words, "--"):
        if not word.startswith("--"):
            values.append(word)
            continue
        if name:
            yield name, " ".join(values)
        name, sign, value = word.partition("=")
        values = [value] if sign else []


def _others(found: Iterator[str | None], value: str) -> list[str]:
    """The values that are there and differ."""
    return list(dict.fromkeys(old for old in found if old is not None and old != value))
