"""Listening, calling and trying ports: over real sockets, as the node program does on a host."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmplan.node import sockets
from glmplan.transport.base import parse_hosts
from glmplan.transport.local import LocalTransport
from glmplan.transport.node import call

HERE = "127.0.0.1"


def ask(operation: str, **request: Any) -> dict[str, Any]:
    """The operation in a process of its own."""
    return call(LocalTransport(parse_hosts("local")[0]), operation, request, timeout_s=120)


def gone(pid: int) -> bool:
    """Whether a process ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def ended(pid: int, before_s: float | None = None) -> bool:
    """Whether it ends: before this time of the monotonic clock, or at all."""
    deadline = time.monotonic() + 60.0 if before_s is None else before_s
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return gone(pid)


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A listener of this process that never speaks."""
    with socket.socket() as sock:
        sock.bind((HERE, 0))
        sock.listen()
        yield sock


def targets(port: int, name: str = "h1") -> list[dict[str, Any]]:
    """One address to call."""
    return [{"name": name, "address": HERE, "port": port}]


def test_a_listener_greets_all_expected_callers_and_ends() -> None:
    began = time.monotonic()
    heard = ask("listen", address=HERE, tcp_ports=[0, 0], seconds=sockets.LONGEST_LISTEN_S, token="t1", callers=3)
    assert [one["problem"] for one in heard["ports"]] == [None, None]
    first, second = (one["port"] for one in heard["ports"])
    assert not gone(heard["pid"])
    for _ in range(3):
        found = ask("connect", targets=targets(first) + targets(second), token="t1")["results"]
        assert [one["problem"] for one in found] == [None, None]
        assert all(one["connect_s"] < 5 for one in found)
    assert ended(heard["pid"], before_s=began + sockets.LONGEST_LISTEN_S), "not by its own deadline"
    again = ask("ports", binds=[{"address": HERE, "port": first}])["ports"]
    assert again[0]["free"]


def test_a_listener_ends_by_itself_when_nobody_calls() -> None:
    heard = ask("listen", address=HERE, tcp_ports=[0], seconds=0.5, token="t", callers=99)
    assert ended(heard["pid"])


def test_a_caller_that_never_hangs_up_holds_nothing_beyond_the_deadline() -> None:
    heard = ask("listen", address=HERE, tcp_ports=[0], seconds=4, token="t", callers=1)
    with socket.create_connection((HERE, heard["ports"][0]["port"])) as caller:
        assert caller.recv(64) == b"glmplan t\n"
        assert ended(heard["pid"])


def test_ports_in_use_are_told_and_the_others_listened_on(taken: socket.socket) -> None:
    heard = ask("listen", address=HERE, tcp_ports=[taken.getsockname()[1], 0], seconds=1, token="t", callers=1)
    assert [one["problem"] for one in heard["ports"]] == ["taken", None]
    assert heard["ports"][1]["port"] > 0


def test_strangers_silence_and_refusal_are_told_apart(taken: socket.socket) -> None:
    with socket.socket() as closed:
        closed.bind((HERE, 0))  # nobody listens on it, and nobody else gets it
        began = time.monotonic()
        found = ask(
            "connect",
            targets=[
                *targets(taken.getsockname()[1]),
                *targets(closed.getsockname()[1]),
                {"name": "n", "address": "no.such.invalid", "port": 1},
            ],
            token="t",
            timeout_s=2.0,
        )["results"]
    assert found[0]["problem"] == "stranger"
    assert found[1]["problem"] == "refused"
    assert found[2]["problem"] not in (None, "silent")
    assert time.monotonic() - began < 60


def test_a_greeting_of_another_run_is_a_stranger() -> None:
    heard = ask("listen", address=HERE, tcp_ports=[0], seconds=30, token="old", callers=1)
    found = ask("connect", targets=targets(heard["ports"][0]["port"]), token="new")["results"]
    assert found[0]["problem"] == "stranger"


def test_a_taken_port_names_its_process(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    found = ask(
        "ports", binds=[{"address": HERE, "port": port}, {"address": "", "port": port}, {"address": HERE, "port": 0}]
    )
    on_address, on_all, any_port = found["ports"]
    assert (on_address["problem"], on_address["pid"]) == ("taken", os.getpid())
    assert on_all["problem"] == "taken"
    assert any_port["free"]
    assert any_port["port"] > 0
    assert abs(found["time_s"] - time.time()) < 60


def test_an_address_of_another_host_cannot_be_bound() -> None:
    found = ask("ports", binds=[{"address": "192.0.2.7", "port": 0}])["ports"][0]
    assert not found["free"]
    assert "cannot assign" in found["problem"]


def test_many_calls_at_once_are_answered() -> None:
    listener = socket.socket()
    listener.bind((HERE, 0))
    listener.listen(256)
    done = threading.Thread(
        target=sockets._serve, args=([listener], sockets._greeting("t"), time.monotonic() + 120, 200), daemon=True
    )
    done.start()
    results = sockets.connect({"targets": targets(listener.getsockname()[1]) * 200, "token": "t", "timeout_s": 60})[
        "results"
    ]
    assert {one["problem"] for one in results} == {None}
    done.join(60)
    assert not done.is_alive()
    listener.close()
