"""How long a start may take, how long is left, and when silence means a stall.

Every allowance follows from the work: bytes from disk, graphs to capture, ranks to spawn. Estimates are what the work takes
at the measured rates; a deadline is the estimate with slack, and each part says why it is as long as it is. Units: seconds,
bytes. Pure: the clock is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from glmplan.facts.base import Frozen
from glmplan.fleet.log_lines import Phase, Rank
from glmplan.fleet.phases import NodeProgress
from glmplan.planning.plan import Plan
from glmplan.units import format_bytes

LIBRARY_BYTES = 12_000_000_000
"""Read before the first line: torch with its CUDA libraries, the engine and its kernel packages. Chosen on the high side."""
SLOW_DISK_BYTES_PER_S = 100_000_000
"""Taken where nothing was measured: a network share over 1 Gbit/s, the slowest store one would load such a model from."""
SPAWN_S = 30.0
"""Importing an engine from a warm cache and starting CUDA, on a slow core. Chosen."""
JOIN_ESTIMATE_S = 20.0
"""Setting up the process groups: 1 to 17 s on H200s (docs/proof, the launch records)."""
JOIN_S = 300.0
"""Waiting for the other nodes: torch.distributed's store gives its clients 300 s to join."""
GRAPH_S = 2.0
"""One captured batch size with its warm-up runs; vLLM 0.33.0 says 5 to 20 s for all of them, SGLang "several minutes"."""
COMPILE_S = 900.0
"""JIT kernels at a first start: about 340 s were reported for vLLM on RTX PRO 6000, and SGLang 0.5.23 took 230 s before the
first graph of TP2 on H200s (docs/proof, launch-pipeline-tp1); slow CPUs get more than twice that."""
WARMUP_ESTIMATE_S = 15.0
"""The first request: 1 to 13 s on H200s (docs/proof, the launch records)."""
WARMUP_S = 600.0
"""The first request; SGLang itself gives it 600 s (0.5.23 srt/entrypoints/http_server.py:2498)."""
SLACK = 3.0
"""Deadline over estimate: ranks read the same files at their own pace, so parts are read from disk twice or thrice."""
QUIET_S = 120.0
"""The shortest silence that is called a stall: a hung NFS server is retried for 60 s and more (`man 5 nfs`, timeo)."""
FILE_BYTES = 5_400_000_000
"""One file of a checkpoint whose files are not known; what GLM-5.2-FP8 has."""
GROWTH_BYTES = 64 * 1024 * 1024
"""Growth of a GPU's memory that counts as a sign of life; PyTorch's allocator takes large tensors in blocks near it."""


@dataclass(frozen=True, slots=True)
class LoadWork:
    """What one node has to do. `bytes_to_read` from disk; `disk_bytes_per_s` as measured, None where it was not."""

    bytes_to_read: int
    disk_bytes_per_s: int | None = None
    graphs: int = 0
    nodes: int = 1
    file_bytes: int = FILE_BYTES
    compiles: bool = True
    rank_bytes: Mapping[Rank, int] = field(default_factory=dict)

    @property
    def rate_bytes_per_s(self) -> int:
        """The measured rate, or the slow assumption."""
        return max(self.disk_bytes_per_s or SLOW_DISK_BYTES_PER_S, 1)

    @property
    def rate_words(self) -> str:
        """The rate and where it comes from."""
        origin = "measured" if self.disk_bytes_per_s else "assumed: nothing was measured"
        return f"{format_bytes(self.rate_bytes_per_s)}/s, {origin}"


class Allowance(Frozen):
    """Seconds for one part of a start: what it should take, what it may take, and why."""

    part: str
    estimate_s: float
    limit_s: float
    reason: str


class Deadline(Frozen):
    """All parts of a start; `total_s` from the start of the workers to the first answer."""

    parts: tuple[Allowance, ...]

    @property
    def total_s(self) -> float:
        """Seconds that a start may take in all."""
        return sum(part.limit_s for part in self.parts)

    @property
    def estimate_s(self) -> float:
        """Seconds that a start should take."""
        return sum(part.estimate_s for part in self.parts)


