"""Start a deployment on every node: all of them, or none that was not running before.

Secrets travel in the request's body (stdin of the node program) and land in 0600 files there: the API key in the engine's
`--config` file, the Hugging Face token in a file that HF_TOKEN_PATH names. Both are struck from logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glmplan.errors import GlmplanError, UnreachableError
from glmplan.fleet.deployment import API_KEY_FILE, Deployment, tcp_ports
from glmplan.fleet.hosts import Fleet
from glmplan.fleet.stop import HostStop, stop_all
from glmplan.kernels.packed import packed_text

START_S = 60.0
TOKEN_FILE = "hf-token"


@dataclass(frozen=True)
class Secrets:
    """What must never be seen; `repr` shows nothing."""

    api_key: str | None = field(default=None, repr=False)
    hf_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Started:
    """A node after the start: `state` is started or adopted, `log` the file there."""

    host: str
    node_rank: int
    state: str
    pid: int
    log: str


class StartError(GlmplanError):
    """A node refused to start; what this call started is stopped again, and hosts where that is not proved are named.

    The exit code is the first reason's.
    """


def requests(deployment: Deployment, secrets: Secrets) -> dict[str, dict[str, Any]]:
    """The start request of every host."""
    found = {}
    for rank, host in enumerate(deployment.hosts):
        command = deployment.commands[rank]
        argv, environment, files, redact = list(command.argv), dict(command.environment), [], []
        if secrets.api_key is not None:
            argv += ["--config", f"@FILES@/{API_KEY_FILE}"]
            files.append({"name": API_KEY_FILE, "content": f"api-key: {_quoted(secrets.api_key)}\n"})
            redact.append(secrets.api_key)
        if secrets.hf_token is not None:
            environment["HF_TOKEN_PATH"] = f"@FILES@/{TOKEN_FILE}"
            files.append({"name": TOKEN_FILE, "content": secrets.hf_token})
            redact.append(secrets.hf_token)
        found[host] = {
            "deployment": deployment.name,
            "digest": deployment.digest,
            "node_rank": rank,
            "owner": deployment.owner,
            "argv": argv,
            "environment": environment,
            "gpu_indexes": list(deployment.gpu_indexes[rank]),
            "tcp_ports": tcp_ports(deployment, rank),
            "files": files,
            "redact": redact,
            "site": packed_text() if deployment.sends_kernels else "",
        }
    return found


def _quoted(text: str) -> str:
    """A YAML string in single quotes."""
    return "'" + text.replace("'", "''") + "'"


def start_all(fleet: Fleet, deployment: Deployment, secrets: Secrets) -> tuple[Started, ...]:
    """Start every node at once; if one cannot, stop those that this call started and raise with all reasons."""
    wanted = requests(deployment, secrets)
    outcomes = fleet.ask_all("start", wanted, timeout_s=START_S)
    results = {host: outcomes[host].result for host in deployment.hosts}
    started = [
        Started(host, rank, result["state"], result["pid"], result["log"])
        for rank, (host, result) in enumerate(results.items())
        if result is not None
    ]
    failed = {host: outcomes[host].error for host in deployment.hosts if outcomes[host].error is not None}
    if not failed:
        return tuple(started)
    fresh = [node.host for node in started if node.state == "started"]
    unsure = [host for host, error in failed.items() if isinstance(error, UnreachableError)]
    raise _refused(failed, stop_all(fleet, deployment.name, [*fresh, *unsure]))


def _refused(failed: Mapping[str, GlmplanError | None], stops: tuple[HostStop, ...]) -> GlmplanError:
    """All reasons in one error, of the class of the first."""
    first = next(error for error in failed.values() if error is not None)
    words = [f"{host}: {error.message}" for host, error in failed.items() if error is not None]
    left = [stop.host for stop in stops if not stop.stopped]
    begin = f"NOT PROVED STOPPED: {', '.join(left)}; nothing else was started." if left else "Nothing was started."
    error = StartError(f"{begin} {' '.join(words)}", first.next_step)
    error.exit_code = first.exit_code
    return error
