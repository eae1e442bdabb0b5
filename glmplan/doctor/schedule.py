"""Who is which rank of the all-reduce, and which two talk at the same time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from glmplan.doctor.seen import Seen
from glmplan.facts.host import Host

ALL_PAIRS_UP_TO = 16
"""Ranks up to which every two talk; beyond, the first ranks of every two hosts do."""
LEAST_FREE_BYTES = 3 * 2**30
"""GPU memory for CUDA, NCCL's communicators and the buffers of a test beside a server."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Ranks:
    """The ranks of every host, in order. `gpu_indexes` is empty with gloo."""

    backend: Literal["nccl", "gloo"]
    hosts: tuple[Host, ...]
    counts: tuple[int, ...]
    gpu_indexes: tuple[tuple[int, ...], ...]
    rounds: tuple[tuple[Pair, ...], ...]

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return sum(self.counts)

    @property
    def first(self) -> tuple[int, ...]:
        """The first rank of each host."""
        return (0, *accumulate(self.counts[:-1]))

    def host_of(self, rank: int) -> str:
        """The host that runs a rank."""
        found = [host.name for host, first in zip(self.hosts, self.first, strict=True) if first <= rank]
        return found[-1]

    def label(self, rank: int) -> str:
        """The rank as people find it: its GPU where it has one."""
        position = max(index for index, first in enumerate(self.first) if first <= rank)
        local = rank - self.first[position]
        name = self.hosts[position].name
        return f"{name} GPU {self.gpu_indexes[position][local]}" if self.backend == "nccl" else f"{name} rank {rank}"


def ranks_of(seen: Seen) -> Ranks:
    """NCCL with one rank a GPU where every host has GPUs with room, else gloo on the CPUs."""
    hosts = seen.hosts
    gpus = [tuple(gpu.index for gpu in seen.gpus(host) if gpu.available_bytes >= LEAST_FREE_BYTES) for host in hosts]
    if all(gpus):
        counts = tuple(len(indexes) for indexes in gpus)
        return Ranks("nccl", hosts, counts, tuple(gpus), _rounds(counts))
    counts = (2,) if len(hosts) == 1 else (1,) * len(hosts)
    return Ranks("gloo", hosts, counts, ((),) * len(hosts), _rounds(counts))


def _rounds(counts: Sequence[int]) -> tuple[tuple[Pair, ...], ...]:
    total = sum(counts)
    if total <= ALL_PAIRS_UP_TO:
        return tournament(range(total))
    firsts = (0, *accumulate(counts[:-1]))
    return tournament(firsts)


def tournament(players: Sequence[int]) -> tuple[tuple[Pair, ...], ...]:
    """Every two meet once, each at most once a round (the circle method)."""
    ring: list[int | None] = list(players)
    if len(ring) % 2:
        ring.append(None)
    half, found = len(ring) // 2, []
    for _ in range(len(ring) - 1):
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append(tuple((a, b) if a < b else (b, a) for a, b in pairs if a is not None and b is not None))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return tuple(round_ for round_ in found if round_)
