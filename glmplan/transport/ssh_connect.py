"""From a host's name to an authenticated SSH connection: TCP or a jump host, key exchange, host key, login.

Every step has its own limit in seconds, so a host that accepts and stays silent fails in time. A jump host is connected
to once for all hosts behind it: its sshd drops logins at random beyond MaxStartups, 10 by default.
"""

from __future__ import annotations

import subprocess
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from glmplan.errors import GlmplanError, UsageError
from glmplan.transport.errors import ConnectionFailedError, ConnectionLostError, TimedOutError
from glmplan.transport.host_keys import HostKey
from glmplan.transport.options import SshOptions
from glmplan.transport.ssh_config import Settings, resolve
from glmplan.transport.ssh_login import log_in
from glmplan.transport.ssh_trust import KnownHost
from glmplan.transport.ssh_way import hang_up, hear_signals, in_order, load_paramiko, over_command, over_tcp

HANDSHAKE_TIMEOUT_S = 15.0
"""Key exchange, after the banner came: slow hosts under load take seconds."""

LOGIN_TIMEOUT_S = 15.0
"""One key's answer: sshd may look up names or ask a directory service."""

KEEPALIVE_S = 15
"""Between keepalives, or ServerAliveInterval where that is less: below the 60 s of usual NAT tables."""

MOST_JUMPS = 8
"""ProxyJump in a circle would go on for ever."""


class Connection:
    """An authenticated connection and what carries it."""

    def __init__(self, transport: Any, jump: Jump | None, process: subprocess.Popen[bytes] | None) -> None:
        self.transport = transport
        self._jump, self._process = jump, process

    @property
    def alive(self) -> bool:
        """Whether the connection still stands, as far as is known."""
        return bool(self.transport.is_active())

    def cut(self) -> None:
        """End it, from any thread: whoever uses it hears of it."""
        hang_up(self.transport)

    def close(self) -> None:
        """Let go of it, and of the jump host, which stays connected while other hosts use it."""
        self.cut()
        _let_go(self._jump, self._process)
        self._jump, self._process = None, None


class Jump:
    """A connection to a jump host, for as long as any host behind it is used."""

    def __init__(self, name: str, key: object) -> None:
        self.name, self.key, self.users = name, key, 0
        self.ready: Future[Connection] = Future()

    @property
    def spent(self) -> bool:
        """Whether a new connection is needed: it failed, or broke."""
        return self.ready.done() and (self.ready.exception() is not None or not self.ready.result().alive)

    def release(self) -> None:
        """One user less; the last one closes it."""
        with _jumps_lock:
            self.users -= 1
            last = self.users == 0
            if last and _jumps.get(self.key) is self:
                del _jumps[self.key]
        if last and self.ready.exception() is None:
            self.ready.result().close()


_jumps: dict[object, Jump] = {}
_jumps_lock = threading.Lock()

Route = tuple[Settings, ...]
"""The hosts on the way, the next one first and the wanted one last."""


def route_to(settings: Settings, options: SshOptions) -> Route:
    """The jump hosts before a host, resolved each; raises UsageError for a way without end."""
    route: Route = (settings,)
    while route[0].jumps and not route[0].proxy_command:
        if len(route) > MOST_JUMPS:
            raise UsageError(
                f"ProxyJump of {settings.name} leads through more than {MOST_JUMPS} hosts.", "Look for a circle in it."
            )
        *nearer, last = (word.removeprefix("ssh://").rstrip("/") for word in route[0].jumps)
        hop = resolve(last, options.config)
        route = (replace(hop, jumps=tuple(nearer), proxy_command=None) if nearer else hop, *route)
    return route


def connect(route: Route, options: SshOptions) -> Connection:
    """Connect and log in to the last host of the route. Raises UnreachableError subclasses."""
    settings = route[-1]
    paramiko = load_paramiko()
    timeout_s = settings.connect_timeout_s or options.connect_timeout_s
    jump, process, transport = None, None, None
    try:
        if settings.proxy_command:
            way, process = over_command(settings.proxy_command)
        elif len(route) > 1:
            jump = _jump_to(route[:-1], options)
            way = _through(jump, settings, timeout_s)
        else:
            way = over_tcp(settings, timeout_s)
        transport = paramiko.Transport(way)
        hear_signals(transport)
        _shake_hands(transport, settings, options, timeout_s)
        transport.auth_timeout = LOGIN_TIMEOUT_S
        log_in(transport, settings, options)
        transport.set_keepalive(min(settings.alive_interval_s or KEEPALIVE_S, KEEPALIVE_S))
    except BaseException:
        if transport is not None:
            transport.packetizer.complete_handshake()  # ends paramiko's timer thread
            hang_up(transport)
            hang_up(transport.sock)
        _let_go(jump, process)
        raise
    return Connection(transport, jump, process)


