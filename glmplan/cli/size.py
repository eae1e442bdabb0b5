"""`glmplan size`: does it fit, in which layout, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._options import PlanningOptions, takes_planning_options

if TYPE_CHECKING:
    from rich.console import Console

    from glmplan.planning.plan import Plan

EXAMPLES = """Examples:

glmplan size --gpus "24x rtx-4090-48g" --nodes 3

glmplan size --gpu rtx-5090 --context 131072

glmplan size --gpus "8x a100-80g" --checkpoint awq-int4 --explain

glmplan size --recipe 8x-h200

glmplan size --inventory hosts.toml --context 256k --concurrency 8 --save plan.json"""


@takes_planning_options
def size(
    options: PlanningOptions,
    explain: Annotated[bool, typer.Option("--explain", help="Show every line item of the fullest rank.")] = False,
    rejected: Annotated[bool, typer.Option("--rejected", help="Show the layouts not chosen, with reasons.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the plan to a file for launch --plan.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --save overwrite a file.")] = False,
) -> None:
    """Fit GLM-5.2 into GPUs, rank by rank, to the byte. Without hardware options, this machine's GPUs are used."""
    from glmplan.cli._files import check_writable, save_plan
    from glmplan.cli._plan import make_plan

    if save is not None:
        check_writable(save, force)
    plan = make_plan(options, with_changes=as_json or rejected or save is not None)
    if save is not None and plan.fits:
        save_plan(plan, save)
    if as_json:
        typer.echo(plan.model_dump_json(indent=1))
    else:
        _print(plan, explain, rejected, save)
    if not plan.fits:
        raise typer.Exit(3)


def _print(plan: Plan, explain: bool, rejected: bool, save: Path | None) -> None:
    from glmplan.cli import _output

    out = _output.console()
    _output.print_plan(out, plan)
    if plan.fits and plan.nodes[0].sm is not None:
        _flags(out, plan)
    if explain:
        _output.print_explanation(out, plan)
    if rejected:
        _output.print_rejected(out, plan)
    if plan.fits and save is not None:
        out.print(f"Saved {save}. Next: glmplan launch --dry-run --plan {save}", soft_wrap=True)
    elif plan.fits:
        _output.print_lines(out, ["Next: the same options with `glmplan launch --dry-run` print each node's command."])
    elif save is not None:
        out.print(f"[yellow]Not saved:[/] {save} would hold a plan that does not fit.", soft_wrap=True)


def _flags(out: Console, plan: Plan) -> None:
    """The first node's command on a few lines; the other nodes differ in their rank."""
    from glmplan.cli import _output
    from glmplan.engines.base import Endpoints, wrapped
    from glmplan.engines.commands import node_commands

    command = node_commands(plan, Endpoints())[0]
    out.print("[bold]Flags[/] (first node; the others differ in their rank, and in weight kernels where their GPUs differ)")
    _output.print_lines(out, ["  " + line for line in wrapped(command)])
    out.print()
