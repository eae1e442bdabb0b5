"""What was typed for a launch beside hardware and load, checked before anything is asked of a host."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from glmplan.engines.base import Endpoints, More
from glmplan.errors import UsageError
from glmplan.facts.model_config import first_problem, read_json
from glmplan.fleet.reference import Reference
from glmplan.fleet.start import Secrets

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Wanted:
    """What was typed beside hardware and load."""

    plan_file: Path | None
    rehearse: bool
    yes: bool
    name: str | None
    endpoints: Endpoints
    api_key_env: str | None
    hf_token_env: str | None
    engine_python: str | None
    more: More
    skip_doctor: bool
    deadline_s: float | None
    stall_s: float | None
    lost_after_s: float
    canary: bool
    canary_reference: Path | None
    canaries: tuple[str, ...]
    as_json: bool

    @property
    def engine_pythons(self) -> tuple[str, ...]:
        """The Python that was named, if any."""
        return (self.engine_python,) if self.engine_python else ()

    @property
    def engine_folders(self) -> tuple[str, ...]:
        """Where the engine will find packages first: PYTHONPATH of --engine-env."""
        values = [value for name, value in self.more.environment if name == "PYTHONPATH"]
        return tuple(folder for folder in values[-1].split(":") if folder) if values else ()


def more_words(words: list[str] | None, variables: list[str] | None) -> More:
    """What `--engine-arg` and `--engine-env` add."""
    pairs = []
    for text in variables or ():
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise UsageError(f"--engine-env {text!r} is not NAME=VALUE.", "Write --engine-env NCCL_DEBUG=INFO.")
        pairs.append((name, value))
    return More(tuple(words or ()), tuple(pairs))


def canary_names(text: str | None) -> tuple[str, ...]:
    """The names of `--canaries`, refused before anything is asked of a host."""
    from glmplan.fleet.canary import CanarySettings, chosen

    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise UsageError(f"--canaries {text!r} has an empty name.", "Write --canaries fact,needle, or leave it out.")
    chosen(CanarySettings(only=names))
    return names


def read_secrets(api_key_env: str | None, hf_token_env: str | None) -> Secrets:
    """The values of the named variables; an empty one is refused."""
    values = []
    for option, variable in (("--api-key-env", api_key_env), ("--hf-token-env", hf_token_env)):
        value = None if variable is None else os.environ.get(variable, "").strip()
        if value == "":
            raise UsageError(
                f"{option} names {variable}, which is not set here.", f"Set it: read -rs {variable}; export {variable}"
            )
        values.append(value)
    return Secrets(*values)


def check_listening(http_host: str, secrets: Secrets) -> None:
    """Nobody serves a network without a key."""
    if http_host not in LOOPBACK and not http_host.startswith("127.") and secrets.api_key is None:
        raise UsageError(
            f"--http-host {http_host} is open to the network, and no API key is given.",
            "Name the variable that holds one with --api-key-env, or keep 127.0.0.1 and use ssh -L.",
        )


def read_reference(path: Path) -> Reference:
    """Answers that `glmplan verify --record` wrote."""
    try:
        return Reference.model_validate(read_json(path))
    except ValidationError as error:
        raise UsageError(
            f"{path} is no record of answers: {first_problem(error)}.", "Make one: glmplan verify --url URL --record FILE."
        ) from None
