"""`glmplan stop`: take a deployment down, and prove that nothing of it is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._hosts import HostOptions
from glmplan.cli._options import takes_host_options

if TYPE_CHECKING:
    from glmplan.fleet.stop import HostStop

EXAMPLES = """Examples:

glmplan stop

glmplan stop glm-5.2-fp8-3f9a1c --grace 30

glmplan stop glm-5.2-fp8-3f9a1c --hosts h1,h2,h3   (launched from another machine)"""


@takes_host_options
def stop(
    options: HostOptions,
    name: Annotated[str | None, typer.Argument(help="A deployment; without it, the only one launched from here.")] = None,
    grace: Annotated[float, typer.Option(help="Seconds between SIGTERM and SIGKILL.")] = 10.0,
    forget: Annotated[bool, typer.Option("--forget", help="Also remove its logs and records.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Stop every process of a deployment on every host; NVML must then say that its GPU memory is free."""
    import json

    from glmplan.cli._hosts import named_hosts, ssh_options
    from glmplan.cli._telling import stop_words
    from glmplan.errors import UsageError
    from glmplan.fleet import deployment as records
    from glmplan.fleet.hosts import Fleet
    from glmplan.fleet.stop import stop_all
    from glmplan.transport.base import parse_hosts

    if not 0 <= grace <= 600:
        raise UsageError(f"--grace is {grace:g}; it must lie in 0 to 600 seconds.", "Try 10.")
    if options.hosts is not None and name is None:
        raise UsageError("--hosts without a name would not say what to stop.", "List with glmplan status --hosts ...")
    record = None if options.hosts is not None else records.load(name)
    hosts = named_hosts(options) if record is None else parse_hosts(",".join(record.hosts))
    chosen = records.check_name(name) if record is None and name is not None else record.name if record else ""
    with Fleet(hosts, ssh_options(options)) as fleet:
        found = stop_all(fleet, chosen, grace_s=grace)
        gone = all(one.stopped for one in found)
        if forget and gone:
            fleet.ask_all("forget", {host: {"deployment": chosen} for host in fleet.names})
    if forget and gone:
        records.forget(chosen)
    if as_json:
        typer.echo(json.dumps([one.model_dump() for one in found], indent=1))
    else:
        for one in found:
            typer.echo(f"{stop_words(one)}")
    _end(found)


def _end(found: tuple[HostStop, ...]) -> None:
    if any(one.error is not None for one in found):
        raise typer.Exit(5)
    if not all(one.stopped for one in found):
        raise typer.Exit(1)
