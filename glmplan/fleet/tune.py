"""Tuned tables for SGLang's block-FP8 GEMM and fused experts, made on a GPU of one host with the engine's own Python.

The tuner (`kernels.engines.sglang_tune`) runs there as a worker of the node program, so it goes on without a connection and
is found again; its log holds every table. What came back lies in `out` and is sent along when it is started again, so
nothing is measured twice, whatever ended: the link, this program, the time that was given, or the host.
Layout: `PROFILES/tuned/ENGINE_VERSION/gemm/N=..json` and `.../moe/configs/triton_X_Y_Z/E=..json`; what was gained is in
`gains/` beside them under the same name, and experts that are not done in `partial/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from glmplan.errors import (
    DoesNotFitError,
    GlmplanError,
    UnreachableError,
    UnsupportedError,
    UsageError,
    WrongAnswersError,
)
from glmplan.fleet.hosts import Fleet
from glmplan.fleet.stop import stop_all
from glmplan.fleet.tune_order import Tuning, to_go_on
from glmplan.fleet.tune_result import Event, PartialLine, TableLine, Tables, Tuned, parse_line, require_writable

POLL_S, POLL_TIMEOUT_S = 1.0, 15.0
START_S = 60.0
LOST_AFTER_S = 120.0
"""A host that is silent for this long is given up here; the tuner goes on there."""
LOG_BYTES = 1 << 20
GRACE_S = 5.0
LAST_LINES = 3


class Observer(Protocol):
    """Who is told how far the tuning is."""

    def started(self, state: str, pid: int | None) -> None:
        """The tuner runs: `started`, or `adopted` when it ran before, or `ended` when its log is all that is read."""

    def event(self, event: Event) -> None:
        """One step of the tuner."""

    def silent(self, words: str | None) -> None:
        """The host does not answer, and why; None when it does again."""

    def close(self) -> None:
        """Nothing more comes."""


def held_gpu(fleet: Fleet, name: str) -> int | None:
    """The GPU on which a tuner of this name runs on the first host."""
    for one in fleet.ask(fleet.names[0], "deployments", timeout_s=POLL_TIMEOUT_S)["deployments"]:
        if one["deployment"] == name and one["state"] == "running" and one["gpu_indexes"]:
            return int(one["gpu_indexes"][0])
    return None


class Tuner:
    """One tuning on one host, from its start or from where it is."""

    def __init__(
        self,
        fleet: Fleet,
        tuning: Tuning,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fleet, self._tuning, self._observer = fleet, tuning, observer
        self._host = fleet.names[0]
        self._clock, self._sleep = clock, sleep
        self._offset, self._rest, self._last = 0, "", [""]
        self.tables = Tables.read(tuning.out, tuning.experts_out)
        for folder in tuning.folders:
            require_writable(folder)
        self.events: list[Event] = []

    def run(self, seconds: float | None = None) -> Tuned:
        """Until the end, or until `seconds` are over; an interruption stops the tuner and keeps what there is."""
        interrupted = timed_out = False
        began = self._clock()
        try:
            if not self._finished_before():
                timed_out = not self._follow(began, seconds)
        except KeyboardInterrupt:
            interrupted = True
        if timed_out or interrupted:
            self._stop()
        self._forget()
        return Tuned.of(self._tuning, self._host, self.events, self.tables, interrupted, timed_out)

    def _finished_before(self) -> bool:
        """Take in an earlier run's log; whether there is nothing left to do. Starts the tuner if it does not run."""
        found = self._poll()
        if found["state"] != "absent":
            self._read(found)  # tables of another tuning of this engine on this GPU are as good
        if found.get("digest") == self._tuning.digest:
            if found["state"] == "running":
                self._observer.started("adopted", found.get("pid"))
                return False
            if found["state"] == "exited" and found.get("exit_status") == 0:
                self._observer.started("ended", found.get("pid"))
                return True
        self._offset, self._rest, self.events = 0, "", []
        known = Tables({}, {}) if self._tuning.again else self.tables
        started = self._fleet.ask(self._host, "start", self._tuning.start_request(known), START_S)
        self._observer.started(started["state"], started.get("pid"))
        return False

    def _follow(self, began_s: float, seconds: float | None) -> bool:
        """Read the log until the tuner has ended; False when the time was over first."""
        answered_s = self._clock()
        while True:
            try:
                found = self._poll()
                self._read(found)
            except UnreachableError as error:
                self._observer.silent(error.message)
                if self._clock() - answered_s > LOST_AFTER_S:
                    raise UnreachableError(
                        f"{self._host} is lost: {error.message}",
                        "The tuner goes on there. Run the same command again when the host answers.",
                    ) from None
                self._sleep(POLL_S)
                continue
            answered_s = self._clock()
            self._observer.silent(None)
            if found["state"] != "running":
                self._require_success(found)
                return True
            if seconds is not None and self._clock() - began_s > seconds:
                return False
            self._sleep(POLL_S)

    def _poll(self) -> dict[str, Any]:
        request = {
            "deployment": self._tuning.name, "log_offset": self._offset, "max_bytes": LOG_BYTES, "gpus": False,
        }  # fmt: skip
        return self._fleet.ask(self._host, "poll", request, POLL_TIMEOUT_S)

    def _read(self, found: dict[str, Any]) -> None:
        """Take in the log to its end."""
        while True:
            self._take(found["log"])
            self._offset = found["log_offset"]
            if not found["log"] or self._offset >= found["log_size"]:
                break
            found = self._poll()
        if found["state"] != "running" and self._rest:
            self._take("\n")

    def _take(self, text: str) -> None:
        lines = (self._rest + text).split("\n")
        self._rest = lines.pop()
        for line in lines:
            told = parse_line(line)
            if isinstance(told, Event):
                self.events.append(told)
                self._observer.event(told)
            elif isinstance(told, PartialLine):
                self.tables.add_partial(told, self._folder(told.file))
            elif isinstance(told, TableLine):
                self.tables.add(told, self._folder(told.file))
            elif line.strip():
                self._last = [*self._last, line.strip()][-LAST_LINES:]

    def _folder(self, name: str) -> Path:
        """Where this table lies here."""
        own = self._tuning.experts_out
        return own if own is not None and "/" in name else self._tuning.out

    def _require_success(self, found: dict[str, Any]) -> None:
        """Raise what the tuner said when it failed."""
        if found["state"] == "exited" and found.get("exit_status") == 0:
            return
        said = self._last[-1][:500]
        errors = (UsageError, DoesNotFitError, UnsupportedError, WrongAnswersError)
        kinds: dict[int, type[GlmplanError]] = {error.exit_code: error for error in errors}
        status = found.get("exit_status") if found["state"] == "exited" else None
        self._forget()
        if status in kinds:
            raise kinds[status](f"{self._host}: {said}", "")
        ended = {"gone": "vanished", "rebooted": "went with a reboot", "absent": "was stopped"}.get(found["state"], "ended")
        how = f" with signal {found['signal']}" if found.get("signal") else f" with exit status {status}" if status else ""
        raise GlmplanError(
            f"The tuner on {self._host} {ended}{how}. {' | '.join(filter(None, self._last))}".strip(),
            to_go_on(self._tuning.again),
        )

    def _stop(self) -> None:
        stopped = stop_all(self._fleet, self._tuning.name, grace_s=GRACE_S)[0]
        if not stopped.stopped:
            raise UnreachableError(
                f"The tuner on {self._host} may still run: {stopped.error or 'it did not end'}.",
                f"Stop it: glmplan stop {self._tuning.name} --hosts {self._host}.",
            )
        try:
            self._read(self._poll())
        except GlmplanError:
            return

    def _forget(self) -> None:
        """Remove the state there; a host that does not answer keeps it."""
        try:
            self._fleet.ask(self._host, "forget", {"deployment": self._tuning.name}, POLL_TIMEOUT_S)
        except GlmplanError:
            return
