"""What carries an SSH connection: TCP that notices a dead link, or the user's ProxyCommand; and paramiko itself."""

from __future__ import annotations

import functools
import logging
import socket
import subprocess
import threading
import warnings
from contextlib import suppress
from typing import Any

from glmplan.transport.errors import ConnectionFailedError
from glmplan.transport.ssh_config import Settings

LOST_AFTER_MS = 30_000
"""Unacknowledged data for so long ends the connection (TCP_USER_TIMEOUT); the kernel's default is about 15 minutes."""


@functools.cache
def load_paramiko() -> Any:
    """paramiko, quiet: it would print tracebacks of its own on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paramiko
    logger = logging.getLogger("paramiko")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return paramiko


def over_tcp(settings: Settings, timeout_s: float) -> socket.socket:
    """A connected socket; every address of the name is tried, each for `timeout_s`."""
    place = f"{settings.host} port {settings.tcp_port}"
    note = f" Note: {settings.limitation}" if settings.limitation else ""
    try:
        way = socket.create_connection((settings.host, settings.tcp_port), timeout=timeout_s)
    except socket.gaierror as error:
        raise ConnectionFailedError(
            f"{settings.name}: the name {settings.host} was not found ({error.strerror}).",
            f"Check the spelling, or give {settings.name} a HostName in ~/.ssh/config.{note}",
        ) from None
    except TimeoutError:
        raise ConnectionFailedError(
            f"{settings.name} ({place}) did not take a connection within {timeout_s:g} s.",
            f"Is the host up, and does a firewall allow the port? Try `ssh {settings.name} true`.{note}",
        ) from None
    except OSError as error:
        raise ConnectionFailedError(
            f"{settings.name} ({place}) cannot be connected to: {error.strerror or error}.",
            f"Is sshd running there, on this port? Try `ssh {settings.name} true`.{note}",
        ) from None
    lost_after_ms = min(settings.alive_interval_s * settings.alive_count * 1000 or LOST_AFTER_MS, LOST_AFTER_MS)
    way.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    way.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        way.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, lost_after_ms)
    return way


def over_command(command: str) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Our end of a ProxyCommand, and its process."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return ours, process


def hear_signals(transport: Any) -> None:
    """Keep the signal that ended a command as `channel.glmplan_signal`; paramiko drops it (RFC 4254, 6.10)."""
    kind = load_paramiko().common.MSG_CHANNEL_REQUEST
    handle = transport._channel_handler_table[kind]

    def heard(channel: Any, message: Any) -> None:
        position = message.packet.tell()
        if message.get_text() == "exit-signal":
            message.get_boolean()
            channel.glmplan_signal = message.get_text()
            channel.status_event.set()
        message.packet.seek(position)
        handle(channel, message)

    transport._channel_handler_table = {**transport._channel_handler_table, kind: heard}


def hang_up(way: Any) -> None:
    """Close a socket, channel or transport; over a connection that is gone there is nobody left to tell."""
    with suppress(load_paramiko().SSHException, EOFError, OSError):
        way.close()


def in_order(channel: Any) -> Any:
    """The channel, which sends nothing more once its CLOSE is sent.

    paramiko lets go of the channel's lock before it sends, so that one thread's data can follow another's CLOSE: sshd then
    ends the whole connection, with all hosts behind it ("data packet referred to nonexistent channel").
    """
    channel.transport = _InOrder(channel.transport)
    return channel


class _InOrder:
    """A transport as one channel sees it."""

    def __init__(self, transport: Any) -> None:
        self._transport, self._lock, self._closed = transport, threading.Lock(), False
        self._close = load_paramiko().common.cMSG_CHANNEL_CLOSE

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _send_user_message(self, message: Any) -> None:
        with self._lock:
            if not self._closed:
                self._closed = message.asbytes().startswith(self._close)
                self._transport._send_user_message(message)
