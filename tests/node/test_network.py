"""Interfaces and addresses as the kernel has them: real interfaces in a network namespace of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmplan.node import network

ROOT = Path(__file__).parents[2]
READ = "import json; from glmplan.node.network import nics; print(json.dumps(nics()))"


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with a pair of interfaces."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    name = f"glmplan-facts-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("this machine allows no network namespaces")
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def inside(namespace: str, *words: str) -> str:
    command = ["ip", "netns", "exec", namespace, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def read(namespace: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads(inside(namespace, sys.executable, "-c", READ))}


def test_every_address_of_an_interface_is_read(namespace: str) -> None:
    for words in (
        "link set lo up",
        "link add left type veth peer name right",
        "link set left up",
        "link set right up",
        "link set left mtu 9000",
        "address add 10.77.0.1/24 dev left",
        "address add 10.77.1.1/32 dev left",
        "address add fd77::1/64 dev left nodad",
        "route add default via 10.77.0.2",
    ):
        inside(namespace, "ip", *words.split())
    found = read(namespace)
    left = found["left"]
    assert left["addresses"][:2] == ["10.77.0.1/24", "10.77.1.1/32"]
    assert "fd77::1/64" in left["addresses"]
    assert (left["kind"], left["up"], left["mtu"], left["default_route"]) == ("virtual", True, 9000, True)
    assert left["speed_bits_per_s"] == 10 * 10**9
    assert (found["lo"]["kind"], found["lo"]["default_route"]) == ("loopback", False)


def test_an_interface_without_carrier_is_down(namespace: str) -> None:
    inside(namespace, "ip", "link", "add", "left", "type", "veth", "peer", "name", "right")
    inside(namespace, "ip", "address", "add", "10.77.0.1/24", "dev", "left")
    assert read(namespace)["left"]["up"] is False
    inside(namespace, "ip", "link", "set", "left", "up")
    assert read(namespace)["left"]["up"] is False


def test_an_ipv6_default_route_counts(namespace: str) -> None:
    for words in (
        "link add left type veth peer name right",
        "link set left up",
        "link set right up",
        "address add fd77::1/64 dev left nodad",
        "-6 route add default via fd77::2",
    ):
        inside(namespace, "ip", *words.split())
    assert read(namespace)["left"]["default_route"] is True


def test_without_netlink_the_first_address_is_read_by_ioctl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(network.socket, "AF_NETLINK")
    lo = next(one for one in network.nics() if one["name"] == "lo")
    assert lo["addresses"] == ["127.0.0.1/8"]
    assert lo["kind"] == "loopback"


def test_no_interfaces_at_all_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> list[tuple[int, str]]:
        raise OSError("no permission")

    monkeypatch.setattr(network.socket, "if_nameindex", refused)
    assert network.nics() == []


def test_a_sysfs_of_another_namespace_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.socket, "if_nameindex", lambda: [(987654, "lo")])
    assert network.nics() == []


def test_rdma_ports_are_read_from_sysfs(tmp_path: Path) -> None:
    for device, state, rate in (
        ("mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_1", "1: DOWN", "2.5 Gb/sec (1X SDR)"),
    ):
        folder = tmp_path / device / "ports" / "1"
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
        (folder / "rate").write_text(rate + "\n")
        (folder / "link_layer").write_text("InfiniBand\n")
    first, second = network.rdma_ports(str(tmp_path))
    assert first == {
        "device": "mlx5_0",
        "port": 1,
        "link_layer": "InfiniBand",
        "state": "ACTIVE",
        "rate_bits_per_s": 400 * 10**9,
    }
    assert (second["state"], second["rate_bits_per_s"]) == ("DOWN", 2_500_000_000)


def test_no_rdma_is_none_found(tmp_path: Path) -> None:
    assert network.rdma_ports(str(tmp_path / "nothing")) == []
    (tmp_path / "mlx5_0" / "ports" / "1").mkdir(parents=True)
    assert network.rdma_ports(str(tmp_path))[0]["state"] is None
