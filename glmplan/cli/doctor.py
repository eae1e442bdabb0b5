"""`glmplan doctor`: is everything as a launch needs it, on every host? Findings with evidence and the repair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._hosts import HostOptions
from glmplan.cli._options import takes_host_options

if TYPE_CHECKING:
    from rich.console import Console

    from glmplan.doctor.examine import Visit
    from glmplan.doctor.finding import Finding, Report
    from glmplan.planning.plan import Plan

EXAMPLES = """Examples:

glmplan doctor

glmplan doctor --hosts a,b,c --plan plan.json

glmplan doctor --hosts a,b,c --deep --model-path /models/GLM-5.2-FP8

glmplan doctor --hosts local#0-1,local#2-3 --deep --only copies,all-reduce,links

glmplan doctor --hosts a,b --json | jq '.findings[] | select(.status == "fail")'"""

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


@takes_host_options
def doctor(
    options: HostOptions,
    plan: Annotated[Path | None, typer.Option(help="Judge against a plan saved by size --save.")] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also run kernels, copies between GPUs, an all-reduce over all ranks, disk reads.")
    ] = False,
    only: Annotated[str | None, typer.Option(help="Checks to run, by name: ports,paths,clock.")] = None,
    list_checks: Annotated[bool, typer.Option("--list", help="List the checks, and stop.")] = False,
    model_path: Annotated[
        str | None, typer.Option(help="The model folder, or a repository's name, on the hosts. Default: the plan's.")
    ] = None,
    engine_python: Annotated[
        list[str] | None, typer.Option(help="The engine's Python on the hosts, beside the usual places; may be repeated.")
    ] = None,
    http_host: Annotated[str, typer.Option(help="Address the HTTP server is to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="HTTP port.")] = 30000,
    rendezvous_port: Annotated[int, typer.Option(help="Port of the first node where all ranks meet.")] = 20000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check hosts before a launch, or beside a running server: nothing is changed. Exit code 1 when anything failed."""
    from glmplan.doctor.checks import chosen
    from glmplan.doctor.examine import Visit
    from glmplan.engines.base import Endpoints

    if list_checks:
        _list(as_json)
        return
    visit = Visit(
        checks=chosen(only, deep),
        plan=_plan(plan),
        plan_name=None if plan is None else str(plan),
        endpoints=Endpoints(http_host, http_port, rendezvous_port),
        model_path=model_path,
        engine_pythons=tuple(engine_python or ()),
        deep=deep,
        tell=lambda words: typer.echo(f"doctor: {words}", err=True),
    )
    report = _examined(options, visit)
    if as_json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        _print(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _examined(options: HostOptions, visit: Visit) -> Report:
    from dataclasses import replace

    from glmplan.cli._hosts import named_hosts, ssh_options
    from glmplan.doctor.examine import examine
    from glmplan.errors import UsageError
    from glmplan.fleet.hosts import Fleet

    named = options if options.hosts is not None else replace(options, hosts="local")
    names = named_hosts(named)
    if visit.plan is not None and len(names) != len(visit.plan.nodes):
        raise UsageError(
            f"The plan is for {len(visit.plan.nodes)} hosts; {len(names)} {'is' if len(names) == 1 else 'are'} named.",
            "Name as many hosts as the plan has nodes, in node-rank order: --hosts a,b,c.",
        )
    with Fleet(names, ssh_options(named)) as hosts:
        return examine(hosts, visit)


def _plan(path: Path | None) -> Plan | None:
    from glmplan.cli._files import load_plan

    return None if path is None else load_plan(path)


def _list(as_json: bool) -> None:
    from glmplan.doctor.checks import CHECKS

    if as_json:
        import json

        typer.echo(json.dumps([{"name": c.name, "title": c.title, "level": c.level} for c in CHECKS], indent=1))
        return
    width = max(len(check.name) for check in CHECKS)
    for check in CHECKS:
        typer.echo(f"{check.name:<{width}}  {check.level:<5}  {check.title}")


def _print(report: Report) -> None:
    """Host by host, what needs attention first; skipped checks are one line a reason."""
    from rich.markup import escape

    from glmplan.cli._output import console
    from glmplan.doctor.finding import STATUSES

    out = console()
    for host in dict.fromkeys(finding.host for finding in report.findings):
        out.print(f"[bold]{escape(host)}[/]")
        own = [finding for finding in report.findings if finding.host == host]
        for status in ("fail", "warn", "ok"):
            for finding in own:
                if finding.status == status:
                    _print_finding(out, finding)
        _print_skipped(out, [finding for finding in own if finding.status == "skip"])
        out.print()
    words = ", ".join(f"{report.count(status)} {status}" for status in STATUSES)
    hosts = f"{len(report.hosts)} host{'s' if len(report.hosts) != 1 else ''}"
    out.print(f"{hosts} in {report.elapsed_s:.1f} s: {words}")


def _print_finding(out: Console, finding: Finding) -> None:
    from rich.markup import escape

    style = STYLES[finding.status]
    evidence = escape(finding.evidence)
    out.print(f"  [{style}]{finding.status:<4}[/]  {finding.check:<13}  {evidence}", soft_wrap=True)
    if finding.repair and finding.status in ("warn", "fail"):
        out.print(f"{'':<23}[cyan]repair[/] {escape(finding.repair)}", soft_wrap=True)


def _print_skipped(out: Console, findings: list[Finding]) -> None:
    from rich.markup import escape

    reasons: dict[str, list[str]] = {}
    for finding in findings:
        reasons.setdefault(finding.evidence, []).append(finding.check)
    for reason, names in reasons.items():
        out.print(f"  [dim]skip  {', '.join(names)}: {escape(reason)}[/]", soft_wrap=True)
