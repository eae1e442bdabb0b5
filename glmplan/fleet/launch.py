"""From a deployment to answers that were checked: start, follow, judge, and take everything down when it is not right.

A node that fails takes all others with it: a tensor- or pipeline-parallel engine does not serve without one of its ranks,
and a rank that waits for a dead one holds its GPU for ever. `Observer` is told what happens; it prints, or draws.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from glmplan.errors import NotHealthyError, UnreachableError, WrongAnswersError
from glmplan.facts.base import Frozen
from glmplan.fleet.calibration import RankComparison, calibrations, compare, measure, save_calibration
from glmplan.fleet.canary import CanaryResult, CanarySettings, run_canaries
from glmplan.fleet.deadline import LoadWork
from glmplan.fleet.deployment import API_KEY_FILE, Deployment, save
from glmplan.fleet.diagnosis import Diagnosis, diagnose, new_kernel_lines
from glmplan.fleet.follow import Failure, Limits, NodeView, Snapshot, catch_up, failure_of_running, follow, poll_once
from glmplan.fleet.hosts import Fleet
from glmplan.fleet.served import Ask
from glmplan.fleet.start import Secrets, Started, StartError, start_all
from glmplan.fleet.stop import HostStop, stop_all
from glmplan.transport.errors import ConnectionFailedError, ConnectionLostError, TimedOutError

ENDING_S = 5.0
"""An engine whose rank failed drops its connections first and ends a moment later."""


class Observer(Protocol):
    """Who watches a launch."""

    def started(self, nodes: tuple[Started, ...]) -> None:
        """Every node runs its worker."""
        ...

    def polled(self, snapshot: Snapshot) -> None:
        """One look at all nodes."""
        ...

    def judged(self, result: CanaryResult) -> None:
        """One canary came back."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class LaunchFailed(NotHealthyError):
    """A launch that did not become healthy: the failure, why, and what the stop of all nodes left."""

    def __init__(self, failure: Failure, diagnosis: Diagnosis, stops: tuple[HostStop, ...]) -> None:
        where = f"{failure.host} (node {failure.node_rank})"
        super().__init__(f"{failure.message} Cause on {diagnosis.host}: {diagnosis.cause}", diagnosis.repair)
        self.failure, self.diagnosis, self.stops, self.where = failure, diagnosis, stops, where


class AnswersWrong(WrongAnswersError):
    """A server that runs and answers wrongly; it was stopped."""

    def __init__(self, results: tuple[CanaryResult, ...], stops: tuple[HostStop, ...]) -> None:
        bad = [result for result in results if result.status == "fail"]
        words = "; ".join(result.difference for result in bad)
        super().__init__(f"The server answers wrongly: {words}.", "Nothing is served: every node was stopped. See the logs.")
        self.results, self.stops = results, stops


class LaunchInterrupted(KeyboardInterrupt):
    """Ctrl-C. What the launch had started is stopped (`stops`); what it had adopted alone goes on (`stops` is empty)."""

    def __init__(self, stops: tuple[HostStop, ...]) -> None:
        super().__init__()
        self.stops = stops


class Launched(Frozen):
    """A launch that is healthy. `canaries` is empty where the user asked for none."""

    name: str
    url: str
    seconds: float
    adopted: bool
    rehearsal: bool
    canaries: tuple[CanaryResult, ...] = ()
    kernels: tuple[str, ...] = ()
    memory: tuple[RankComparison, ...] = ()
    logs: dict[str, str]


@dataclass(frozen=True)
class Judgement:
    """When a start has failed, and whether and how answers are judged (None: not at all)."""

    works: tuple[LoadWork, ...]
    limits: Limits
    canaries: CanarySettings | None


def head_ask(fleet: Fleet, deployment: Deployment) -> Ask:
    """Requests to the head's HTTP server, made on the head itself: its port need not be reachable from here."""

    def ask(method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, Any]:
        request: dict[str, Any] = {
            "method": method, "url": deployment.base_url + path, "headers": {}, "body": body, "timeout_s": timeout_s,
            "deployment": deployment.name,
        }  # fmt: skip
        if deployment.needs_api_key:
            request["api_key_file"] = API_KEY_FILE
        found = fleet.ask(deployment.hosts[0], "http", request, timeout_s + 15.0)
        return found["status"], found["body"]

    return ask


def patient(ask: Ask, limits: Limits) -> Ask:
    """The same, asked again while the head is silent for less than `lost_after_s`: what loaded for twenty minutes does not
    end with a link that drops for a few seconds. A request that had all of its time is not repeated."""

    def again(method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, Any]:
        lost_s: float | None = None
        while True:
            began = time.monotonic()
            try:
                return ask(method, path, body, timeout_s)
            except (ConnectionFailedError, ConnectionLostError, TimedOutError):
                now = time.monotonic()
                lost_s = now if lost_s is None else lost_s
                if now - began >= timeout_s or now - lost_s >= limits.lost_after_s:
                    raise
            time.sleep(limits.poll_s)

    return again


