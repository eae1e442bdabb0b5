"""What `launch`, `restart` and `watch` do together: probe, plan, ask, examine, start, follow, tell."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from glmplan.cli._hosts import HostOptions, named_hosts, probed, require_all, ssh_options
from glmplan.cli._options import PlanningOptions
from glmplan.cli._telling import say, tell_failure, tell_stops
from glmplan.engines.base import Endpoints, More, NodeCommand
from glmplan.engines.commands import node_commands
from glmplan.errors import DoesNotFitError, GlmplanError, UsageError
from glmplan.facts.host import Host, Inventory
from glmplan.facts.model_config import first_problem, read_json
from glmplan.fleet import prepare
from glmplan.fleet.canary import CanarySettings
from glmplan.fleet.deployment import Deployment
from glmplan.fleet.follow import Limits
from glmplan.fleet.hosts import Fleet
from glmplan.fleet.launch import AnswersWrong, Judgement, Launched, LaunchFailed, LaunchInterrupted, launch
from glmplan.fleet.reference import Reference
from glmplan.fleet.start import Secrets
from glmplan.planning.bind import bind
from glmplan.planning.plan import Plan

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STAND_IN_GPUS = (("rtx-4090-48g", 8), ("rtx-pro-6000", 8), ("h200", 8))
"""What a rehearsal on hosts without GPUs stands in for: the first of these that carries the model on all hosts."""


@dataclass(frozen=True)
class Wanted:
    """What was typed beside hardware and load."""

    plan_file: Path | None
    rehearse: bool
    yes: bool
    name: str | None
    endpoints: Endpoints
    api_key_env: str | None
    hf_token_env: str | None
    engine_python: str | None
    more: More
    skip_doctor: bool
    deadline_s: float | None
    stall_s: float | None
    lost_after_s: float
    canary: bool
    canary_reference: Path | None
    canaries: tuple[str, ...]
    as_json: bool

    @property
    def engine_pythons(self) -> tuple[str, ...]:
        """The Python that was named, if any."""
        return (self.engine_python,) if self.engine_python else ()

    @property
    def engine_folders(self) -> tuple[str, ...]:
        """Where the engine will find packages first: PYTHONPATH of --engine-env."""
        values = [value for name, value in self.more.environment if name == "PYTHONPATH"]
        return tuple(folder for folder in values[-1].split(":") if folder) if values else ()


class NameTakenError(GlmplanError):
    """A launch of this name with another plan or other hosts has not been stopped."""


class ExaminedError(GlmplanError):
    """The doctor found what would make the launch fail."""


def more_words(words: list[str] | None, variables: list[str] | None) -> More:
    """What `--engine-arg` and `--engine-env` add."""
    pairs = []
    for text in variables or ():
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise UsageError(f"--engine-env {text!r} is not NAME=VALUE.", "Write --engine-env NCCL_DEBUG=INFO.")
        pairs.append((name, value))
    return More(tuple(words or ()), tuple(pairs))


def canary_names(text: str | None) -> tuple[str, ...]:
    """The names of `--canaries`, refused before anything is asked of a host."""
    from glmplan.fleet.canary import CanarySettings, chosen

    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise UsageError(f"--canaries {text!r} has an empty name.", "Write --canaries fact,needle, or leave it out.")
    chosen(CanarySettings(only=names))
    return names


def run(options: PlanningOptions, wanted: Wanted) -> Launched:
    """The whole way from options to a healthy deployment."""
    secrets = read_secrets(wanted.api_key_env, wanted.hf_token_env)
    check_listening(wanted.endpoints.http_host, secrets)
    reference = None if wanted.canary_reference is None else read_reference(wanted.canary_reference)
    hosts = find_hosts(options, wanted)
    plan = choose_plan(options, wanted, hosts)
    by_name = {host.name: host for host in hosts}
    commands = choose_commands(plan, wanted, by_name)
    has_gpus = all(by_name[node.host].gpus for node in plan.nodes)
    deployment = prepare.make_deployment(
        plan, commands, wanted.endpoints, wanted.name, secrets.api_key is not None, wanted.rehearse, has_gpus
    )
    require_own_name(options, deployment)
    show(plan, hosts, deployment)
    confirm(wanted, deployment)
    examine(options, wanted, plan, deployment)
    return bring_up(options, deployment, secrets, judgement(wanted, deployment, by_name, reference))


def read_secrets(api_key_env: str | None, hf_token_env: str | None) -> Secrets:
    """The values of the named variables; an empty one is refused."""
    values = []
    for option, variable in (("--api-key-env", api_key_env), ("--hf-token-env", hf_token_env)):
        value = None if variable is None else os.environ.get(variable, "").strip()
        if value == "":
            raise UsageError(
                f"{option} names {variable}, which is not set here.", f"Set it: read -rs {variable}; export {variable}"
            )
        values.append(value)
    return Secrets(*values)


def check_listening(http_host: str, secrets: Secrets) -> None:
    """Nobody serves a network without a key."""
    if http_host not in LOOPBACK and not http_host.startswith("127.") and secrets.api_key is None:
        raise UsageError(
            f"--http-host {http_host} is open to the network, and no API key is given.",
            "Name the variable that holds one with --api-key-env, or keep 127.0.0.1 and use ssh -L.",
        )


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


def require_own_name(options: HostOptions, deployment: Deployment) -> None:
    """Another launch of this name must not run: its record, by which `stop` finds its hosts, would be lost."""
    from glmplan.fleet import deployment as records
    from glmplan.fleet.status import status

    if deployment.name not in records.recorded():
        return
    known = records.load(deployment.name)
    if known.digest == deployment.digest:
        return
    with fleet_of(known, options) as fleet:
        nodes = status(fleet, known).nodes
    running = [node.host for node in nodes if node.state == "running" or node.processes]
    silent = [node.host for node in nodes if node.state == "unreachable"]
    if not running and not silent:
        return
    words = f"runs on {', '.join(running)}" if running else f"may still run on {', '.join(silent)}, which does not answer"
    raise NameTakenError(
        f"Another launch of the name {known.name} {words}. Nothing was started.",
        f"Stop it (glmplan stop {known.name}), or choose another --name.",
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
    from dataclasses import replace

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


def show(plan: Plan, hosts: Sequence[Host], deployment: Deployment) -> None:
    """What is about to start, and on which hosts not."""
    from rich.console import Console

    from glmplan.cli._follow import numbers
    from glmplan.cli._output import print_summary

    print_summary(Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140), plan)
    for node in plan.nodes:
        say(f"  node {node.node_rank}: {node.host}, address {node.address or 'by name'}, GPUs {numbers(node.gpu_indexes)}")
    unused = [host.name for host in hosts if host.name not in {node.host for node in plan.nodes}]
    if unused:
        say(f"  not needed: {', '.join(unused)}")
    for warning in plan.warnings:
        say(f"  note: {warning}")
    tables = prepare.sent_tables(deployment)
    if tables:
        say(f"  tuned tables go along: {' and '.join(tables)}")
    if deployment.rehearsal:
        say("  rehearsal: a stand-in runs instead of the engine; no weights are read")


def confirm(wanted: Wanted, deployment: Deployment) -> None:
    """Ask on a terminal; elsewhere the command itself is the consent."""
    if wanted.yes or not sys.stdin.isatty() or not sys.stderr.isatty():
        return
    import typer

    if not typer.confirm(f"Start {deployment.name} on {', '.join(deployment.hosts)}?", err=True):
        raise typer.Exit(130)


REHEARSED_CHECKS = "reachable,interface,hostname,clock,exposure,ports,paths,limits,leftovers"
"""What matters to a stand-in: it uses ports and paths, but no GPU memory, engine or model file."""


PASSING = {"ports", "paths"}
"""Checks that another visit spoils while it listens on the rendezvous port itself; they are tried twice, some time apart."""


def examine(options: PlanningOptions, wanted: Wanted, plan: Plan, deployment: Deployment) -> None:
    """The doctor's quick checks; a failed one ends the launch unless told otherwise. A running deployment is adopted."""
    from glmplan.doctor.checks import chosen
    from glmplan.doctor.examine import Visit, examine
    from glmplan.fleet.status import listed

    def runs() -> bool:
        return any(one.deployment == deployment.name and one.state == "running" for one in listed(fleet)[0])

    adopting = f"{deployment.name} runs here already: workers of the same plan are adopted, the rest is started."
    with fleet_of(deployment, options) as fleet:
        if runs():
            say(adopting)
            return
        say("Examining the hosts ...")
        visit = Visit(
            checks=chosen(REHEARSED_CHECKS if deployment.rehearsal else None, False), plan=plan, endpoints=wanted.endpoints,
            engine_pythons=wanted.engine_pythons, engine_folders=wanted.engine_folders,
        )  # fmt: skip
        report = examine(fleet, visit)
        if {finding.check for finding in report.findings if finding.status == "fail"} & PASSING:
            time.sleep(random.uniform(0.5, 2.5))
            report = examine(fleet, visit)
        if report.exit_code and runs():  # another launch of the same plan was faster
            say(adopting)
            return
    for finding in report.findings:
        if finding.status in ("warn", "fail"):
            say(f"  {finding.status} {finding.host}: {finding.title}: {finding.evidence}")
            if finding.repair:
                say(f"       repair: {finding.repair}")
    failed = sorted({finding.check for finding in report.findings if finding.status == "fail"})
    if failed and not wanted.skip_doctor:
        raise ExaminedError(
            f"{len(failed)} check(s) failed: {', '.join(failed)}. Nothing was started.",
            "Repair them (lines above), or start all the same with --skip-doctor.",
        )
    say(f"  {report.count('ok')} checks ok, {report.count('warn')} warnings, {report.count('fail')} failures")


