"""`glmplan probe`: what this machine, or a list of hosts, has: GPUs, network, memory, disks, engines, model files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._hosts import HostOptions
from glmplan.cli._options import takes_host_options

if TYPE_CHECKING:
    from glmplan.facts.host import Host
    from glmplan.probe.remote import FactsRequest

EXAMPLES = """Examples:

glmplan probe

glmplan probe --hosts a,b,c --save inventory.toml

glmplan probe --hosts local --model-path /models/GLM-5.2-FP8 --disk-read

glmplan probe --hosts a,b --json | jq '.hosts[].system.nics'"""

LONGEST_READ_S = 60.0


@takes_host_options
def probe(
    options: HostOptions,
    save: Annotated[Path | None, typer.Option(help="Write the hosts to a TOML file for size --inventory.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --save overwrite a file.")] = False,
    model_path: Annotated[
        str | None, typer.Option(help="A model folder, or a repository's name, to judge on every host.")
    ] = None,
    disk_read: Annotated[bool, typer.Option("--disk-read", help="Measure how fast that folder can be read.")] = False,
    disk_seconds: Annotated[float, typer.Option(help="Seconds of that measurement.")] = 2.0,
    engine_python: Annotated[
        list[str] | None, typer.Option(help="A Python or environment to look at beside the usual places; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Read GPUs, network, memory, disks and engines, here or on hosts over SSH. Changes nothing."""
    from glmplan.cli._files import check_writable
    from glmplan.errors import UsageError
    from glmplan.probe.remote import FactsRequest

    if disk_read and model_path is None:
        raise UsageError("--disk-read measures a model folder, and none is named.", "Add --model-path DIR.")
    if not 0.1 <= disk_seconds <= LONGEST_READ_S:
        raise UsageError(f"--disk-seconds is {disk_seconds:g}; it must lie in 0.1 to {LONGEST_READ_S:g}.", "Try 2.")
    if save is not None:
        check_writable(save, force)
    asked = FactsRequest(model_path, disk_read, disk_seconds, tuple(engine_python or ()))
    if options.hosts is None:
        _probe_here(asked, save, as_json)
    else:
        _probe_hosts(options, asked, save, as_json)


def _probe_here(asked: FactsRequest, save: Path | None, as_json: bool) -> None:
    """This machine, read in this process."""
    from glmplan.facts.profiles import gpu_profiles
    from glmplan.probe.local import facts_here

    host = facts_here(asked, gpu_profiles())
    if as_json:
        typer.echo(host.model_dump_json(indent=1))
    else:
        _print([host])
    _save([host], save, as_json)


def _probe_hosts(options: HostOptions, asked: FactsRequest, save: Path | None, as_json: bool) -> None:
    """All named hosts at once; what failed is told on stderr and by the exit code."""
    from glmplan.cli._hosts import print_failures, probed
    from glmplan.probe.remote import report_of

    outcomes = probed(options, asked)
    report = report_of(outcomes)
    if as_json:
        typer.echo(report.model_dump_json(indent=1))
    elif report.hosts:
        _print(report.hosts)
    failed = print_failures(outcomes)
    if failed:
        if save is not None:
            typer.echo(f"glmplan: {save} was not written: {failed} of {len(outcomes)} hosts failed.", err=True)
        raise typer.Exit(5)
    _save(report.hosts, save, as_json)


def _save(hosts: Sequence[Host], save: Path | None, as_json: bool) -> None:
    """Write the inventory; GPUs that could not be read are an error even where nothing is to be written."""
    from glmplan.cli._files import save_text
    from glmplan.facts.inventory import inventory_text
    from glmplan.probe.remote import inventory_of

    inventory = inventory_of(hosts)
    if save is not None:
        save_text(inventory_text(inventory), save)
        typer.echo(f"Saved {save}. Next: glmplan size --inventory {save}", err=as_json)


def _print(hosts: Sequence[Host]) -> None:
    from glmplan.cli._output import console
    from glmplan.cli._probe_output import print_host

    out = console()
    for number, host in enumerate(hosts):
        if number:
            out.print()
        print_host(out, host)
