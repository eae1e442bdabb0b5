"""What `launch`, `restart` and `watch` do together: probe, plan, ask, examine, start, follow, tell."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from glmplan.cli._choosing import choose_commands, choose_plan, find_hosts
from glmplan.cli._hosts import HostOptions, ssh_options
from glmplan.cli._options import PlanningOptions
from glmplan.cli._telling import say, tell_failure, tell_stops
from glmplan.cli._wanted import Wanted, check_listening, read_reference, read_secrets
from glmplan.engines.commands import contradictions
from glmplan.errors import GlmplanError
from glmplan.facts.host import Host
from glmplan.fleet import prepare
from glmplan.fleet.canary import CanarySettings
from glmplan.fleet.deployment import Deployment
from glmplan.fleet.follow import Limits
from glmplan.fleet.hosts import Fleet
from glmplan.fleet.launch import AnswersWrong, Judgement, Launched, LaunchFailed, LaunchInterrupted, launch
from glmplan.fleet.reference import Reference
from glmplan.fleet.start import Secrets
from glmplan.planning.plan import Plan

REHEARSED_CHECKS = "reachable,interface,hostname,clock,exposure,ports,paths,limits,leftovers"
"""What matters to a stand-in: it uses ports and paths, but no GPU memory, engine or model file."""
PASSING = {"ports", "paths"}
"""Checks that another visit spoils while it listens on the rendezvous port itself; they are tried twice, some time apart."""


class NameTakenError(GlmplanError):
    """A launch of this name with another plan or other hosts has not been stopped."""


class ExaminedError(GlmplanError):
    """The doctor found what would make the launch fail."""


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
    show(plan, hosts, deployment, contradictions(plan, wanted.endpoints, wanted.more))
    confirm(wanted, deployment)
    examine(options, wanted, plan, deployment)
    return bring_up(options, deployment, secrets, judgement(wanted, deployment, by_name, reference))


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


def show(plan: Plan, hosts: Sequence[Host], deployment: Deployment, notes: Sequence[str]) -> None:
    """What is about to start, and on which hosts not; `notes`: beside the plan's own."""
    from rich.console import Console

    from glmplan.cli._follow import numbers
    from glmplan.cli._output import print_summary

    print_summary(Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140), plan)
    for node in plan.nodes:
        say(f"  node {node.node_rank}: {node.host}, address {node.address or 'by name'}, GPUs {numbers(node.gpu_indexes)}")
    unused = [host.name for host in hosts if host.name not in {node.host for node in plan.nodes}]
    if unused:
        say(f"  not needed: {', '.join(unused)}")
    for warning in (*plan.warnings, *notes):
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
