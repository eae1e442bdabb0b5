"""What `launch`, `restart` and `stop` tell at their end: why a launch failed, what a stop proved, where it serves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmplan.fleet.launch import Launched, LaunchFailed
    from glmplan.fleet.stop import HostStop


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def tell_failure(error: LaunchFailed) -> None:
    """The lines that show the cause, what NVML and the kernel add, and what the stop left."""
    found = error.diagnosis
    rank = "" if found.rank is None else f", PP{found.rank[0]} TP{found.rank[1]}"
    when = "while serving" if found.when == "run" else f"while {found.phase or 'starting'}"
    say(f"\n{found.host}{rank}, {when}:")
    for line in found.lines:
        say(f"  | {line}")
    for fact in found.facts:
        say(f"  {fact}")
    tell_stops(error.stops)


def tell_stops(stops: Sequence[HostStop]) -> None:
    """One line per host."""
    for stop in stops:
        say(f"  {stop_words(stop)}")


NOTHING_TO_STOP = {
    "exited": "nothing to stop, its worker had ended before",
    "gone": "nothing to stop, its worker had been killed before",
    "rebooted": "nothing to stop, the host was rebooted since the launch",
    "absent": "nothing to stop, the host knows no deployment of this name",
}


def stop_words(stop: HostStop) -> str:
    """What a stop proved on one host."""
    if stop.error is not None:
        return f"{stop.host}: NOT STOPPED, unknown: {stop.error}"
    if not stop.stopped:
        left = ", ".join(stop.survivors) or "GPU memory is still held"
        return f"{stop.host}: NOT STOPPED: {left}"
    freed = {True: ", GPU memory free", False: "", None: ""}[stop.gpu_memory_freed]
    if stop.killed:
        return f"{stop.host}: stopped, {stop.killed} process(es) ended{freed}"
    return f"{stop.host}: {NOTHING_TO_STOP.get(stop.was or '', 'nothing of it runs')}{freed}"


def _tell_memory(result: Launched) -> None:
    """Predicted against measured memory of the rank that differs most, and where all of it is kept."""
    import typer

    from glmplan.units import format_bytes

    totals = [
        (abs(part.difference_bytes), rank, part) for rank in result.memory for part in rank.parts if part.part == "total"
    ]
    if totals:
        _, rank, part = max(totals, key=lambda one: one[0])
        typer.echo(
            f"  memory: predicted {format_bytes(part.predicted_bytes)}, measured {format_bytes(part.measured_bytes)} on the "
            f"rank that differs most (PP{rank.pp_rank} TP{rank.tp_rank} on {rank.host}); later plans use the measurement"
        )


def print_result(result: Launched) -> None:
    """Where it serves and what to do next."""
    from urllib.parse import urlsplit

    import typer

    from glmplan.cli._follow import minutes

    parts = urlsplit(result.url)
    head = next(iter(result.logs))
    passed = [canary.name for canary in result.canaries if canary.status == "pass"]
    judged = f"canaries passed: {', '.join(passed)}" if result.canaries else "answers NOT checked (--no-canary)"
    _tell_memory(result)
    for line in result.kernels:
        typer.echo(f"  {line}")
    since = "it ran before and was adopted" if result.adopted else f"after {minutes(result.seconds)}"
    what = "up (a rehearsal: a stand-in answers, no model)" if result.rehearsal else "healthy" if passed else "up"
    typer.echo(f"{result.name} is {what}, {since}; {judged}.")
    typer.echo(f"  serves     {result.url}/v1 on {head}")
    if not head.startswith("local"):
        target = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        typer.echo(f"  from here  {tunnel(head, f'{parts.port}:{target}:{parts.port}')}")
    typer.echo(f"  next       glmplan status {result.name}")
    typer.echo(f"             glmplan logs {result.name} -f")
    typer.echo(f"             glmplan stop {result.name}")


def tunnel(host: str, forward: str) -> str:
    """The command that brings the head's port here; `host` is `[user@]host[:port]`."""
    name, colon, port = host.rpartition(":")
    if colon and port.isdecimal() and (":" not in name or name.endswith("]")):
        return f"ssh -N -L {forward} -p {port} {name.replace('[', '').replace(']', '')}"
    return f"ssh -N -L {forward} {host.replace('[', '').replace(']', '')}"
