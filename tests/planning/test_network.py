"""Which address and interface each node gets: shared, private, fast; never loopback between machines."""

from __future__ import annotations

import pytest

from glmplan.facts.host import Host
from glmplan.facts.system import Nic, RdmaPort, System
from glmplan.planning.network import HostLink, choose_links, network_environment, with_links

GBIT = 10**9
LO = Nic(name="lo", kind="loopback", up=True, addresses=("127.0.0.1/8", "::1/128"))


def nic(name: str, *addresses: str, gbit: float | None = 10, **more: object) -> Nic:
    fields = {"up": True, "speed_bits_per_s": None if gbit is None else round(gbit * GBIT), **more}
    return Nic(name=name, addresses=addresses, **fields)


def host(name: str, *nics: Nic, rdma: tuple[RdmaPort, ...] = ()) -> Host:
    return Host(name=name, system=System(nics=(LO, *nics), rdma=rdma))


def port(device: str, layer: str = "InfiniBand", gbit: float = 400, state: str = "ACTIVE") -> RdmaPort:
    return RdmaPort(device=device, port=1, link_layer=layer, state=state, rate_bits_per_s=round(gbit * GBIT))


def chosen(*hosts: Host) -> list[tuple[str | None, str | None]]:
    return [(link.nic, link.address) for link in choose_links(hosts)]


def test_no_host_has_no_link():
    assert choose_links([]) == ()


def test_hosts_on_one_network_use_it():
    a, b = host("a", nic("eth0", "10.0.0.1/24")), host("b", nic("ens5", "10.0.0.2/24"))
    assert chosen(a, b) == [("eth0", "10.0.0.1"), ("ens5", "10.0.0.2")]
    assert choose_links([a, b])[0].reason == "10.0.0.0/24 is the only shared network (private, 10 Gbit/s)"


def test_one_host_alone_has_an_address_too():
    assert chosen(host("a", nic("eth0", "10.0.0.1/24"))) == [("eth0", "10.0.0.1")]


def test_the_fastest_network_wins_by_its_slowest_host():
    a = host("a", nic("eth0", "10.0.0.1/24", gbit=25), nic("eth1", "10.1.0.1/24", gbit=100))
    b = host("b", nic("eth0", "10.0.0.2/24", gbit=25), nic("eth1", "10.1.0.2/24", gbit=100))
    slow = host("b", nic("eth0", "10.0.0.2/24", gbit=25), nic("eth1", "10.1.0.2/24", gbit=1))
    assert chosen(a, b)[0] == ("eth1", "10.1.0.1")
    assert chosen(a, slow)[0] == ("eth0", "10.0.0.1")


def test_a_private_network_goes_before_a_faster_public_one():
    a = host("a", nic("eth0", "203.0.114.1/24", gbit=100), nic("eth1", "192.168.7.1/24", gbit=1))
    b = host("b", nic("eth0", "203.0.114.2/24", gbit=100), nic("eth1", "192.168.7.2/24", gbit=1))
    assert chosen(a, b) == [("eth1", "192.168.7.1"), ("eth1", "192.168.7.2")]


def test_a_public_network_is_better_than_none_and_says_so():
    a, b = host("a", nic("eth0", "203.0.114.1/24")), host("b", nic("eth0", "203.0.114.2/24"))
    assert chosen(a, b)[1] == ("eth0", "203.0.114.2")
    assert "public" in choose_links([a, b])[0].reason


def test_carriers_shared_addresses_are_private():
    a = host("a", nic("eth0", "203.0.114.1/24"), nic("eth1", "100.64.0.1/24"))
    b = host("b", nic("eth0", "203.0.114.2/24"), nic("eth1", "100.64.0.2/24"))
    assert chosen(a, b)[0] == ("eth1", "100.64.0.1")


def test_guests_bridges_are_never_used():
    bridge = nic("docker0", "172.17.0.1/16", gbit=100, kind="virtual")
    a, b = host("a", bridge, nic("eth0", "10.0.0.1/24")), host("b", bridge, nic("eth0", "10.0.0.2/24"))
    assert chosen(a, b) == [("eth0", "10.0.0.1"), ("eth0", "10.0.0.2")]
    assert choose_links([host("a", bridge)])[0].address is None


def test_the_same_address_on_two_hosts_is_no_network():
    same = nic("mgmt", "192.168.1.1/24", gbit=100)
    a, b = host("a", same, nic("eth0", "10.0.0.1/24")), host("b", same, nic("eth0", "10.0.0.2/24"))
    assert chosen(a, b) == [("eth0", "10.0.0.1"), ("eth0", "10.0.0.2")]


def test_tunnels_and_radio_come_last():
    a = host("a", nic("wg0", "10.9.0.1/24", gbit=100), nic("eth0", "10.0.0.1/24", gbit=1))
    b = host("b", nic("wg0", "10.9.0.2/24", gbit=100), nic("eth0", "10.0.0.2/24", gbit=1))
    assert chosen(a, b)[0] == ("eth0", "10.0.0.1")
    a = host("a", nic("wlan0", "10.9.0.1/24", kind="wireless"), nic("eth0", "10.0.0.1/24", gbit=1))
    b = host("b", nic("wlan0", "10.9.0.2/24", kind="wireless"), nic("eth0", "10.0.0.2/24", gbit=1))
    assert chosen(a, b)[0] == ("eth0", "10.0.0.1")


def test_an_interface_that_is_down_does_not_count():
    a = host("a", nic("eth0", "10.0.0.1/24", up=False), nic("eth1", "10.1.0.1/24", gbit=1))
    b = host("b", nic("eth0", "10.0.0.2/24"), nic("eth1", "10.1.0.2/24", gbit=1))
    assert chosen(a, b)[0] == ("eth1", "10.1.0.1")


