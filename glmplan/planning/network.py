"""Which address and interface the nodes of a plan should use among themselves.

Units: bits/s. The engines' rendezvous and NCCL's bootstrap carry unauthenticated data, so a private address always goes
before a public one; among those of a kind the faster network wins, judged by its slowest host. Loopback is used only when
every node is on this machine. InfiniBand and RoCE are told to NCCL by name where every host has an active port.

Source: NCCL 2.27 user guide, NCCL_SOCKET_IFNAME and NCCL_IB_HCA ("=" asks for the exact name).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

from glmplan.facts.host import Host
from glmplan.facts.system import Nic, RdmaPort

Interface = IPv4Interface | IPv6Interface

HOST_ONLY = re.compile(r"(docker|virbr|lxcbr|lxdbr|podman|cni|vmnet|vboxnet)\d*(-nic)?|br-[0-9a-f]{12}|kube-.*")
"""Bridges for the guests of one machine: other hosts have the same ones and cannot reach these."""
TUNNELS = re.compile(r"(tun|tap|wg|tailscale|zt|utun|ppp)[0-9a-z]*")
CARRIER_SHARED = ip_interface("100.64.0.0/10").network  # RFC 6598: not reachable from outside


@dataclass(frozen=True)
class HostLink:
    """How one host is reached by the others. Without an `address`, `reason` says why there is none.

    `rdma_device` names NCCL's devices, joined by commas. `avoid_rdma`: this host has some that another one lacks.
    """

    host: str
    address: str | None
    nic: str | None
    speed_bits_per_s: int | None
    rdma_device: str | None
    reason: str
    avoid_rdma: bool = False


@dataclass(frozen=True)
class _Place:
    """One usable address of one host."""

    host: str
    nic: Nic
    interface: Interface

    @property
    def private(self) -> bool:
        own = self.interface.ip
        return own.is_private or (own.version == 4 and own in CARRIER_SHARED)


def choose_links(hosts: Sequence[Host]) -> tuple[HostLink, ...]:
    """For each host, in order, the address that the other nodes should use."""
    if not hosts:
        return ()
    if all(is_local(host.name) for host in hosts):
        return tuple(_loopback(number, host) for number, host in enumerate(hosts))
    places = [_places(host) for host in hosts]
    chosen = _best_shared(places) or _routed(places)
    if chosen is None:
        return tuple(_none(host, own) for host, own in zip(hosts, places, strict=True))
    rdma, uneven = _rdma(hosts, chosen[0]), _uneven(hosts)
    return tuple(
        HostLink(
            host=host.name,
            address=str(place.interface.ip),
            nic=place.nic.name,
            speed_bits_per_s=place.nic.speed_bits_per_s,
            rdma_device=devices,
            reason=chosen[1],
            avoid_rdma=uneven and bool(_active(host)),
        )
        for host, place, devices in zip(hosts, chosen[0], rdma, strict=True)
    )


def network_environment(link: HostLink) -> dict[str, str]:
    """The variables that keep NCCL and gloo on this interface; empty where none was found."""
    if link.nic is None:
        return {}
    found = {"NCCL_SOCKET_IFNAME": f"={link.nic}", "GLOO_SOCKET_IFNAME": link.nic}
    if link.rdma_device is not None:
        found["NCCL_IB_HCA"] = f"={link.rdma_device}"
    elif link.avoid_rdma:
        found["NCCL_IB_DISABLE"] = "1"
    return found


def with_links(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """The hosts with the address and the variables chosen for them; an address that is known already stays."""
    return tuple(
        host
        if host.address is not None
        else host.model_copy(update={"address": link.address, "network": network_environment(link)})
        for host, link in zip(hosts, choose_links(hosts), strict=True)
    )


def is_local(name: str) -> bool:
    """Whether the name is this machine's: `local`, `localhost` or `local#0-3`."""
    return name in ("local", "localhost") or name.startswith("local#")


def _loopback(number: int, host: Host) -> HostLink:
    return HostLink(host.name, f"127.0.0.{number + 1}", "lo", None, None, "all nodes are on this machine")


def _places(host: Host) -> list[_Place]:
    """Addresses that other hosts might reach: no loopback, no link-local ones, no bridges for guests."""
    found = []
    for nic in host.system.nics if host.system else ():
        if not nic.up or nic.kind == "loopback" or HOST_ONLY.fullmatch(nic.name):
            continue
        for text in nic.addresses:
            interface = ip_interface(text)
            if not (interface.ip.is_link_local or interface.ip.is_loopback or interface.ip.is_multicast):
                found.append(_Place(host.name, nic, interface))
    return found


