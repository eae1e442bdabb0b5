"""Which TCP ports are free here, and whether other hosts reach them: the three network operations of `doctor`.

`listen` answers at once and leaves a process behind that greets every caller with a token, until it has greeted the number
of callers that were announced or its seconds are over; it writes nothing and reads nothing. `connect` calls many such
listeners together. Seconds are wall time. A listener lets its callers hang up first, so that no TIME_WAIT of its own keeps
the port from the engine that starts next.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any

from .errors import NodeError
from .port_holder import holder, wait_for_passing

LONGEST_LISTEN_S = 30.0
GREETING_BYTES = 128


def ports(request: dict[str, Any]) -> dict[str, Any]:
    """Try every `{"address", "port"}` of `binds` and let go again: `{"ports": [...], "time_s"}`.

    An empty address is every interface, port 0 one that the system picks. A taken port comes with the pid, owner and
    command that hold it, as far as /proc tells.
    """
    found = []
    for bind in request["binds"]:
        address, port = str(bind.get("address") or ""), int(bind["port"])
        sock, problem = _bound(address, port)
        if problem == "taken" and wait_for_passing(port):
            sock, problem = _bound(address, port)
        if sock is not None:
            port = sock.getsockname()[1]
            sock.close()
        held_by = holder(port) if problem == "taken" else {}
        found.append({"address": address, "port": port, "free": sock is not None, "problem": problem, **held_by})
    return {"ports": found, "time_s": time.time()}


def listen(request: dict[str, Any]) -> dict[str, Any]:
    """Listen on `address` at each of `tcp_ports` (0: one that the system picks) for `seconds`, greeting with `token`.

    Answers `{"ports": [{"asked", "port", "problem"}], "pid"}`; `problem` is None, "taken", or the system's words, and such
    a port is not listened on. `callers` is how many are expected at each port.
    """
    address, seconds = str(request["address"]), min(float(request["seconds"]), LONGEST_LISTEN_S)
    sockets, found = [], []
    for asked in request["tcp_ports"]:
        sock, problem = _bound(address, int(asked))
        if sock is not None:
            sock.listen(256)
            sockets.append(sock)
        port = sock.getsockname()[1] if sock is not None else int(asked)
        found.append({"asked": int(asked), "port": port, "problem": problem})
    pid = _leave(sockets, str(request["token"]), seconds, int(request["callers"]) * len(sockets)) if sockets else None
    return {"ports": found, "pid": pid}


def connect(request: dict[str, Any]) -> dict[str, Any]:
    """Call every `{"name", "address", "port"}` of `targets` at once.

    Each result says `problem`: None where the greeting came, "refused", "silent" (nothing came back within `timeout_s`),
    "stranger" (something else answers on that port), or the system's words; `connect_s` is the time of the handshake.
    """
    calls = [_Call(target, str(request["token"]), str(request.get("source") or "")) for target in request["targets"]]
    deadline = time.monotonic() + float(request.get("timeout_s", 2.0))
    pending = {call.sock.fileno(): call for call in calls if call.sock is not None and not call.done}
    poller = select.poll()
    for number in pending:
        poller.register(number, select.POLLOUT)
    while pending and time.monotonic() < deadline:
        for number, _ in poller.poll(max(deadline - time.monotonic(), 0) * 1000):
            call = pending[number]
            call.step()
            if call.done:
                poller.unregister(number)
                del pending[number]
            elif call.connected:
                poller.modify(number, select.POLLIN)
    for call in pending.values():
        call.finish("silent")
    return {"results": [call.result for call in calls]}


class _Call:
    """One caller: a handshake, then the greeting."""

    def __init__(self, target: dict[str, Any], token: str, source: str) -> None:
        self.result = {"name": target["name"], "port": int(target["port"]), "problem": None, "connect_s": None}
        self.connected = self.done = False
        self._wanted, self._got = _greeting(token), b""
        self._began = time.monotonic()
        self.sock: socket.socket | None = None
        address = str(target["address"])
        try:
            family, _, _, _, place = socket.getaddrinfo(address, int(target["port"]), type=socket.SOCK_STREAM)[0]
            self.sock = socket.socket(family, socket.SOCK_STREAM)
            self.sock.setblocking(False)
            if source:
                self.sock.bind((source, 0))
            status = self.sock.connect_ex(place)
        except OSError as error:
            self.finish(_words(error))
            return
        if status not in (0, errno.EINPROGRESS):
            self.finish(_words(OSError(status, os.strerror(status))))

    def step(self) -> None:
        """Go on as far as the socket is ready."""
        assert self.sock is not None
        try:
            if not self.connected:
                status = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if status:
                    raise OSError(status, os.strerror(status))
                self.connected, self.result["connect_s"] = True, time.monotonic() - self._began
                return
            received = self.sock.recv(GREETING_BYTES)
        except OSError as error:
            self.finish(_words(error))
            return
        self._got += received
        if self._got == self._wanted:
            self.finish(None)
        elif not received or not self._wanted.startswith(self._got):
            self.finish("stranger")

    def finish(self, problem: str | None) -> None:
        """Keep the outcome; a handshake without a greeting in time is a stranger that waits to be spoken to."""
        self.result["problem"] = "stranger" if problem == "silent" and self.connected else problem
        self.done = True
        if self.sock is not None:
            self.sock.close()


def _greeting(token: str) -> bytes:
    return f"glmplan {token}\n".encode()[:GREETING_BYTES]


def _words(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "silent"
    return (error.strerror or str(error)).lower()


def _bound(address: str, port: int) -> tuple[socket.socket | None, str | None]:
    """A bound socket, or None and why. SO_REUSEADDR overlooks closed connections, never a listener."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, port))
        if port:
            sock.listen(1)  # two sockets may be bound to one port while neither listens
    except OSError as error:
        sock.close()
        return None, "taken" if error.errno == errno.EADDRINUSE else _words(error)
    return sock, None


