"""Facts of many hosts: what a host answers becomes a Host, what it does not is an outcome of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from glmplan.errors import ProbeError, UnreachableError
from glmplan.facts.profiles import gpu_profiles
from glmplan.node.errors import NodeError
from glmplan.probe.gpus import NoDriverError
from glmplan.probe.remote import (
    FactsRequest,
    clock_offset,
    inventory_of,
    probe_hosts,
    report_of,
    to_host,
)
from glmplan.transport.base import parse_hosts
from glmplan.transport.fake import FakeFleet, FakeHost
from glmplan.transport.node import NodeFailedError
from glmplan.transport.options import SshOptions

RECORDED = Path(__file__).parents[1] / "recorded" / "hosts" / "two-h200.json"
RESERVED = 644939776


def answer(address: str = "10.0.0.2/24") -> dict[str, Any]:
    """A real host's answer, with another address."""
    found: dict[str, Any] = json.loads(RECORDED.read_text())
    found["system"]["nics"][1]["addresses"] = [address]
    return found


def fleet(count: int, **fates: FakeHost) -> FakeFleet:
    hosts = {f"h{n}": FakeHost(answers={"facts": answer(f"10.0.0.{n + 1}/24")}) for n in range(count)}
    return FakeFleet({**hosts, **fates})


def probe(hosts: FakeFleet, request: FactsRequest | None = None) -> Any:
    names = parse_hosts(",".join(hosts.hosts))
    return probe_hosts(names, SshOptions(), request, open_host=hosts.open)


def test_a_hosts_gpus_are_matched_with_profiles():
    found = to_host(answer(), "a", gpu_profiles())
    gpu = found.gpus[1]
    assert (found.name, found.hostname, gpu.profile) == ("a", "gpu-a", "h200")
    assert gpu.memory_usable_bytes == 150754820096 - RESERVED
    assert gpu.memory_in_use_bytes == 150754820096 - RESERVED - 146336251904
    assert found.system is not None
    assert found.system.peers[0].path == "NV18"


def test_an_answer_of_another_shape_is_one_sentence():
    with pytest.raises(ProbeError, match=r"a answered with facts of another shape: colour"):
        to_host({**answer(), "colour": "green"}, "a", ())


@pytest.mark.parametrize(
    ("here", "there", "offset", "error"),
    [
        ((100.0, 101.0), (100.25, 100.75), 0.0, 0.25),
        ((100.0, 101.0), (160.25, 160.75), 60.0, 0.25),
        ((100.0, 101.0), (90.0, 91.0), -10.0, 0.0),
        ((100.0, 101.0), (100.0, 101.5), 0.25, 0.0),
    ],
)
def test_a_clocks_offset_is_known_to_half_the_time_on_the_way(here, there, offset, error):
    assert clock_offset(here, there) == (offset, error)


def test_every_host_is_an_outcome_in_the_order_given():
    outcomes = probe(fleet(3, dead=FakeHost(fate="down"), h9=FakeHost(answers={"facts": answer("10.0.0.9/24")})))
    assert [outcome.name for outcome in outcomes] == ["h0", "h1", "h2", "dead", "h9"]
    assert [outcome.error is None for outcome in outcomes] == [True, True, True, False, True]
    assert isinstance(outcomes[3].error, UnreachableError)
    report = report_of(outcomes)
    assert [host.address for host in report.hosts] == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9"]
    assert [failure.name for failure in report.failures] == ["dead"]


def test_a_node_program_that_fails_is_that_hosts_outcome():
    def broken(request: dict[str, Any]) -> dict[str, Any]:
        raise NodeError("boom", "The disk is on fire.", "Use water.")

    outcomes = probe(fleet(1, bad=FakeHost(answers={"facts": broken})))
    assert isinstance(outcomes[1].error, NodeFailedError)
    assert outcomes[1].error.message == "The disk is on fire."
    assert outcomes[0].error is None


def test_hosts_are_asked_for_what_was_wanted():
    asked: list[dict[str, Any]] = []

    def facts(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        return answer()

    wanted = FactsRequest("/models/glm", True, 1.5, ("/opt/venv",), ("~/site",))
    probe(FakeFleet({"a": FakeHost(answers={"facts": facts})}), wanted)
    assert asked == [
        {
            "gpu_indexes": None,
            "model_path": "/models/glm",
            "disk_read": True,
            "disk_seconds": 1.5,
            "engine_pythons": ["/opt/venv"],
            "engine_folders": ["~/site"],
        }
    ]


def test_an_inventory_has_an_address_and_variables_for_every_host():
    hosts = [outcome.value() for outcome in probe(fleet(3))]
    inventory = inventory_of(hosts)
    assert inventory.origin == "probe"
    assert inventory.gpu_count == 6
    assert inventory.hosts[2].address == "10.0.0.3"
    assert inventory.hosts[2].network == {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}


def test_gpus_that_cannot_be_read_are_no_inventory_and_the_host_is_named():
    lost = {"kind": "gpu-lost", "message": "GPU 2 does not answer.", "next_step": "Reset it."}
    with pytest.raises(ProbeError, match=r"b: GPU 2 does not answer\.") as raised:
        inventory_of([to_host({**answer(), "gpu_problem": lost}, "b", ())])
    assert raised.value.next_step == "Reset it."
    none = {"kind": "no-driver", "message": "No driver.", "next_step": ""}
    with pytest.raises(NoDriverError):
        inventory_of([to_host({**answer(), "gpus": [], "gpu_problem": none}, "b", ())])


def test_128_hosts_of_which_three_are_dead_are_probed_in_seconds():
    """About 1 s; one after the other take 26 s."""
    latency_s = 0.2
    hosts = {
        f"h{n}": FakeHost(latency_s, answers={"facts": answer(f"10.0.{n // 250}.{n % 250 + 1}/16")}) for n in range(125)
    }
    dead = {f"dead{n}": FakeHost(latency_s, fate="down") for n in range(3)}
    everything = FakeFleet({**hosts, **dead})
    begin = time.monotonic()
    outcomes = probe(everything)
    assert time.monotonic() - begin < 15
    assert sum(outcome.error is None for outcome in outcomes) == 125
    assert everything.most_at_once <= 32
    assert inventory_of([outcome.result for outcome in outcomes if outcome.result]).gpu_count == 250
