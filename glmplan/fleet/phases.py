"""How far every rank of a node has come, from the node's log as it arrives.

`NodeProgress` takes text in any pieces: a line may arrive in two halves, and progress bars end in a carriage return. Times
are handed in, so the same text gives the same answer. Unprefixed lines that go on with a record (tracebacks) belong to the
rank whose record it is; progress bars belong to world rank 0. What is not in the log (processes, GPU memory) is not here.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

from glmplan.fleet.log_lines import Family, Memory, Phase, Rank, has_prefix, is_bar, is_ready, meaning, named_rank
from glmplan.planning.plan import Plan

KEPT_LINES = 400
"""Lines kept per node: room for one full traceback of each of eight ranks (about 40 lines each) and what led to it."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One whole line, the rank that wrote it (None: no rank's), and the phase that rank was in."""

    text: str
    rank: Rank | None
    phase: Phase
    time_s: float


@dataclass(frozen=True, slots=True)
class RankProgress:
    """One rank so far. `since_s`: when its phase began; `loaded_s`: when its weights were there; `heard_s`: its last line
    (None: not yet)."""

    pp_rank: int
    tp_rank: int
    phase: Phase = Phase.STARTING
    since_s: float = 0.0
    heard_s: float | None = None
    loaded_s: float | None = None
    shards_done: int | None = None
    shards_total: int | None = None
    memory: Memory = field(default_factory=Memory)

    @property
    def rank(self) -> Rank:
        """(pp_rank, tp_rank)."""
        return self.pp_rank, self.tp_rank


def ranks_of_node(plan: Plan, node_rank: int) -> tuple[Rank, ...]:
    """The ranks that a plan seats on a node."""
    return tuple((rank.pp_rank, rank.tp_rank) for rank in plan.ranks if rank.node_rank == node_rank)


class NodeProgress:
    """The state of one node's ranks; `feed` it the log's text in order."""

    def __init__(self, family: Family, ranks: Iterable[Rank], tp_size: int, head: bool = True, now_s: float = 0.0) -> None:
        self.family, self.tp_size, self.head = family, tp_size, head
        self.ranks = {rank: RankProgress(*rank, since_s=now_s) for rank in sorted(ranks)}
        self.lines: deque[LogLine] = deque(maxlen=KEPT_LINES)
        self.ready = False
        self.heard_s = now_s
        self._rest = ""
        self._writer: Rank | None = None

    def feed(self, text: str, now_s: float) -> tuple[LogLine, ...]:
        """Take what was read; returns the lines it completed."""
        if text:
            self.heard_s = now_s
        pieces = re.split(r"\r\n|\n|\r", self._rest + text)
        self._rest = pieces.pop()
        if text.endswith("\r") and pieces and not self._rest:
            self._rest = pieces.pop() + "\r"  # the other half of a \r\n may follow
        return self._take(pieces, now_s)

    def finish(self, now_s: float) -> tuple[LogLine, ...]:
        """Take the last line although nothing ended it: the process is gone."""
        rest, self._rest = self._rest, ""
        return self._take([rest], now_s)

    def mark_ready(self, now_s: float) -> None:
        """The head serves, so this node does too: a headless vLLM node never says so itself."""
        self.ready = True
        self._all(Phase.READY, Memory(), now_s)

    @property
    def phase(self) -> Phase:
        """The phase of the slowest rank."""
        return min((progress.phase for progress in self.ranks.values()), default=Phase.STARTING)

    def _take(self, texts: list[str], now_s: float) -> tuple[LogLine, ...]:
        cleaned = (_COLOURS.sub("", text).rstrip("\r") for text in texts)
        found = tuple(self._line(text, now_s) for text in cleaned if text.strip())
        self.lines.extend(found)
        return found

    def _line(self, text: str, now_s: float) -> LogLine:
        rank = self._rank(text)
        told = meaning(self.family, text)
        if rank is not None:
            self.ranks[rank] = self._advance(self.ranks[rank], told.phase, told.memory, now_s)
            if told.shards is not None:
                self.ranks[rank] = replace(self.ranks[rank], shards_done=told.shards[0], shards_total=told.shards[1])
        elif told.phase is not None:
            self._all(told.phase, told.memory, now_s)
        phase = self.ranks[rank].phase if rank is not None else self.phase
        if is_ready(self.family, text, self.head):
            self.mark_ready(now_s)
        return LogLine(text, rank, phase, now_s)

    def _rank(self, text: str) -> Rank | None:
        if is_bar(text):
            return next(iter(self.ranks), None)
        named = named_rank(self.family, text, self.tp_size)
        if named is None and not has_prefix(self.family, text):
            named = self._writer
        elif named is None and len(self.ranks) == 1:
            named = next(iter(self.ranks))
        self._writer = named
        return named if named in self.ranks else None

    def _all(self, phase: Phase, memory: Memory, now_s: float) -> None:
        """A line of the whole node: the engine's own process, or the only message of several."""
        for rank, progress in self.ranks.items():
            heard = progress.heard_s
            self.ranks[rank] = replace(self._advance(progress, phase, memory, now_s), heard_s=heard)

    def _advance(self, progress: RankProgress, phase: Phase | None, memory: Memory, now_s: float) -> RankProgress:
        reached = progress.phase if phase is None else max(phase, progress.phase)
        return replace(
            progress,
            phase=reached,
            since_s=now_s if reached > progress.phase else progress.since_s,
            loaded_s=now_s if reached >= Phase.LOADED > progress.phase else progress.loaded_s,
            heard_s=now_s,
            memory=_add(progress.memory, memory, summed=_SUMMED if self.family == "sglang" else ()),
        )


_SUMMED = ("weights_bytes", "kv_bytes", "graph_bytes")
"""What SGLang states once for the model and once for its draft, and for each kind of graph; vLLM states totals."""


def _add(old: Memory, new: Memory, summed: tuple[str, ...]) -> Memory:
    found: dict[str, int | None] = {}
    for name in (known.name for known in fields(Memory)):
        before, now = getattr(old, name), getattr(new, name)
        if before is not None and (now is None or name == "startup_bytes"):
            found[name] = before  # a draft worker states its start again, when there is nothing left to take
        elif name in summed and before is not None:
            found[name] = before + now
        else:
            found[name] = now
    return Memory(**found)
