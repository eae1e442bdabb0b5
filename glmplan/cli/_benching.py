"""What `glmplan bench` does between its options and its exit code: find out about the server, measure, compare, save."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmplan.bench import beside
from glmplan.bench.engine_bench import TITLES, EngineBench, require_installed
from glmplan.bench.plot import plot
from glmplan.bench.prompts import Prompts
from glmplan.bench.result import Report
from glmplan.bench.run import Own, Settings, blank, run
from glmplan.bench.stream import Server, base_url
from glmplan.bench.way import find_way
from glmplan.cli import _bench_output
from glmplan.cli._files import check_writable, load_plan, save_text
from glmplan.cli._wanted import read_secrets
from glmplan.errors import GlmplanError, NotHealthyError, UsageError
from glmplan.fleet.reference import detect_family
from glmplan.fleet.served import Served, http_ask
from glmplan.planning.plan import Plan

FILES = ("bench.json", "bench.svg")
ASK_S = 30.0


@dataclass(frozen=True)
class Target:
    """The server, and whose requests are sent to it: own, engine or auto.

    `auto` is own: the same requests for every engine, of exact length, with no tokenizer needed here, failures by name. The
    engines' own benchmarks need the model's tokenizer in this Python and differ from each other in what they count.
    """

    url: str
    model: str | None
    api_key_env: str | None
    with_: str
    tokenizer: str | None


class Folder:
    """Where the files go; refused at once when they cannot."""

    def __init__(self, path: Path, force: bool) -> None:
        self._path = path
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is not a folder.", "Name a folder for bench.json and bench.svg.")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The folder {path} cannot be made: {error.strerror}.", "Choose another.") from None
        for name in FILES:
            check_writable(path / name, force)

    def save(self, report: Report) -> None:
        """Write both files."""
        save_text(report.model_dump_json(indent=1) + "\n", self._path / FILES[0])
        save_text(plot(report), self._path / FILES[1])
        _bench_output.say(f"Saved {' and '.join(str(self._path / name) for name in FILES)}.")


def measure(target: Target, settings: Settings, plan_file: Path | None) -> Report:
    """The whole benchmark of one server."""
    url, plan = base_url(target.url), None if plan_file is None else load_plan(plan_file)
    key = read_secrets(target.api_key_env, None).api_key
    served = Served(http_ask(url, key), min(ASK_S, settings.timeout_s), target.model)
    model, context = served.model, _context(served)
    settings, notes = _fitting(settings, context)
    family, version = _family(served)
    told = beside.server_told(served) if family == "sglang" else {}
    server = Server(url, model, "completions", timeout_s=settings.timeout_s, api_key=key)
    prompts = Prompts()
    way = find_way(server, told, prompts, settings.endpoint)
    own = Own(way, prompts)
    report = blank(settings, way, family, version).model_copy(update={"notes": notes})
    measure_level = own.level
    if target.with_ == "engine":
        engine = require_installed(family)
        measure_level = EngineBench(engine, url, model, target.tokenizer, key).level
        report = report.model_copy(update={"measured_with": TITLES[engine]})
    observer = _bench_output.observer()
    try:
        found = run(settings, measure_level, own, observer, report)
    finally:
        observer.close()
    return found if plan is None else _with_plan(found, plan, served, told)


def _context(served: Served) -> int | None:
    """None where the server lists no models, or no length."""
    try:
        return served.context_tokens
    except GlmplanError:
        return None


def _family(served: Served) -> tuple[str | None, str]:
    try:
        return detect_family(served.request)
    except GlmplanError:
        return None, ""


def _fitting(settings: Settings, context: int | None) -> tuple[Settings, tuple[str, ...]]:
    """The settings without prompt lengths that the server's context does not hold."""
    settings.check(context)
    held = tuple(length for length in settings.prefill if context is None or length < context)
    left_out = [f"{length:,}" for length in settings.prefill if length not in held]
    notes = (f"Prefill of {', '.join(left_out)} tokens is left out: the context is {context:,}.",) if left_out else ()
    return replace(settings, prefill=held), notes


def _with_plan(report: Report, plan: Plan, served: Served, told: dict[str, Any]) -> Report:
    """The report with the plan's numbers beside the server's."""
    if report.engine_family != plan.engine_family:
        other = f"The plan is for {plan.engine_family}; the server is {report.engine_family or 'neither SGLang nor vLLM'}."
        report = report.model_copy(update={"notes": (*report.notes, other)})
    notes = beside.plan_notes(plan, report.levels, report.prompt_tokens, report.output_tokens)
    rows = beside.beside(plan, served, told)
    return report.model_copy(update={"plan": rows, "notes": (*report.notes, *notes)})


def exit_problem(report: Report) -> GlmplanError | None:
    """Why the benchmark did not succeed; None when every request was answered."""
    failed = sum(level.failed for level in report.levels) + sum(f.requests for one in report.prefill for f in one.failures)
    asked = sum(level.requests for level in report.levels) + sum(one.requests for one in report.prefill)
    last = report.levels[-1] if report.levels else None
    if last is not None and not last.completed:
        words = last.failures[0].words if last.failures else "no answer"
        return NotHealthyError(
            f"At {last.label} none of {last.requests} requests was answered: {words}.", "Look at the server's log."
        )
    if failed:
        return GlmplanError(f"{failed} of {asked} requests failed; they are named above.", "Look at the server's log.")
    return None
