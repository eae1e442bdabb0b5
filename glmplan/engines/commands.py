"""A plan as the commands of its nodes, by the engine family that the plan names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from glmplan.engines import sglang, vllm
from glmplan.engines.base import Endpoints, More, NodeCommand
from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.profiles import engine_profile
from glmplan.planning.plan import Plan

MODEL_CHANGES = {"sglang": "--json-model-override-args", "vllm": "--hf-overrides"}
"""What changes config.json after it was planned with (SGLang 0.5.13.post1 srt/server_args.py:5563, 0.5.23
srt/arg_groups/fields/model.py:152; vLLM 0.33.0 engine/arg_utils.py:1035)."""

SPELLINGS = {
    # SGLang 0.5.13.post1 srt/server_args.py; 0.5.23 srt/arg_groups/fields.
    "sglang": {
        "--model": "--model-path",  # 4491; model.py:55
        "--tensor-parallel-size": "--tp-size",  # 5006; parallel.py:49
        "--tp": "--tp-size",  # no alias: argparse takes the one option that begins so; --pp would be ambiguous
        "--pipeline-parallel-size": "--pp-size",  # 5027; parallel.py:63
        "--data-parallel-size": "--dp-size",  # 5522; parallel.py:77
        "--dp": "--dp-size",  # as --tp
        "--attention-data-parallel-size": "--attn-dp-size",  # parallel.py:87
        "--expert-parallel-size": "--ep-size",  # 6030; parallel.py:285
        "--ep": "--ep-size",  # 6032; parallel.py:285
        "--nccl-init-addr": "--dist-init-addr",  # 5550; parallel.py:36
        "--nsa-prefill-backend": "--dsa-prefill-backend",  # 5745
        "--nsa-decode-backend": "--dsa-decode-backend",  # 5763
    },
    # vLLM 0.33.0 engine/arg_utils.py; `--disable-x` for `--enable-x` by utils/argparse_utils.py:120.
    "vllm": {
        "-tp": "--tensor-parallel-size",  # 1209
        "-pp": "--pipeline-parallel-size",  # 1172
        "-dp": "--data-parallel-size",  # 1241
        "-dcp": "--decode-context-parallel-size",  # 1213
        "-ep": "--enable-expert-parallel",  # 1306
        "-n": "--nnodes",  # 1177
        "-r": "--node-rank",  # 1178
        "-sc": "--speculative-config",  # 1866
        "--disable-expert-parallel": "--no-enable-expert-parallel",
        "--disable-auto-tool-choice": "--no-enable-auto-tool-choice",
    },
}
"""Other names that the engines give to options of the plan."""


class Option(NamedTuple):
    """An option as it is written: its name, what the name says besides (`no`, or a JSON key), and the words after it."""

    name: str
    mark: str
    words: tuple[str, ...]

    def text(self, values: int) -> str:
        """As people read it, with that many of its words."""
        return " ".join((self.name, *self.words[:values]))

    def meaning(self, values: int) -> tuple[str, ...]:
        """The same for two options that do the same, however their numbers and JSON are written."""
        return (self.mark, *map(_meaning, self.words[:values]))


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
    """What the user adds in place of what the plan set, a sentence each: the plan's bytes and layers are not those then.

    As many words are read as the plan's own option has values: what else is there may be a secret. Abbreviated names,
    `--config` files, `64k` for a number, and other options of the same effect are not covered.
    """
    family, planned = plan.engine_family, node_commands(plan, endpoints)
    said = []
    for variable, value in dict(more.environment).items():
        found = {one.environment[variable] for one in planned if variable in one.environment}
        if found - {value}:
            said.append(_note(f"--engine-env {variable}={value}", {f"{variable}={old}" for old in found}))
    planned_options = [options(one.argv, family) for one in planned]
    for name, given in options(more.words, family).items():
        if name == MODEL_CHANGES[family] and given.meaning(1) != ("", "{}"):
            said.append(
                f"{given.name} changes the model after it was planned: the plan is that of the checkpoint's own config.json."
            )
        own = [one[name] for one in planned_options if name in one]
        values = max((len(one.words) for one in own), default=0)
        if any(one.meaning(values) != given.meaning(values) for one in own):
            said.append(_note(given.text(values), {one.text(values) for one in own}))
    return tuple(said)


def options(words: Sequence[str], family: str) -> dict[str, Option]:
    """The options among the words by the plan's name for them. Of one given twice the last counts, and a JSON key in a
    name counts after all others (vLLM 0.33.0 utils/argparse_utils.py:497)."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-(\d+|\d*\.\d+)?", word):
            name, sign, value = word.partition("=")
            found.append((name, [value] if sign else []))
        elif found:
            found[-1][1].append(word)
    found.sort(key=lambda one: "." in one[0])
    known = [(*_plan_name(name, family), name, values) for name, values in found]
    return {key: Option(name, mark, tuple(values)) for key, mark, name, values in known if key.startswith("--")}


def _plan_name(name: str, family: str) -> tuple[str, str]:
    """The plan's name for an option, and what the name says besides."""
    stem, _, json_key = name.partition(".")
    if stem.startswith("--"):
        stem = stem.replace("_", "-")
    stem = SPELLINGS[family].get(stem, stem)
    return ("--" + stem.removeprefix("--no-"), "no") if stem.startswith("--no-") else (stem, json_key)


def _meaning(value: str) -> str:
    """Numbers and JSON in one spelling, other text as it is."""
    for read in (float, lambda text: json.loads(text, parse_int=float)):
        with suppress(ValueError, RecursionError):
            return json.dumps(read(value), sort_keys=True)
    return value


def _note(given: str, own: set[str]) -> str:
    """One sentence for all nodes."""
    place = f"{next(iter(own))}, which the plan set" if len(own) == 1 else "the plan's own (it differs from node to node)"
    return f"{given} takes the place of {place}."
