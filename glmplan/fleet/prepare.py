"""From a plan and probed hosts to a deployment: the engine's Python on every node, the stand-in for rehearsals, limits."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Mapping, Sequence

from glmplan.engines.base import Endpoints, NodeCommand
from glmplan.errors import UnsupportedError
from glmplan.facts.host import Host
from glmplan.fleet.deadline import LoadWork, deadline, work_of
from glmplan.fleet.deployment import Deployment, check_name, default_name, digest, owner
from glmplan.kernels.engines import MOE_DIR, PORT, TUNED_DIR
from glmplan.kernels.packed import TUNED, tuned_kinds
from glmplan.planning.plan import Plan, PlanNode

TABLES = {"gemm": TUNED_DIR, "moe": MOE_DIR}
"""Which variable names the folder of a kind of tuned tables."""
REHEARSAL_DISK_BYTES_PER_S = 1_000_000_000
"""A stand-in reads no weights and no engine: only Python itself, from a warm cache."""


def engine_python(plan: Plan, node: PlanNode, host: Host) -> str:
    """The Python of the host that has the plan's engine in the plan's version; patched builds may say any version."""
    found = host.system.engines if host.system else ()
    own = [one for one in found if one.engine == plan.engine_family]
    patched = plan.engine != f"{plan.engine_family}-{plan.engine_version}"
    fitting = [one for one in own if patched or (one.engine_version or "").split("+")[0] == plan.engine_version]
    if fitting:
        return fitting[0].python
    title = f"{plan.engine_family} {plan.engine_version}"
    if own:
        seen = ", ".join(f"{one.engine_version} in {one.python}" for one in own)
        raise UnsupportedError(
            f"{host.name} has {plan.engine_family} {seen}; the plan is for {title}.",
            f"Install it there (pip install {plan.engine_family}=={plan.engine_version}), or plan with another --engine.",
        )
    raise UnsupportedError(
        f"{host.name} has no Python with {title}.",
        f"Install it there (pip install {plan.engine_family}=={plan.engine_version}), or name its Python: --engine-python.",
    )


def with_python(command: NodeCommand, python: str) -> NodeCommand:
    """The command run by this Python; `vllm` is the program beside it."""
    program = python if command.argv[0] == "python3" else posixpath.join(posixpath.dirname(python), command.argv[0])
    return command.model_copy(update={"argv": (program, *command.argv[1:])})


def as_rehearsal(command: NodeCommand, environment: Mapping[str, str]) -> NodeCommand:
    """The stand-in with the engine's own words; it reads the flags that it knows."""
    own = {name: value for name, value in command.environment.items() if not name.startswith(("SGLANG_", "VLLM_"))}
    return command.model_copy(update={"argv": ("@NODE@", "standin", *command.argv), "environment": {**own, **environment}})


def with_kernels(command: NodeCommand, engine_version: str) -> NodeCommand:
    """The command with our kernels on its Python path, and where tuned tables travel, the engine and the plugin told so.

    SGLang raises where SGLANG_MOE_CONFIG_DIR names a folder without tables, so it is set for those alone. A folder that the
    user named for the engine stays.
    """
    own = {"PYTHONPATH": ":".join(filter(None, ["@SITE@", command.environment.get("PYTHONPATH")]))}
    kinds, tables = tuned_kinds(engine_version), f"@SITE@/{TUNED}/{engine_version}"
    for kind, variable in TABLES.items():
        if kind in kinds and variable not in command.environment:
            own[variable] = f"{tables}/{kind}"
    return command.model_copy(update={"environment": {**command.environment, **own}})


def with_patience(command: NodeCommand, seconds: float) -> NodeCommand:
    """vLLM gives up after 600 s unless told how long its own start may take (0.33.0 envs.py)."""
    own = {"VLLM_ENGINE_READY_TIMEOUT_S": str(round(seconds)), **command.environment}
    return command.model_copy(update={"environment": own})


def uses_port(plan: Plan) -> bool:
    """Whether the plan counts on glmplan's kernels inside the engine."""
    return any(port.plugin for port in plan.ports)


def has_tables(plan: Plan, hosts: Mapping[str, Host]) -> bool:
    """Whether there are tuned tables for a GPU of the plan and its engine."""
    names = {gpu.name for node in plan.nodes for gpu in hosts[node.host].gpus if gpu.index in node.gpu_indexes}
    return plan.engine_family == "sglang" and bool(tuned_kinds(plan.engine_version, names))


def with_package(commands: Sequence[NodeCommand], plan: Plan, hosts: Mapping[str, Host]) -> tuple[NodeCommand, ...]:
    """The commands with glmplan's package where the plan counts on its kernels, or where there are tuned tables, which its
    plugin lays over the engine's own: it leaves attention alone that the engine serves. Switched off it does neither."""
    off = any(command.environment.get(PORT) == "off" for command in commands)
    if uses_port(plan) or (has_tables(plan, hosts) and not off):
        return tuple(with_kernels(command, plan.engine_version) for command in commands)
    return tuple(commands)


def sent_tables(deployment: Deployment) -> tuple[str, ...]:
    """Kinds of tuned tables that go along."""
    values = deployment.commands[0].environment
    return tuple(kind for kind, variable in TABLES.items() if values.get(variable, "").startswith("@SITE@"))


def make_deployment(
    plan: Plan, commands: Sequence[NodeCommand], endpoints: Endpoints, name: str | None, has_key: bool, rehearsal: bool,
    has_gpus: bool = True,
) -> Deployment:  # fmt: skip
    """The record of what is about to start."""
    code = digest(plan, tuple(commands), has_key)
    chosen = check_name(name) if name is not None else default_name(plan, code, rehearsal)
    weights = {node.node_rank: 0 for node in plan.nodes}
    for rank in plan.ranks:
        weights[rank.node_rank] += rank.weights_bytes
    return Deployment(
        name=chosen,
        digest=code,
        hosts=tuple(command.host for command in commands),
        owner=owner(),
        created_s=time.time(),
        rehearsal=rehearsal,
        http_host=endpoints.http_host,
        http_port=endpoints.http_port,
        rendezvous_port=endpoints.rendezvous_port,
        needs_api_key=has_key,
        uses_port=uses_port(plan) and not rehearsal,
        commands=tuple(commands),
        gpu_indexes=tuple(node.gpu_indexes if has_gpus else () for node in plan.nodes),
        weights_bytes=tuple(weights[node.node_rank] for node in plan.nodes),
        plan=plan,
    )


def works(plan: Plan, hosts: Mapping[str, Host], rehearsal: bool) -> tuple[LoadWork, ...]:
    """What each node has to do before it is ready."""
    if rehearsal:
        return tuple(
            LoadWork(0, REHEARSAL_DISK_BYTES_PER_S, nodes=plan.layout.nodes, file_bytes=0, compiles=False)
            for _ in plan.nodes
        )
    return tuple(work_of(plan, node.node_rank, _disk_rate(hosts.get(node.host))) for node in plan.nodes)


def _disk_rate(host: Host | None) -> int | None:
    disks = host.system.disks if host is not None and host.system is not None else ()
    return next((disk.read_bytes_per_s for disk in disks if disk.read_bytes_per_s), None)


def allowed_s(all_works: Sequence[LoadWork]) -> float:
    """Seconds until the slowest node must be ready."""
    return max(deadline(work).total_s for work in all_works)
