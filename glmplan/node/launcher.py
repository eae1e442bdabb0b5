"""One start of one worker: what was asked, whether it may run here, and the files and the process it needs."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import state
from .bundle import bundle
from .errors import NodeError
from .port_holder import holder, wait_for_passing
from .processes import MARK, boot_id, kill, record_of
from .worker_log import LEAST_SECRET, Redactor

KEPT = (
    "HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME", "VIRTUAL_ENV",
    "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "HF_HOME", "HF_HUB_CACHE", "NVIDIA_VISIBLE_DEVICES", "SSL_CERT_FILE",
)  # fmt: skip
"""What a worker inherits; everything else is set by the plan, so that a controller's shell cannot change it."""
START_S = 20.0
"""A supervisor that has not answered by then hangs on a dead disk."""
GIVEN_UP_S = 2.0
"""One that is killed is gone within this time, unless the kernel holds it."""
LEAST_FREE_BYTES = 1 << 20


@dataclass(frozen=True)
class Order:
    """A `start` request. `tcp_ports` are numbers (any address) or "address:port"; `site` is a zip in base64, unpacked for
    the worker's Python path."""

    deployment: str
    digest: str
    argv: list[str]
    node_rank: int = 0
    owner: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    gpu_indexes: list[int] = field(default_factory=list)
    tcp_ports: list[Any] = field(default_factory=list)
    files: list[dict[str, str]] = field(default_factory=list)
    redact: list[str] = field(default_factory=list)
    site: str = ""
    log_limit_bytes: int = 0

    @property
    def place(self) -> Path:
        """The state folder."""
        return state.folder(self.deployment)

    def filled(self, text: str) -> str:
        """The text with places for @FILES@ (the files), @SITE@ (the unpacked site) and @NODE@ (the node program)."""
        places = {"@FILES@": "files", "@SITE@": "site", "@NODE@": "node.pyz"}
        for word, name in places.items():
            text = text.replace(word, str(self.place / name))
        return text


def order(request: dict[str, Any]) -> Order:
    """The request, checked as far as text can be."""
    try:
        found = Order(**request)
    except TypeError as error:
        raise NodeError("usage", f"The start request is wrong: {error}.", "Use the same glmplan for all hosts.") from None
    state.folder(found.deployment)
    if not found.argv:
        raise NodeError("usage", "The start request has no command.", "Give argv.")
    short = [secret for secret in found.redact if len(secret) < LEAST_SECRET]
    if short:
        raise NodeError(
            "usage",
            f"A secret of {len(short[0])} characters cannot be kept out of the log; {LEAST_SECRET} is the least.",
            "Use a longer one.",
        )
    for entry in found.files:
        if not state.NAME.fullmatch(entry["name"]):
            raise NodeError("usage", f"{entry['name']!r} is no name of a file.", "Use letters, digits, '.', '_' and '-'.")
    return found


def worker_environment(wanted: Order) -> dict[str, str]:
    """What a login gives, what the plan sets, and the marks by which the processes are found again."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("LC_")}
    kept.setdefault("PATH", os.defpath)
    asked = {name: wanted.filled(value) for name, value in wanted.environment.items()}
    marks = {"GLMPLAN_DEPLOYMENT": wanted.deployment, MARK: str(wanted.place)}
    return {**kept, "PYTHONUNBUFFERED": "1", "SPT_NOENV": "1", **asked, **marks}


def worker_argv(wanted: Order, environment: dict[str, str]) -> list[str]:
    """The command with its program found; as the first word @NODE@ brings this Python with it."""
    argv = [wanted.filled(word) for word in wanted.argv]
    if wanted.argv[0] == "@NODE@":
        return [sys.executable, *argv]
    program = shutil.which(argv[0], path=environment["PATH"])
    if program is None:
        raise NodeError(
            "no-program",
            f"{socket.gethostname()} has no program {argv[0]!r} on PATH={environment['PATH']}.",
            "Install the engine there, or put its environment first on PATH.",
        )
    return [program, *argv[1:]]


def require_free_ports(tcp_ports: list[Any]) -> None:
    """Refuse ports on which something listens; the one that does is named where /proc shows it."""
    for entry in tcp_ports:
        address, _, port = str(entry).rpartition(":")
        problem = _taken(address.strip("[]"), int(port))
        if problem == "taken" and wait_for_passing(int(port)):
            problem = _taken(address.strip("[]"), int(port))
        if problem:
            by = holder(int(port))
            who = f" by pid {by['pid']} ({by['command']}) of {by['owner']}" if by["pid"] else ""
            next_step = f"Stop it (`kill {by['pid']}`), or choose another port." if by["pid"] else "Choose another port."
            raise NodeError("port-taken", f"TCP port {str(entry).lstrip(':')} is {problem}{who}.", next_step)


def _taken(address: str, port: int) -> str:
    """Why it cannot be listened on: "taken", or the system's words; empty when it can."""
    for family, place in ((socket.AF_INET, address or "0.0.0.0"), (socket.AF_INET6, address or "::")):
        if address and (":" in address) != (family == socket.AF_INET6):
            continue
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((place, port))
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "taken"
            if error.errno == errno.EACCES:
                return "not allowed for this user"
            if address:
                return f"not to be had ({error.strerror})"
    return ""


