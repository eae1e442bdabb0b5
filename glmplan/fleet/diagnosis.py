"""Why a deployment failed: the one cause behind many lines, where, and what repairs it.

The table of signatures lies in `profiles/failures/`. A failed rank brings down its node, and that node the others, so most
lines are effects; causes outweigh effects, heavier causes outweigh lighter ones, and between equals the earlier line wins.
The same words mean opposite things at start and at run time (out of memory while loading: give each GPU fewer weights;
while serving: take less for the KV cache), so every line carries the phase its rank was in. Pure: evidence is collected
elsewhere.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from glmplan.facts.base import Frozen
from glmplan.facts.failure_profile import FailureSignature
from glmplan.facts.profiles import failure_signatures
from glmplan.fleet.log_lines import Family, Phase
from glmplan.fleet.phases import LogLine
from glmplan.units import MIB, format_bytes

SHOWN_LINES = 10
FOREIGN_BYTES = 512 * MIB
"""Above this a GPU is in use by others: a desktop session or a monitor's CUDA context stays below it."""
FULL_SHARE = 0.97
"""A GPU this full has no room for another allocation of an engine, whose smallest are a few per cent of a card."""

State = Literal["running", "exited", "gone", "rebooted", "absent", "unreachable"]


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU as NVML sees it at the failure: bytes of this deployment, of everyone, and in all."""

    index: int
    used_bytes: int | None = None
    in_use_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NodeEvidence:
    """What is known of one node. `kernel_log` holds lines since the start only; `signal` is a number without sign."""

    node_rank: int
    host: str
    lines: tuple[LogLine, ...] = ()
    state: State = "exited"
    exit_status: int | None = None
    signal: int | None = None
    gpus: tuple[GpuMemory, ...] = ()
    kernel_log: tuple[str, ...] = ()
    was_ready: bool = False
    stopped_by_us: bool = False


class Diagnosis(Frozen):
    """The answer. `certain` is false where no signature was found; `facts` are NVML's, the kernel's and the process's."""

    id: str
    when: Literal["start", "run"]
    cause: str
    repair: str
    host: str
    node_rank: int
    rank: tuple[int, int] | None = None
    phase: str = ""
    lines: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    source: str = ""
    certain: bool = True


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One explanation. `order` puts causes before effects, the heavy before the light, the early before the late."""

    order: tuple[bool, int, float, int, int]
    answer: Diagnosis


def diagnose(nodes: Sequence[NodeEvidence], family: Family) -> Diagnosis:
    """The most likely cause over all nodes; without any known sign, what the first dead worker says."""
    signatures = failure_signatures(family)
    found = [candidate for node in nodes for candidate in (*_of_lines(node, signatures), *_of_process(node))]
    causes = [candidate for candidate in found if not candidate.order[0]]
    if causes:
        return min(causes, key=lambda candidate: candidate.order).answer
    blamed = sorted(nodes, key=_blame)
    raised = next(filter(None, (_exception(node, signatures) for node in blamed)), None)
    if raised is not None:
        return raised
    if found:
        return min(found, key=lambda candidate: candidate.order).answer.model_copy(update={"certain": False})
    return _ended(blamed[0])


_KILLED = re.compile(r"exit ?code:? -9\b")
_KILLS_ITSELF = re.compile(r"kill_process_tree called: parent_pid=(\d+), include_parent=True, pid=\1\b")
"""SGLang's end after any failure: it sends signal 9 to its children and to itself (0.5.13.post1 and 0.5.23,
srt/utils/common.py, kill_process_tree)."""


def _killed(node: NodeEvidence) -> bool:
    """Whether signal 9 came from outside: from the kernel or a person, not from the engine to itself."""
    return node.signal == signal.SIGKILL and not any(_KILLS_ITSELF.search(line.text) for line in node.lines)


def _of_lines(node: NodeEvidence, signatures: Sequence[FailureSignature]) -> Iterator[_Candidate]:
    begin, served = _served_from(node)
    killed = _killed(node) or any(_KILLED.search(line.text) for line in node.lines)
    for signature in signatures:
        if signature.needs_kill and not killed:
            continue
        for index, line in enumerate(_texts(node, signature)):
            time_s = node.lines[index].time_s if signature.where == "log" else 0.0
            if signature.where == "log" and (index < begin or not _in_time(signature, node.lines[index], served)):
                continue
            found = signature.match(line)
            if found:
                order = (signature.role == "effect", -signature.weight, time_s, node.node_rank, index)
                yield _Candidate(order, _known(node, signature, index, found))
                break


def _texts(node: NodeEvidence, signature: FailureSignature) -> Sequence[str]:
    return [line.text for line in node.lines] if signature.where == "log" else node.kernel_log


def _served_from(node: NodeEvidence) -> tuple[int, bool]:
    """The first line that counts, and whether all of them are of run time: a start that succeeded explains nothing."""
    if not node.was_ready:
        return 0, False
    first = next((index for index, line in enumerate(node.lines) if line.phase is Phase.READY), None)
    return (0, True) if first is None else (first, False)


def _in_time(signature: FailureSignature, line: LogLine, served: bool) -> bool:
    word = "run" if served or line.phase is Phase.READY else line.phase.label
    return not signature.during or word in signature.during


def _known(node: NodeEvidence, signature: FailureSignature, index: int, found: re.Match[str]) -> Diagnosis:
    """The diagnosis of a signature; groups such as `pid2` stand for `pid` where that did not match."""
    line = node.lines[index] if signature.where == "log" else None
    words = {name.rstrip("23"): value for name, value in found.groupdict().items() if value is not None}
    ready = node.was_ready or (line is not None and line.phase is Phase.READY)
    return Diagnosis(
        id=signature.id,
        when="run" if ready else "start",
        cause=_filled(signature.cause, words),
        repair=_filled(signature.repair, words),
        host=node.host,
        node_rank=node.node_rank,
        rank=line.rank if line else None,
        phase=line.phase.label if line else "",
        lines=_around(node, index) if line else node.kernel_log[max(index - 4, 0) : index + 6],
        facts=tuple(_facts(node)),
        source=signature.source,
    )


def _filled(text: str, words: dict[str, str]) -> str:
    """The text with its {words}; a parenthesis or a clause whose word is unknown goes, a lone word becomes a ?."""
    for name, value in words.items():
        text = text.replace(f"{{{name}}}", value)
    text = re.sub(r" \([^()]*\{[a-z]+\}[^()]*\)", "", text)
    return re.sub(r"\{[a-z]+\}", "?", text)


def _around(node: NodeEvidence, index: int) -> tuple[str, ...]:
    """Up to ten lines of the same rank that lead to the line and follow it, in order."""
    rank = node.lines[index].rank
    same = [place for place, line in enumerate(node.lines) if line.rank in (rank, None) or place == index]
    here = same.index(index)
    first = max(min(here - 5, len(same) - SHOWN_LINES), 0)
    return tuple(node.lines[place].text for place in same[first : first + SHOWN_LINES])


_CRASHES = {signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV}
_ENDED_BY_REQUEST = {None, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP}
"""Signals that a worker gets when it is stopped, or gives itself to clean up (SGLang: SIGQUIT)."""


def _of_process(node: NodeEvidence) -> Iterator[_Candidate]:
    """What the end of the process says by itself, weighed against the log's signatures."""
    if node.state == "rebooted":
        weight = 99
    elif _killed(node):
        weight = 80
    elif node.signal in _CRASHES:
        weight = 78
    elif node.state == "unreachable":
        weight = 77
    elif node.state == "gone":
        weight = 71
    else:
        return
    if not node.stopped_by_us:
        yield _Candidate((False, -weight, 0.0, node.node_rank, 0), _ended(node))


