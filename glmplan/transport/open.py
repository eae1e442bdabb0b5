"""A transport for a host name."""

from __future__ import annotations

from glmplan.transport.base import HostName, Transport
from glmplan.transport.local import LocalTransport
from glmplan.transport.options import SshOptions

__all__ = ["SshOptions", "open_transport"]


def open_transport(host: HostName, options: SshOptions | None = None) -> Transport:
    """The way to this host. Nothing is connected yet: the first command connects."""
    if host.is_local:
        return LocalTransport(host)
    from glmplan.transport.ssh import SshTransport

    return SshTransport(host, options or SshOptions())
