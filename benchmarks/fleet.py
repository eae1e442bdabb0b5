"""How long a probe of many hosts takes: simulated hosts with a round trip of 200 ms each, three of them dead.

The facts are recorded ones; bytes, typed conversion, addresses and the fan-out are the real ones. One dead host refuses, two
accept and stay silent, so the connect timeout of 4 s is part of every result; one of those is among the last to be asked,
which is the slowest order.

Run:  python benchmarks/fleet.py [hosts ...]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmplan.facts.host import Host
from glmplan.probe.remote import probe_hosts, report_of
from glmplan.transport.base import parse_hosts
from glmplan.transport.fake import FakeFleet, FakeHost
from glmplan.transport.fanout import Outcome
from glmplan.transport.open import SshOptions

RECORDED = Path(__file__).parents[1] / "tests" / "recorded" / "hosts" / "two-h200.json"
LATENCY_S = 0.2
AIMS = {128: 5.0, 1000: 30.0}
"""Hosts -> seconds they may take."""


@dataclass(frozen=True)
class Measured:
    """One probe of a simulated fleet."""

    outcomes: tuple[Outcome[Host], ...]
    elapsed_s: float
    most_at_once: int


def fleet(count: int, silent: Sequence[int]) -> FakeFleet:
    """`count` hosts; the fourth refuses, the `silent` ones accept and say nothing."""
    recorded: dict[str, Any] = json.loads(RECORDED.read_text())
    hosts = {
        f"node{number:04}": FakeHost(
            latency_s=LATENCY_S, answers={"facts": {**recorded, "hostname": f"node{number:04}", "started_s": time.time()}}
        )
        for number in range(count)
    }
    names = list(hosts)
    hosts[names[3]] = FakeHost(latency_s=LATENCY_S, fate="down")
    for number in silent:
        hosts[names[number]] = FakeHost(fate="silent")
    return FakeFleet(hosts)


def measure(count: int, silent: Sequence[int]) -> Measured:
    """Probe them, choose addresses."""
    simulated = fleet(count, silent)
    began = time.perf_counter()
    outcomes = probe_hosts(parse_hosts(",".join(simulated.hosts)), SshOptions(), open_host=simulated.open)
    report_of(outcomes)
    return Measured(outcomes, time.perf_counter() - began, simulated.most_at_once)


def main() -> None:
    """Print one line per size."""
    sizes = [int(word) for word in sys.argv[1:]] or list(AIMS)
    print(f"{'hosts':>6} {'answered':>9} {'dead':>5} {'at once':>8} {'seconds':>8} {'aim':>6}")
    for count in sizes:
        found = measure(count, (count // 2, count - 2))
        dead = sum(outcome.error is not None for outcome in found.outcomes)
        aim = f"{AIMS[count]:g} s" if count in AIMS else "-"
        print(f"{count:>6} {count - dead:>9} {dead:>5} {found.most_at_once:>8} {found.elapsed_s:>8.2f} {aim:>6}")


if __name__ == "__main__":
    main()
