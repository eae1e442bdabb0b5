"""The meeting point of all ranks: they join, wait for one another, and learn when one is lost.

It runs in threads of world rank 0's process, on the rendezvous port. Messages are lines of JSON. A rank that goes without a
goodbye, or says nothing for `silent_s` seconds, is lost to all; all hear of the first that was noticed, and of no other.
"""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

BEAT_S = 1.0
"""How often both sides say that they live."""


class LostError(Exception):
    """The ranks cannot go on together; the text is what an engine's log would say."""


def write_line(sock: socket.socket, content: dict[str, Any]) -> None:
    """Send one message."""
    sock.sendall(json.dumps(content).encode() + b"\n")


def read_line(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end of the connection or after something that is none."""
    line = stream.readline(1 << 20)
    try:
        found = json.loads(line) if line else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def shut(sock: socket.socket) -> None:
    """Close, also for a thread that waits in it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def listener(address: str, port: int) -> socket.socket:
    """Listen; the failure reads as torch's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((socket.gethostbyname(address) if family == socket.AF_INET else address, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        name = errno.errorcode.get(error.errno or 0, "error")
        raise LostError(
            "The server socket has failed to listen on any local network address. "
            f"port: {port}, address: {address}, code: -{error.errno}, name: {name}, message: {error.strerror}"
        ) from None
    return sock


def _is_join(message: dict[str, Any]) -> bool:
    return isinstance(message.get("join"), int) and isinstance(message.get("entry"), dict) and "world_size" in message


@dataclass
class _Joined:
    """One connected rank, as the hub sees it."""

    rank: int
    sock: socket.socket
    entry: dict[str, Any]
    lock: threading.Lock = field(default_factory=threading.Lock)
    leaving: bool = False

    def send(self, content: dict[str, Any]) -> None:
        """Send to this rank; one that is gone is noticed by its reader."""
        with suppress(OSError), self.lock:
            write_line(self.sock, content)


class Hub:
    """The meeting point, in threads of world rank 0's process."""

    def __init__(self, address: str, port: int, world_size: int, silent_s: float) -> None:
        self._server = listener(address, port)
        self._world_size, self._silent_s = world_size, silent_s
        self._joined: dict[int, _Joined] = {}
        self._arrived: dict[str, set[int]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._lost: dict[str, Any] | None = None
        for work in (self._accept, self._beat):
            threading.Thread(target=work, daemon=True).start()

    @property
    def count(self) -> int:
        """Ranks that have joined."""
        return len(self._joined)

    def close(self) -> None:
        """Stop; everybody's connection ends."""
        self._closed = True
        shut(self._server)
        for member in self._joined.values():
            shut(member.sock)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _beat(self) -> None:
        while not self._closed:
            time.sleep(BEAT_S)
            for member in list(self._joined.values()):
                member.send({"beat": 1})

    def _serve(self, sock: socket.socket) -> None:
        """One connection: the first message joins, the others are arrivals and signs of life."""
        sock.settimeout(self._silent_s)
        member = None
        with suppress(OSError), sock, sock.makefile("rb") as stream:
            first = read_line(stream)
            member = self._join(sock, first) if first and _is_join(first) else None
            while member is not None:
                message = read_line(stream)
                if message is None:
                    break
                self._take(member, message)
        if member is not None and not member.leaving and not self._closed:
            self._lose(member)

    def _lose(self, member: _Joined) -> None:
        """Tell all, unless they know of another: what follows a loss must not read as its cause."""
        words = {"lost": member.rank, "where": member.entry["address"]}
        with self._lock:
            if self._lost is not None:
                return
            self._lost = words
        self._tell(words)

    def _join(self, sock: socket.socket, message: dict[str, Any]) -> _Joined | None:
        rank, entry = int(message["join"]), message["entry"]
        with self._lock:
            if message["world_size"] != self._world_size or rank in self._joined or not 0 <= rank < self._world_size:
                what = f"rank {rank} of {message['world_size']} cannot join {self._world_size} ranks, or joined already"
                with suppress(OSError):
                    write_line(sock, {"refused": what})
                return None
            member = self._joined[rank] = _Joined(rank, sock, entry)
            complete, lost = len(self._joined) == self._world_size, self._lost
        if lost is not None:
            member.send(lost)
        elif complete:
            self._tell({"table": [self._joined[r].entry for r in range(self._world_size)]})
        return member

    def _take(self, member: _Joined, message: dict[str, Any]) -> None:
        if "leave" in message:
            member.leaving = True
        if "arrive" not in message:
            return
        name = message["arrive"]
        with self._lock:
            here = self._arrived.setdefault(name, set())
            here.add(member.rank)
            complete = len(here) == self._world_size
        if complete:
            self._tell({"pass": name})

    def _tell(self, content: dict[str, Any]) -> None:
        for member in list(self._joined.values()):
            member.send(content)