def _best_shared(places: Sequence[list[_Place]]) -> tuple[list[_Place], str] | None:
    """The best network on which every host has an address of its own."""
    first = places[0] if places else []
    shared = []
    for order, candidate in enumerate(first):
        network = candidate.interface.network
        if network.num_addresses == 1 and len(places) > 1:
            continue  # a /32 says nothing about neighbours
        row = [next((one for one in own if one.interface.network == network), None) for own in places]
        members = [one for one in row if one is not None]
        if len(members) == len(places) and len({one.interface.ip for one in members}) == len(places):
            shared.append((_rank(members, order), members))
    if not shared:
        return None
    members = min(shared, key=lambda one: one[0])[1]
    kind = "private" if members[0].private else "public"
    others = "the only shared network" if len(shared) == 1 else f"the best of {len(shared)} shared networks"
    return members, f"{members[0].interface.network} is {others} ({kind}{_speed(members)})"


def _rank(members: Sequence[_Place], order: int) -> tuple[bool, bool, bool, int, bool, int]:
    """Less is better: private, no tunnel, wired, fast, IPv4, in the first host's order."""
    return (
        not all(one.private for one in members),
        any(TUNNELS.fullmatch(one.nic.name) for one in members),
        any(one.nic.kind == "wireless" for one in members),
        -min(one.nic.speed_bits_per_s or 0 for one in members),
        members[0].interface.version == 6,
        order,
    )


def _speed(members: Sequence[_Place]) -> str:
    speeds = [one.nic.speed_bits_per_s for one in members]
    known = [speed for speed in speeds if speed is not None]
    return f", {min(known) / 1e9:g} Gbit/s" if len(known) == len(speeds) else ", speed unknown"


def _routed(places: Sequence[list[_Place]]) -> tuple[list[_Place], str] | None:
    """Private addresses on the interfaces of the default routes, where the hosts share no subnet, as clouds do."""
    row = []
    for own in places:
        place = next((one for one in own if one.nic.default_route and one.private and one.interface.version == 4), None)
        if place is None:
            return None
        row.append(place)
    if len({one.interface.ip for one in row}) != len(row):
        return None
    return row, "the hosts share no subnet; these are their private addresses towards the default route"


def _none(host: Host, places: Sequence[_Place]) -> HostLink:
    if host.system is None:
        reason = "its interfaces are not known"
    elif not places:
        reason = "it has no address but loopback and link-local ones"
    else:
        reason = f"it shares no network with all the others; it has {', '.join(str(one.interface) for one in places)}"
    return HostLink(host.name, None, None, None, None, reason)


def _active(host: Host) -> list[RdmaPort]:
    ports = host.system.rdma if host.system else ()
    return [port for port in ports if (port.state or "").upper() == "ACTIVE"]


def _uneven(hosts: Sequence[Host]) -> bool:
    """Whether NCCL would choose RDMA on some hosts and cannot on others: it starts there, and then hangs or fails."""
    kinds = [frozenset(port.link_layer for port in _active(host)) for host in hosts]
    return not frozenset.intersection(*kinds)


def _rdma(hosts: Sequence[Host], members: Sequence[_Place]) -> list[str | None]:
    """NCCL's devices per host, all rails of one kind; None for all unless every host has them."""
    rows = [_rails(host, place.nic) for host, place in zip(hosts, members, strict=True)]
    if not all(rows) or len({row[0].link_layer for row in rows}) != 1:
        return [None] * len(rows)
    return [",".join(dict.fromkeys(port.device for port in row)) for row in rows]


def _rails(host: Host, nic: Nic) -> list[RdmaPort]:
    """The ports like the chosen interface's own; without one the InfiniBand ports, of the highest rate."""
    active = _active(host)
    own = next((port for port in active if port.device == nic.rdma_device), None)
    if own is not None:
        return [port for port in active if (port.link_layer, port.rate_bits_per_s) == (own.link_layer, own.rate_bits_per_s)]
    infiniband = [port for port in active if port.link_layer == "InfiniBand"]
    fastest = max((port.rate_bits_per_s or 0 for port in infiniband), default=0)
    return [port for port in infiniband if (port.rate_bits_per_s or 0) == fastest]
