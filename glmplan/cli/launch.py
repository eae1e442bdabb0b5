"""`glmplan launch`: print the exact command of every node. Starting them comes with a later version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._options import PlanningOptions, takes_planning_options

if TYPE_CHECKING:
    from glmplan.engines.base import NodeCommand
    from glmplan.planning.plan import Plan

EXAMPLES = """Examples:

glmplan launch --dry-run --gpus "24x rtx-4090-48g" --nodes 3

glmplan launch --dry-run --plan plan.json --json"""


@takes_planning_options
def launch(
    options: PlanningOptions,
    plan: Annotated[Path | None, typer.Option(help="A plan saved by size --save, instead of planning again.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what each node would run, and stop.")] = False,
    http_host: Annotated[str, typer.Option(help="Address the HTTP server listens on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="HTTP port.")] = 30000,
    rendezvous_port: Annotated[int, typer.Option(help="Port of the first node where all ranks meet.")] = 20000,
    as_json: Annotated[bool, typer.Option("--json", help="Print argv and environment as JSON.")] = False,
) -> None:
    """Print argv and environment of every node, exactly."""
    from glmplan.cli._plan import make_plan
    from glmplan.engines.base import Endpoints
    from glmplan.errors import DoesNotFitError, UsageError

    if not dry_run:
        raise UsageError(
            "This version prints commands and starts none; launch needs --dry-run.",
            "Add --dry-run and run the printed command on each node.",
        )
    endpoints = Endpoints(http_host, http_port, rendezvous_port)
    chosen = _saved(plan, options) if plan is not None else make_plan(options, with_changes=False)
    if not chosen.fits:
        raise DoesNotFitError(f"The plan {chosen.summary}.", "Run glmplan size with the same options; it says what fits.")
    commands = node_commands(chosen, endpoints)
    if as_json:
        import json

        typer.echo(json.dumps([command.model_dump() for command in commands], indent=1))
    else:
        _print(chosen, commands)


def _saved(path: Path, options: PlanningOptions) -> Plan:
    from glmplan.cli._files import load_plan
    from glmplan.errors import UsageError

    if options != PlanningOptions():
        given = [name for name, value in vars(options).items() if value != getattr(PlanningOptions(), name)]
        raise UsageError(
            f"--plan and --{given[0].replace('_', '-')} contradict each other: the plan holds it already.",
            "Give --plan alone, or plan again without it.",
        )
    return load_plan(path)


def node_commands(plan: Plan, endpoints: object) -> tuple[NodeCommand, ...]:
    """The commands of a plan, from the engine family's builder."""
    from glmplan.engines import sglang, vllm
    from glmplan.engines.base import Endpoints
    from glmplan.errors import UnsupportedError, UsageError
    from glmplan.facts.profiles import engine_profile

    assert isinstance(endpoints, Endpoints)
    engine = engine_profile(plan.engine)
    if engine.family != plan.engine_family:
        raise UsageError(
            f"The plan names {plan.engine} and the family {plan.engine_family}.", "Save it again with glmplan size."
        )
    if any(node.sm is None for node in plan.nodes):
        raise UnsupportedError("AMD GPUs are sized only; glmplan has no launch command for them.", "Use NVIDIA GPUs.")
    build = sglang.commands if plan.engine_family == "sglang" else vllm.commands
    return build(plan, engine, endpoints)


def _print(plan: Plan, commands: tuple[NodeCommand, ...]) -> None:
    import sys

    from glmplan.engines.base import render

    for warning in plan.warnings:
        print(f"note: {warning}", file=sys.stderr)
    if plan.layout.nodes > 1 and plan.inventory_origin in ("declared", "default"):
        first = plan.nodes[0].host
        typer.echo(f"# {first} stands for the first host's address; --inventory FILE names real ones.")
    typer.echo(f"# {plan.summary}")
    for command in commands:
        typer.echo(f"\n# node {command.node_rank}: {command.host}")
        typer.echo(render(command))
