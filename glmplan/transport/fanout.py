"""The same work on many hosts at once: one outcome per host, in the order given.

A host that fails is its own outcome; a host that hangs is given up after `timeout_s` and its thread left behind (threads are
daemons, so the process can end). KeyboardInterrupt reaches the caller at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from glmplan.errors import GlmplanError
from glmplan.transport.base import HostName, Transport
from glmplan.transport.errors import TimedOutError

N = TypeVar("N", str, HostName, Transport)
T = TypeVar("T")

DEFAULT_LIMIT = 32
"""Hosts worked on at once: enough to hide latency, few enough for two cores to encrypt."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of one host: `result` unless there is an `error`."""

    name: str
    result: T | None
    error: GlmplanError | None
    elapsed_s: float

    def value(self) -> T:
        """The result, or the error raised."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


def label(host: str | HostName | Transport) -> str:
    """The host's name in messages."""
    if isinstance(host, str):
        return host
    return host.text if isinstance(host, HostName) else host.name


def each(
    names: Sequence[N],
    work: Callable[[N], T],
    limit: int = DEFAULT_LIMIT,
    timeout_s: float = 120.0,
    on_done: Callable[[Outcome[T]], None] | None = None,
) -> tuple[Outcome[T], ...]:
    """Run `work` for every name, at most `limit` at once, each for at most `timeout_s` seconds.

    `on_done` is called in the caller's thread as outcomes come in.
    """
    assert limit > 0
    assert timeout_s > 0
    outcomes: dict[int, Outcome[T]] = {}
    started: dict[int, float] = {}
    done: queue.SimpleQueue[tuple[int, Outcome[T]]] = queue.SimpleQueue()
    waiting = list(range(len(names)))[::-1]

    def settle(index: int, outcome: Outcome[T]) -> None:
        del started[index]
        outcomes[index] = outcome
        if on_done is not None:
            on_done(outcome)

    while len(outcomes) < len(names):
        while waiting and len(started) < limit:
            index = waiting.pop()
            started[index] = time.monotonic()
            threading.Thread(
                target=_work, args=(index, names[index], work, done), name=f"glmplan-{label(names[index])}", daemon=True
            ).start()
        try:
            index, outcome = done.get(timeout=max(0.0, min(started.values()) + timeout_s - time.monotonic()))
            if index in started:
                settle(index, outcome)
        except queue.Empty:
            now = time.monotonic()
            for index in [index for index, since in started.items() if now - since >= timeout_s]:
                name = label(names[index])
                settle(index, Outcome(name, None, TimedOutError(name, timeout_s), now - started[index]))
    return tuple(outcomes[index] for index in range(len(names)))


def _work(index: int, name: N, work: Callable[[N], T], done: queue.SimpleQueue[tuple[int, Outcome[T]]]) -> None:
    begun = time.monotonic()
    result: T | None = None
    error: GlmplanError | None = None
    try:
        result = work(name)
    except GlmplanError as known:
        error = known
    except BaseException as unknown:  # a defect on one host must not hide the others
        error = GlmplanError(
            f"{label(name)}: {type(unknown).__name__}: {unknown}", "This is a defect of glmplan; please report it."
        )
        error.__cause__ = unknown
    done.put((index, Outcome(label(name), result, error, time.monotonic() - begun)))
