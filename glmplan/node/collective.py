"""One rank of a rehearsal: it finds the others at the rendezvous, waits for them, and notices when one is lost.

Every rank, world rank 0 included, connects to the `Hub` of rank 0, says where its own listener is (an ephemeral port on the
address it connected from), and stays connected.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .hub import BEAT_S, LostError, listener, read_line, shut, write_line

TRY_S = 0.2
CONNECT_S = 10.0
"""For one connection between two hosts that are both up."""


class Member:
    """One rank's side. Every wait ends: passed, lost (LostError), or out of time (LostError)."""

    def __init__(self, rank: int, world_size: int, timeout_s: float, silent_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._timeout_s, self._silent_s = timeout_s, silent_s
        self.table: list[dict[str, Any]] = []
        self._on_lost: Callable[[str], None] = lambda reason: None
        self._passed: set[str] = set()
        self._lost: str | None = None
        self._loss_told = False
        self._change = threading.Condition()
        self._send_lock = threading.Lock()
        self._sock: socket.socket | None = None
        self.own: socket.socket | None = None

    def join(self, address: str, port: int, entry: dict[str, Any], joined: Callable[[], int] | None = None) -> None:
        """Connect, give `entry` (with this rank's listener added) and wait until `table` holds everybody's.

        `joined` tells how many have come, on the rank that knows.
        """
        deadline = time.monotonic() + self._timeout_s
        self._sock = self._connect(address, port, deadline)
        here = self._sock.getsockname()[0]
        self.own = listener(here, 0)
        place = {"address": here, "port": self.own.getsockname()[1]}
        write_line(self._sock, {"join": self.rank, "world_size": self.world_size, "entry": {**entry, **place}})
        for work in (self._read, self._beat):
            threading.Thread(target=work, daemon=True).start()
        try:
            self._wait(lambda: bool(self.table), deadline)
        except TimeoutError:
            count = f"{joined()}/{self.world_size}" if joined else f"?/{self.world_size}"
            raise LostError(
                f"Timed out after {self._timeout_s:.0f} seconds waiting for clients. {count} clients joined."
            ) from None

    def _connect(self, address: str, port: int, deadline: float) -> socket.socket:
        while True:
            try:
                left_s = max(0.1, min(CONNECT_S, deadline - time.monotonic()))
                sock = socket.create_connection((address, port), timeout=left_s)
                sock.settimeout(self._silent_s)
                return sock
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LostError(
                        f"The client socket has timed out after {self._timeout_s * 1000:.0f}ms while trying to connect to "
                        f"({address}, {port}): {error}."
                    ) from None
                time.sleep(TRY_S)

    def arrive(self, name: str) -> None:
        """Wait until every rank has come to this point."""
        self._say({"arrive": name})
        try:
            self._wait(lambda: name in self._passed, None)
        except TimeoutError as error:  # without a deadline there is none
            raise LostError(str(error)) from None

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with the reason when the others are lost; at once if they are already."""
        with self._change:
            self._on_lost, late = tell, self._loss_told
        if late:
            tell(str(self._lost))

    def leave(self) -> None:
        """Say goodbye, so that nobody takes it for a death."""
        self._on_lost = lambda reason: None
        with suppress(LostError):
            self._say({"leave": 1})

    def close(self) -> None:
        """Let go of everything; without `leave` the others take it for a death."""
        self._lost = self._lost or "closed"
        for sock in (self._sock, self.own):
            if sock is not None:
                shut(sock)

    def _say(self, content: dict[str, Any]) -> None:
        assert self._sock is not None
        try:
            with self._send_lock:
                write_line(self._sock, content)
        except OSError as error:
            raise LostError(self._lost or f"Connection to rank 0 lost: {error}") from None

    def _wait(self, done: Callable[[], bool], deadline: float | None) -> None:
        with self._change:
            while not done():
                if self._lost:
                    raise LostError(self._lost)
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError
                self._change.wait(0.2)

    def _read(self) -> None:
        assert self._sock is not None
        reason = f"Connection closed by peer [{_peer(self._sock)}] (rank 0)"
        try:
            with self._sock.makefile("rb") as stream:
                message = read_line(stream)
                while message is not None and self._take(message):
                    message = read_line(stream)
        except OSError as error:
            reason = f"Connection to rank 0 lost: no sign of life for {self._silent_s:g} s ({error})"
        with self._change:
            self._lost = self._lost or reason
            self._loss_told, tell = True, self._on_lost
            self._change.notify_all()
        tell(self._lost)

    def _take(self, message: dict[str, Any]) -> bool:
        """False when nothing more is worth reading."""
        with self._change:
            if "table" in message:
                self.table = message["table"]
            if "pass" in message:
                self._passed.add(message["pass"])
            if "lost" in message:
                self._lost = f"Connection closed by peer [{message['where']}] (rank {message['lost']})"
            if "refused" in message:
                self._lost = f"The rendezvous refused this rank: {message['refused']}"
            self._change.notify_all()
        return self._lost is None

    def _beat(self) -> None:
        with suppress(LostError):
            while self._lost is None:
                time.sleep(BEAT_S)
                self._say({"beat": 1})


def _peer(sock: socket.socket) -> str:
    try:
        return "{}:{}".format(*sock.getpeername()[:2])
    except OSError:
        return "unknown"
