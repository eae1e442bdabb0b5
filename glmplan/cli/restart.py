"""`glmplan restart` and `glmplan watch`: bring a recorded deployment up again, once or whenever it falls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from glmplan.cli._hosts import HostOptions
from glmplan.cli._options import takes_host_options

if TYPE_CHECKING:
    from glmplan.fleet.deployment import Deployment
    from glmplan.fleet.launch import Judgement
    from glmplan.fleet.start import Secrets

RESTART_EXAMPLES = """Examples:

glmplan restart

glmplan restart glm-5.2-fp8-3f9a1c --json"""

WATCH_EXAMPLES = """Examples:

glmplan watch --max-restarts 3

glmplan watch glm-5.2-fp8-3f9a1c --check-every 60"""

ApiKeyEnv = Annotated[str | None, typer.Option(help="Variable here that holds the server's API key.")]
HfTokenEnv = Annotated[str | None, typer.Option(help="Variable here that holds a Hugging Face token.")]
NoCanary = Annotated[bool, typer.Option("--no-canary", help="Do not ask the server anything.")]
Name = Annotated[str | None, typer.Argument(help="A deployment; without it, the only one launched from here.")]


def _inputs(
    name: str | None, api_key_env: str | None, hf_token_env: str | None, canary: bool
) -> tuple[Deployment, Secrets, Judgement]:
    """The record, the secrets it needs, and how its start is judged."""
    from glmplan.cli._launching import canary_settings
    from glmplan.cli._wanted import read_secrets
    from glmplan.errors import UsageError
    from glmplan.fleet import deployment as records
    from glmplan.fleet import prepare
    from glmplan.fleet.follow import Limits
    from glmplan.fleet.launch import Judgement

    record = records.load(name)
    secrets = read_secrets(api_key_env, hf_token_env)
    if record.needs_api_key and secrets.api_key is None:
        raise UsageError(
            f"{record.name} was launched with an API key, which is kept nowhere here.", "Name its variable: --api-key-env."
        )
    works = prepare.works(record.plan, {}, record.rehearsal)
    asked = canary_settings(record, None, record.canaries_passed and _askable(record)) if canary else None
    return record, secrets, Judgement(works, Limits(prepare.allowed_s(works)), asked)


def _askable(record: Deployment) -> tuple[str, ...]:
    """The canaries passed at the launch; recorded answers are not kept with the deployment."""
    return tuple(name for name in record.canaries_passed if name != "reference")


@takes_host_options
def restart(
    options: HostOptions,
    name: Name = None,
    api_key_env: ApiKeyEnv = None,
    hf_token_env: HfTokenEnv = None,
    no_canary: NoCanary = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Stop a deployment everywhere, then start the same again and check its answers."""
    from glmplan.cli import _launching, _telling
    from glmplan.errors import NotHealthyError
    from glmplan.fleet.stop import stop_all

    record, secrets, judging = _inputs(name, api_key_env, hf_token_env, not no_canary)
    with _launching.fleet_of(record, options) as fleet:
        stops = stop_all(fleet, record.name)
    _telling.tell_stops(stops)
    if not all(stop.stopped for stop in stops):
        raise NotHealthyError(
            f"{record.name} is not stopped everywhere, so it was not started again.", "See the lines above."
        )
    result = _launching.bring_up(options, record, secrets, judging)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        _telling.print_result(result)


@takes_host_options
def watch(
    options: HostOptions,
    name: Name = None,
    max_restarts: Annotated[int, typer.Option(help="Restarts before giving up; stable service sets the count back.")] = 3,
    check_every: Annotated[float, typer.Option(help="Seconds between two canaries; 0 asks none.")] = 300.0,
    poll_every: Annotated[float, typer.Option(help="Seconds between two looks at the nodes.")] = 5.0,
    back_off: Annotated[float, typer.Option(help="Seconds before the first restart; doubled each time.")] = 5.0,
    api_key_env: ApiKeyEnv = None,
    hf_token_env: HfTokenEnv = None,
    no_canary: NoCanary = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a JSON line.")] = False,
) -> None:
    """Restart a deployment whenever a rank dies or an answer is wrong: all ranks or none. Ctrl-C leaves it running."""
    from glmplan.cli import _launching, _telling
    from glmplan.cli._follow import Lines
    from glmplan.errors import UsageError
    from glmplan.fleet.launch import LaunchInterrupted
    from glmplan.fleet.watch import Patience, watch

    for word, value, least in (
        ("max-restarts", max_restarts, 0), ("check-every", check_every, 0), ("poll-every", poll_every, 0.1),
        ("back-off", back_off, 0),
    ):  # fmt: skip
        if not least <= value < float("inf"):
            raise UsageError(f"--{word} is {value:g}; it must be at least {least:g}, and finite.", "Correct it.")
    record, secrets, judging = _inputs(name, api_key_env, hf_token_env, not no_canary)
    patience = Patience(max_restarts, poll_every, check_every, back_off)
    say = _json_line if as_json else _line
    say(f"watching {record.name} on {', '.join(record.hosts)}")
    try:
        with _launching.fleet_of(record, options) as fleet:
            watch(fleet, record, secrets, judging, patience, Lines(record, judging.limits.deadline_s), say)
    except LaunchInterrupted as error:
        _telling.tell_stops(error.stops)
        raise
    except KeyboardInterrupt:
        _telling.say(f"Detached; {record.name} is left as it is: glmplan status {record.name}.")
        raise


def _line(text: str) -> None:
    import time

    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _json_line(text: str) -> None:
    import json
    import time

    print(json.dumps({"time_s": round(time.time(), 3), "event": text}), flush=True)
