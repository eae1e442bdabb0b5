"""Requests at once, or arriving at random: the threads that ask, and an end that comes at once when it is wanted.

All bodies are made before the first is sent. `Ctrl-C` cuts the open requests and keeps the answers there are.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from glmplan.bench.statistics import Answer
from glmplan.bench.stop import Stop
from glmplan.bench.stream import Server

MOST_IN_FLIGHT = 512
"""Requests at once with a rate: more threads than this measure the client. Later arrivals wait, and it is said."""
LEAVE_S = 5.0
"""How long cut requests may take to end."""
BUSY_CLIENT = 0.8
"""Share of one CPU core from which the asking itself delays what it measures: threads of Python share one core."""


@dataclass
class Loaded:
    """The answers of a load in the order they came, and what was odd about it."""

    answers: list[Answer] = field(default_factory=list)
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)


def at_once(server: Server, bodies: Sequence[bytes], concurrency: int, on_answer: Callable[[Answer], None]) -> Loaded:
    """Keep `concurrency` requests open until every body was sent and answered."""
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for body in bodies:
        waiting.put(body)

    def work(stop: Stop, take: Callable[[Answer], None]) -> None:
        while not stop.is_set:
            try:
                body = waiting.get_nowait()
            except queue.Empty:
                return
            take(server.ask(body, stop))

    def start(run: _Run) -> None:
        for _ in range(min(concurrency, len(bodies))):
            run.thread(work)

    return _Run(on_answer).to_the_end(start)


def arriving(server: Server, bodies: Sequence[bytes], rate_per_s: float, on_answer: Callable[[Answer], None]) -> Loaded:
    """Send the bodies at random times, `rate_per_s` on average (a Poisson process), whatever is still open."""
    source = random.Random(len(bodies))
    room = threading.Semaphore(MOST_IN_FLIGHT)
    late: list[float] = []

    def start(run: _Run) -> None:
        due = time.monotonic()
        for body in bodies:
            if run.stop.wait(max(0.0, due - time.monotonic())):
                return
            if not room.acquire(blocking=False):
                while not room.acquire(timeout=0.1):
                    pass
                late.append(time.monotonic() - due)
            run.thread(partial(_one, server, body, room))
            due += source.expovariate(rate_per_s)

    found = _Run(on_answer).to_the_end(start)
    if late:
        found.notes.append(
            f"{len(late)} requests were sent up to {max(late):.1f} s late: {MOST_IN_FLIGHT} were open, which is the limit"
        )
    return found


def _one(server: Server, body: bytes, room: threading.Semaphore, stop: Stop, take: Callable[[Answer], None]) -> None:
    try:
        take(server.ask(body, stop))
    finally:
        room.release()


Work = Callable[[Stop, Callable[[Answer], None]], None]


class _Run:
    """The threads of one load."""

    def __init__(self, on_answer: Callable[[Answer], None]) -> None:
        self.stop = Stop()
        self._on_answer = on_answer
        self._threads: list[threading.Thread] = []
        self._came: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._loaded = Loaded()

    def thread(self, work: Work) -> None:
        """Start one."""
        one = threading.Thread(target=work, args=(self.stop, self._came.put), daemon=True, name="glmplan-bench")
        one.start()
        self._threads.append(one)

    def to_the_end(self, start: Callable[[_Run], None]) -> Loaded:
        """Until the last thread has ended; an interruption ends them all and is noted."""
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        try:
            start(self)
            while any(thread.is_alive() for thread in self._threads):
                self._take(0.1)
        except KeyboardInterrupt:
            self._loaded.interrupted = True
            self.stop.set()
            deadline = time.monotonic() + LEAVE_S
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        except BaseException:
            self.stop.set()
            raise
        while self._take(0.0):
            pass
        wall_s, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
        if wall_s > 1.0 and cpu_s > BUSY_CLIENT * wall_s:
            self._loaded.notes.append(
                f"asking took {100 * cpu_s / wall_s:.0f} % of a CPU core here: latencies may be the client's own"
            )
        return self._loaded

    def _take(self, timeout_s: float) -> bool:
        try:
            answer = self._came.get(timeout=timeout_s) if timeout_s else self._came.get_nowait()
        except queue.Empty:
            return False
        self._loaded.answers.append(answer)
        if not answer.cut:
            self._on_answer(answer)
        return True