def graph_count(graph_max_bs: int, mtp: bool = False) -> int:
    """Batch sizes captured, as SGLang lists them (0.5.23 srt/arg_groups/cuda_graph_hook.py:498); a draft has two more."""
    sizes = {1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 512, 16), *range(512, graph_max_bs + 1, 32), graph_max_bs}
    return len([size for size in sizes if 0 < size <= graph_max_bs]) * (3 if mtp else 1)


def work_of(plan: Plan, node_rank: int, disk_bytes_per_s: int | None) -> LoadWork:
    """The work of a node of a plan. Each node reads the whole checkpoint: the loaders walk through every file."""
    return LoadWork(
        bytes_to_read=plan.weights.file_bytes or plan.weights.tensor_bytes,
        disk_bytes_per_s=disk_bytes_per_s,
        graphs=graph_count(plan.settings.graph_max_bs, plan.settings.mtp_steps > 0),
        nodes=plan.layout.nodes,
        rank_bytes={(rank.pp_rank, rank.tp_rank): rank.weights_bytes for rank in plan.ranks if rank.node_rank == node_rank},
    )


def deadline(work: LoadWork) -> Deadline:
    """What a start may take on this node."""
    spawn = SPAWN_S + LIBRARY_BYTES / work.rate_bytes_per_s
    read = work.bytes_to_read / work.rate_bytes_per_s
    capture = work.graphs * GRAPH_S
    return Deadline(
        parts=(
            Allowance(
                part="spawn", estimate_s=spawn, limit_s=SLACK * spawn,
                reason=f"libraries of {format_bytes(LIBRARY_BYTES)} at {work.rate_words}, and their start",
            ),
            Allowance(
                part="join", estimate_s=JOIN_ESTIMATE_S, limit_s=JOIN_S if work.nodes > 1 else SPAWN_S,
                reason="torch's store waits 300 s for the other nodes" if work.nodes > 1 else "one node",
            ),
            Allowance(
                part="load", estimate_s=read, limit_s=max(SLACK * read, QUIET_S),
                reason=f"{format_bytes(work.bytes_to_read)} at {work.rate_words}; {SLACK:g} times for ranks that read apart",
            ),
            Allowance(
                part="compile", estimate_s=0.0, limit_s=COMPILE_S if work.compiles else 0.0,
                reason="kernels compiled at the first start; later starts find them in the cache",
            ),
            Allowance(
                part="capture", estimate_s=capture, limit_s=SLACK * capture,
                reason=f"{work.graphs} CUDA graphs at {GRAPH_S:g} s",
            ),
            Allowance(
                part="warm up", estimate_s=WARMUP_ESTIMATE_S, limit_s=WARMUP_S,
                reason="the engine gives its first request 600 s",
            ),
        )
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Eta:
    """Time left on a node. `share` of the weights loaded; `basis`: what `remaining_s` follows from. Where that is None, why
    it is unknown: what is under way takes longer than estimated."""

    remaining_s: float | None
    share: float | None
    basis: str


def loaded_share(progress: NodeProgress, work: LoadWork, grown_bytes: Mapping[Rank, int]) -> tuple[float | None, str]:
    """How much of the node's weights is loaded, by the slowest rank; `grown_bytes`: GPU memory since loading began."""
    shares, basis = [], ""
    for rank, one in progress.ranks.items():
        if one.phase >= Phase.LOADED:
            shares.append(1.0)
        elif one.shards_total:
            shares.append((one.shards_done or 0) / one.shards_total)
            basis = basis or "files read"
        elif work.rank_bytes.get(rank) and rank in grown_bytes:
            shares.append(min(max(grown_bytes[rank], 0) / work.rank_bytes[rank], 1.0))
            basis = "GPU memory"
    return (min(shares), basis or "log") if shares else (None, "")


def eta(progress: NodeProgress, work: LoadWork, grown_bytes: Mapping[Rank, int], now_s: float) -> Eta:
    """Seconds until the node is ready, from what is loaded and how fast that went, elsewhere from the estimates."""
    phase = progress.phase
    if phase is Phase.READY:
        return Eta(0.0, 1.0, "log")
    loading = phase is Phase.LOADING
    share, basis = loaded_share(progress, work, grown_bytes) if loading else (float(phase > Phase.LOADING), "")
    since = _began(progress, now_s)
    what, part_s, later_s = _under_way(phase, work)
    if loading and share is not None and share >= 1.0:
        return Eta(None, share, "all is read, and the engine works on it")
    if loading and share is not None and share >= 0.01 and now_s - min(since) >= 1.0:
        return Eta((now_s - min(since)) / share * (1 - share) + later_s, share, basis)
    elapsed = max(now_s - max(since), 0.0)
    estimate = f"the {part_s:,.0f} s estimated {what}"
    if elapsed > part_s:
        return Eta(None, share, f"longer than {estimate}")
    return Eta(part_s - elapsed + later_s, share, work.rate_words if phase <= Phase.LOADING else estimate)


def _began(progress: NodeProgress, now_s: float) -> list[float]:
    """When ranks began what the node does now: those in the slowest phase. From the weights to the captured graphs, which
    have one estimate, all of them."""
    if Phase.LOADING < progress.phase < Phase.CAPTURED:
        return [rank.loaded_s for rank in progress.ranks.values() if rank.loaded_s is not None]
    return [rank.since_s for rank in progress.ranks.values() if rank.phase is progress.phase] or [now_s]


def _under_way(phase: Phase, work: LoadWork) -> tuple[str, float, float]:
    """What a node does in a phase, the seconds estimated for it, and those for what comes after."""
    parts = {part.part: part.estimate_s for part in deadline(work).parts}
    captured = parts["capture"] + parts["warm up"]
    graphs = f"{work.graphs} CUDA graphs and " if work.graphs else ""
    return {
        Phase.STARTING: ("to start the engine", parts["spawn"] + parts["join"], parts["load"] + captured),
        Phase.JOINING: ("to join the other ranks", parts["join"], parts["load"] + captured),
        Phase.LOADING: ("to read the weights", parts["load"], captured),
        Phase.CAPTURED: ("for a first request", parts["warm up"], 0.0),
    }.get(phase, (f"for {graphs}a first request where no kernel is compiled", captured, 0.0))


def quiet_limit_s(phase: Phase, work: LoadWork) -> float:
    """How long a node may show no sign of life (log, files read, GPU memory) in a phase."""
    one_file = SLACK * work.file_bytes / work.rate_bytes_per_s
    if phase is Phase.STARTING:
        return max(deadline(work).parts[0].limit_s, QUIET_S)
    if phase is Phase.JOINING:
        return JOIN_S + QUIET_S
    if phase is Phase.LOADING:
        return max(one_file, QUIET_S)
    if phase is Phase.READY:
        return math.inf
    return (COMPILE_S if work.compiles else 0.0) + max(SLACK * GRAPH_S, QUIET_S)


class Pulse:
    """Remembers when a node last showed a sign of life."""

    def __init__(self, now_s: float) -> None:
        self.alive_s = now_s
        self._log_bytes = 0
        self._used: dict[int, int] = {}

    def beat(self, now_s: float, log_bytes: int, used_bytes: Mapping[int, int] | None = None) -> None:
        """Note the log's size and the memory used per GPU index."""
        grew = any(used - self._used.get(gpu, 0) >= GROWTH_BYTES for gpu, used in (used_bytes or {}).items())
        if log_bytes != self._log_bytes or grew:
            self.alive_s = now_s
            self._used |= used_bytes or {}
        self._log_bytes = log_bytes

    def stalled(self, phase: Phase, work: LoadWork, now_s: float) -> str | None:
        """A sentence where the silence is longer than the phase allows, else None."""
        quiet, limit = now_s - self.alive_s, quiet_limit_s(phase, work)
        if quiet <= limit:
            return None
        return (
            f"no log line and no growth of GPU memory for {quiet:,.0f} s while {phase.label}; {limit:,.0f} s are allowed "
            f"(disk: {work.rate_words})"
        )