def _let_go(jump: Jump | None, process: subprocess.Popen[bytes] | None) -> None:
    if jump is not None:
        jump.release()
    if process is not None:
        process.terminate()
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _jump_to(route: Route, options: SshOptions) -> Jump:
    """A share of the connection to a jump host; waits for whoever is connecting to it."""
    key = (route, options)
    with _jumps_lock:
        jump = _jumps.get(key)
        mine = jump is None or jump.spent
        if jump is None or mine:
            jump = _jumps[key] = Jump(route[-1].name, key)
        jump.users += 1
    if mine:
        try:
            jump.ready.set_result(connect(route, options))
        except BaseException as error:  # those who wait for the same jump host get the same answer
            jump.ready.set_exception(error)
    try:
        jump.ready.result()
    except BaseException:
        jump.release()
        raise
    return jump


def _through(jump: Jump, settings: Settings, timeout_s: float) -> Any:
    paramiko = load_paramiko()
    hop, place = jump.name, f"{settings.host} port {settings.tcp_port}"
    try:
        channel = jump.ready.result().transport.open_channel(
            "direct-tcpip", (settings.host, settings.tcp_port), ("127.0.0.1", 0), timeout=timeout_s
        )
        return in_order(channel)
    except paramiko.ChannelException as error:
        raise ConnectionFailedError(
            f"{settings.name}: the jump host {hop} cannot reach {place} ({error.text}).",
            f"Try `ssh {settings.name} true`; AllowTcpForwarding must be on at {hop}.",
        ) from None
    except (paramiko.SSHException, EOFError, OSError):
        raise ConnectionFailedError(
            f"{settings.name}: the jump host {hop} did not connect to {place} within {timeout_s:g} s.",
            f"Is {settings.name} up, and does a firewall allow the port? Try `ssh {settings.name} true`.",
        ) from None


def _shake_hands(transport: Any, settings: Settings, options: SshOptions, timeout_s: float) -> None:
    """Banner, key exchange, host key; leaves the transport encrypted with a host that is who it should be."""
    known = KnownHost(settings)
    known.prefer(transport)
    transport.banner_timeout, transport.handshake_timeout = timeout_s, HANDSHAKE_TIMEOUT_S
    limit_s = timeout_s + HANDSHAKE_TIMEOUT_S
    began = time.monotonic()
    done = threading.Event()
    transport.start_client(event=done)
    finished = done.wait(limit_s)
    if not transport.is_active():
        raise _no_handshake(transport.get_exception(), settings, timeout_s, time.monotonic() - began)
    if not finished:
        raise TimedOutError(settings.name, limit_s)
    key = transport.get_remote_server_key()
    known.check(HostKey(key.get_name(), key.get_base64()), options)


def _no_handshake(error: BaseException | None, settings: Settings, timeout_s: float, elapsed_s: float) -> GlmplanError:
    paramiko = load_paramiko()
    words = str(error or "") or type(error).__name__
    if isinstance(error, paramiko.IncompatiblePeer):
        return ConnectionFailedError(
            f"{settings.name} and glmplan share no SSH algorithm: {words}.",
            "Update sshd there, or allow a modern algorithm in its configuration.",
        )
    if "banner" in words or isinstance(error, EOFError):
        if elapsed_s >= timeout_s:
            return TimedOutError(settings.name, timeout_s)
        return ConnectionFailedError(
            f"{settings.name} ({settings.host} port {settings.tcp_port}) hung up before the login, or is no SSH service.",
            f"Try `ssh -v {settings.name} true`; if it comes and goes, raise MaxStartups in its sshd_config.",
        )
    return ConnectionLostError(settings.name, f"in the key exchange ({words})")
