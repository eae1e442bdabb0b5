"""Fleets larger than any test machine: simulated hosts, everything else real."""

from __future__ import annotations

from benchmarks.fleet import measure
from glmplan.transport.errors import ConnectionFailedError, TimedOutError


def test_128_hosts_with_three_dead() -> None:
    """200 ms away each, 32 at once: in about 5 s, of which 4 are the silent ones' limit; one after the other take 34 s."""
    found = measure(128, silent=(20, 50))
    assert found.elapsed_s < 20
    assert found.most_at_once == 32
    failed = {number: type(one.error) for number, one in enumerate(found.outcomes) if one.error is not None}
    assert failed == {3: ConnectionFailedError, 20: TimedOutError, 50: TimedOutError}
    assert [one.result.hostname for one in found.outcomes if one.result] == [
        f"node{number:04}" for number in range(128) if number not in failed
    ]


def test_1000_hosts() -> None:
    """In about 12 s; one after the other take 200 s."""
    found = measure(1000, silent=(500, 998))
    assert found.elapsed_s < 90
    assert sum(one.error is not None for one in found.outcomes) == 3
