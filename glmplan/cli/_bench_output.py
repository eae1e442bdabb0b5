"""How a benchmark looks: a bar or lines on stderr while it runs, tables on stdout at its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from glmplan.bench.result import FailureCount, Level, Prefill, Report, Spread
from glmplan.bench.run import Observer
from glmplan.cli._output import console


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def observer() -> Observer:
    """A bar where stderr is a terminal, else lines."""
    return _Bar() if sys.stderr.isatty() else _Lines()


class _Lines:
    """A line when a load ends."""

    def begins(self, label: str, requests: int) -> None:
        """Say what comes."""
        say(f"{label}: {requests} requests ...")

    def answered(self) -> None:
        """Nothing: thousands of lines help nobody."""

    def level(self, level: Level) -> None:
        """The two numbers people wait for."""
        rate = _rate(level.output_tokens_per_s)
        say(f"{level.label}: {level.completed} of {level.requests} answered in {level.seconds:.1f} s, {rate} tokens/s")

    def prefill(self, prefill: Prefill) -> None:
        """The rate."""
        say(f"prefill of {prefill.prompt_tokens:,} tokens: {_rate(prefill.tokens_per_s)} tokens/s")

    def close(self) -> None:
        """Nothing to take down."""


class _Bar(_Lines):
    """A bar for the load under way."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def begins(self, label: str, requests: int) -> None:
        """Open the bar."""
        self.close()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.add_task(label, total=requests)
        self._progress.start()

    def answered(self) -> None:
        """One step."""
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])

    def level(self, level: Level) -> None:
        """Close the bar and leave the line."""
        self.close()
        super().level(level)

    def prefill(self, prefill: Prefill) -> None:
        """The same."""
        self.close()
        super().prefill(prefill)

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def print_report(report: Report) -> None:
    """The tables, and every note."""
    out = console()
    engine = f"{report.engine_family} {report.engine_version}".strip() if report.engine_family else "an unknown engine"
    out.print(f"[bold]{escape(report.model)}[/] at {escape(report.url)} ({escape(engine)})", soft_wrap=True)
    out.print(
        f"{report.prompt_tokens:,} prompt and {report.output_tokens:,} output tokens; {report.prompts} to "
        f"{report.endpoint}; measured with {report.measured_with}; {report.warmup_requests} warm-up requests not counted\n",
        soft_wrap=True,
    )
    if report.levels:
        out.print(_levels(report.levels))
    if report.prefill:
        out.print()
        out.print(_prefill(report.prefill))
    if report.plan:
        out.print()
        out.print(_plan(report))
    for failure, where in _failures(report):
        out.print(f"[red]failed[/] {where}: {failure.requests} x {escape(failure.words)}", soft_wrap=True)
    for note in (*(f"{level.label}: {note}." for level in report.levels for note in level.notes), *report.notes):
        out.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    if report.interrupted:
        out.print("[yellow]interrupted[/] What was measured until then is above.")


def _levels(levels: Sequence[Level]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="Decode by load", title_justify="left")
    names = ("load", "answered", "decode tok/s", "one stream", "output tok/s", "TTFT p50", "p99", "ITL p50", "p99", "tokens")
    for name in names:
        table.add_column(name, justify="left" if name == "load" else "right")
    for level in levels:
        counted = f"{level.output_tokens:,}" + ("" if level.counted_by == "usage" else " chunks")
        table.add_row(
            level.label + (" (cut)" if level.interrupted else ""),
            f"{level.completed}/{level.requests}",
            _rate(level.decode_tokens_per_s),
            _rate(level.stream_tokens_per_s),
            _rate(level.output_tokens_per_s),
            *_times(level.ttft),
            *(text + "*" * (level.itl_of_chunks and text != "-") for text in _times(level.itl)),
            counted,
        )
    if any(level.itl_of_chunks and level.itl for level in levels):
        table.caption = "* between chunks: the server does not say how many tokens a chunk holds"
        table.caption_justify = "left"
    return table


def _prefill(prefills: Sequence[Prefill]) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title="Prefill, one request at a time", title_justify="left"
    )
    for name in ("prompt tokens", "requests", "tokens/s", "TTFT p50", "p99"):
        table.add_column(name, justify="right")
    for one in prefills:
        table.add_row(f"{one.prompt_tokens:,}", str(one.requests), _rate(one.tokens_per_s), *_times(one.ttft))
    return table


def _plan(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="Plan and server", title_justify="left")
    for name in ("number", "planned", "server", "difference", "told by"):
        table.add_column(name, justify="left" if name in ("number", "told by") else "right")
    for row in report.plan:
        share = "-" if row.measured is None or not row.predicted else f"{100 * (row.measured / row.predicted - 1):+.1f} %"
        measured = "-" if row.measured is None else f"{row.measured:,}"
        table.add_row(row.name, f"{row.predicted:,}", measured, share, row.source)
    return table


def _failures(report: Report) -> list[tuple[FailureCount, str]]:
    found = [(failure, level.label) for level in report.levels for failure in level.failures]
    return found + [(f, f"prefill of {one.prompt_tokens:,} tokens") for one in report.prefill for f in one.failures]


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _times(spread: Spread | None) -> tuple[str, str]:
    return ("-", "-") if spread is None else (_time(spread.p50_s), _time(spread.p99_s))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
