"""The options of every command that reaches hosts, and what the commands do with them: open, ask all, tell failures."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from glmplan.errors import GlmplanError, UnreachableError, UsageError

if TYPE_CHECKING:
    from glmplan.facts.host import Host
    from glmplan.probe.remote import FactsRequest
    from glmplan.transport.base import HostName
    from glmplan.transport.fanout import Outcome
    from glmplan.transport.open import SshOptions

T = TypeVar("T")
HOSTS = "Hosts"


@dataclass(frozen=True)
class HostOptions:
    """What was typed about hosts. None is 'not given'."""

    hosts: Annotated[
        str | None,
        typer.Option(help="Hosts over SSH: a,b,user@c:2222; local, or local#0-3 for some GPUs here.", rich_help_panel=HOSTS),
    ] = None
    accept_new_host_key: Annotated[
        bool,
        typer.Option(
            "--accept-new-host-key",
            help="Record the key of a host never seen; a changed key is refused.",
            rich_help_panel=HOSTS,
        ),
    ] = False
    ssh_config: Annotated[
        Path | None, typer.Option(help="Instead of ~/.ssh/config ($GLMPLAN_SSH_CONFIG).", rich_help_panel=HOSTS)
    ] = None


class HostsFailedError(UnreachableError):
    """Some hosts failed; each one's own error was printed before."""


def named_hosts(options: HostOptions) -> tuple[HostName, ...]:
    """The hosts of `--hosts`, which must be given."""
    from glmplan.transport.base import parse_hosts

    if options.hosts is None:
        raise UsageError("No host is named.", "Add --hosts a,b,c, or --hosts local for this machine.")
    return parse_hosts(options.hosts)


def ssh_options(options: HostOptions) -> SshOptions:
    """How to connect."""
    from glmplan.transport.open import SshOptions

    if options.ssh_config is not None and not options.ssh_config.is_file():
        raise UsageError(f"The SSH configuration {options.ssh_config} is no file.", "Correct --ssh-config.")
    return SshOptions(
        accept_new_host_key=options.accept_new_host_key,
        config=None if options.ssh_config is None else str(options.ssh_config),
        ask_passphrase=_ask_passphrase if sys.stdin.isatty() and sys.stderr.isatty() else None,
    )


def _ask_passphrase(key: Path) -> str | None:
    """Ask on the terminal, without an echo; None where the user gives nothing."""
    try:
        return getpass(f"Passphrase of {key}: ", stream=sys.stderr) or None
    except EOFError:
        return None


def probed(options: HostOptions, request: FactsRequest | None = None) -> tuple[Outcome[Host], ...]:
    """Facts of every host of `--hosts`."""
    from glmplan.probe.remote import probe_hosts

    return probe_hosts(named_hosts(options), ssh_options(options), request)


def print_failures(outcomes: Iterable[Outcome[Any]]) -> int:
    """Say on stderr what failed where; how many failed."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        assert outcome.error is not None
        print(f"glmplan: {about(outcome.name, outcome.error)}", file=sys.stderr)
        if outcome.error.next_step:
            print(f"  next: {outcome.error.next_step}", file=sys.stderr)
    return len(failed)


def about(name: str, error: GlmplanError) -> str:
    """The error's sentence with the host's name in it."""
    return error.message if name in error.message else f"{name}: {error.message}"


def require_all(outcomes: Sequence[Outcome[T]]) -> tuple[T, ...]:
    """The results, or HostsFailedError (exit code 5) after every failure was printed."""
    failed = print_failures(outcomes)
    if failed:
        names = ", ".join(outcome.name for outcome in outcomes if outcome.error is not None)
        raise HostsFailedError(
            f"{failed} of {len(outcomes)} hosts failed: {names}.", "Repair them, or leave them out of --hosts."
        )
    return tuple(outcome.result for outcome in outcomes if outcome.result is not None)
