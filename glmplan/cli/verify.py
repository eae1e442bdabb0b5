"""`glmplan verify`: are the answers of a running server right, or the kernels of this GPU?"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from glmplan.fleet.canary import CanaryResult, CanarySettings
    from glmplan.fleet.served import Ask, Served

EXAMPLES = """Examples:

glmplan verify --url http://127.0.0.1:30000

glmplan verify --url http://10.0.0.1:30000 --api-key-env GLM_KEY --only needle,long-needle

glmplan verify --url http://trusted:30000 --record answers.json

glmplan verify --url http://10.0.0.1:30000 --reference answers.json --json

glmplan verify --kernels"""


@dataclass(frozen=True)
class _Asked:
    """What was typed about the server."""

    url: str
    without_mtp_url: str | None
    model: str | None
    context_tokens: int | None
    timeout_s: float
    api_key: str | None
    only: tuple[str, ...]


def verify(
    url: Annotated[str | None, typer.Option(help="The server: http://HOST:PORT.")] = None,
    model: Annotated[str | None, typer.Option(help="The served model's name; else the first of /v1/models.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API key.", metavar="NAME")
    ] = None,
    context: Annotated[str | None, typer.Option(help="Longest request in tokens; else what the server lists.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Canaries to ask, by name; may be repeated or a,b,c.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Compare with answers of a trusted server, made with --record.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Write this server's answers to a file, and ask nothing else.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="With --record: mean difference after a prompt that is still equal, in nats (0.1).")
    ] = None,
    ties: Annotated[float | None, typer.Option(help="With --record: two tokens this near are a tie, in nats (0.2).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --record overwrite a file.")] = False,
    without_mtp_url: Annotated[
        str | None, typer.Option(help="The same model without MTP; its text must agree (canary mtp).")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 300.0,
    kernels: Annotated[bool, typer.Option("--kernels", help="Check the kernels on this machine's GPU instead.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print the canaries and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Ask questions whose answers are known: a fact, arithmetic, needles in long texts, a tool call, two equal runs."""
    from glmplan.errors import UsageError
    from glmplan.units import parse_tokens

    if list_:
        _list(as_json)
        return
    if kernels == (url is not None):
        raise UsageError("Give either --url or --kernels.", "glmplan verify --url http://127.0.0.1:30000, for example.")
    if kernels:
        raise typer.Exit(_kernels(as_json))
    _check_numbers(timeout, tolerance, ties)
    if record is None and (tolerance is not None or ties is not None):
        raise UsageError("--tolerance and --ties go with --record: they are kept in the record.", "Record again with them.")
    if record is not None and (reference is not None or only or without_mtp_url):
        raise UsageError("--record asks for token ids only; it goes with no canary.", "Record first, then verify.")
    assert url is not None
    names = tuple(name.strip() for words in only or () for name in words.split(",") if name.strip())
    tokens = None if context is None else parse_tokens(context, "--context")
    asked = _Asked(url, without_mtp_url, model, tokens, timeout, _key(api_key_env), names)
    if record is not None:
        _record(asked, record, (tolerance, ties), force, as_json)
    else:
        _ask(asked, reference, as_json)


def _check_numbers(timeout: float, tolerance: float | None, ties: float | None) -> None:
    from glmplan.errors import UsageError
    from glmplan.fleet.reference import MOST_TIE_NATS, MOST_TOLERANCE_NATS

    for option, value, most, usual in (
        ("--timeout", timeout, math.inf, "300"),
        ("--tolerance", tolerance, MOST_TOLERANCE_NATS, "0.1"),
        ("--ties", ties, MOST_TIE_NATS, "0.2"),
    ):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{option} is {value:g} and must be a number above 0.", f"Write {option} {usual}, for example.")
        if value is not None and value > most:
            raise UsageError(
                f"{option} is {value:g} nats and may be {most:g} at most.", f"Write {option} {usual}, for example."
            )


def _key(name: str | None) -> str | None:
    from glmplan.errors import UsageError

    if name is None:
        return None
    if not os.environ.get(name):
        raise UsageError(f"The environment variable {name} is not set.", f"Set it: read -rs {name} && export {name}")
    return os.environ[name]


def _served(asked: _Asked) -> tuple[Ask, Served]:
    from glmplan.fleet.served import Served, http_ask

    ask = http_ask(asked.url, asked.api_key)
    return ask, Served(ask, asked.timeout_s, asked.model, asked.context_tokens)


