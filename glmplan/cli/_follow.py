"""How a launch looks while it runs: a live table per rank on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from glmplan.units import format_bytes

if TYPE_CHECKING:
    from glmplan.fleet.canary import CanaryResult
    from glmplan.fleet.deadline import Eta
    from glmplan.fleet.deployment import Deployment
    from glmplan.fleet.follow import NodeView, Snapshot
    from glmplan.fleet.launch import Observer
    from glmplan.fleet.phases import RankProgress
    from glmplan.fleet.start import Started

HEARTBEAT_S = 30.0
"""Plain output says that nothing changed at least this often: a silent terminal looks dead."""


def observer(deployment: Deployment, deadline_s: float) -> Observer:
    """The live table where stderr is a terminal, else lines."""
    return LiveTable(deployment, deadline_s) if sys.stderr.isatty() else Lines(deployment, deadline_s)


def minutes(seconds: float) -> str:
    """`47 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def verdict(result: CanaryResult) -> str:
    """One line about a canary."""
    wrong = "NONE" if result.unanswered else "WRONG"
    words = {"pass": "ok", "fail": wrong, "skip": "skipped"}.get(result.status, result.status)
    return f"canary {result.name:<14} {words:<8} {result.seconds:5.1f} s  {result.note}".rstrip()


class Lines:
    """One line per change; for logs, pipes and CI."""

    def __init__(self, deployment: Deployment, deadline_s: float) -> None:
        self._deployment, self._deadline_s = deployment, deadline_s
        self._said: dict[tuple[str, tuple[int, int]], str] = {}
        self._silent: dict[str, str | None] = {}
        self._last = time.monotonic()
        self._began = self._last

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        print(f"[{self._last - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)

    def started(self, nodes: tuple[Started, ...]) -> None:
        """Every node runs its worker."""
        for node in nodes:
            self._say(f"{node.host}: {node.state}, pid {node.pid}, log {node.log}")
        self._say(f"{minutes(self._deadline_s)} are allowed from here to the first answer")

    def polled(self, snapshot: Snapshot) -> None:
        """Say what changed since the last look."""
        for node in snapshot.nodes:
            if node.silent != self._silent.get(node.host):
                self._silent[node.host] = node.silent
                self._say(f"{node.host}: {node.silent or 'answers again'}")
            self._changes(node)
        if time.monotonic() - self._last > HEARTBEAT_S:
            slow = min(snapshot.nodes, key=lambda node: node.progress.phase)
            self._say(f"{slow.host} is {slow.progress.phase.label}{_left(self._deployment, slow)}")

    def _changes(self, node: NodeView) -> None:
        """Ranks of a node that went on, one line for those that went on alike."""
        alike: dict[tuple[str, str], list[RankProgress]] = {}
        for rank in node.progress.ranks.values():
            if self._said.get((node.host, rank.rank)) != rank.phase.label:
                self._said[node.host, rank.rank] = rank.phase.label
                memory = "" if self._deployment.rehearsal else _memory_words(rank)
                alike.setdefault((rank.phase.label, memory), []).append(rank)
        for (label, memory), ranks in alike.items():
            self._say(f"{node.host} {_rank_names(ranks)}: {label}{memory}")

    def judged(self, result: CanaryResult) -> None:
        """One canary came back."""
        self._say(verdict(result))

    def close(self) -> None:
        """Nothing to take down."""


class LiveTable:
    """A table of all ranks that is drawn again after every look."""

    def __init__(self, deployment: Deployment, deadline_s: float) -> None:
        self._deployment, self._deadline_s = deployment, deadline_s
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None

    def started(self, nodes: tuple[Started, ...]) -> None:
        """Open the table."""
        for node in nodes:
            self._console.print(f"{node.host}: {node.state}, pid {node.pid}, log {escape(node.log)}", soft_wrap=True)
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._live.start()

    def polled(self, snapshot: Snapshot) -> None:
        """Draw it."""
        if self._live is not None:
            self._live.update(_table(self._deployment, snapshot, self._deadline_s))

    def judged(self, result: CanaryResult) -> None:
        """The table stands still; canaries are lines below it."""
        self.close()
        colour = {"pass": "green", "fail": "red"}.get(result.status, "yellow")
        self._console.print(f"[{colour}]{escape(verdict(result))}[/]", soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _rank_name(rank: RankProgress) -> str:
    return f"PP{rank.pp_rank} TP{rank.tp_rank}"


def _rank_names(ranks: list[RankProgress]) -> str:
    """`PP1 TP0-7`, or one by one where they are not in a row."""
    stages: dict[int, list[int]] = {}
    for rank in ranks:
        stages.setdefault(rank.pp_rank, []).append(rank.tp_rank)
    return ", ".join(f"PP{stage} TP{numbers(found)}" for stage, found in stages.items())


def numbers(found: Sequence[int]) -> str:
    """`0-7`, `3`, or `0,2,5`."""
    if len(found) > 1 and list(found) == list(range(found[0], found[-1] + 1)):
        return f"{found[0]}-{found[-1]}"
    return ",".join(map(str, found))


def _memory_words(rank: RankProgress) -> str:
    memory = rank.memory
    parts = []
    if memory.weights_bytes is not None:
        parts.append(f"weights {format_bytes(memory.weights_bytes)}")
    if memory.tokens is not None:
        parts.append(f"{memory.tokens:,} KV tokens")
    return f" ({', '.join(parts)})" if parts else ""


def _left(deployment: Deployment, node: NodeView) -> str:
    found = node.eta(deployment.gpu_indexes[node.node_rank], time.monotonic())
    share = "" if found.share is None else f", {100 * found.share:.0f} % loaded"
    if found.remaining_s is None:
        doing = f", kernels are compiled by {' and '.join(node.compilers)}" if node.compilers else ""
        return f"{share}{doing}, time left unknown ({found.basis})"
    return f"{share}, about {minutes(found.remaining_s)} left (by {found.basis})"


def _left_in_short(node: NodeView, left: Eta) -> str:
    if left.remaining_s is None:
        return "compiling" if node.compilers else "unknown"
    return minutes(left.remaining_s)


def _table(deployment: Deployment, snapshot: Snapshot, deadline_s: float) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title_justify="left",
        title=f"{deployment.name}: {minutes(snapshot.elapsed_s)} of at most {minutes(deadline_s)}",
    )  # fmt: skip
    for name in ("host", "rank", "GPU", "phase", "GPU memory", "weights", "log age", "left"):
        table.add_column(name)
    for node in snapshot.nodes:
        indexes = deployment.gpu_indexes[node.node_rank]
        left = node.eta(indexes, time.monotonic())
        for place, rank in enumerate(node.progress.ranks.values()):
            gpu = node.gpus.get(indexes[place]) if place < len(indexes) else None
            held = gpu.used_bytes if gpu and gpu.used_bytes is not None else None
            shards = (
                f" {rank.shards_done}/{rank.shards_total}" if rank.shards_total and rank.phase.label == "loading" else ""
            )
            table.add_row(
                node.host if place == 0 else "",
                _rank_name(rank),
                str(indexes[place]) if place < len(indexes) else "-",
                (node.silent and "[red]no answer[/]") or f"{rank.phase.label}{shards}",
                "-" if held is None else format_bytes(held),
                "-"
                if deployment.rehearsal or rank.memory.weights_bytes is None
                else format_bytes(rank.memory.weights_bytes),
                "-" if node.log_age_s is None else minutes(node.log_age_s),
                "" if place or node.progress.ready else _left_in_short(node, left),
            )
    return table
