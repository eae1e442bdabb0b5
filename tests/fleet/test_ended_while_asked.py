"""A server that ends, or a host that is lost, while canaries are asked: who is named, with which cause, after which looks.

The hosts are scripted, because what matters is when they say what; real processes that die are in `test_faults.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from glmplan.fleet import launch as subject
from glmplan.fleet.canary import CanaryResult, CanarySettings
from glmplan.fleet.deadline import Pulse
from glmplan.fleet.follow import LOG_BYTES, TAIL_PIECES, Limits, NodeView, catch_up
from glmplan.fleet.phases import NodeProgress
from glmplan.transport.errors import ConnectionFailedError, ConnectionLostError, HostKeyChangedError, TimedOutError
from glmplan.transport.fanout import Outcome
from glmplan.transport.node import NodeFailedError

DEPLOYMENT: Any = SimpleNamespace(
    name="d", hosts=("h1", "h2"), log_family="sglang", base_url="http://h1:1", needs_api_key=False
)
Poll = Callable[[int, str, int], Outcome[dict[str, Any]]]


class Hosts:
    """`poll(look, host, offset)` says what a host tells; `answer` what the server says to a request."""

    def __init__(self, poll: Poll, answer: Exception | None = None) -> None:
        self.poll, self.answer, self.looks = poll, answer, 0

    def ask_all(self, operation: str, wanted: Any = None, timeout_s: float = 30.0) -> dict[str, Outcome[dict[str, Any]]]:
        if operation == "kernel_log":
            return {host: Outcome(host, {"lines": []}, None, 0) for host in DEPLOYMENT.hosts}
        look, self.looks = self.looks, self.looks + 1
        return {host: self.poll(look, host, request["log_offset"]) for host, request in wanted.items()}

    def ask(self, host: str, operation: str, request: Any, timeout_s: float) -> dict[str, Any]:
        if self.answer is not None:
            raise self.answer
        return {"status": 200, "body": {"choices": [{"message": {"content": "407"}, "finish_reason": "stop"}]}}


def told(host: str, state: str = "running", log: str = "", offset: int = 0, **more: Any) -> Outcome[dict[str, Any]]:
    """A host with this whole log, read from an offset."""
    piece = log[offset : offset + LOG_BYTES]
    place = {"log": piece, "log_offset": offset + len(piece), "log_size": len(log)}
    ended = {"ended_s": time.time() - 1, "exit_status": 1} if state == "exited" else {}
    return Outcome(host, {"state": state, "time_s": time.time(), **place, **ended, **more}, None, 0)


def views(seen_s_ago: float) -> tuple[NodeView, ...]:
    """Both nodes ready, last seen so long ago."""
    then = time.monotonic() - seen_s_ago
    found = []
    for rank, host in enumerate(DEPLOYMENT.hosts):
        progress = NodeProgress("sglang", [(rank, 0)], 1, head=rank == 0, now_s=then)
        work: Any = None
        found.append(NodeView(host, rank, progress, work, Pulse(then), state="running", answered_s=then))
        progress.mark_ready(then)
    return tuple(found)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "ENDING_S", 1.0)


def judged(hosts: Any, nodes: tuple[NodeView, ...], *names: str, lost_after_s: float = 60.0) -> tuple[CanaryResult, ...]:
    limits = Limits(100.0, lost_after_s=lost_after_s, poll_s=0.01)
    judgement = subject.Judgement((), limits, CanarySettings(model="m", only=names, timeout_s=5.0))
    observer: Any = SimpleNamespace(judged=lambda result: None)
    return subject.judge(hosts, DEPLOYMENT, nodes, judgement, observer)


SILENT = NodeFailedError("no-answer", "http://h1:1 does not answer")


def test_one_missed_look_after_long_canaries_is_no_loss():
    hosts = Hosts(lambda look, host, offset: Outcome(host, None, TimedOutError(host, 15), 15), SILENT)
    (result,) = judged(hosts, views(seen_s_ago=70), "fact")
    assert (result.status, result.expected) == ("fail", "an answer")


def test_wrong_answers_are_not_looked_behind():
    hosts = Hosts(lambda look, host, offset: told(host, "exited"))
    (result,) = judged(hosts, views(5), "arithmetic")
    assert (result.status, hosts.looks) == ("fail", 0)


def test_a_death_names_the_canary_that_got_no_answer_and_what_was_wrong_before():
    def poll(look: int, host: str, offset: int) -> Outcome[dict[str, Any]]:
        return told(host, "exited" if host == "h2" and look else "running")

    hosts = Hosts(poll)

    def ask(host: str, operation: str, request: Any, timeout_s: float) -> dict[str, Any]:
        if "17 x 24" not in str(request["body"]):
            raise SILENT
        return Hosts.ask(hosts, host, operation, request, timeout_s)

    hosts.ask = ask  # type: ignore[method-assign]
    with pytest.raises(subject._EndedWhileAsked) as caught:
        judged(hosts, views(5), "arithmetic", "tool", "repeat")
    assert caught.value.failure.message == (
        "The tool canary got no answer. The worker on h2 (node 1) ended with exit status 1. "
        "Before that it answered wrongly: arithmetic expected '408' and got '407'."
    )


def test_a_head_that_is_lost_while_asked_is_a_failure_of_its_host():
    hosts = Hosts(lambda look, host, offset: told(host), TimedOutError("h1", 15))
    with pytest.raises(subject._EndedWhileAsked, match="h1 is lost while its server is asked") as caught:
        judged(hosts, views(5), "fact", lost_after_s=0.2)
    assert (caught.value.failure.kind, caught.value.failure.host) == ("lost", "h1")


@pytest.mark.parametrize(
    "blip",
    [TimedOutError("h1", 15), ConnectionLostError("h1", "reset by peer"), ConnectionFailedError("No route to h1.", "Wait.")],
    ids=lambda error: type(error).__name__,
)
def test_a_link_of_the_head_that_drops_for_a_moment_costs_no_launch(blip: Exception):
    hosts = Hosts(lambda look, host, offset: told(host))
    asked: list[str] = []

    def ask(host: str, operation: str, request: Any, timeout_s: float) -> dict[str, Any]:
        asked.append(host)
        if len(asked) < 4:
            raise blip
        answer = Hosts.ask(hosts, host, operation, request, timeout_s)
        answer["body"]["choices"][0]["message"]["content"] = "408"
        return answer

    hosts.ask = ask  # type: ignore[method-assign]
    (result,) = judged(hosts, views(5), "arithmetic")
    assert (result.status, len(asked)) == ("pass", 4)


def test_a_request_that_had_all_of_its_time_is_not_asked_again():
    asked: list[float] = []

    def ask(method: str, path: str, body: Any, timeout_s: float) -> tuple[int, Any]:
        asked.append(timeout_s)
        time.sleep(timeout_s)
        raise TimedOutError("h1", timeout_s)

    with pytest.raises(TimedOutError):
        subject.patient(ask, Limits(100.0, poll_s=0.01))("GET", "/", None, 0.1)
    assert asked == [0.1]


def test_a_head_whose_key_changed_is_not_asked_again():
    hosts = Hosts(lambda look, host, offset: told(host), HostKeyChangedError("The key of h1 changed.", "Look."))
    with pytest.raises(subject._EndedWhileAsked, match="The key of h1 changed"):
        judged(hosts, views(5), "fact")


PORT = "glmplan port failed: the real cause.\n"


@pytest.mark.parametrize("lines", [6_000, 60_000])
def test_the_cause_is_found_at_the_end_of_a_log_that_grew_meanwhile(lines: int):
    """Less than is read of a log's end, and more."""
    log = f"{'a line of noise ' * 10}\n" * lines + PORT
    assert (len(log) > TAIL_PIECES * LOG_BYTES) is (lines == 60_000)
    hosts: Any = Hosts(lambda look, host, offset: told(host) if host == "h1" else told(host, "exited", log, offset))
    nodes = views(5)
    catch_up(hosts, DEPLOYMENT, nodes)
    assert hosts.looks <= TAIL_PIECES
    assert nodes[1].log_offset == len(log)
    found = subject.explain(hosts, DEPLOYMENT, nodes, {})
    assert (found.id, found.host) == ("kernel-port-failed", "h2")
    assert found.cause.endswith("answer wrongly: the real cause.")


def test_a_cause_that_is_written_a_moment_after_the_first_sign_is_read():
    effect = "RuntimeError: Connection closed by peer [127.0.0.1]:1\n"
    cause = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"

    def poll(look: int, host: str, offset: int) -> Outcome[dict[str, Any]]:
        if host == "h1":
            return told(host, "exited", effect, offset)
        return told(host, "exited", cause, offset) if look else told(host)

    hosts: Any = Hosts(poll, SILENT)
    nodes = views(5)
    with pytest.raises(subject._EndedWhileAsked):
        judged(hosts, nodes, "fact")
    catch_up(hosts, DEPLOYMENT, nodes)
    found = subject.explain(hosts, DEPLOYMENT, nodes, {})
    assert (found.id, found.host) == ("oom-run", "h2")
