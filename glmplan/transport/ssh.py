"""A host over SSH: commands through one kept connection, opened by the first command and opened again after it broke.

A command is one string to the remote user's shell; `quoted` is the only place that makes it. Secrets travel on stdin. Exit
status as in subprocess: negative for a signal. A command that overruns its time is killed with its process group: sshd
would leave it running, and takes no signals over the channel for root (OpenSSH 9.2), so a wrapper tells the group's id
on stderr first; that line is taken out again.
"""

from __future__ import annotations

import re
import select
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from glmplan.transport.base import Completed, HostName
from glmplan.transport.errors import ConnectionLostError, TimedOutError
from glmplan.transport.options import SshOptions
from glmplan.transport.ssh_config import resolve
from glmplan.transport.ssh_connect import Connection, connect, route_to
from glmplan.transport.ssh_way import hang_up, in_order, load_paramiko

OPEN_TIMEOUT_S = 10.0
"""A channel on a standing connection; longer means that the link is gone."""

KILL_TIMEOUT_S = 5.0
CHUNK_BYTES = 1 << 15

WRAPPER = 'read -r a b c d group rest </proc/$$/stat; echo "glmplan-process-group $group" >&2; exec "$@"'
TOLD_GROUP = re.compile(rb"^glmplan-process-group ([0-9]*)\n", re.MULTILINE)


def quoted(argv: Sequence[str]) -> str:
    """A command line for the remote shell."""
    return shlex.join(argv)


class SshTransport:
    """One host, one connection, one command at a time."""

    def __init__(self, host: HostName, options: SshOptions) -> None:
        self.name = host.text
        self._options = options
        self._connection: Connection | None = None

    def run(self, argv: Sequence[str], stdin: bytes = b"", timeout_s: float = 30.0) -> Completed:
        """Run a command for at most `timeout_s`; connecting before it has limits of its own."""
        connection = self._connected()
        deadline = time.monotonic() + timeout_s
        with self._ended_by(connection, timeout_s):
            channel = self._channel(connection, min(timeout_s, OPEN_TIMEOUT_S))
            command = _Command(self.name, channel, stdin)
            try:
                channel.exec_command(quoted(["sh", "-c", WRAPPER, "sh", *argv]))
                if command.converse(deadline):
                    return command.completed()
                _kill(connection, command.process_group())
                raise TimedOutError(self.name, timeout_s)
            finally:
                hang_up(channel)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> Connection:
        if self._connection is not None and not self._connection.alive:
            self.close()
        if self._connection is None:
            options = self._options
            settings = resolve(self.name, options.config, options.user, options.identity)
            self._connection = connect(route_to(settings, options), options)
        return self._connection

    @contextmanager
    def _ended_by(self, connection: Connection, timeout_s: float) -> Iterator[None]:
        """Sending blocks while a link is dead: one second after the deadline the connection is closed under it."""
        overran = threading.Event()

        def end() -> None:
            overran.set()
            connection.cut()

        guard = threading.Timer(timeout_s + 1, end)
        guard.daemon = True
        guard.start()
        paramiko = load_paramiko()
        try:
            yield
        except (paramiko.SSHException, EOFError, OSError) as error:
            self.close()
            if overran.is_set():
                raise TimedOutError(self.name, timeout_s) from None
            raise ConnectionLostError(self.name, str(error) or type(error).__name__) from None
        finally:
            guard.cancel()

    def _channel(self, connection: Connection, timeout_s: float) -> Any:
        paramiko = load_paramiko()
        began = time.monotonic()
        try:
            return in_order(connection.transport.open_session(timeout=timeout_s))
        except (paramiko.SSHException, EOFError) as error:
            self.close()
            if time.monotonic() - began >= timeout_s:
                raise TimedOutError(self.name, timeout_s) from None
            raise ConnectionLostError(self.name, f"no session was opened ({error})") from None


class _Command:
    """One command's input and outputs."""

    def __init__(self, host: str, channel: Any, stdin: bytes) -> None:
        self._host, self._channel = host, channel
        self._unsent = memoryview(stdin)
        self._out, self._err = bytearray(), bytearray()

    def converse(self, deadline: float) -> bool:
        """Feed stdin and drain both outputs; True when the command has ended and nothing is left to read."""
        channel = self._channel
        poller = select.poll()
        poller.register(channel.fileno(), select.POLLIN)
        input_open = True
        while True:
            closed = channel.eof_received or channel.closed
            ended = closed and channel.status_event.is_set()
            moved = self._drain() | (not ended and self._feed())
            if input_open and not self._unsent:
                input_open = False
                with suppress(OSError, EOFError):
                    channel.shutdown_write()
            if ended and not moved:
                return True
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            if moved:
                continue
            if closed:
                channel.status_event.wait(min(left_s, 0.1))  # the pipe stays readable from here on
            else:
                poller.poll(min(left_s, 0.01 if self._unsent else 0.1) * 1000)

    def completed(self) -> Completed:
        """How it ended; raises ConnectionLostError when nobody said."""
        error = TOLD_GROUP.sub(b"", bytes(self._err), count=1)
        name = getattr(self._channel, "glmplan_signal", None)
        if name is not None:
            return Completed(-int(getattr(signal, f"SIG{name}", signal.SIGKILL)), bytes(self._out), error)
        if self._channel.exit_status < 0:
            raise ConnectionLostError(self._host, "it ended before the command's exit status came")
        return Completed(self._channel.exit_status, bytes(self._out), error)

    def process_group(self) -> int | None:
        """The command's process group on the host."""
        told = TOLD_GROUP.search(self._err)
        return int(told[1]) if told and told[1] else None

    def _drain(self) -> bool:
        found = False
        while self._channel.recv_ready():
            self._out += self._channel.recv(CHUNK_BYTES)
            found = True
        while self._channel.recv_stderr_ready():
            self._err += self._channel.recv_stderr(CHUNK_BYTES)
            found = True
        return found

    def _feed(self) -> bool:
        """One write, if the window is open; a command that reads no more loses the rest, as in a pipe."""
        if not self._unsent or not self._channel.send_ready():
            return False
        try:
            self._unsent = self._unsent[self._channel.send(self._unsent[:CHUNK_BYTES].tobytes()) :]
        except OSError:
            if not self._channel.get_transport().is_active():
                raise
            self._unsent = self._unsent[:0]
        return True


def _kill(connection: Connection, process_group: int | None) -> None:
    """Kill a command that overran; silence on a link that is down."""
    if process_group is None or process_group <= 1:
        return
    paramiko = load_paramiko()
    with suppress(paramiko.SSHException, EOFError, OSError):
        channel = in_order(connection.transport.open_session(timeout=KILL_TIMEOUT_S))
        try:
            channel.exec_command(quoted(["kill", "-KILL", "--", f"-{process_group}"]))
            channel.status_event.wait(KILL_TIMEOUT_S)
        finally:
            channel.close()
