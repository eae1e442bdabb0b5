"""`glmplan tune`: find the fastest tile sizes of SGLang's FP8 GEMMs and experts on the GPU that will serve; keep them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._hosts import HostOptions
from glmplan.cli._options import takes_host_options

if TYPE_CHECKING:
    from glmplan.facts.host import Host
    from glmplan.fleet.hosts import Fleet
    from glmplan.fleet.tune import Observer
    from glmplan.fleet.tune_order import Tuning
    from glmplan.fleet.tune_result import Event, Tuned, TunedShape

EXAMPLES = """Examples:

glmplan tune

glmplan tune --hosts h1 --tp-size 8 --minutes 30

glmplan tune --kind moe --tp-size 8 --quick

glmplan tune --hosts h1 --shapes 2624,6144 --experts 256,256 --engine-python /opt/venv-sglang

glmplan tune --hosts local#3 --out tables --json"""
SHOWN_ROWS = (1, 16, 256, 4096)
KNOWN_S = 0.5
"""A row that was told sooner was not measured."""


@takes_host_options
def tune(
    options: HostOptions,
    tp_size: Annotated[int, typer.Option(help="Ranks that share each weight; the plan's TP size.")] = 8,
    shapes: Annotated[
        list[str] | None, typer.Option(help="Only this weight, as N,K; may be repeated.", metavar="N,K")
    ] = None,
    kind: Annotated[str, typer.Option(help="What to tune: gemm, moe (experts) or both. Experts take longest.")] = "both",
    experts: Annotated[
        list[str] | None,
        typer.Option(help="Only E experts N wide, as E,N or E,N,HIDDEN,TOP_K; may be repeated.", metavar="E,N"),
    ] = None,
    ep_size: Annotated[int, typer.Option(help="Ranks among which experts are divided; the plan's EP size.")] = 1,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Try a few tile sizes only, for a first table soon; a run without it replaces that."),
    ] = False,
    rows: Annotated[
        str | None, typer.Option(help="Numbers of rows to tune for, as 1,16,256, instead of 16 from 1 to 4096.")
    ] = None,
    engine_python: Annotated[str | None, typer.Option(help="The engine's Python there, where it is not found.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the tables (default: tuned/VERSION/gemm and moe of the user's profiles)."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this time; the next run goes on.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure again what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Search the engine's own kernels over GLM-5.2's weights and experts on one GPU of a host (this machine by default)."""
    from dataclasses import replace

    from glmplan.errors import UsageError
    from glmplan.fleet.tune_order import check_experts, check_shapes, check_together
    from glmplan.kernels.engines.sglang_tune_experts import require_sizes
    from glmplan.kernels.engines.sglang_tune_steps import parse_rows

    if minutes is not None and not 0 < minutes < 1e6:
        raise UsageError(f"--minutes is {minutes:g}; it must be above 0.", "Give minutes.")
    weights, own = check_shapes(_words_of(shapes)), check_experts(_words_of(experts))
    check_together(kind, weights, own, ep_size)
    require_sizes(tp_size, ep_size)
    if rows is not None:
        parse_rows(rows)
    asked = _Asked(tp_size, weights, rows, again, engine_python or None, out, minutes, kind, own, ep_size, quick)
    result = _run(replace(options, hosts=options.hosts or "local"), asked)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        _print(result, asked)
    if result.interrupted:
        raise typer.Exit(130)


@dataclass(frozen=True)
class _Asked:
    """What was typed beside the host."""

    tp_size: int
    shapes: tuple[str, ...]
    rows: str | None
    again: bool
    engine_python: str | None
    out: Path | None
    minutes: float | None
    kind: str
    experts: tuple[str, ...]
    ep_size: int
    quick: bool


def _run(options: HostOptions, asked: _Asked) -> Tuned:
    from glmplan.cli._hosts import named_hosts, probed, require_all, ssh_options
    from glmplan.errors import UsageError
    from glmplan.fleet.hosts import Fleet
    from glmplan.fleet.tune import Tuner
    from glmplan.probe.remote import FactsRequest

    hosts = named_hosts(options)
    if len(hosts) != 1:
        raise UsageError(f"--hosts names {len(hosts)} hosts; one GPU of one host is tuned on.", "Name one of them.")
    pythons = (asked.engine_python,) if asked.engine_python else ()
    (host,) = require_all(probed(options, FactsRequest(engine_pythons=pythons)))
    with Fleet(hosts, ssh_options(options)) as fleet:
        tuning = _tuning(fleet, host, asked)
        print(
            f"Tuning on GPU {tuning.gpu_index} ({tuning.gpu}) of {host.name} with SGLang {tuning.engine_version} in "
            f"{tuning.python}; tables go to {' and '.join(map(str, tuning.folders))}.",
            file=sys.stderr,
        )
        observer: Observer = _Bar(host.name) if sys.stderr.isatty() else _Lines(host.name)
        try:
            return Tuner(fleet, tuning, observer).run(None if asked.minutes is None else asked.minutes * 60)
        finally:
            observer.close()


def _tuning(fleet: Fleet, host: Host, asked: _Asked) -> Tuning:
    """The engine, the GPU and the folder."""
    from glmplan.fleet.tune import held_gpu
    from glmplan.fleet.tune_order import Tuning, choose_gpu, choose_python, deployment_name, require_gpu, tuned_folder

    require_gpu(host)
    python, version = choose_python(host, asked.engine_python)
    gpu_index, gpu = choose_gpu(host, held_gpu(fleet, deployment_name(version)))
    folder, experts_folder = (asked.out or tuned_folder(version, kind) for kind in ("gemm", "moe"))
    return Tuning(
        python, version, gpu_index, gpu, asked.tp_size, folder, asked.shapes, asked.rows, asked.again, asked.kind,
        asked.experts, experts_folder, asked.ep_size, asked.quick,
    )  # fmt: skip


def _words_of(given: list[str] | None) -> list[str]:
    """The words of a repeated option; several may stand in one value."""
    return [word for text in given or () for word in text.split()]


class _Lines:
    """A line for every step; for logs, pipes and CI."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._silent: str | None = None
        self._began_s, self._rows, self._known = time.monotonic(), 0, 0

    def started(self, state: str, pid: int | None) -> None:
        """Say whether it is a new one."""
        words = {"adopted": "goes on", "ended": "had ended"}.get(state, "started")
        self._say(f"{self._host}: the tuner {words} (pid {pid})")

    def event(self, event: Event) -> None:
        """One step in words."""
        self._say(self._told(event))

    def _told(self, event: Event) -> str:
        """The step, and how long the rest of this table takes if its other rows take as long as those before. Rows that
        come at once at its beginning were known, and tell nothing."""
        now_s = time.monotonic()
        if event.kind != "rows":
            self._began_s, self._rows, self._known = now_s, 0, 0
            return _words(event)
        if self._known == self._rows and now_s - self._began_s < KNOWN_S:
            self._began_s, self._known = now_s, self._known + 1
        self._rows += 1
        left = (event.row_count or self._rows) - self._rows
        left_s = (now_s - self._began_s) / max(self._rows - self._known, 1) * left
        return _words(event) + (f", about {left_s / 60:.0f} min left" if left_s >= 60 else "")

    def silent(self, words: str | None) -> None:
        """Only changes are told."""
        if words != self._silent:
            self._say(f"{self._host}: {words or 'answers again'}")
        self._silent = words

    def close(self) -> None:
        """Nothing to take down."""

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Bar(_Lines):
    """One bar over all shapes and rows."""

    def __init__(self, host: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().__init__(host)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("starting", total=None)
        self._progress.start()

    def event(self, event: Event) -> None:
        """Move it; a shape that is done leaves a line."""
        words = self._told(event)
        share = min(self._rows / ((event.row_count or 16) + 1), 1.0)
        done = event.step - 1 + (1 if event.kind in ("done", "kept") else share)
        self._progress.update(self._task, total=event.steps, completed=done, description=words)
        if event.kind in ("done", "kept"):
            self._say(_words(event))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _words(event: Event) -> str:
    where = f"[{event.step}/{event.steps}] {event.shape} {event.size}"
    if event.kind != "rows" or not event.default_us or not event.tuned_us:
        return f"{where}: {'search begins' if event.kind == 'shape' else event.kind}"
    gain = event.default_us / event.tuned_us
    return f"{where}: {event.rows} rows {event.default_us:.1f} -> {event.tuned_us:.1f} us, {gain:.2f}x"


def _print(result: Tuned, asked: _Asked) -> None:
    """Gain per weight over the engine's default, and where the tables are."""
    from rich.table import Table

    from glmplan.cli._output import console
    from glmplan.fleet.tune_order import to_go_on

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("weight", "size", "gain", *(f"{rows} rows" for rows in SHOWN_ROWS), ""):
        table.add_column(name, justify="left" if name in ("weight", "") else "right")
    for shape in result.shapes:
        gain = "-" if shape.gain is None else f"{shape.gain:.2f}x"
        cells = [_cell(shape, rows) for rows in SHOWN_ROWS]
        table.add_row(shape.name, shape.size, gain, *cells, "" if shape.measured else "was there")
    out = console()
    out.print(table)
    kept = f"{len(result.shapes)} of {result.shapes_wanted if result.shapes_wanted is not None else '?'} tables"
    out.print(f"\n{kept} for SGLang {result.engine_version} on {result.gpu} are in {result.where}.", soft_wrap=True)
    if not result.complete:
        out.print(f"[yellow]not complete[/] {to_go_on(asked.again)}")


def _cell(shape: TunedShape, rows: int) -> str:
    for one in shape.rows:
        if one.rows == rows and one.default_us and one.tuned_us:
            return f"{one.default_us:.1f} -> {one.tuned_us:.1f} us"
    return "-"
