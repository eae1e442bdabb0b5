"""From the hosts' facts to the plan of a launch and what each of its nodes runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from glmplan.cli._hosts import named_hosts, probed, require_all
from glmplan.cli._options import PlanningOptions
from glmplan.cli._telling import say
from glmplan.cli._wanted import Wanted
from glmplan.engines.base import NodeCommand
from glmplan.engines.commands import node_commands
from glmplan.errors import DoesNotFitError, GlmplanError, UsageError
from glmplan.facts.host import Host, Inventory
from glmplan.fleet import prepare
from glmplan.planning.bind import bind
from glmplan.planning.plan import Plan

STAND_IN_GPUS = (("rtx-4090-48g", 8), ("rtx-pro-6000", 8), ("h200", 8))
"""What a rehearsal on hosts without GPUs stands in for: the first of these that carries the model on all hosts."""


def find_hosts(options: PlanningOptions, wanted: Wanted) -> tuple[Host, ...]:
    """Facts of every host, with the addresses that the nodes use among themselves."""
    from glmplan.planning.network import with_links
    from glmplan.probe.remote import FactsRequest, inventory_of

    say(f"Probing {len(named_hosts(options))} host(s) ...")
    path = _model_path(options, wanted)
    request = FactsRequest(
        model_path=path, disk_read=path is not None, disk_seconds=1.0,
        engine_pythons=wanted.engine_pythons, engine_folders=wanted.engine_folders,
    )  # fmt: skip
    found = require_all(probed(options, request))
    require_own_machines(found)
    if wanted.rehearse and not any(host.gpus for host in found):
        return with_links(found)
    return inventory_of(found).hosts


def require_own_machines(hosts: Sequence[Host]) -> None:
    """Two names of one machine would be two nodes with one state folder; only `local#...` makes several nodes of one."""
    seen: dict[tuple[str, str | None], str] = {}
    for host in hosts:
        boot_id = host.system.boot_id if host.system is not None else None
        if boot_id is None:
            continue
        other = seen.setdefault((boot_id, host.hostname), host.name)
        if other != host.name and not (other.startswith("local#") and host.name.startswith("local#")):
            raise UsageError(
                f"{other} and {host.name} are one machine ({host.hostname}).",
                "Name each machine once; local#0-3,local#4-7 makes several nodes of this one.",
            )


def _model_path(options: PlanningOptions, wanted: Wanted) -> str | None:
    """The checkpoint's folder on the hosts, where one is named."""
    if wanted.plan_file is not None:
        from glmplan.cli._files import load_plan

        named = load_plan(wanted.plan_file).model_path
    else:
        named = options.served_model or (str(options.model_path) if options.model_path else "")
    return named if named.startswith(("/", "~")) and not wanted.rehearse else None


def choose_plan(options: PlanningOptions, wanted: Wanted, hosts: Sequence[Host]) -> Plan:
    """The saved plan bound to these hosts, or a new one for their GPUs."""
    from glmplan.cli._plan import make_plan
    from glmplan.cli.launch import saved_plan

    if wanted.plan_file is not None:
        return bind(saved_plan(wanted.plan_file, options), hosts, compare_gpus=not wanted.rehearse)
    if wanted.rehearse and not any(host.gpus for host in hosts):
        return bind(_stand_in_plan(options, len(hosts)), hosts, compare_gpus=False)
    return require_fits(make_plan(options, with_changes=False, inventory=Inventory(origin="probe", hosts=tuple(hosts))))


def require_fits(plan: Plan) -> Plan:
    """The plan, or DoesNotFitError."""
    if not plan.fits:
        raise DoesNotFitError(f"The plan {plan.summary}.", "Run glmplan size with the same options; it says what fits.")
    return plan


def _stand_in_plan(options: PlanningOptions, count: int) -> Plan:
    """A plan on that many nodes for GPUs that are not there."""
    from glmplan.cli._plan import make_plan

    declared = replace(options, hosts=None)
    if options.gpus is not None:
        return require_fits(make_plan(declared, with_changes=False))
    for gpu, per_node in STAND_IN_GPUS:
        pin = ",".join(filter(None, [options.pin, f"nodes={count}"]))
        try:
            plan = make_plan(replace(declared, gpus=f"{count * per_node}x {gpu}", nodes=count, pin=pin), with_changes=False)
        except GlmplanError:
            continue
        if plan.fits and plan.layout.nodes == count:
            say(f"No GPU on these hosts: the rehearsal stands in for {count} node(s) of {per_node}x {gpu}.")
            return plan
    raise DoesNotFitError(
        f"No stand-in plan covers {count} hosts.", 'Name GPUs to stand in for: --gpus "24x rtx-4090-48g" --nodes 3.'
    )


def choose_commands(plan: Plan, wanted: Wanted, hosts: Mapping[str, Host]) -> tuple[NodeCommand, ...]:
    """What each node runs: the engine by its own Python, or the stand-in."""
    commands = node_commands(plan, wanted.endpoints, wanted.more)
    if wanted.rehearse:
        practice = {name: value for name, value in os.environ.items() if name.startswith("GLMPLAN_REHEARSE_")}
        return tuple(prepare.as_rehearsal(command, practice) for command in commands)
    found = tuple(
        prepare.with_python(command, wanted.engine_python or prepare.engine_python(plan, node, hosts[node.host]))
        for command, node in zip(commands, plan.nodes, strict=True)
    )
    if plan.engine_family == "vllm":
        seconds = wanted.deadline_s or prepare.allowed_s(prepare.works(plan, hosts, rehearsal=False))
        found = tuple(prepare.with_patience(one, seconds) for one in found)
    return prepare.with_package(found, plan, hosts)
