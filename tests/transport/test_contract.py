"""What all transports promise: the same tests on this machine, over SSH and on paper."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from glmplan.node.errors import NodeError
from glmplan.transport.base import Completed, Transport, parse_hosts
from glmplan.transport.errors import ConnectionFailedError, ConnectionLostError, TimedOutError
from glmplan.transport.fake import FakeFleet, FakeHost
from glmplan.transport.local import LocalTransport
from glmplan.transport.node import NodeFailedError, call
from tests.netns import Network
from tests.transport.conftest import Opener

MIB = 1 << 20


@dataclass
class Way:
    """A transport; `slow` is it on a host where commands take longer than half a second."""

    kind: str
    transport: Transport
    slow: Transport
    python: str = "python3"


def scripted_sh(argv: Sequence[str], stdin: bytes) -> Completed:
    """What a real sh does with the scripts of this file."""
    words = " ".join(argv[1:])
    if "kill -TERM" in words:
        return Completed(-15, b"", b"")
    if "exit 7" in words:
        return Completed(7, b"out", b"err\n")
    if "head -c" in words:
        return Completed(0, b"x" * MIB, b"y" * MIB)
    raise AssertionError(words)


def paper_hello(request: dict[str, object]) -> dict[str, object]:
    """The hello operation of a host of paper."""
    return {"user": "u", "hostname": "paper", "python": "/p", "python_version": "3.9.0", "time_s": 1.0, "pid": 1, **request}


def paper_stop(request: dict[str, object]) -> dict[str, object]:
    """An operation that fails."""
    raise NodeError("absent", f"There is no {request['deployment']} here.", "Look at glmplan status.")


@pytest.fixture(params=["local", "ssh", "fake"])
def way(request: pytest.FixtureRequest, opened: Opener) -> Iterator[Way]:
    """Each transport in turn."""
    if request.param == "local":
        local = LocalTransport(parse_hosts("local")[0])
        yield Way("local", local, local, sys.executable)
    elif request.param == "ssh":
        hosts: Network = request.getfixturevalue("three_hosts")
        ssh = opened("h1", hosts)
        yield Way("ssh", ssh, ssh)
    else:
        programs = {
            "cat": lambda argv, stdin: Completed(0, stdin, b""),
            "printf": lambda argv, stdin: Completed(0, "".join(f"{word}|" for word in argv[2:]).encode(), b""),
            "sh": scripted_sh,
            "true": lambda argv, stdin: Completed(0, b"", b""),
        }
        host = FakeHost(answers={"hello": paper_hello, "poll": paper_stop}, programs=programs)
        fleet = FakeFleet({"a": host, "b": FakeHost(took_s=5.0, programs=programs)})
        first, second = (fleet.open(name) for name in parse_hosts("a,b"))
        yield Way("fake", first, second)


def test_exit_status_and_both_outputs(way: Way) -> None:
    """A command's failure is its exit status."""
    assert way.transport.run(["sh", "-c", "printf out; echo err >&2; exit 7"]) == Completed(7, b"out", b"err\n")


def test_a_signal_is_a_negative_exit_status(way: Way) -> None:
    """As in subprocess."""
    assert way.transport.run(["sh", "-c", "kill -TERM $$"]).exit_status == -15


def test_words_arrive_as_they_were(way: Way) -> None:
    """No shell on the way changes a word."""
    words = ["a b", "'", '"', "$HOME", ";", "*", "", "\\", "über", "-n", "a\nb"]
    assert way.transport.run(["printf", "%s|", *words]).stdout.decode() == "".join(f"{word}|" for word in words)


