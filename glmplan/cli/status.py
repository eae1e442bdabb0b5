"""`glmplan status`: what runs, asked of the hosts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._hosts import HostOptions
from glmplan.cli._options import takes_host_options

if TYPE_CHECKING:
    from glmplan.fleet.status import DeploymentStatus, Listed

EXAMPLES = """Examples:

glmplan status

glmplan status glm-5.2-fp8-3f9a1c --json

glmplan status --hosts h1,h2,h3   (everything that runs there, whoever started it)"""


@takes_host_options
def status(
    options: HostOptions,
    name: Annotated[str | None, typer.Argument(help="A deployment; without it, the only one launched from here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what runs where. Exit code 6 when a deployment is not whole, 5 when a host does not answer."""
    from glmplan.cli._launching import fleet_of
    from glmplan.fleet import deployment as records
    from glmplan.fleet.status import status as ask

    if options.hosts is not None and name is None:
        _list(options, as_json)
        return
    record = records.load(name)
    with fleet_of(record, options) as fleet:
        found = ask(fleet, record)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        _print(found)
    if found.word != "serving":
        raise typer.Exit(5 if found.word == "unknown" else 6)


def _list(options: HostOptions, as_json: bool) -> None:
    import json

    from glmplan.cli._hosts import named_hosts, ssh_options
    from glmplan.fleet.hosts import Fleet
    from glmplan.fleet.status import listed

    with Fleet(named_hosts(options), ssh_options(options)) as fleet:
        found, failed = listed(fleet)
    if as_json:
        typer.echo(json.dumps([one.model_dump() for one in found], indent=1))
    else:
        _print_list(found, [host for host in fleet.names if host not in failed])
    for host, error in failed.items():
        print_error(host, error.message, error.next_step)
    if failed:
        raise typer.Exit(5)


def print_error(host: str, message: str, next_step: str) -> None:
    """A host's failure on stderr."""
    import sys

    print(f"glmplan: {message if host in message else f'{host}: {message}'}", file=sys.stderr)
    if next_step:
        print(f"  next: {next_step}", file=sys.stderr)


def _ago(since_s: float | None) -> str:
    from glmplan.cli._follow import minutes

    return "-" if since_s is None else f"{minutes(max(time.time() - since_s, 0))} ago"


def _print(found: DeploymentStatus) -> None:
    from rich.table import Table

    from glmplan.cli._follow import minutes
    from glmplan.cli._output import console
    from glmplan.units import format_bytes

    out = console()
    colour = {"serving": "green", "starting": "yellow"}.get(found.word, "red")
    kind = "rehearsal, " if found.rehearsal else ""
    out.print(
        f"[bold]{found.name}[/]: [{colour}]{found.word}[/] ({kind}{found.url} on {found.nodes[0].host})", soft_wrap=True
    )
    out.print(f"  {found.summary}", soft_wrap=True)
    out.print(f"  canaries passed at the launch: {', '.join(found.canaries_passed) or 'none'}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("node", "host", "state", "pid", "started", "log age", "processes", "GPU memory", "note"):
        table.add_column(column)
    for node in found.nodes:
        end = f" ({node.exit_status})" if node.exit_status is not None else f" (signal {node.signal})" if node.signal else ""
        table.add_row(
            str(node.node_rank), node.host, node.state + end, str(node.pid or "-"), _ago(node.started_s),
            "-" if node.log_age_s is None else minutes(node.log_age_s), str(node.processes),
            "-" if node.gpu_memory_bytes is None else format_bytes(node.gpu_memory_bytes), node.note,
        )  # fmt: skip
    out.print(table)


def _print_list(found: tuple[Listed, ...], hosts: list[str]) -> None:
    from rich.table import Table

    from glmplan.cli._output import console

    out = console()
    if not found and not hosts:
        return
    if not found:
        out.print(f"No deployment on {', '.join(hosts)}.", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "deployment", "node", "state", "pid", "owner", "GPUs", "started"):
        table.add_column(column, overflow="fold")
    for one in found:
        gpus = ",".join(map(str, one.gpu_indexes)) or "-"
        table.add_row(
            one.host, one.deployment, "-" if one.node_rank is None else str(one.node_rank), one.state, str(one.pid or "-"),
            one.owner or "-", gpus, _ago(one.started_s),
        )  # fmt: skip
    out.print(table)