def write_state(wanted: Order, started_s: float, gpus: list[dict[str, Any]]) -> None:
    """A fresh state folder: what was asked, without secrets, and the files with them."""
    place, hide = wanted.place, Redactor(wanted.redact)
    told = {
        "deployment": wanted.deployment, "digest": wanted.digest, "node_rank": wanted.node_rank, "owner": wanted.owner,
        "argv": wanted.argv, "environment": wanted.environment, "gpu_indexes": wanted.gpu_indexes,
        "tcp_ports": wanted.tcp_ports, "files": [entry["name"] for entry in wanted.files], "started_s": started_s,
        "gpus_before": gpus,
    }  # fmt: skip
    with state.writing(place):
        state.remove(place)
        state.make_folder(place / "files")
        disk = os.statvfs(place)
        if disk.f_bavail * disk.f_frsize < LEAST_FREE_BYTES:
            raise OSError(state.DISK_FULL[0], os.strerror(state.DISK_FULL[0]))
        for entry in wanted.files:
            state.write_file(place / "files" / entry["name"], entry["content"].encode())
        _unpack(wanted.site, place / "site")
        state.write_file(place / "node.pyz", bundle())
        state.write_json(place / "worker.json", {"pid": None, "boot_id": boot_id(), "starter": record_of(os.getpid())})
        state.write_file(place / "start.json", hide.clean(json.dumps(told).encode()))


def _unpack(site: str, folder: Path) -> None:
    """The zip of a `start` request (base64) below `folder`; a name that leads out of it is refused."""
    if not site:
        return
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(site))) as archive:
        for entry in archive.infolist():
            parts = Path(entry.filename).parts
            if entry.filename.startswith("/") or ".." in parts:
                raise NodeError("usage", f"The site names {entry.filename!r}.", "Use the same glmplan for all hosts.")
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            state.write_file(target, archive.read(entry))


def supervise(wanted: Order, argv: list[str], environment: dict[str, str], lock: int) -> dict[str, Any]:
    """Start the supervisor, which outlives this program, and wait until it has started the worker.

    It holds `lock` until its record is written, so that no other start comes between if this program is killed.
    """
    place = wanted.place
    cwd = environment.get("HOME", "/")
    request = {
        "folder": str(place), "argv": argv, "environment": environment, "redact": wanted.redact,
        "cwd": cwd if os.path.isdir(cwd) else "/", "log_limit_bytes": wanted.log_limit_bytes,
        "lock": lock,
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name in KEPT}
    process = subprocess.Popen(
        [sys.executable, str(place / "node.pyz"), "supervise", wanted.deployment], env=kept, cwd="/",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        pass_fds=(lock,),
    )  # fmt: skip
    try:
        out, _ = process.communicate(json.dumps(request).encode(), timeout=START_S)
        found = json.loads(out)
    except (subprocess.TimeoutExpired, ValueError) as error:
        _give_up(place, process)
        raise NodeError(
            "not-started", f"The supervisor of {wanted.deployment} did not start: {error}.", f"Look into {place}."
        ) from None
    if "error" in found:
        raise NodeError("no-program", f"{argv[0]} did not start: {found['error']}.", "Look at its path and its rights.")
    assert isinstance(found, dict)
    return found


def _give_up(place: Path, process: subprocess.Popen[bytes]) -> None:
    """End a supervisor that does not answer. It may hold the pipe for ever, so that its end is not waited for."""
    process.kill()
    kill(state.read_json(place / "worker.json").get("supervisor", {}))
    if process.stdout:
        process.stdout.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GIVEN_UP_S)
