"""`glmplan bench`: how fast a running server answers, at how many requests at once, and how fast it reads prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from glmplan.bench.result import Report
    from glmplan.bench.run import Settings
    from glmplan.cli._benching import Folder

LOAD, OUTPUT = "Load", "Output"

MOST_AT_ONCE = 4096
"""Each request at once is a thread."""
EXAMPLES = """Examples:

glmplan bench --url http://127.0.0.1:30000

glmplan bench --url http://127.0.0.1:30000 --concurrency 1,16,64 --prompt-tokens 4k --output-tokens 256 --out bench-h200

glmplan bench --url http://10.0.0.1:30000 --rate 2.5 --api-key-env GLM_KEY --prefill none

glmplan bench --url http://127.0.0.1:30000 --plan plan.json --json"""


def bench(
    url: Annotated[str, typer.Option(help="The server: http://HOST:PORT.")],
    concurrency: Annotated[
        str | None, typer.Option(help="Requests at once, level by level (1,4,8,16,32).", rich_help_panel=LOAD)
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second that arrive at random, instead of --concurrency.", rich_help_panel=LOAD),
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Length of the prompts.", rich_help_panel=LOAD)] = "1024",
    output_tokens: Annotated[str, typer.Option(help="Length of the answers.", rich_help_panel=LOAD)] = "128",
    prefill: Annotated[
        str, typer.Option(help="Prompt lengths whose reading is timed, or none.", rich_help_panel=LOAD)
    ] = "1k,8k,32k",
    requests_per_level: Annotated[
        int | None,
        typer.Option(help="Requests of each level (default: 3 a stream, at least 8).", rich_help_panel=LOAD),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The served model's name; else the first of /v1/models.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API key.", metavar="NAME")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of silence after which a request has failed.")] = 600.0,
    endpoint: Annotated[
        str, typer.Option(help="completions, generate (SGLang's own, token ids), or auto: what the server takes.")
    ] = "auto",
    with_: Annotated[
        str, typer.Option("--with", help="Whose requests: own, engine (its serving benchmark, if here), or auto: own.")
    ] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="With --with engine: a tokenizer's folder or repository, if not the server's.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A saved plan: its numbers beside the server's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.svg.", rich_help_panel=OUTPUT)] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite them.", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure decode speed by load, time to first token, time between tokens, and prefill by length."""
    from glmplan.cli import _benching

    typed: dict[str, Any] = {
        "concurrency": concurrency, "rate": rate, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens,
        "prefill": prefill, "requests_per_level": requests_per_level, "timeout": timeout, "endpoint": endpoint,
    }  # fmt: skip
    settings, whose = settings_of(typed), _one_of("--with", with_, ("auto", "own", "engine"))
    folder = None if out is None else _benching.Folder(out, force)
    report = _benching.measure(_benching.Target(url, model, api_key_env, whose, tokenizer), settings, plan)
    _finish(report, folder, as_json)


def settings_of(typed: dict[str, Any]) -> Settings:
    """What was typed about the load, checked."""
    from glmplan.bench.run import Settings
    from glmplan.errors import UsageError
    from glmplan.units import parse_tokens

    if typed["concurrency"] is not None and typed["rate"] is not None:
        raise UsageError("--concurrency and --rate exclude each other.", "Give one of them.")
    levels = _counts("--concurrency", typed["concurrency"] or "1,4,8,16,32", MOST_AT_ONCE)
    lengths = () if typed["prefill"].strip().lower() == "none" else _counts("--prefill", typed["prefill"])
    for name in ("rate", "requests_per_level", "timeout"):
        if typed[name] is not None and not 0 < typed[name] < 1e9:
            raise UsageError(f"--{name.replace('_', '-')} is {typed[name]:g}; it must be above 0.", "Correct it.")
    tokens = [parse_tokens(typed[name], f"--{name.replace('_', '-')}") for name in ("prompt_tokens", "output_tokens")]
    if min(tokens) < 1:
        raise UsageError("--prompt-tokens and --output-tokens must be at least 1.", "Correct them.")
    endpoint = _one_of("--endpoint", typed["endpoint"], ("auto", "completions", "generate"))
    return Settings(
        concurrency=levels, rate_per_s=typed["rate"], prompt_tokens=tokens[0], output_tokens=tokens[1], prefill=lengths,
        requests_per_level=typed["requests_per_level"], timeout_s=typed["timeout"],
        endpoint="generate" if endpoint == "generate" else "completions" if endpoint == "completions" else None,
    )  # fmt: skip


def _counts(option: str, text: str, most: int = 10**7) -> tuple[int, ...]:
    from glmplan.errors import UsageError
    from glmplan.units import parse_tokens

    found = tuple(parse_tokens(part, option) for part in text.split(","))
    if min(found) < 1 or max(found) > most or len(set(found)) < len(found):
        raise UsageError(
            f"{option} {text!r} has a number below 1, one above {most:,}, or one twice.", "Write it like 1,4,16."
        )
    return found


def _one_of(option: str, text: str, known: tuple[str, ...]) -> str:
    from glmplan.errors import UsageError
    from glmplan.units import nearest

    if text not in known:
        raise UsageError(f"{option} {text!r} is not known.", nearest(text, list(known)))
    return text


def _finish(report: Report, folder: Folder | None, as_json: bool) -> None:
    """Print, save, and end with the exit code that the report deserves."""
    from glmplan.cli import _bench_output, _benching

    if as_json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        _bench_output.print_report(report)
    if folder is not None:
        folder.save(report)
    if report.interrupted:
        raise typer.Exit(130)
    problem = _benching.exit_problem(report)
    if problem is not None:
        raise problem