def _blame(node: NodeEvidence) -> tuple[bool, bool, bool, int]:
    """Who is looked at first when nothing is known: a dead node, not ended on request, with a bad status."""
    dead = node.state not in ("running", "unreachable") and not node.stopped_by_us
    return not dead, node.signal is not None and node.signal in _ENDED_BY_REQUEST, node.exit_status == 0, node.node_rank


_EXCEPTION = re.compile(r"^(?:\(.*\] )?(?P<what>(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit): .+)")


def _exception(node: NodeEvidence, signatures: Sequence[FailureSignature]) -> Diagnosis | None:
    """The first exception that the worker printed and that no signature knows."""
    for index, line in enumerate(node.lines):
        found = _EXCEPTION.match(line.text)
        if found and not any(signature.match(line.text) for signature in signatures):
            words = {"cause": f"The worker raised an error that is in no table: {found['what'][:300]}", "certain": False}
            words |= {"repair": "Read the lines; glmplan doctor --deep rules out GPUs, links and disks.", "id": "exception"}
            place = {"lines": _around(node, index), "rank": line.rank, "phase": line.phase.label}
            return _ended(node).model_copy(update=words | place)
    return None


def _ended(node: NodeEvidence) -> Diagnosis:
    """What can be said without a known line."""
    name, cause, repair = _process_words(node)
    return Diagnosis(
        id=name,
        when="run" if node.was_ready else "start",
        cause=cause,
        repair=repair,
        host=node.host,
        node_rank=node.node_rank,
        lines=tuple(line.text for line in node.lines)[-SHOWN_LINES:],
        facts=tuple(_facts(node)),
        source="how the process ended",
        certain=name in ("rebooted", "unreachable"),
    )


