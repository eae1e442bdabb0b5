"""Hosts with real sshd for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from glmplan.transport.base import parse_hosts
from glmplan.transport.open import SshOptions
from glmplan.transport.ssh import SshTransport
from tests import netns
from tests.netns import Network, three_hosts

__all__ = ["three_hosts"]

Opener = Callable[..., SshTransport]


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own agent and configuration have no say."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.delenv("GLMPLAN_SSH_CONFIG", raising=False)


@pytest.fixture
def one_host(tmp_path: Path) -> Iterator[Network]:
    """h1 for one test that changes it."""
    if reason := netns.why_not():
        pytest.skip(reason)
    with netns.network("h1", folder=tmp_path / "net") as hosts:
        yield hosts


@pytest.fixture
def opened() -> Iterator[Opener]:
    """A function that opens SSH transports, which are closed at the end."""
    transports: list[SshTransport] = []

    def to(name: str, hosts: Network, config: Path | None = None, **choices: object) -> SshTransport:
        options = replace(SshOptions(config=str(config or hosts.ssh_config), connect_timeout_s=20.0), **choices)
        transports.append(SshTransport(parse_hosts(name)[0], options))
        return transports[-1]

    yield to
    for transport in transports:
        transport.close()