def launch(fleet: Fleet, deployment: Deployment, secrets: Secrets, judgement: Judgement, observer: Observer) -> Launched:
    """Bring the deployment up. Raises LaunchFailed or AnswersWrong after everything was stopped again."""
    began = time.monotonic()
    before = kernel_logs(fleet)
    save(deployment)
    nodes: tuple[Started, ...] = ()
    try:
        nodes = start_all(fleet, deployment, secrets)
        observer.started(nodes)
        seen, problem, _ = follow(fleet, deployment, judgement.works, judgement.limits, observer.polled)
        problem = problem or missing_port(deployment, seen)
        if problem is not None:
            diagnosis = explain(fleet, deployment, seen, before)
            raise LaunchFailed(problem, diagnosis, stop_all(fleet, deployment.name))
        try:
            results = judge(fleet, deployment, seen, judgement, observer)
        except _EndedWhileAsked as ended:
            catch_up(fleet, deployment, seen)
            diagnosis = explain(fleet, deployment, seen, before)
            raise LaunchFailed(ended.failure, diagnosis, stop_all(fleet, deployment.name)) from None
        if any(result.status == "fail" for result in results):
            raise AnswersWrong(results, stop_all(fleet, deployment.name))
    except (LaunchFailed, AnswersWrong, StartError):
        raise  # these have stopped what there was to stop
    except BaseException as error:  # Ctrl-C and defects alike leave nothing running that this launch started
        adopted = bool(nodes) and all(node.state == "adopted" for node in nodes)
        stops = () if adopted else stop_all(fleet, deployment.name)
        if isinstance(error, KeyboardInterrupt):
            raise LaunchInterrupted(stops) from None
        raise
    memory = measured_memory(fleet, deployment, seen)
    save(deployment.model_copy(update={"canaries_passed": tuple(r.name for r in results if r.status == "pass")}))
    return Launched(
        name=deployment.name,
        url=deployment.base_url,
        seconds=round(time.monotonic() - began, 1),
        rehearsal=deployment.rehearsal,
        adopted=all(node.state == "adopted" for node in nodes),
        canaries=results,
        memory=memory,
        kernels=tuple(dict.fromkeys(line.render() for node in seen for line in node.port_lines)),
        logs={node.host: node.log for node in nodes},
    )


def missing_port(deployment: Deployment, nodes: tuple[NodeView, ...]) -> Failure | None:
    """A node of which not every rank said that our kernels are in, where the plan counts on them."""
    if not deployment.uses_port:
        return None
    for node in nodes:
        ranks = len(node.progress.ranks)
        if len(node.port_lines) < ranks:
            return Failure(
                "refused", node.host, node.node_rank,
                f"{len(node.port_lines)} of {ranks} ranks on {node.host} said that glmplan's kernels are in, which the plan "
                "counts on (is the plugin kept out by SGLANG_PLUGINS or VLLM_PLUGINS there?).",
            )  # fmt: skip
    return None


class _EndedWhileAsked(Exception):
    """A canary got no answer, and this is why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def judge(
    fleet: Fleet, deployment: Deployment, nodes: tuple[NodeView, ...], judgement: Judgement, observer: Observer
) -> tuple[CanaryResult, ...]:
    """Ask the canaries. One that gets no answer makes this look for a node that has ended, the first time for a while."""
    if judgement.canaries is None:
        return ()
    wrong: list[str] = []
    patience_s = ENDING_S

    def judged(result: CanaryResult) -> None:
        nonlocal patience_s
        observer.judged(result)
        if result.status != "fail":
            return
        if not result.unanswered:
            wrong.append(result.difference)
            return
        found = ended_node(fleet, deployment, nodes, judgement.limits, patience_s)
        patience_s = 0.0
        if found is not None:
            before = f" Before that it answered wrongly: {'; '.join(wrong)}." if wrong else ""
            words = f"The {result.name} canary got no answer. {found.message}{before}"
            raise _EndedWhileAsked(replace(found, message=words))

    try:
        return run_canaries(patient(head_ask(fleet, deployment), judgement.limits), judgement.canaries, judged)
    except UnreachableError as error:
        head = deployment.hosts[0]
        words = f"{head} is lost while its server is asked: {error.message}"
        raise _EndedWhileAsked(Failure("lost", head, 0, words)) from None


def ended_node(
    fleet: Fleet, deployment: Deployment, nodes: tuple[NodeView, ...], limits: Limits, patience_s: float
) -> Failure | None:
    """A worker that has ended, or ends within so many seconds."""
    began = time.monotonic()
    for node in nodes:
        node.answered_s = began  # nobody looked while the canaries ran
    while True:
        now = time.monotonic()
        poll_once(fleet, deployment, nodes, now)
        found = failure_of_running(nodes, limits, now)
        if found is not None or now - began >= patience_s:
            return found
        time.sleep(0.5)


def kernel_logs(fleet: Fleet) -> dict[str, tuple[str, ...]]:
    """What the kernels of all hosts said lately; nothing from a host that does not tell."""
    outcomes = fleet.ask_all("kernel_log", None, timeout_s=15.0)
    return {host: tuple(outcome.result["lines"]) if outcome.result else () for host, outcome in outcomes.items()}


def explain(
    fleet: Fleet, deployment: Deployment, nodes: tuple[NodeView, ...], before: Mapping[str, tuple[str, ...]]
) -> Diagnosis:
    """The diagnosis from logs, NVML and what the kernels said since `before`."""
    now = kernel_logs(fleet)
    evidence = [node.evidence(new_kernel_lines(before.get(node.host, ()), now[node.host])) for node in nodes]
    return diagnose(evidence, deployment.log_family)


def measured_memory(fleet: Fleet, deployment: Deployment, nodes: tuple[NodeView, ...]) -> tuple[RankComparison, ...]:
    """Predicted against measured, after the canaries; saved for later plans, but never from a stand-in."""
    if deployment.rehearsal:
        return ()
    poll_once(fleet, deployment, nodes, time.monotonic())
    measured = measure(deployment.plan, {n.node_rank: n.progress for n in nodes}, {n.node_rank: n.gpus for n in nodes})
    for one in calibrations(deployment.plan, measured, deployment.name):
        with suppress(OSError):  # a plan can do without it; the comparison is printed all the same
            save_calibration(one)
    return compare(deployment.plan, measured)
