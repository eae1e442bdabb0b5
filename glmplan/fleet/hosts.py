"""The hosts of a deployment, each with its open connection: one operation on all of them at once.

A connection that timed out or broke is dropped and opened again by the next operation, so a link that comes back is used
again without being told.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from glmplan.errors import UnreachableError
from glmplan.transport.base import HostName, Transport
from glmplan.transport.fanout import Outcome, each
from glmplan.transport.node import call
from glmplan.transport.open import SshOptions, open_transport

Answers = Mapping[str, "Outcome[dict[str, Any]]"]


class Fleet:
    """Hosts by name, in node-rank order. Use it as a context manager."""

    def __init__(self, hosts: Sequence[HostName], options: SshOptions, limit: int = 32) -> None:
        self.hosts = tuple(hosts)
        self._by_name = {host.text: host for host in hosts}
        self._options = options
        self._limit = limit
        self._open: dict[str, Transport] = {}
        self._lock = Lock()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            transports, self._open = list(self._open.values()), {}
        for transport in transports:
            transport.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Host names in order."""
        return tuple(host.text for host in self.hosts)

    def ask(
        self, name: str, operation: str, request: dict[str, Any] | None = None, timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """One operation on one host; the connection is dropped when the host cannot be reached."""
        transport = self._transport(name)
        try:
            return call(transport, operation, request, timeout_s, self._python(name))
        except UnreachableError:
            self._drop(name, transport)
            raise

    def ask_all(
        self, operation: str, requests: Mapping[str, dict[str, Any]] | None = None, timeout_s: float = 30.0
    ) -> Answers:
        """The operation on every host, or on those that `requests` names, at once: an outcome for each."""
        wanted = requests if requests is not None else {name: {} for name in self.names}
        outcomes = each(
            list(wanted),
            lambda name: self.ask(name, operation, wanted[name], timeout_s),
            limit=self._limit,
            timeout_s=timeout_s + 10.0,
        )
        for outcome in outcomes:
            if isinstance(outcome.error, UnreachableError):
                self._drop(outcome.name, None)
        return {outcome.name: outcome for outcome in outcomes}

    def _python(self, name: str) -> str:
        return sys.executable if self._by_name[name].is_local else "python3"

    def _transport(self, name: str) -> Transport:
        with self._lock:
            if name in self._open:
                return self._open[name]
        transport = open_transport(self._by_name[name], self._options)
        with self._lock:
            self._open[name] = transport
        return transport

    def _drop(self, name: str, transport: Transport | None) -> None:
        with self._lock:
            held = self._open.get(name)
            if held is None or (transport is not None and held is not transport):
                return
            del self._open[name]
        held.close()
