"""`glmplan launch`: from a list of hosts to a server whose answers were checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._options import PlanningOptions, takes_planning_options

if TYPE_CHECKING:
    from glmplan.cli._wanted import Wanted
    from glmplan.engines.base import Endpoints, More, NodeCommand
    from glmplan.planning.plan import Plan

STARTING, JUDGING = "Starting", "Judging"

EXAMPLES = """Examples:

glmplan launch --hosts h1,h2,h3 --checkpoint fp8 --served-model /models/GLM-5.2-FP8

glmplan launch --hosts h1,h2,h3 --plan plan.json --yes

glmplan launch --hosts h1,h2,h3 --rehearse

glmplan launch --dry-run --gpus "24x rtx-4090-48g" --nodes 3"""


@takes_planning_options
def launch(
    options: PlanningOptions,
    plan: Annotated[Path | None, typer.Option(help="A plan saved by size --save, instead of planning again.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what each node would run, and stop.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Run a stand-in instead of the engine: a minute, no weights.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the deployment (default: model and checkpoint).", rich_help_panel=STARTING)
    ] = None,
    http_host: Annotated[
        str, typer.Option(help="Address the HTTP server listens on.", rich_help_panel=STARTING)
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="HTTP port.", rich_help_panel=STARTING)] = 30000,
    rendezvous_port: Annotated[
        int, typer.Option(help="Port of the first node where all ranks meet.", rich_help_panel=STARTING)
    ] = 20000,
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable here that holds the server's API key.", rich_help_panel=STARTING)
    ] = None,
    hf_token_env: Annotated[
        str | None, typer.Option(help="Variable here that holds a Hugging Face token.", rich_help_panel=STARTING)
    ] = None,
    engine_python: Annotated[
        str | None, typer.Option(help="The engine's Python on the hosts, where it is not found.", rich_help_panel=STARTING)
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="A word for the engine's command line, after the planned ones; may be repeated.", rich_help_panel=STARTING
        ),
    ] = None,
    engine_env: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the engine, over the planned ones; may be repeated.", rich_help_panel=STARTING),
    ] = None,
    skip_doctor: Annotated[
        bool, typer.Option("--skip-doctor", help="Start although a check fails.", rich_help_panel=JUDGING)
    ] = False,
    deadline: Annotated[
        float | None,
        typer.Option(help="Seconds to the first answer, instead of what disk and bytes allow.", rich_help_panel=JUDGING),
    ] = None,
    stall: Annotated[
        float | None, typer.Option(help="Seconds without a sign of life, instead of by phase.", rich_help_panel=JUDGING)
    ] = None,
    lost_after: Annotated[
        float, typer.Option(help="Seconds after which a silent host is lost.", rich_help_panel=JUDGING)
    ] = 60.0,
    no_canary: Annotated[
        bool, typer.Option("--no-canary", help="Do not ask the server anything.", rich_help_panel=JUDGING)
    ] = False,
    canary_reference: Annotated[
        Path | None, typer.Option(help="Answers recorded by verify --record to compare with.", rich_help_panel=JUDGING)
    ] = None,
    canaries: Annotated[
        str | None, typer.Option(help="Only these canaries: fact,needle,...", rich_help_panel=JUDGING)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Start GLM-5.2 on hosts, follow it, and call it healthy when its answers are right."""
    from glmplan.cli import _wanted
    from glmplan.engines.base import Endpoints
    from glmplan.errors import UsageError

    endpoints = Endpoints(http_host, http_port, rendezvous_port)
    if dry_run:
        _dry_run(options, plan, endpoints, as_json, _wanted.more_words(engine_arg, engine_env))
        return
    if options.hosts is None:
        raise UsageError(
            "No host is named, so there is nothing to start on.",
            "Add --hosts a,b,c (or --hosts local), or --dry-run to print the commands.",
        )
    for word, value in (("deadline", deadline), ("stall", stall), ("lost-after", lost_after)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{word} is {value:g}; it must be above 0 seconds, and finite.", "Give seconds.")
    wanted = _wanted.Wanted(
        plan_file=plan, rehearse=rehearse, yes=yes, name=name, endpoints=endpoints, api_key_env=api_key_env,
        hf_token_env=hf_token_env, engine_python=engine_python,
        more=_wanted.more_words(engine_arg, engine_env), skip_doctor=skip_doctor, deadline_s=deadline, stall_s=stall,
        lost_after_s=lost_after, canary=not no_canary, canary_reference=canary_reference,
        canaries=_wanted.canary_names(canaries), as_json=as_json,
    )  # fmt: skip
    _start(options, wanted)


def _start(options: PlanningOptions, wanted: Wanted) -> None:
    from glmplan.cli import _launching, _telling

    result = _launching.run(options, wanted)
    if wanted.as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        _telling.print_result(result)


def _dry_run(options: PlanningOptions, plan: Path | None, endpoints: Endpoints, as_json: bool, more: More) -> None:
    from glmplan.cli._plan import make_plan
    from glmplan.engines.commands import contradictions, node_commands
    from glmplan.errors import DoesNotFitError

    chosen = saved_plan(plan, options) if plan is not None else make_plan(options, with_changes=False)
    if not chosen.fits:
        raise DoesNotFitError(f"The plan {chosen.summary}.", "Run glmplan size with the same options; it says what fits.")
    commands = node_commands(chosen, endpoints, more)
    if as_json:
        import json

        typer.echo(json.dumps([command.model_dump() for command in commands], indent=1))
    else:
        _print_commands(chosen, commands, (*chosen.warnings, *contradictions(chosen, endpoints, more)))


def saved_plan(path: Path, options: PlanningOptions) -> Plan:
    """The plan of a file; planning options beside it contradict it."""
    from dataclasses import fields

    from glmplan.cli._files import load_plan
    from glmplan.cli._hosts import HostOptions
    from glmplan.errors import UsageError

    about_hosts = {field.name for field in fields(HostOptions)}
    plain = PlanningOptions()
    given = [n for n, value in vars(options).items() if n not in about_hosts and value != getattr(plain, n)]
    if given:
        raise UsageError(
            f"--plan and --{given[0].replace('_', '-')} contradict each other: the plan holds it already.",
            "Give --plan alone, or plan again without it.",
        )
    return load_plan(path)


def _print_commands(plan: Plan, commands: tuple[NodeCommand, ...], notes: tuple[str, ...]) -> None:
    import sys

    from glmplan.engines.base import render

    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if plan.layout.nodes > 1 and plan.inventory_origin in ("declared", "default"):
        first = plan.nodes[0].host
        typer.echo(f"# {first} stands for the first host's address; --inventory FILE or --hosts names real ones.")
    typer.echo(f"# {plan.summary}")
    for command in commands:
        typer.echo(f"\n# node {command.node_rank}: {command.host}")
        typer.echo(render(command))