def test_a_mebibyte_each_way(way: Way) -> None:
    """Input and output larger than any buffer, byte for byte."""
    data = bytes(range(256)) * (MIB // 256)
    assert way.transport.run(["cat"], stdin=data).stdout == data


def test_both_outputs_are_drained(way: Way) -> None:
    """A full stderr does not block stdout."""
    script = "head -c 1048576 /dev/zero | tr '\\0' x; head -c 1048576 /dev/zero | tr '\\0' y >&2"
    done = way.transport.run(["sh", "-c", script])
    assert (done.stdout, done.stderr) == (b"x" * MIB, b"y" * MIB)


def test_input_that_nobody_reads(way: Way) -> None:
    """A command may end before it has read its input."""
    assert way.transport.run(["true"], stdin=b"x" * 4 * MIB).exit_status == 0


def test_a_missing_program_ends_with_127(way: Way) -> None:
    """And says so."""
    done = way.transport.run(["glmplan-no-such-program"])
    assert done.exit_status == 127
    assert b"not found" in done.stderr


def test_a_command_that_overruns_its_time(way: Way) -> None:
    """It raises in time, and the transport can be used again."""
    way.transport.run(["true"])
    began = time.monotonic()
    with pytest.raises(TimedOutError) as caught:
        way.slow.run(["sh", "-c", "sleep 61 & sleep 60"], timeout_s=0.5)
    assert 0.5 <= time.monotonic() - began < 20
    assert "0.5 s" in caught.value.message
    assert caught.value.exit_code == 5
    assert way.transport.run(["true"]).exit_status == 0


def test_hello_of_the_node_program(way: Way) -> None:
    """A whole operation."""
    found = call(way.transport, "hello", python=way.python)
    assert set(found) >= {"user", "hostname", "python", "python_version", "time_s", "pid"}


def test_a_failing_operation_carries_its_kind(way: Way) -> None:
    """The host's own words arrive, or those of the node program without the operation's arguments."""
    with pytest.raises(NodeFailedError) as caught:
        call(way.transport, "poll", {"deployment": "../x"}, python=way.python)
    assert caught.value.kind
    assert caught.value.message


def test_an_unknown_operation(way: Way) -> None:
    """It did not run, and says why."""
    with pytest.raises(NodeFailedError, match="no operation 'nonsense'") as caught:
        call(way.transport, "nonsense", python=way.python)
    assert caught.value.kind == "not-run"


def test_a_host_without_python(way: Way) -> None:
    """The sentence names the interpreter."""
    if way.kind == "fake":
        pytest.skip("a host of paper has no interpreter")
    with pytest.raises(NodeFailedError, match="has no no-such-python") as caught:
        call(way.transport, "hello", python="no-such-python")
    assert caught.value.kind == "no-python"


def test_use_after_close(way: Way) -> None:
    """A closed transport connects again."""
    way.transport.close()
    way.transport.close()
    assert way.transport.run(["true"]).exit_status == 0


def real_down(hosts: Network, to: Opener) -> Transport:
    hosts.stop_sshd("h1")
    return to("h1", hosts)


def real_silent(hosts: Network, to: Opener) -> Transport:
    hosts.mute_sshd("h1")
    return to("h1", hosts, connect_timeout_s=1.0)


def real_lost(hosts: Network, to: Opener) -> Transport:
    transport = to("h1", hosts)
    transport.run(["true"])
    hosts.once("h1", "sleep 99", hosts.stop_sshd, "h1", True)
    return transport


@pytest.mark.parametrize("kind", ["ssh", "fake"])
@pytest.mark.parametrize(
    ("fate", "make", "error"),
    [
        ("down", real_down, ConnectionFailedError),
        ("silent", real_silent, TimedOutError),
        ("lost", real_lost, ConnectionLostError),
    ],
)
def test_hosts_that_cannot_be_reached(
    kind: str,
    fate: str,
    make: Callable[[Network, Opener], Transport],
    error: type[Exception],
    request: pytest.FixtureRequest,
    opened: Opener,
) -> None:
    """A host of paper fails as a real one does."""
    if kind == "ssh":
        transport = make(request.getfixturevalue("one_host"), opened)
    else:
        fleet = FakeFleet({"h1": FakeHost(fate=fate)})  # type: ignore[arg-type]
        from glmplan.transport.open import SshOptions

        transport = fleet.open(parse_hosts("h1")[0], SshOptions(connect_timeout_s=1.0))
    with pytest.raises(error) as caught:
        transport.run(["sleep", "99"], timeout_s=60)
    assert type(caught.value) is error
    assert "h1" in str(caught.value)