def judgement(wanted: Wanted, deployment: Deployment, hosts: Mapping[str, Host], reference: Reference | None) -> Judgement:
    """Limits and canaries."""
    works = prepare.works(deployment.plan, hosts, deployment.rehearsal)
    limits = Limits(wanted.deadline_s or prepare.allowed_s(works), wanted.stall_s, wanted.lost_after_s)
    if not wanted.canary:
        return Judgement(works, limits, None)
    return Judgement(works, limits, canary_settings(deployment, reference, wanted.canaries))


def canary_settings(deployment: Deployment, reference: Reference | None, only: tuple[str, ...]) -> CanarySettings:
    """What the server is asked."""
    from glmplan.fleet.canary import chosen

    found = CanarySettings(
        context_tokens=deployment.plan.settings.context_tokens,
        only=only,
        reference=reference,
        engine_family=deployment.plan.engine_family,
    )
    chosen(found)
    return found


def read_reference(path: Path) -> Reference:
    """Answers that `glmplan verify --record` wrote."""
    try:
        return Reference.model_validate(read_json(path))
    except ValidationError as error:
        raise UsageError(
            f"{path} is no record of answers: {first_problem(error)}.", "Make one: glmplan verify --url URL --record FILE."
        ) from None


@contextmanager
def fleet_of(deployment: Deployment, options: HostOptions) -> Iterator[Fleet]:
    """Connections to the deployment's hosts."""
    from glmplan.transport.base import parse_hosts

    with Fleet(parse_hosts(",".join(deployment.hosts)), ssh_options(options)) as fleet:
        yield fleet


def bring_up(options: HostOptions, deployment: Deployment, secrets: Secrets, judging: Judgement) -> Launched:
    """Start and follow with a picture of it; failures are told in full before they end the command."""
    from glmplan.cli._follow import observer

    watching = observer(deployment, judging.limits.deadline_s)
    try:
        with fleet_of(deployment, options) as fleet:
            return launch(fleet, deployment, secrets, judging, watching)
    except LaunchFailed as error:
        watching.close()
        tell_failure(error)
        raise
    except AnswersWrong as error:
        watching.close()
        tell_stops(error.stops)
        raise
    except LaunchInterrupted as error:
        watching.close()
        say("Interrupted." if error.stops else f"Interrupted; {deployment.name} ran before and goes on.")
        tell_stops(error.stops)
        raise
    finally:
        watching.close()
