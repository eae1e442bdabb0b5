"""An end that reaches every open request at once, whatever it waits for."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Stop:
    """Ends every open request at once."""

    def __init__(self) -> None:
        self._set, self._lock = threading.Event(), threading.Lock()
        self._sockets: set[socket.socket] = set()

    @property
    def is_set(self) -> bool:
        """Whether no request may go on."""
        return self._set.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but no longer than until the stop; whether it came."""
        return self._set.wait(seconds)

    def add(self, connected: socket.socket) -> None:
        """Remember an open connection."""
        with self._lock:
            self._sockets.add(connected)
        if self.is_set:
            _shut(connected)

    def remove(self, closed: socket.socket) -> None:
        """Forget it."""
        with self._lock:
            self._sockets.discard(closed)

    def set(self) -> None:
        """Cut all of them."""
        self._set.set()
        with self._lock:
            for one in self._sockets:
                _shut(one)


def _shut(connected: socket.socket) -> None:
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
