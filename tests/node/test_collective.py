"""Ranks in threads over real sockets: meeting, waiting, adding up, losing one another."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from glmplan.node import collective, hub
from glmplan.node.collective import Member
from glmplan.node.hub import Hub, LostError, shut, write_line
from glmplan.node.ring import Links
from tests.node.host import free_port, until

LONG_S = 60.0
"""Nobody is lost for being slow."""


class World:
    """A hub and its members, closed in the end."""

    def __init__(self, size: int, stack: ExitStack, silent_s: float = LONG_S) -> None:
        self.port = free_port()
        self.hub = Hub("127.0.0.1", self.port, size, silent_s)
        stack.callback(self.hub.close)
        self.members = [Member(rank, size, LONG_S, LONG_S) for rank in range(size)]
        for member in self.members:
            stack.callback(member.close)

    def each(self, work: Callable[[Member], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(work, self.members))

    def join(self) -> None:
        self.each(lambda member: member.join("127.0.0.1", self.port, {"node": member.rank // 2}))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    before = set(threading.enumerate())
    with ExitStack() as made:
        yield made
    until(lambda: set(threading.enumerate()) <= before)


def test_all_ranks_meet_and_know_one_another(stack: ExitStack) -> None:
    world = World(6, stack)
    world.join()
    assert world.hub.count == 6
    tables = [member.table for member in world.members]
    assert tables == [tables[0]] * 6
    assert [entry["node"] for entry in tables[0]] == [0, 0, 1, 1, 2, 2]


def test_nobody_passes_before_the_last_arrives(stack: ExitStack) -> None:
    world = World(3, stack)
    world.join()
    passed: list[int] = []

    def arrive(member: Member) -> None:
        if member.rank == 2:
            time.sleep(0.5)
            assert passed == []
        member.arrive("here")
        passed.append(member.rank)

    world.each(arrive)
    assert sorted(passed) == [0, 1, 2]


def test_every_pair_of_nodes_is_tested_and_the_sum_is_right(stack: ExitStack) -> None:
    world = World(6, stack)
    world.join()

    def test(member: Member) -> int:
        links = Links(member)
        stack.callback(links.close)
        reached = links.test_pairs()
        member.arrive("links")
        assert links.all_reduce() > 0
        return reached

    assert world.each(test) == [2, 0, 2, 0, 2, 0]


def test_an_unreachable_node_is_named(stack: ExitStack) -> None:
    world = World(4, stack)
    world.join()
    lost = world.members[2]
    assert lost.own is not None
    shut(lost.own)
    links = Links(world.members[0])
    stack.callback(links.close)
    with pytest.raises(LostError, match=r"Node 0 cannot reach node 1 at 127.0.0.1:\d+: .*refused.* Open the ephemeral"):
        links.test_pairs()


def test_a_lost_rank_is_told_to_all(stack: ExitStack) -> None:
    world = World(3, stack)
    world.join()
    told: list[str] = []
    for member in world.members[:2]:
        member.when_lost(told.append)
    world.members[2].close()
    until(lambda: len(told) == 2)
    assert set(told) == {"Connection closed by peer [127.0.0.1] (rank 2)"}
    with pytest.raises(LostError, match=r"\(rank 2\)"):
        world.members[0].arrive("never")


def test_a_loss_that_came_first_is_told_all_the_same(stack: ExitStack) -> None:
    world = World(2, stack)
    world.join()
    world.members[1].close()
    with pytest.raises(LostError):
        world.members[0].arrive("never")
    told: list[str] = []
    world.members[0].when_lost(told.append)
    until(lambda: told)
    assert told == ["Connection closed by peer [127.0.0.1] (rank 1)"]


def test_a_goodbye_is_no_death(stack: ExitStack) -> None:
    world = World(2, stack)
    world.join()
    told: list[str] = []
    world.members[0].when_lost(told.append)
    world.members[1].leave()
    world.members[1].close()
    time.sleep(0.5)
    assert told == []


def test_a_silent_rank_is_lost_although_nothing_was_closed(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (collective, hub):
        monkeypatch.setattr(module, "BEAT_S", 0.1)
    world = World(2, stack, silent_s=2.5)
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", world.port)) as mute:
        joined = pool.submit(world.members[0].join, "127.0.0.1", world.port, {"node": 0})
        until(lambda: world.hub.count == 1)
        begin = time.monotonic()
        write_line(mute, {"join": 1, "world_size": 2, "entry": {"node": 1, "address": "10.9.9.9", "port": 1}})
        joined.result()
        told: list[str] = []
        world.members[0].when_lost(told.append)
        until(lambda: told)
        assert told == ["Connection closed by peer [10.9.9.9] (rank 1)"]
        assert time.monotonic() - begin >= 2.5


def test_a_rank_of_another_world_is_refused(stack: ExitStack) -> None:
    world = World(2, stack)
    stranger = Member(1, 4, LONG_S, LONG_S)
    stack.callback(stranger.close)
    with pytest.raises(LostError, match="refused this rank: rank 1 of 4 cannot join 2 ranks"):
        stranger.join("127.0.0.1", world.port, {"node": 0})


def test_words_that_are_no_protocol_do_no_harm(stack: ExitStack) -> None:
    world = World(2, stack)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"join": "x"}\n', b"[1]\n", b"\x00" * 100):
        with socket.create_connection(("127.0.0.1", world.port)) as sock:
            sock.sendall(words)
    world.join()


def test_who_joins_after_a_loss_hears_of_it(stack: ExitStack) -> None:
    world = World(3, stack)
    first, *others = world.members
    with ThreadPoolExecutor(3) as pool:
        began = pool.submit(first.join, "127.0.0.1", world.port, {"node": 0})
        until(lambda: world.hub.count == 1)
        first.close()
        with pytest.raises(LostError):
            began.result(timeout=LONG_S / 2)
        for member in others:
            with pytest.raises(LostError, match=r"Connection closed by peer \[127\.0\.0\.1\] \(rank 0\)"):
                pool.submit(member.join, "127.0.0.1", world.port, {"node": 1}).result(timeout=LONG_S / 2)
