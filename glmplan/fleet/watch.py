"""Keep a deployment up: when a rank dies, take all of it down and start all of it again, with back-off and a breaker.

A restart is whole or not at all. Attempts count whether they come up or not; a deployment that stays healthy for
`stable_s` has its count set back. A host that does not answer is waited for `lost_after_s`, like in a launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glmplan.errors import GlmplanError, NotHealthyError, UnreachableError
from glmplan.fleet.canary import CanarySettings, run_canaries
from glmplan.fleet.deployment import Deployment
from glmplan.fleet.follow import failure_of_running, poll_once, views
from glmplan.fleet.hosts import Fleet
from glmplan.fleet.launch import Judgement, Observer, explain, head_ask, kernel_logs, launch
from glmplan.fleet.start import Secrets
from glmplan.fleet.stop import stop_all

CHEAP = ("arithmetic", "fact")
"""Canaries of a few tokens; they tell a livelock from a server that works."""


@dataclass(frozen=True)
class Patience:
    """Seconds and counts of a watch. `check_s` between two canaries of a server that runs; 0 asks none."""

    max_restarts: int = 3
    poll_s: float = 5.0
    check_s: float = 300.0
    first_wait_s: float = 5.0
    longest_wait_s: float = 300.0
    stable_s: float = 900.0

    def wait_s(self, attempt: int) -> float:
        """The back-off before an attempt, doubled each time; attempts count from 1."""
        return min(self.first_wait_s * 2.0 ** (attempt - 1), self.longest_wait_s)


class GaveUpError(NotHealthyError):
    """The breaker: too many restarts; everything is stopped."""


def watch(
    fleet: Fleet, deployment: Deployment, secrets: Secrets, judging: Judgement, patience: Patience, observer: Observer,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Watch until interrupted; raises GaveUpError when the breaker opens."""
    attempts, healthy_since = 0, time.monotonic()
    before = kernel_logs(fleet)
    while True:
        reason = _until_trouble(fleet, deployment, judging, patience, before)
        if time.monotonic() - healthy_since > patience.stable_s:
            attempts = 0
        say(reason)
        while True:
            stop_all(fleet, deployment.name)
            attempts += 1
            if attempts > patience.max_restarts:
                raise GaveUpError(
                    f"{deployment.name} failed {attempts} times; {patience.max_restarts} restarts are allowed. "
                    f"Last: {reason}",
                    f"Everything is stopped. Look at glmplan logs {deployment.name}, repair, and launch again.",
                )
            wait = patience.wait_s(attempts)
            say(f"restart {attempts} of {patience.max_restarts} in {wait:g} s")
            time.sleep(wait)
            try:
                launch(fleet, deployment, secrets, judging, observer)
            except GlmplanError as error:
                reason = error.message
                say(f"restart {attempts} failed: {reason}")
                continue
            healthy_since = time.monotonic()
            say(f"{deployment.name} is healthy again")
            break


def _until_trouble(
    fleet: Fleet, deployment: Deployment, judging: Judgement, patience: Patience, before: Mapping[str, tuple[str, ...]]
) -> str:
    """Poll until something is wrong; a sentence about it."""
    nodes = views(deployment, judging.works, time.monotonic())
    checked = time.monotonic()
    while True:
        now = time.monotonic()
        poll_once(fleet, deployment, nodes, now)
        found = failure_of_running(nodes, judging.limits, now)
        if found is not None:
            cause = explain(fleet, deployment, nodes, before)
            return f"{found.message} Cause on {cause.host}: {cause.cause}"
        if patience.check_s and now - checked > patience.check_s:
            checked = now
            wrong = _wrong_answer(fleet, deployment)
            if wrong:
                return wrong
        time.sleep(patience.poll_s)


def _wrong_answer(fleet: Fleet, deployment: Deployment) -> str | None:
    """Ask a cheap canary that was passed at the launch."""
    known = [name for name in CHEAP if name in deployment.canaries_passed]
    if not known:
        return None
    settings = CanarySettings(only=(known[0],), context_tokens=deployment.plan.settings.context_tokens, timeout_s=120.0)
    try:
        result = run_canaries(head_ask(fleet, deployment), settings)[0]
    except UnreachableError:
        return None  # the next polls tell whether the host is lost
    if result.unanswered:
        return f"The server no longer answers: {result.got}"
    if result.status == "fail":
        return f"The server no longer answers rightly: {result.difference}."
    return None