def _ask(asked: _Asked, reference: Path | None, as_json: bool) -> None:
    """Run the canaries and judge."""
    from glmplan.cli._wanted import read_reference
    from glmplan.fleet.canary import CanarySettings, chosen, require_right, run_canaries
    from glmplan.fleet.served import http_ask

    settings = CanarySettings(
        model=asked.model,
        context_tokens=asked.context_tokens,
        only=asked.only,
        skip=_not_wanted(asked, reference),
        timeout_s=asked.timeout_s,
        reference=None if reference is None else read_reference(reference),
    )
    chosen(settings)
    ask, served = _served(asked)
    named = settings.model_copy(update={"model": served.model, "context_tokens": served.context_tokens})
    plain = None if asked.without_mtp_url is None else http_ask(asked.without_mtp_url, asked.api_key)
    results = run_canaries(ask, named, None if as_json else _print, without_mtp=plain)
    if as_json:
        _json(asked.url, named, results)
    require_right(results)
    if not as_json:
        passed = sum(result.status == "pass" for result in results)
        typer.echo(
            f"{passed} canaries passed, {len(results) - passed} skipped: {served.model} at {asked.url} answers rightly."
        )


def _not_wanted(asked: _Asked, reference: Path | None) -> tuple[str, ...]:
    """Canaries that need something the user did not give are not named, unless asked for by name."""
    absent = [("mtp", asked.without_mtp_url), ("reference", reference)]
    return tuple(name for name, given in absent if given is None and name not in asked.only)


def _record(asked: _Asked, path: Path, allowed: tuple[float | None, float | None], force: bool, as_json: bool) -> None:
    """Ask a trusted server for its tokens and keep them. `allowed`: --tolerance and --ties."""
    from glmplan.cli._files import check_writable, save_text
    from glmplan.fleet.reference import TIE_NATS, TOLERANCE_NATS, detect_family, record

    check_writable(path, force)
    _, served = _served(asked)
    model = served.model
    family, version = detect_family(served.request)
    tolerance, ties = allowed
    found = record(
        served.request, model, family, version, served.context_tokens, tolerance or TOLERANCE_NATS, ties or TIE_NATS
    )
    save_text(found.model_dump_json(indent=1) + "\n", path)
    tokens = sum(len(entry.tokens) for entry in found.entries)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    noise, name = max((entry.noise_nats or 0.0, entry.name) for entry in found.entries)
    most = f", by {noise:g} after the prompt of {name}" if noise else ""
    typer.echo(
        f"Saved {path}: {len(found.entries)} prompts and {tokens} tokens of {model} ({family} {version or '?'}); "
        f"the server differs from itself by {found.noise_nats:g} nats{most}.\n"
        f"Next: glmplan verify --url URL --reference {path}"
    )


def _print(result: CanaryResult) -> None:
    """One line a canary; what was asked and answered where it failed."""
    note = f"  {result.note}" if result.note else ""
    typer.echo(f"{result.status:<5} {result.name:<12} {result.seconds:7.2f} s{note}")
    if result.status == "fail":
        for name, value in (("asked", result.prompt), ("expected", result.expected), ("got", result.got)):
            lines = value.splitlines() or [""]
            typer.echo(f"      {name + ':':<10}" + "\n                ".join(lines))


def _json(url: str, settings: CanarySettings, results: tuple[CanaryResult, ...]) -> None:
    import json

    right = not any(result.status == "fail" for result in results) and any(result.status == "pass" for result in results)
    shown = {"url": url, "model": settings.model, "right": right, "results": [result.model_dump() for result in results]}
    typer.echo(json.dumps(shown, indent=1, ensure_ascii=False))


def _list(as_json: bool) -> None:
    import json

    from glmplan.fleet.canary import TITLES

    if as_json:
        typer.echo(json.dumps([{"name": name, "title": title} for name, title in TITLES.items()], indent=1))
        return
    for name, title in TITLES.items():
        typer.echo(f"{name:<12} {title}")


def _kernels(as_json: bool) -> int:
    """The kernels' own check in a process of its own, because it takes the GPU; its exit code."""
    import json
    import subprocess

    command = [sys.executable, "-m", "glmplan.kernels.verify"]
    if not as_json:
        return subprocess.run(command, check=False).returncode
    ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    typer.echo(json.dumps({"right": ran.returncode == 0, "lines": ran.stdout.splitlines()}, indent=1))
    return ran.returncode