def test_link_local_addresses_are_never_used():
    a, b = host("a", nic("eth0", "fe80::1/64", "169.254.0.1/16")), host("b", nic("eth0", "fe80::2/64", "169.254.0.2/16"))
    assert [link.address for link in choose_links([a, b])] == [None, None]
    assert "loopback and link-local" in choose_links([a, b])[0].reason


def test_ipv4_goes_before_ipv6_and_ipv6_is_better_than_none():
    a, b = host("a", nic("eth0", "fd00::1/64", "10.0.0.1/24")), host("b", nic("eth0", "fd00::2/64", "10.0.0.2/24"))
    assert chosen(a, b)[0] == ("eth0", "10.0.0.1")
    a, b = host("a", nic("eth0", "fd00::1/64")), host("b", nic("eth0", "fd00::2/64"))
    assert chosen(a, b) == [("eth0", "fd00::1"), ("eth0", "fd00::2")]


def test_an_unknown_speed_is_slower_than_a_known_one():
    a = host("a", nic("eth0", "10.0.0.1/24", gbit=None), nic("eth1", "10.1.0.1/24", gbit=1))
    b = host("b", nic("eth0", "10.0.0.2/24", gbit=None), nic("eth1", "10.1.0.2/24", gbit=1))
    assert chosen(a, b)[0] == ("eth1", "10.1.0.1")


def test_clouds_without_a_shared_subnet_use_the_route_and_say_so():
    a = host("a", nic("ens4", "10.128.0.2/32", default_route=True))
    b = host("b", nic("ens4", "10.128.0.3/32", default_route=True))
    assert chosen(a, b) == [("ens4", "10.128.0.2"), ("ens4", "10.128.0.3")]
    assert "share no subnet" in choose_links([a, b])[0].reason


def test_without_a_shared_network_there_is_a_reason_per_host():
    a, b = host("a", nic("eth0", "10.0.0.1/24")), host("b", nic("eth0", "10.1.0.1/24"))
    first, second = choose_links([a, b])
    assert (first.address, second.address) == (None, None)
    assert "10.0.0.1/24" in first.reason
    assert "10.1.0.1/24" in second.reason
    assert network_environment(first) == {}


def test_a_host_whose_interfaces_are_unknown_says_so():
    assert choose_links([Host(name="a")])[0] == HostLink("a", None, None, None, None, "its interfaces are not known")


def test_nodes_of_this_machine_have_loopback_addresses_of_their_own():
    parts = [host("local#0-3", nic("eth0", "10.0.0.1/24")), host("local#4-7", nic("eth0", "10.0.0.1/24"))]
    assert chosen(*parts) == [("lo", "127.0.0.1"), ("lo", "127.0.0.2")]
    assert network_environment(choose_links(parts)[1]) == {"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}


def test_this_machine_among_others_is_reached_over_the_network():
    a, b = host("local", nic("eth0", "10.0.0.1/24")), host("b", nic("eth0", "10.0.0.2/24"))
    assert chosen(a, b) == [("eth0", "10.0.0.1"), ("eth0", "10.0.0.2")]


def test_loopback_is_never_used_between_machines():
    a, b = host("a", nic("lo2", "127.0.5.1/8", kind="virtual")), host("b", nic("lo2", "127.0.5.2/8", kind="virtual"))
    assert [link.address for link in choose_links([a, b])] == [None, None]


RAILS = tuple(port(f"mlx5_{number}") for number in range(2))


def test_infiniband_is_named_with_all_rails():
    hosts = [host(name, nic("eth0", f"10.0.0.{n}/24"), rdma=RAILS) for n, name in enumerate("ab", 1)]
    assert network_environment(choose_links(hosts)[0]) == {
        "NCCL_SOCKET_IFNAME": "=eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "=mlx5_0,mlx5_1",
    }


def test_roce_is_used_where_the_chosen_interface_has_it():
    ports = (port("mlx5_0", "Ethernet", 200), port("mlx5_1", "Ethernet", 200), port("mlx5_2", "Ethernet", 25))
    hosts = [
        host(name, nic("eth0", f"10.0.0.{n}/24", gbit=200, rdma_device="mlx5_0"), rdma=ports)
        for n, name in enumerate("ab", 1)
    ]
    assert [link.rdma_device for link in choose_links(hosts)] == ["mlx5_0,mlx5_1"] * 2


def test_roce_elsewhere_is_not_guessed():
    hosts = [host(name, nic("eth0", f"10.0.0.{n}/24"), rdma=(port("mlx5_0", "Ethernet"),)) for n, name in enumerate("ab", 1)]
    assert [link.rdma_device for link in choose_links(hosts)] == [None, None]
    assert "NCCL_IB_DISABLE" not in network_environment(choose_links(hosts)[0])


@pytest.mark.parametrize("other", [(), (port("mlx5_0", state="DOWN"),), (port("mlx5_0", "Ethernet"),)])
def test_rdma_on_some_hosts_only_is_switched_off(other):
    a = host("a", nic("eth0", "10.0.0.1/24"), rdma=RAILS)
    b = host("b", nic("eth0", "10.0.0.2/24"), rdma=other)
    first, second = choose_links([a, b])
    assert (first.rdma_device, second.rdma_device) == (None, None)
    assert network_environment(first)["NCCL_IB_DISABLE"] == "1"


def test_hosts_get_their_address_and_variables_and_keep_a_given_one():
    a = host("a", nic("eth0", "10.0.0.1/24"))
    b = host("b", nic("eth0", "10.0.0.2/24")).model_copy(update={"address": "b.example"})
    first, second = with_links([a, b])
    assert first.address == "10.0.0.1"
    assert first.network == {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert (second.address, second.network) == ("b.example", {})
