"""Where a host keeps what glmplan started on it.

`${XDG_STATE_HOME:-~/.local/state}/glmplan/[$GLMPLAN_NODE/]<deployment>/`: folders 0700, files 0600, JSON written whole or
not at all. `start.json` says what was asked (without secrets), `worker.json` which process runs it and how it ended,
`events.jsonl` what happened, `log` what it printed, `files/` what it reads. One lock for all starts of a user on a host.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import NodeError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RECORD_BYTES = 4096
"""worker.json is padded to this size, so that it can be rewritten in place on a full disk."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def home() -> Path:
    """The folder of all of this user's nodes on this host."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "glmplan"


def root() -> Path:
    """The folder of this node's deployments; `local#0-3` names a node of its own through GLMPLAN_NODE."""
    node = os.environ.get("GLMPLAN_NODE", "")
    if node and not NAME.fullmatch(node):
        raise NodeError("usage", f"GLMPLAN_NODE={node!r} is no name of a node.", "Unset it.")
    return home() / node if node else home()


def folder(deployment: object) -> Path:
    """The state folder of a deployment, which need not exist."""
    if not isinstance(deployment, str) or not NAME.fullmatch(deployment):
        raise NodeError(
            "usage", f"{deployment!r} is no name of a deployment.", "Use letters, digits, '.', '_' and '-', 64 at most."
        )
    return root() / deployment


def folders(of_all_nodes: bool = False) -> list[Path]:
    """The deployments that have state here; with `of_all_nodes` those of every node and user that can be read."""
    if not of_all_nodes:
        return sorted(path.parent for path in _found(root(), "*/start.json"))
    found: list[Path] = []
    for base in dict.fromkeys([home(), *_other_homes()]):
        found += [path.parent for pattern in ("*/start.json", "*/*/start.json") for path in _found(base, pattern)]
    return sorted(found)


def _found(base: Path, pattern: str) -> list[Path]:
    try:
        return list(base.glob(pattern))
    except OSError:
        return []


def _other_homes() -> list[Path]:
    import pwd

    homes = {entry.pw_dir for entry in pwd.getpwall() if entry.pw_dir.startswith(("/home/", "/root"))}
    return [Path(home) / ".local" / "state" / "glmplan" for home in sorted(homes)]


def make_folder(path: Path) -> None:
    """Make a private folder; the parents that are missing are private too."""
    missing = [path, *path.parents]
    for place in reversed(missing):
        if not place.exists():
            with contextlib.suppress(FileExistsError):
                place.mkdir(mode=0o700)
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o700)


def remove(path: Path) -> None:
    """Remove a deployment's state, and the folder of its node when nothing else is in it."""
    shutil.rmtree(path, ignore_errors=True)
    if path.parent != home():
        with contextlib.suppress(OSError):
            path.parent.rmdir()


@contextlib.contextmanager
def lock(timeout_s: float, shared: bool = False) -> Iterator[int | None]:
    """Hold the lock of all starts; yields its file descriptor, or None when it cannot be had within `timeout_s`.

    `shared` is for those that need no start beside them but do not mind each other. A process that inherits the descriptor
    holds the lock too, until it closes it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        make_folder(home())
        handle = os.open(home() / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield None
        return
    deadline = time.monotonic() + timeout_s
    try:
        held = _try_lock(handle, kind)
        while not held and time.monotonic() < deadline:
            time.sleep(0.02)
            held = _try_lock(handle, kind)
        yield handle if held else None
    finally:
        os.close(handle)


def lockable() -> bool:
    """Whether there is a lock to be had, now or later: a full or read-only home has none."""
    return os.access(home() / "lock", os.W_OK)


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what can go wrong while state is written into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            words = f"The disk that holds {path} is full."
            raise NodeError("disk-full", words, f"Free space there: `df -h {home()}`.") from None
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise NodeError(
            "state-unwritable", f"{path} cannot be written: {reason}.", "Set XDG_STATE_HOME to a folder that can."
        ) from None


def write_file(path: Path, content: bytes) -> None:
    """Write a 0600 file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a record, padded; on a full disk an existing one is rewritten in place."""
    data = json.dumps(content).encode().ljust(RECORD_BYTES)
    try:
        write_file(path, data)
    except OSError as error:
        if error.errno not in DISK_FULL or not path.exists():
            raise
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(handle, data, 0)
        finally:
            os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A record; empty when there is none or it cannot be read."""
    for _ in range(3):
        try:
            found = json.loads(path.read_bytes())
        except OSError:
            return {}
        except ValueError:
            time.sleep(0.01)  # rewritten in place at this moment
            continue
        return found if isinstance(found, dict) else {}
    return {}


def add_event(place: Path, event: str, **fields: Any) -> None:
    """Note what happened; a full disk loses the note and nothing else."""
    line = json.dumps({"time_s": time.time(), "event": event, **fields}) + "\n"
    with contextlib.suppress(OSError):
        handle = os.open(place / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def read_events(place: Path, most: int = 100) -> list[dict[str, Any]]:
    """The latest events, oldest first."""
    try:
        lines = (place / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines[-most:]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