def _process_words(node: NodeEvidence) -> tuple[str, str, str]:
    """Id, cause and repair from the end of the process alone."""
    if node.state == "rebooted":
        return "rebooted", f"{node.host} was restarted while the worker ran.", "Launch again when the host is up."
    if node.state == "unreachable":
        return "unreachable", f"{node.host} no longer answers.", f"Check its power and network: ssh {node.host} uptime"
    if node.signal == signal.SIGKILL and not _killed(node):
        words = "One of the engine's processes failed, and the engine then ended all of its own with signal 9."
        return "ended-itself", words, "Read its last lines: the first error among them is the reason."
    if _killed(node):
        return (
            "killed",
            "The worker was killed with signal 9, by the kernel's out-of-memory killer or by someone.",
            f"ssh {node.host} 'dmesg -T | grep -i -e oom -e killed' tells; then free host memory or add swap.",
        )
    if node.signal is not None:
        known = {one.value: one.name for one in signal.Signals}
        words = f"The worker ended by signal {node.signal} ({known.get(node.signal, 'unknown')})."
        return "signal", words, "Read its last lines; a crash in native code leaves its stack there."
    if node.state == "gone":
        return (
            "gone",
            "The worker vanished without a record of its end.",
            f"ssh {node.host} dmesg -T shows the kernel's log.",
        )
    if node.state == "absent":
        return "absent", "The deployment is no longer on this host: somebody stopped it.", "Launch it again."
    if node.state == "running":
        return "not-ready", "The worker runs, but it did not become ready in time.", "Read its last lines."
    return "exit", f"The worker ended with exit status {node.exit_status}.", "Read its last lines."


def _facts(node: NodeEvidence) -> Iterator[str]:
    """What NVML and the process add."""
    for gpu in node.gpus:
        if gpu.in_use_bytes is None or gpu.total_bytes is None:
            continue
        foreign = gpu.in_use_bytes - (gpu.used_bytes or 0) if gpu.used_bytes is not None else 0
        if gpu.in_use_bytes >= FULL_SHARE * gpu.total_bytes:
            yield f"GPU {gpu.index} is full: {format_bytes(gpu.in_use_bytes)} of {format_bytes(gpu.total_bytes)} in use."
        if foreign > FOREIGN_BYTES:
            yield f"Other processes hold {format_bytes(foreign)} on GPU {gpu.index}."
    if node.signal is not None:
        yield f"The worker ended by signal {node.signal}."
    elif node.exit_status is not None:
        yield f"The worker ended with exit status {node.exit_status}."


def new_kernel_lines(before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    """What the kernel's log has gained: old out-of-memory kills and Xids explain nothing."""
    known = set(before)
    return tuple(line for line in after if line not in known)
