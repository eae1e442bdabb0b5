"""Checks of names, interfaces, exposure, ports and paths."""

from __future__ import annotations

from typing import Any

from glmplan.doctor.network import nccl_choice
from glmplan.doctor.seen import PathTry, PortTry
from glmplan.facts.host import Host
from glmplan.facts.system import Nic, RdmaPort
from tests.doctor.hosts import host, plan, seen, verdict


def test_a_name_on_loopback_is_a_warning_while_the_interface_is_told() -> None:
    debian = host(1, hostname_addresses=("127.0.1.1",))
    found = verdict("hostname", seen(debian, host(2)))
    assert found.status == "warn"
    assert found.repair == "on h1: in /etc/hosts replace the line of node1 by: 10.0.0.1 node1"
    nowhere = host(2, nics=(Nic(name="eth0", up=True, addresses=("192.168.7.2/24",)),))
    alone = seen(host(1, hostname_addresses=("127.0.1.1",), nics=()), nowhere)
    assert verdict("hostname", alone).status == "fail"
    assert verdict("hostname", seen(host(1, hostname_addresses=("127.0.1.1",)))).status == "skip"


def test_the_interface_comes_with_its_variables() -> None:
    found = verdict("interface", seen())
    assert found.status == "ok"
    assert "eth0 10.0.0.1 (100 Gbit/s" in found.evidence
    assert "NCCL_SOCKET_IFNAME==eth0 GLOO_SOCKET_IFNAME=eth0" in found.evidence


def test_the_interface_that_nccl_would_take_is_told_when_it_is_another() -> None:
    nics = (
        Nic(name="docker0", up=True, addresses=("172.17.0.1/16",)),
        Nic(name="wan0", up=True, addresses=("8.8.4.1/24",)),
        Nic(name="eth1", up=True, addresses=("10.0.0.1/24",), speed_bits_per_s=10**11),
    )
    assert "without them NCCL would take wan0" in verdict("interface", seen(host(1, nics=nics), host(2))).evidence
    assert "without them" not in verdict("interface", seen()).evidence
    assert [nccl_choice(nics[:count]) for count in range(4)] == [None, "docker0", "wan0", "wan0"]


def test_hosts_without_a_shared_network_fail() -> None:
    what = seen(host(1), host(2, nics=(Nic(name="eth0", up=True, addresses=("192.168.7.2/24",)),)))
    assert verdict("interface", what).status == "fail"


def test_a_slow_network_is_a_warning() -> None:
    def slow(number: int) -> Host:
        nic = Nic(name="eth0", up=True, addresses=(f"10.0.0.{number}/24",), speed_bits_per_s=10**9, mtu=1500)
        return host(number, nics=(nic,))

    assert verdict("interface", seen(slow(1), slow(2))).status == "warn"


def test_a_public_rendezvous_fails_and_a_public_side_is_a_warning() -> None:
    def reachable(number: int, *more: Nic) -> Host:
        nic = Nic(name="eth0", up=True, addresses=(f"8.8.4.{number}/24",), speed_bits_per_s=10**11)
        return host(number, nics=more or (nic,))

    found = verdict("exposure", seen(reachable(1), reachable(2)))
    assert found.status == "fail"
    assert "8.8.4.1, a public address" in found.evidence
    private = Nic(name="eth1", up=True, addresses=("10.0.0.1/24",), speed_bits_per_s=10**11)
    public = Nic(name="eth0", up=True, addresses=("8.8.4.1/24",), speed_bits_per_s=10**11)
    sided = seen(reachable(1, public, private), host(2))
    assert verdict("exposure", sided).status == "warn"
    assert "8.8.4.1 on eth0" in verdict("exposure", sided).evidence
    assert verdict("exposure", seen()).status == "ok"


def test_mtu_and_rdma() -> None:
    jumbo = host(2, nics=(Nic(name="eth0", up=True, addresses=("10.0.0.2/24",), mtu=1500),))
    assert verdict("mtu", seen(host(1), jumbo)).status == "warn"
    ports = (
        RdmaPort(device="mlx5_0", port=1, link_layer="InfiniBand", state="ACTIVE", rate_bits_per_s=400 * 10**9),
        RdmaPort(device="mlx5_1", port=1, link_layer="InfiniBand", state="DOWN"),
    )
    found = verdict("rdma", seen(host(rdma=ports)))
    assert (found.status, found.evidence) == ("warn", "1 of 2 ports active; not: mlx5_1/1 DOWN")


def test_a_taken_port_names_its_holder() -> None:
    tries = (PortTry("HTTP", "127.0.0.1", 30000, "taken", "pid 7 sglang of bob"), PortTry("rendezvous", "", 20000))
    found = verdict("ports", seen(ports={"h1": tries}))
    assert (found.status, found.evidence) == ("fail", "HTTP 30000 on 127.0.0.1: taken by pid 7 sglang of bob")


def test_a_closed_path_names_both_ends_and_the_range_to_open() -> None:
    def path(source: str, port: int, **changes: Any) -> PathTry:
        facts = {"source": source, "target": "h1", "address": "10.0.0.1", "port": port, "ephemeral": port != 20000}
        return PathTry(**{**facts, "connect_s": 0.001, **changes})

    tries = (path("h2", 20000), path("h3", 20000), path("h2", 40001), path("h3", 40001, problem="silent", connect_s=None))
    found = verdict("paths", seen(paths=tries, plan=plan()))
    assert (found.status, found.evidence) == ("fail", "h3 to 10.0.0.1:40001 (ephemeral) silent")
    assert "TCP 20000 and 32768-60999 in from h3" in found.repair
    whole = verdict("paths", seen(paths=tries[:3]))
    assert (whole.status, whole.evidence.split(" in ")[0]) == (
        "ok",
        "reached from 2 hosts on port 20000, ephemeral port 40001",
    )
