"""A launch as a record: what runs where, under which name, and the request that starts it on each node.

The record lies on the machine that launched, `$XDG_STATE_HOME/glmplan/launches/NAME.json` (0600), and holds no secret: it
is what `status`, `logs`, `stop`, `restart` and `watch` read. What truly runs is always asked of the hosts.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from glmplan.engines.base import NodeCommand
from glmplan.errors import UsageError
from glmplan.facts.base import Frozen
from glmplan.facts.model_config import first_problem, read_json
from glmplan.fleet.log_lines import Family
from glmplan.node.state import home, make_folder
from glmplan.planning.plan import Plan

RESERVED = {"launches", "calibration", "node"}
API_KEY_FILE = "engine.yaml"


class Deployment(Frozen):
    """One launch. `hosts` are names as the user wrote them, in node-rank order."""

    schema_version: Literal[1] = 1
    name: str
    digest: str
    hosts: tuple[str, ...] = Field(min_length=1)
    owner: str
    created_s: float
    rehearsal: bool
    http_host: str
    http_port: int
    rendezvous_port: int
    needs_api_key: bool
    uses_port: bool = False
    commands: tuple[NodeCommand, ...]
    gpu_indexes: tuple[tuple[int, ...], ...]
    weights_bytes: tuple[int, ...]
    canaries_passed: tuple[str, ...] = ()
    plan: Plan

    @property
    def log_family(self) -> Family:
        """Whose lines the workers print: the stand-in of a rehearsal prints SGLang's."""
        return "sglang" if self.rehearsal else self.plan.engine_family

    @property
    def sends_kernels(self) -> bool:
        """Whether glmplan's package goes along: for its kernels, or for tuned tables beside the engine's own."""
        return any("@SITE@" in value for command in self.commands for value in command.environment.values())

    @property
    def base_url(self) -> str:
        """The HTTP server as the head node sees it."""
        host = self.commands[0].http_host or self.http_host
        host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        return f"http://[{host}]:{self.http_port}" if ":" in host else f"http://{host}:{self.http_port}"


def owner() -> str:
    """Who launches, for people on the hosts: user@machine."""
    return f"{getpass.getuser()}@{platform.node()}"


def digest(plan: Plan, commands: tuple[NodeCommand, ...], has_key: bool = False) -> str:
    """Tells two launches apart: same commands on the same hosts, with an API key or without one, same digest."""
    text = "\n".join(command.model_dump_json() for command in commands) + plan.model + (" key" if has_key else "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_name(plan: Plan, code: str, rehearsal: bool) -> str:
    """`glm-5.2-fp8-3f9a1c`; a rehearsal says so."""
    words = re.sub(r"[^a-z0-9.]+", "-", f"{plan.model}-{plan.checkpoint}".lower()).strip("-.")
    return f"{'rehearsal-' if rehearsal else ''}{words[:40]}-{code[:6]}"


def check_name(name: str) -> str:
    """A name that is safe as a folder on every host."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name) or name in RESERVED:
        raise UsageError(
            f"{name!r} is no name for a deployment.", "Use lower-case letters, digits, dots and dashes, at most 63."
        )
    return name


def launches_folder() -> Path:
    """Where records lie on this machine."""
    return home() / "launches"


def save(deployment: Deployment) -> Path:
    """Write the record whole or not at all."""
    folder = launches_folder()
    try:
        make_folder(folder)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(deployment.model_dump_json(indent=1) + "\n")
        path = folder / f"{deployment.name}.json"
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"The record of the launch cannot be written to {folder}: {error.strerror}.",
            "Make room there, or set XDG_STATE_HOME to a folder you may write to.",
        ) from None
    return path


def recorded() -> dict[str, Path]:
    """Records by name, newest first."""
    files = launches_folder().glob("*.json")
    return {path.stem: path for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)}


def load(name: str | None) -> Deployment:
    """The named record; without a name the only one, or a UsageError that lists them."""
    found = recorded()
    if not found:
        raise UsageError(
            f"No launch is recorded on this machine ({launches_folder()} is empty).",
            "Start one with glmplan launch, or ask the hosts: --hosts a,b,c.",
        )
    if name is None and len(found) > 1:
        raise UsageError(f"{len(found)} launches are recorded: {', '.join(found)}.", "Name one of them.")
    chosen = next(iter(found)) if name is None else name
    if chosen not in found:
        raise UsageError(f"No launch is named {chosen!r}; recorded: {', '.join(found)}.", "Name one of them.")
    try:
        return Deployment.model_validate(read_json(found[chosen]))
    except ValidationError as error:
        raise UsageError(
            f"{found[chosen]} is no record of this glmplan: {first_problem(error)}.",
            "Ask the hosts instead (--hosts a,b,c), and remove that file.",
        ) from None


def forget(name: str) -> None:
    """Remove the record."""
    (launches_folder() / f"{name}.json").unlink(missing_ok=True)


def tcp_ports(deployment: Deployment, node_rank: int) -> list[str]:
    """`address:port` of what must be free on a node before it starts; an empty address is any."""
    listens = deployment.commands[node_rank].http_host
    found = [f"{listens}:{deployment.http_port}"]
    if node_rank == 0:
        local = listens if listens.startswith("127.") and len(deployment.hosts) > 1 else ""
        found.append(f"{local}:{deployment.rendezvous_port}")
    return found