def _leave(sockets: list[socket.socket], token: str, seconds: float, callers: int) -> int:
    """Serve in a process that outlives this one and holds none of its streams; its pid."""
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    first = os.fork()
    if first:
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            told = stream.read(8)
        os.waitpid(first, 0)
        for sock in sockets:
            sock.close()
        if len(told) != 8:
            raise NodeError("no-process", "No process could be started to listen.", "Look at `ulimit -u` on the host.")
        return int(struct.unpack("q", told)[0])
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(write, struct.pack("q", os.getpid()))
        _let_go({sock.fileno() for sock in sockets})
        _serve(sockets, _greeting(token), time.monotonic() + seconds, callers)
        status = 0
    finally:
        os._exit(status)


def _let_go(kept: set[int]) -> None:
    """Close every descriptor but `kept`, so that the connection that brought the request can end."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    highest = max((int(name) for name in os.listdir("/proc/self/fd")), default=256)
    for number in range(3, highest + 1):
        if number not in kept:
            with suppress(OSError):
                os.close(number)


def _serve(sockets: list[socket.socket], greeting: bytes, deadline: float, callers: int) -> None:
    """Greet until all expected callers came and hung up, or until the deadline."""
    listeners = {sock.fileno(): sock for sock in sockets}
    open_calls: dict[int, socket.socket] = {}
    poller = select.poll()
    for number, sock in listeners.items():
        sock.setblocking(False)
        poller.register(number, select.POLLIN)
    greeted = 0
    while time.monotonic() < deadline and (greeted < callers or open_calls):
        for number, _ in poller.poll(max(deadline - time.monotonic(), 0) * 1000):
            if number in listeners:
                with suppress(OSError):
                    call, _ = listeners[number].accept()
                    call.setblocking(False)
                    call.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    open_calls[call.fileno()] = call
                    poller.register(call.fileno(), select.POLLIN)
                    call.send(greeting)
                    greeted += 1
            elif _hung_up(open_calls[number]):
                poller.unregister(number)
                open_calls.pop(number).close()


def _hung_up(call: socket.socket) -> bool:
    try:
        return not call.recv(GREETING_BYTES)
    except BlockingIOError:
        return False
    except OSError:
        return True
