"""The program that stays with a worker: starts it, keeps what it prints, and records how it ended.

`supervise` reads {"folder", "argv", "environment", "cwd", "redact", "log_limit_bytes", "lock"} on stdin, leaves its parent
for good, starts the worker in a session of its own, lets go of the lock of starts, and answers one line on stdout: {"pid",
"started_s"} or {"error", "errno"}. It adopts the worker's orphans (child subreaper), so that `stop` finds them as its
children. Secrets are in its memory only.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .processes import record_of
from .state import add_event, read_json, write_json
from .worker_log import LIMIT_BYTES, LogFile, Redactor

IDLE_S = 1.0
"""After this long an unfinished line is written as it is."""
WAIT_S = 0.1
"""How soon the worker's end is noticed."""
DRAIN_S = 2.0
"""How long the last words of what an ended worker left behind are waited for; its own are always."""
READ_BYTES = 1 << 16
F_GETPIPE_SZ = 1032  # fcntl has the name since Python 3.10
PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h


def main(words: list[str]) -> int:
    """The program; returns in the process that the caller waits for, and again in the supervisor at its end."""
    request = json.load(sys.stdin.buffer)
    if os.fork():
        os._exit(0)
    _settle()
    place = Path(request["folder"])
    supervisor = record_of(os.getpid())
    with suppress(OSError):  # who gives the start up finds this process, also while it waits for the program's disk
        write_json(place / "worker.json", {**read_json(place / "worker.json"), "supervisor": supervisor})
    try:
        worker = _start(request)
    except OSError as error:
        _answer({"error": os.strerror(error.errno or 0), "errno": error.errno})
        return 1
    assert worker.stdout is not None
    started: dict[str, Any] = {**record_of(worker.pid), "started_s": time.time(), "supervisor": supervisor}
    with suppress(OSError):
        write_json(place / "worker.json", started)
    os.close(request["lock"])
    add_event(place, "started", pid=worker.pid)
    _answer({"pid": worker.pid, "started_s": started["started_s"]})
    log = LogFile(place, int(request.get("log_limit_bytes") or LIMIT_BYTES))
    _Follower(place, worker, log, Redactor(request["redact"])).run()
    return 0


def _settle() -> None:
    """A session of its own, no hang-ups, and orphans of the worker become its children."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _start(request: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        request["argv"], env=request["environment"], cwd=request["cwd"], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
    )  # fmt: skip


def _answer(content: dict[str, Any]) -> None:
    """Tell the starter, and let go of it."""
    with suppress(OSError):
        os.write(1, json.dumps(content).encode() + b"\n")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)


class _Follower:
    """Copies the output until the worker ended and nobody holds its pipe any more."""

    def __init__(self, place: Path, worker: subprocess.Popen[bytes], log: LogFile, redactor: Redactor) -> None:
        assert worker.stdout is not None
        self._place, self._worker, self._log, self._redactor = place, worker, log, redactor
        self._pipe = worker.stdout.fileno()
        self._open, self._noted, self._quiet = True, False, False
        self._status: int | None = None
        self._last = self._ended = time.monotonic()
        self._ended_s = 0.0
        self._unread = 0

    def run(self) -> None:
        """Until the end of the worker and of what it left behind."""
        while self._open or not self._noted:
            if self._open:
                self._copy()
            else:
                time.sleep(WAIT_S)
            self._reap()
            if self._status is not None and not self._noted and self._drained():
                self._log.write(self._redactor.flush(final=not self._open))
                self._note(self._status)
        self._log.write(self._redactor.flush(final=True))

    def _copy(self) -> None:
        ended = self._status is not None
        if not select.select([self._pipe], [], [], WAIT_S)[0]:
            self._quiet = ended
            if time.monotonic() - self._last > IDLE_S:
                self._log.write(self._redactor.flush())
            return
        data = os.read(self._pipe, READ_BYTES)
        self._open, self._last = bool(data), time.monotonic()
        if ended:  # what the worker wrote is at most what the pipe held then; a short read emptied it
            self._unread = self._unread - len(data) if len(data) == READ_BYTES else 0
        self._log.write(self._redactor.feed(data))

    def _drained(self) -> bool:
        """Whether the last words of the ended worker are in the log; what it left may talk on for ever."""
        return not self._open or self._quiet or (self._unread <= 0 and time.monotonic() - self._ended > DRAIN_S)

    def _reap(self) -> None:
        """Take in the worker's end, and let adopted orphans go."""
        with suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            while pid:
                if pid == self._worker.pid:
                    self._worker.returncode = self._status = status
                    self._ended, self._ended_s = time.monotonic(), time.time()
                    self._unread = fcntl.fcntl(self._pipe, F_GETPIPE_SZ) if self._open else 0
                pid, status = os.waitpid(-1, os.WNOHANG)

    def _note(self, status: int) -> None:
        self._noted = True
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        end = {"exit_status": code, "signal": number, "ended_s": self._ended_s}
        add_event(self._place, "exited", exit_status=code, signal=number)  # who reads the record finds the event too
        with suppress(OSError):
            write_json(self._place / "worker.json", {**read_json(self._place / "worker.json"), **end})
