"""Many hosts at once: order, limit, failures, hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from glmplan.errors import GlmplanError, UnreachableError
from glmplan.transport.base import parse_hosts
from glmplan.transport.errors import TimedOutError
from glmplan.transport.fanout import Outcome, each
from tests.fleet.control import interruptible
from tests.netns_wire import wait_for


def test_outcomes_come_in_the_order_given() -> None:
    """Whatever ended first."""
    before = {"a": ["c", "b"], "b": ["c"], "c": []}
    ended: list[str] = []

    def work(name: str) -> str:
        wait_for("the others", lambda: ended == before[name])
        time.sleep(0.2)
        return name.upper()

    began = time.monotonic()
    found = each(list(before), work, on_done=lambda outcome: ended.append(outcome.name))
    assert [(one.name, one.result, one.error) for one in found] == [("a", "A", None), ("b", "B", None), ("c", "C", None)]
    assert ended == ["c", "b", "a"]
    assert 0.2 <= found[2].elapsed_s < found[0].elapsed_s <= time.monotonic() - began


def test_nothing_to_do() -> None:
    """No host, no outcome."""
    assert each([], lambda name: name) == ()


def test_at_most_limit_at_once() -> None:
    """The limit is reached and not passed."""
    lock, now, most = threading.Lock(), 0, 0
    all_four = threading.Barrier(4)

    def work(name: str) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        all_four.wait(30)
        with lock:
            now -= 1

    found = each([str(n) for n in range(20)], work, limit=4)
    assert [one.error for one in found] == [None] * 20, "they met in fours"
    assert most == 4


def test_a_failure_hides_nothing() -> None:
    """Errors of hosts are outcomes; so are defects, with their cause kept."""

    def work(name: str) -> str:
        if name == "bad":
            raise UnreachableError("bad is down.", "Start it.")
        if name == "odd":
            raise ZeroDivisionError("1 / 0")
        return name

    good, bad, odd = each(["good", "bad", "odd"], work)
    assert good.result == "good"
    assert isinstance(bad.error, UnreachableError)
    assert isinstance(odd.error, GlmplanError)
    assert "odd: ZeroDivisionError: 1 / 0" in odd.error.message
    assert isinstance(odd.error.__cause__, ZeroDivisionError)
    assert good.value() == "good"
    with pytest.raises(UnreachableError):
        bad.value()


def test_a_host_that_hangs_is_given_up() -> None:
    """Its slot goes to the next, and a late answer changes nothing."""
    release = threading.Event()

    def work(name: str) -> str:
        if name.startswith("hung"):
            release.wait(60)
        return name

    began = time.monotonic()
    found = each(["hung1", "hung2", "a", "b"], work, limit=2, timeout_s=1.5)
    assert time.monotonic() - began < 20
    release.set()
    assert [type(one.error) for one in found] == [TimedOutError, TimedOutError, type(None), type(None)]
    assert found[0].error is not None
    assert "1.5 s" in found[0].error.message


def test_names_of_hosts() -> None:
    """HostName and transports are labelled by their text."""
    found = each(parse_hosts("a,u@b:22"), lambda host: host.text)
    assert [(one.name, one.result) for one in found] == [("a", "a"), ("u@b:22", "u@b:22")]


def test_an_error_in_on_done_reaches_the_caller() -> None:
    """It is the caller's own."""

    def broken(outcome: Outcome[str]) -> None:
        raise RuntimeError(outcome.name)

    with pytest.raises(RuntimeError, match="a"):
        each(["a"], str, on_done=broken)


def test_ctrl_c_ends_the_process_at_once() -> None:
    """Although hosts hang."""
    program = (
        "import time\nfrom glmplan.transport.fanout import each\n"
        "each(['a', 'b'], lambda name: (print('go', flush=True), time.sleep(60)), timeout_s=90)"
    )
    with interruptible():
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        error = process.communicate(timeout=50)[1]
    assert time.monotonic() - began < 20
    assert b"KeyboardInterrupt" in error
