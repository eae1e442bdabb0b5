"""The links between ranks, tested by value: every pair of nodes in both directions, and a sum around a ring of all ranks.

Plain sockets on ephemeral ports, which is what the engines' control messages use between nodes.
"""

from __future__ import annotations

import array
import json
import socket
import threading
import time
from contextlib import suppress

from .collective import CONNECT_S, Member
from .hub import LostError, read_line, shut, write_line

WORDS = 1024
"""64-bit numbers that go around: 8 KiB, which every socket buffer takes at once."""


class Links:
    """A rank's connections to other ranks; its listener answers as soon as this exists."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._previous: socket.socket | None = None
        self._came = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        assert self._member.own is not None
        with suppress(OSError):
            while True:
                sock, _ = self._member.own.accept()
                threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        """Answer a pair's question with its own words; keep the ring's connection."""
        sock.settimeout(CONNECT_S)
        with suppress(OSError):
            message = _read_unbuffered(sock)
            if "ring" in message:
                sock.settimeout(None)
                self._previous = sock
                self._came.set()
                return
            write_line(sock, message)
        sock.close()

    def close(self) -> None:
        """Let go of the ring, and answer nobody any more."""
        for sock in (self._previous, self._member.own):
            if sock is not None:
                shut(sock)

    def test_pairs(self) -> int:
        """Ask the first rank of every other node; the number of nodes that answered. Raises LostError with the pair."""
        table, mine = self._member.table, self._member.table[self._member.rank]
        leaders: dict[int, int] = {}
        for rank, entry in enumerate(table):
            leaders.setdefault(entry["node"], rank)
        if leaders[mine["node"]] != self._member.rank:
            return 0
        others = [rank for node, rank in sorted(leaders.items()) if node != mine["node"]]
        for rank in others:
            self._ask(rank)
        return len(others)

    def _ask(self, rank: int) -> None:
        mine, entry = self._member.table[self._member.rank], self._member.table[rank]
        question = {"pair": [mine["node"], entry["node"]], "value": time.time_ns()}
        where = f"node {entry['node']} at {entry['address']}:{entry['port']}"
        try:
            with socket.create_connection((entry["address"], entry["port"]), timeout=CONNECT_S) as sock:
                write_line(sock, question)
                with sock.makefile("rb") as stream:
                    if read_line(stream) != question:
                        raise LostError(f"Node {mine['node']} got a wrong answer from {where}.")
        except OSError as error:
            raise LostError(
                f"Node {mine['node']} cannot reach {where}: {error}. Open the ephemeral TCP ports between the nodes."
            ) from None

    def all_reduce(self) -> float:
        """Sum a vector over all ranks and compare; the seconds it took. Raises LostError for a wrong sum or a lost peer."""
        size, rank = self._member.world_size, self._member.rank
        begin = time.perf_counter()
        own = array.array("q", [(rank + 1) * (at + 1) for at in range(WORDS)])
        total = array.array("q", own)
        if size > 1:
            following = self._next()
            try:
                for _ in range(size - 1):
                    following.sendall(own.tobytes())
                    own = array.array("q", self._receive(WORDS * 8))
                    total = array.array("q", [a + own[at] for at, a in enumerate(total)])
            except OSError as error:
                raise LostError(f"The ring of ranks broke at rank {rank}: {error}") from None
            finally:
                following.close()
        ranks = size * (size + 1) // 2
        if any(value != ranks * (at + 1) for at, value in enumerate(total)):
            raise LostError(f"The sum over {size} ranks is wrong on rank {rank}.")
        return time.perf_counter() - begin

    def _next(self) -> socket.socket:
        entry = self._member.table[(self._member.rank + 1) % self._member.world_size]
        try:
            sock = socket.create_connection((entry["address"], entry["port"]), timeout=CONNECT_S)
            sock.settimeout(CONNECT_S)
            write_line(sock, {"ring": self._member.rank})
        except OSError as error:
            raise LostError(f"Rank {self._member.rank} cannot reach {entry['address']}:{entry['port']}: {error}") from None
        if not self._came.wait(CONNECT_S):
            sock.close()
            raise LostError(f"Nobody connected to rank {self._member.rank} within {CONNECT_S:g} s.")
        return sock

    def _receive(self, count: int) -> bytes:
        assert self._previous is not None
        self._previous.settimeout(CONNECT_S)
        data = b""
        while len(data) < count:
            piece = self._previous.recv(count - len(data))
            if not piece:
                raise ConnectionResetError("the previous rank closed the connection")
            data += piece
        return data


def _read_unbuffered(sock: socket.socket) -> dict[str, object]:
    """One message, and not a byte of what follows it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 4096:
        piece = sock.recv(1)
        if not piece:
            break
        line += piece
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
