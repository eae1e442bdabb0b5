"""How a plan looks in a terminal: one console for data on stdout, one set of tables and bars.

Wide tables are for terminals; when stdout is a file or a pipe the width is 140 columns and there is no colour.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from glmplan.planning.plan import Plan, PlanRank
from glmplan.units import format_bytes

GROUPS = (
    ("weights", "weights", "blue"),
    ("kv_cache", "KV cache", "green"),
    ("runtime", "runtime", "yellow"),
    ("margin", "margin", "magenta"),
    ("others", "other processes", "red"),
)


MARKS = {"weights": "█", "kv_cache": "▓", "runtime": "▒", "margin": "░", "others": "×"}


def console() -> Console:
    """The console for data."""
    if sys.stdout is None or not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        return Console(highlight=False, width=max(int(columns) if columns.isdecimal() else 140, 120))
    return Console(highlight=False)


def group_bytes(rank: PlanRank) -> dict[str, int]:
    """Bytes of a rank by group."""
    found = {name: 0 for name, _, _ in GROUPS}
    for item in rank.items:
        found[item.group] += item.bytes
    return found


def worst(plan: Plan) -> PlanRank:
    """The ledger of the fullest rank."""
    key = (plan.worst_rank.pp_rank, plan.worst_rank.tp_rank)
    return next(rank for rank in plan.ranks if (rank.pp_rank, rank.tp_rank) == key)


def memory_bar(rank: PlanRank, width: int = 64) -> Text:
    """One character per share of the capacity; an overfull rank fills the bar and says by how much."""
    scale = max(rank.capacity_bytes, rank.total_bytes)
    bar, used, drawn = Text(), 0, 0
    for name, _, colour in GROUPS:
        used += group_bytes(rank)[name]
        upto = round(width * used / scale)
        bar.append(MARKS[name] * (upto - drawn), style=colour)
        drawn = upto
    bar.append("·" * (width - drawn))
    return bar


def print_plan(out: Console, plan: Plan) -> None:
    """The answer, top down: verdict, layout, memory, ports, flags and next steps."""
    _headline(out, plan)
    _facts(out, plan)
    _stage_table(out, plan)
    _worst_bars(out, plan)
    _port_table(out, plan)
    for warning in plan.warnings:
        out.print(f"[yellow]note[/] {escape(warning)}", soft_wrap=True)
    if plan.advice:
        out.print("\n[bold]What would fit[/]")
        for sentence in plan.advice:
            out.print(f"  • {escape(sentence)}", soft_wrap=True)
    elif not plan.fits:
        out.print("\nNothing near would fit: neither another checkpoint nor up to 64 such nodes.")


def print_summary(out: Console, plan: Plan) -> None:
    """The short form for a launch: verdict, load and the memory of each stage."""
    _headline(out, plan)
    _facts(out, plan)
    _stage_table(out, plan)


def _gpu_words(plan: Plan) -> str:
    kinds: dict[str, int] = {}
    for rank in plan.ranks:
        kinds[rank.gpu] = kinds.get(rank.gpu, 0) + 1
    return " + ".join(f"{count}x {name}" for name, count in kinds.items())


def _headline(out: Console, plan: Plan) -> None:
    nodes = f"{plan.layout.nodes} node{'s' if plan.layout.nodes > 1 else ''}"
    out.print(f"[bold]{plan.model} {plan.checkpoint}[/] on {_gpu_words(plan)}, {nodes}, {plan.engine}")
    extras = [
        f"{name}{size}"
        for name, size in (("DP", plan.layout.dp_size), ("EP", plan.layout.ep_size), ("DCP", plan.layout.dcp_size))
        if size > 1
    ]
    layout = " x ".join([f"TP{plan.layout.tp_size}", f"PP{plan.layout.pp_size}", *extras])
    stages = f"{', '.join(map(str, plan.layout.stages))} layers"
    stages = f"stages of {stages}" if plan.layout.pp_size > 1 else f"one stage of {stages}"
    if plan.fits:
        count = f"{plan.smallest_count} GPUs are the fewest in usual servers" if plan.smallest_count else "It fits"
        out.print(f"[bold green]{count}[/], as [bold]{layout}[/], {stages}.\n")
        return
    rank = worst(plan)
    if rank.shortfall_bytes == 0:
        reason = plan.summary.removeprefix("does not fit: ")
        out.print(f"[bold red]It does not fit[/]: {escape(reason)}.\n", soft_wrap=True)
        return
    out.print(
        f"[bold red]It does not fit.[/] The nearest layout is {layout}, {stages}: pp_rank {rank.pp_rank} lacks "
        f"{format_bytes(rank.shortfall_bytes)} ({rank.shortfall_bytes:,} bytes) a rank.\n",
        soft_wrap=True,
    )


def _facts(out: Console, plan: Plan) -> None:
    settings, weights = plan.settings, plan.weights
    rows = [("asked for", f"{settings.context_tokens:,} tokens x {settings.concurrency} at once")]
    if plan.max_context_tokens:
        rows.append(("one request", f"up to {plan.max_context_tokens:,} tokens"))
    if plan.fits:
        rows.append(("KV cache", f"{plan.kv_cache_tokens:,} tokens in all"))
    row = f"{settings.kv_dtype} ({settings.kv_format}, {settings.kv_row_bytes} B a row and layer)"
    rows.append(("KV format", f"{row}, {plan.kv_bytes_per_token:,} B a token over all stages"))
    disk = f", {format_bytes(weights.file_bytes)} on disk" if weights.file_bytes else ""
    rows.append(("weights", f"{weights.tensor_bytes:,} bytes{disk}; {weights.origin}"))
    for name, value in rows:
        out.print(f"  {name:<12} {escape(value)}", soft_wrap=True)
    out.print()


def _stage_table(out: Console, plan: Plan) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("pp_rank", "right"), ("host", "left"), ("layers", "left"), ("begins on", "left"), ("weights", "right"),
        ("KV cache", "right"), ("runtime", "right"), ("margin", "right"), ("total", "right"), ("capacity", "right"),
        *(() if plan.fits else (("short", "right"),)),
    ):  # fmt: skip
        table.add_column(name, justify=justify)
    for stage in plan.stages:
        ranks = [rank for rank in plan.ranks if rank.pp_rank == stage.pp_rank]
        rank = max(ranks, key=lambda r: (r.shortfall_bytes, r.total_bytes / r.capacity_bytes))
        sums = group_bytes(rank)
        table.add_row(
            str(stage.pp_rank),
            ", ".join(stage.hosts),
            f"{stage.first_layer}-{stage.last_layer} ({stage.layers})",
            f"a {stage.begins_on} layer",
            format_bytes(sums["weights"]),
            format_bytes(sums["kv_cache"]),
            format_bytes(sums["runtime"] + sums["others"]),
            format_bytes(sums["margin"]),
            format_bytes(rank.total_bytes),
            format_bytes(rank.capacity_bytes),
            *(() if plan.fits else (format_bytes(rank.shortfall_bytes) if rank.shortfall_bytes else "-",)),
        )
    out.print("[bold]Memory of the fullest rank of each stage[/]")
    out.print(table)


def _worst_bars(out: Console, plan: Plan) -> None:
    rank = worst(plan)
    out.print(
        f"\n[bold]Ranks of the fullest stage[/]: pp_rank {rank.pp_rank}; fullest is tp_rank {rank.tp_rank} on {rank.host}, "
        f"GPU {rank.gpu_index} ({rank.gpu}), {100 * rank.total_bytes / rank.capacity_bytes:.1f} %",
        soft_wrap=True,
    )
    for one in (one for one in plan.ranks if one.pp_rank == rank.pp_rank):
        free = one.capacity_bytes - one.total_bytes
        left = f"{format_bytes(free)} free" if free >= 0 else f"[red]{format_bytes(-free)} short[/]"
        out.print(f"  tp_rank {one.tp_rank:>2} ", memory_bar(one), f" {left}", sep="", soft_wrap=True)
    sums = group_bytes(rank)
    legend = [
        f"[{colour}]{MARKS[name]}[/] {label} {format_bytes(sums[name])}" for name, label, colour in GROUPS if sums[name]
    ]
    out.print("  " + "   ".join(legend) + "\n")


def _port_table(out: Console, plan: Plan) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("operation", "served by", "evidence", "why"):
        table.add_column(name, overflow="fold")
    for port in plan.ports:
        served = f"{port.implementation} [yellow](plugin)[/]" if port.plugin else port.implementation
        evidence = f"{port.evidence}: {port.proof}" if port.proof else port.evidence
        table.add_row(port.op, served, escape(evidence), port.why)
    out.print("[bold]Kernel ports and backends[/]")
    out.print(table)
    out.print()


def print_explanation(out: Console, plan: Plan) -> None:
    """Every line item of the fullest rank with its source."""
    rank = worst(plan)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("line item")
    table.add_column("bytes", justify="right")
    table.add_column("kind")
    table.add_column("source", overflow="fold")
    for item in rank.items:
        table.add_row(item.name, f"{item.bytes:,}", item.kind or item.group, item.source)
    table.add_row("[bold]total[/]", f"[bold]{rank.total_bytes:,}[/]", "", f"capacity {rank.capacity_bytes:,}")
    out.print(f"[bold]Ledger of pp_rank {rank.pp_rank}, tp_rank {rank.tp_rank}[/]")
    out.print(table)
    out.print(f"\nweights: {escape(plan.weights.origin)}; {plan.weights.certainty}. {escape(plan.weights.note)}\n")


def print_rejected(out: Console, plan: Plan) -> None:
    """Every layout that was not chosen, with one reason."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layout", "reason", "nearest change"):
        table.add_column(name, overflow="fold")
    for entry in plan.rejected:
        table.add_row(entry.layout, entry.reason, entry.change)
    out.print(f"[bold]{len(plan.rejected)} layouts not chosen[/]")
    out.print(table)
    out.print()


def print_lines(out: Console, lines: Iterable[str]) -> None:
    """Plain text as it is, for commands that people paste."""
    for line in lines:
        out.print(escape(line), soft_wrap=True)
