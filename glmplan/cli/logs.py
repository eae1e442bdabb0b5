"""`glmplan logs`: what the workers print, of one node, one rank or all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._hosts import HostOptions
from glmplan.cli._options import takes_host_options

if TYPE_CHECKING:
    from glmplan.fleet.deployment import Deployment
    from glmplan.fleet.phases import LogLine

EXAMPLES = """Examples:

glmplan logs --lines 50

glmplan logs glm-5.2-fp8-3f9a1c -f --node 1

glmplan logs --rank 17"""

TAIL_BYTES = 1 << 20
FOLLOW_S = 1.0


@takes_host_options
def logs(
    options: HostOptions,
    name: Annotated[str | None, typer.Argument(help="A deployment; without it, the only one launched from here.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come; Ctrl-C detaches.")] = False,
    node: Annotated[int | None, typer.Option(help="Only this node's log.")] = None,
    rank: Annotated[int | None, typer.Option(help="Only this world rank's lines (pp_rank x TP + tp_rank).")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the last lines.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the logs of a deployment. Detaching leaves it running."""
    from glmplan.fleet import deployment as records

    record = records.load(name)
    _check(record, node, rank, lines)
    try:
        _show(record, options, follow, node, rank, lines, as_json)
    except KeyboardInterrupt:
        import sys

        print(f"\nDetached; {record.name} goes on.", file=sys.stderr)
        raise typer.Exit(130) from None


def _check(record: Deployment, node: int | None, rank: int | None, lines: int) -> None:
    from glmplan.errors import UsageError
    from glmplan.fleet.phases import ranks_of_node

    world = record.plan.layout.tp_size * record.plan.layout.pp_size
    if node is not None and not 0 <= node < len(record.hosts):
        raise UsageError(f"--node is {node}; {record.name} has nodes 0 to {len(record.hosts) - 1}.", "Choose one of them.")
    if rank is not None and not 0 <= rank < world:
        raise UsageError(f"--rank is {rank}; {record.name} has ranks 0 to {world - 1}.", "Choose one of them.")
    if (
        node is not None
        and rank is not None
        and divmod(rank, record.plan.layout.tp_size) not in ranks_of_node(record.plan, node)
    ):
        raise UsageError(f"Rank {rank} is not on node {node} of {record.name}.", "Give --rank alone.")
    if lines < 0:
        raise UsageError(f"--lines is {lines}; it must not be negative.", "Try 100.")


def _show(
    record: Deployment, options: HostOptions, follow: bool, node: int | None, rank: int | None, lines: int, as_json: bool
) -> None:
    from glmplan.cli._launching import fleet_of
    from glmplan.cli.status import print_error
    from glmplan.fleet.phases import NodeProgress, ranks_of_node

    layout = record.plan.layout
    ranks = {number: ranks_of_node(record.plan, number) for number in range(len(record.hosts))}
    wanted_rank = None if rank is None else divmod(rank, layout.tp_size)
    chosen = [n for n in ranks if node in (None, n) and (wanted_rank is None or wanted_rank in ranks[n])]
    readers = {n: NodeProgress(record.log_family, ranks[n], layout.tp_size, head=n == 0) for n in chosen}
    offsets = dict.fromkeys(chosen, -TAIL_BYTES)
    told: set[str] = set()
    with fleet_of(record, options) as fleet:
        while True:
            wanted = {
                record.hosts[n]: {
                    "deployment": record.name,
                    "log_offset": offsets[n],
                    "max_bytes": TAIL_BYTES,
                    "gpus": False,
                }
                for n in chosen
            }
            answers = fleet.ask_all("poll", wanted, timeout_s=15.0)
            for n in chosen:
                host, result, error = record.hosts[n], answers[record.hosts[n]].result, answers[record.hosts[n]].error
                if result is None:
                    if error is not None and host not in told:
                        print_error(host, error.message, error.next_step)
                    told.add(host)
                    continue
                told.discard(host)
                first, offsets[n] = offsets[n] < 0, result["log_offset"]
                found = readers[n].feed(result.get("log") or "", time.monotonic())
                found = tuple(line for line in found if wanted_rank is None or line.rank == wanted_rank)
                if first:
                    found = found[len(found) - min(lines, len(found)) :]
                _print(found, host if as_json or len(chosen) > 1 else "", as_json)
            if not follow:
                break
            time.sleep(FOLLOW_S)
    if told:
        raise typer.Exit(5)


def _print(found: tuple[LogLine, ...], host: str, as_json: bool) -> None:
    import json

    for line in found:
        if as_json:
            rank = None if line.rank is None else list(line.rank)
            typer.echo(json.dumps({"host": host, "rank": rank, "phase": line.phase.label, "text": line.text}))
        else:
            typer.echo(f"{host}: {line.text}" if host else line.text)
