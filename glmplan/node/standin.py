"""The stand-in worker of a rehearsal: one process per rank of this node, and the engine's HTTP server.

It takes the engine's own command line, meets the ranks of the other nodes on the real ports, and then answers as the engine
would: on the head with text, on the other nodes with the health that always says 200 (SGLang 0.5.23,
srt/utils/common.py:3640). A rank that dies ends the node, with SGLang's words (srt/entrypoints/engine.py:1335).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from . import standin_rank, standin_torch
from .errors import NodeError
from .standin_http import Server
from .standin_options import Options, parse
from .standin_rank import plain, say

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def main(words: list[str]) -> int:
    """The program; ends only by a signal or a failure."""
    try:
        options = parse(words)
    except (NodeError, OSError) as error:
        plain(f"launch_server.py: error: {getattr(error, 'message', error)}")
        return 2
    say("", f"server_args={_shown(options)}")
    node = _Node(options)
    signal.signal(signal.SIGTERM, node.ended)
    signal.signal(signal.SIGINT, node.ended)
    node.spawn()
    try:
        return node.run()
    finally:
        node.end_ranks()


def _shown(options: Options) -> str:
    """The options, without the key, as SGLang prints its own."""
    shown = {name: value for name, value in vars(options).items() if name not in ("api_key", "faults")}
    return "ServerArgs(" + ", ".join(f"{name}={value!r}" for name, value in shown.items()) + ")"


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class _Node:
    """The parent of this node's ranks."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._ranks: dict[int, int] = {}
        self._reports: dict[int, int] = {}
        self._serving = False

    def spawn(self) -> None:
        """Fork every rank of this node; a child dies with its parent."""
        parent, problem = os.getpid(), standin_torch.load()
        if problem and "No module named 'torch'" not in problem:
            say("", f"Rehearsal: torch is not used: {problem}.")
        for rank in self._options.ranks():
            readable, writable = os.pipe()
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                with suppress(OSError, AttributeError):
                    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != parent:
                    os._exit(1)
                os.close(readable)
                standin_rank.main(self._options, rank, writable, not problem)
            os.close(writable)
            self._ranks[pid], self._reports[readable] = rank, rank

    def ended(self, number: int, frame: Any) -> None:
        """A polite end: the ranks go first."""
        self.end_ranks()
        os._exit(128 + number)

    def end_ranks(self) -> None:
        """Kill what is left of the ranks."""
        for pid in self._ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self) -> int:
        """Wait for the ranks, serve, and watch."""
        waiting = dict(self._reports)
        while waiting:
            for pipe in select.select(list(waiting), [], [], 0.2)[0]:
                if os.read(pipe, 1):
                    del waiting[pipe]
                else:
                    time.sleep(0.05)  # the kernel closes the pipe before it reports the death
            if waiting and self._died():
                return 1
        if not self._serve():
            return 1
        self._kill_later()
        while not self._died():
            time.sleep(0.1)
        return 1

    def _kill_later(self) -> None:
        """The fault die-serving:RANK:SECONDS, counted from when this node serves."""
        for pid, rank in self._ranks.items():
            fault = self._options.fault("die-serving", rank)
            if fault is not None:
                timer = threading.Timer(fault.seconds or 3.0, _kill, (pid,))
                timer.daemon = True
                timer.start()

    def _died(self) -> bool:
        """Whether a rank has ended; says so as SGLang does."""
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if not pid:
            return False
        rank = self._ranks.pop(pid)
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        local = self._options.ranks().index(rank)
        if self._serving:
            say("", f"Subprocess scheduler_{local} (pid={pid}) crashed with exit code {code}. "
                    "Triggering SIGQUIT for cleanup...")  # fmt: skip
        else:
            plain(
                f"RuntimeError: Rank {local} scheduler died during initialization (exit code: {code}). If exit code is -9 "
                "(SIGKILL), a common cause is the OS OOM killer. Run `dmesg -T | grep -i oom` to check."
            )
        return True

    def _serve(self) -> bool:
        options = self._options
        try:
            server = Server(options)
        except OSError as error:
            say("", f"[Errno {error.errno}] error while attempting to bind on address "
                    f"('{options.http_host}', {options.http_port}): {(error.strerror or '').lower()}")  # fmt: skip
            return False
        host, port = server.server_address[:2]
        where = f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._serving = True
        if options.node_rank > 0:
            say("", f"Dummy health check server started in background thread at {where}")
            return True
        plain(f"INFO:     Started server process [{os.getpid()}]")
        plain("INFO:     Application startup complete.")
        plain(f"INFO:     Uvicorn running on http://{where} (Press CTRL+C to quit)")
        say("", "The server is fired up and ready to roll!")
        return True
