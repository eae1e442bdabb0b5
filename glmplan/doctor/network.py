"""Do the hosts find each other, on the right interface, on ports that are free, and on no public one?

dist-init and NCCL's bootstrap carry unauthenticated pickles and data: whoever reaches these ports owns the processes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from glmplan.doctor.finding import Verdict, fail, ok, skip, warn
from glmplan.doctor.seen import PathTry, Seen, on, system
from glmplan.facts.host import Host
from glmplan.facts.system import Nic
from glmplan.planning.network import is_local, network_environment

SLOW_BITS_PER_S = 10_000_000_000
"""Below 10 Gbit/s a pipeline's hand-over of 2,048 tokens (25 MB of BF16) takes more than 20 ms."""


def hostname(host: Host, seen: Seen) -> Verdict:
    """The host's own name does not resolve to loopback: gloo and NCCL would tell others that address."""
    if not seen.together:
        return skip("one host")
    if is_local(host.name):
        return skip("all nodes are on this machine")
    found, name = system(host).hostname_addresses, host.hostname or "its name"
    bound = bool(network_variables(host, seen))
    if not found:
        words = f"{name} resolves to nothing"
    elif all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found):
        words = f"{name} resolves to {', '.join(found)}"
    else:
        return ok(f"{name} resolves to {', '.join(found[:3])}")
    link = seen.link(host)
    address = link.address if link and link.address else "ADDRESS"
    repair = on(host, f"in /etc/hosts replace the line of {name} by: {address} {name}")
    return warn(f"{words}; GLOO_SOCKET_IFNAME keeps the engine off it", repair) if bound else fail(words, repair)


def network_variables(host: Host, seen: Seen) -> dict[str, str]:
    """NCCL's and gloo's variables for this host."""
    link = seen.link(host)
    return network_environment(link) if link else {}


def interface(host: Host, seen: Seen) -> Verdict:
    """Which interface the engine should use, and the variables that say so."""
    if not seen.together:
        return skip("one host")
    link = seen.link(host)
    if link is None or link.address is None:
        reason = link.reason if link else "no address was chosen"
        return fail(reason, "connect the hosts to one network, or give addresses in --inventory FILE")
    variables = " ".join(f"{name}={value}" for name, value in network_variables(host, seen).items())
    speed = f"{link.speed_bits_per_s / 1e9:g} Gbit/s" if link.speed_bits_per_s else "speed unknown"
    words = f"{link.nic} {link.address} ({speed}; {link.reason}): {variables}"
    own = nccl_choice(system(host).nics)
    if own is not None and own != link.nic:
        words += f"; without them NCCL would take {own}"
    slow = link.speed_bits_per_s is not None and link.speed_bits_per_s < SLOW_BITS_PER_S and link.rdma_device is None
    faster = [nic for nic in system(host).nics if nic.up and (nic.speed_bits_per_s or 0) > (link.speed_bits_per_s or 0)]
    if slow:
        more = f"; {faster[0].name} is faster and not shared by all" if faster else ""
        return warn(f"{words}{more}", on(host, f"use a faster network: ethtool {link.nic}; ip -br address"))
    return ok(words)


def nccl_choice(nics: Iterable[Nic]) -> str | None:
    """The interface NCCL takes when it is told nothing: ib* first, docker* and lo last, else in the kernel's order.

    Source: NCCL user guide, NCCL_SOCKET_IFNAME. `nics` are in the kernel's order.
    """
    names = [nic.name for nic in nics if nic.up and nic.addresses]
    ordinary = [name for name in names if not name.startswith(("docker", "lo", "virbr"))]
    infiniband = [name for name in ordinary if name.startswith("ib")]
    return next(iter([*infiniband, *ordinary, *names]), None)


def mtu_equal(seen: Seen) -> Verdict:
    """All nodes' interfaces have one MTU: larger frames would be lost on the way to a smaller one."""
    found: dict[str, int] = {}
    for host in seen.hosts:
        nic = _chosen_nic(host, seen)
        if nic is not None and nic.mtu is not None:
            found[host.name] = nic.mtu
    if len(found) < 2:
        return skip("fewer than two hosts tell an MTU")
    if len(set(found.values())) > 1:
        words = ", ".join(f"{name} {mtu}" for name, mtu in found.items())
        return warn(f"different MTU: {words}", f"ip link set NIC mtu {min(found.values())} on all, or raise the others")
    return ok(f"MTU {next(iter(found.values()))} on all hosts")


def _chosen_nic(host: Host, seen: Seen) -> Nic | None:
    link = seen.link(host)
    return next((nic for nic in system(host).nics if link and nic.name == link.nic), None)


def rdma(host: Host, seen: Seen) -> Verdict:
    """InfiniBand and RoCE ports are up."""
    found = system(host).rdma
    if not found:
        return skip("no InfiniBand or RoCE device")
    down = [port for port in found if "ACTIVE" not in (port.state or "").upper()]
    if down:
        words = ", ".join(f"{port.device}/{port.port} {port.state or 'unknown'}" for port in down)
        repair = on(host, "ibstat; ibdev2netdev; for InfiniBand look at the subnet manager")
        return warn(f"{len(found) - len(down)} of {len(found)} ports active; not: {words}", repair)
    link = seen.link(host)
    used = f"; NCCL uses {link.rdma_device}" if link and link.rdma_device else "; NCCL goes over sockets"
    return ok(f"{len(found)} ports active{used if seen.together else ''}")


def public_addresses(host: Host) -> list[tuple[str, str]]:
    """(interface, address) that the whole internet may route to."""
    found = []
    for nic in system(host).nics:
        for text in nic.addresses:
            address = ipaddress.ip_interface(text).ip
            if nic.up and address.is_global and not address.is_multicast:
                found.append((nic.name, str(address)))
    return found


def exposure(host: Host, seen: Seen) -> Verdict:
    """The rendezvous is not on a public interface. torch's store listens on every interface of the first node."""
    if not seen.together:
        return skip("one host: the rendezvous is on 127.0.0.1")
    node, link = seen.node(host), seen.link(host)
    address = (node.address if node else None) or (link.address if link else None)
    port = seen.endpoints.rendezvous_port
    try:
        is_public = address is not None and ipaddress.ip_address(address).is_global
    except ValueError:
        is_public = False
    if is_public:
        return fail(
            f"nodes talk over {address}, a public address; port {port} and NCCL's ports take unauthenticated pickles",
            "use a private network or a VPN (WireGuard) between the nodes",
        )
    public = public_addresses(host)
    if public and _is_head(host, seen):
        words = ", ".join(f"{text} on {nic}" for nic, text in public[:3])
        names = " ".join(dict.fromkeys(nic for nic, _ in public))
        return warn(
            f"the host also has {words}, and torch's store listens on every interface",
            on(host, f"sudo nft/ufw: deny TCP {port} and the ephemeral ports coming in on {names}"),
        )
    return ok(f"nodes talk over {address}, which is not public" if address else "no public address")


def _is_head(host: Host, seen: Seen) -> bool:
    node = seen.node(host)
    if node is not None:
        return node.node_rank == 0
    return bool(seen.hosts) and host.name == (seen.names or (seen.hosts[0].name,))[0]


def ports_free(host: Host, seen: Seen) -> Verdict:
    """The TCP ports of the launch are free."""
    found = seen.ports.get(host.name)
    if found is None:
        error = seen.problems.get(f"ports:{host.name}")
        return fail(error.message, error.next_step) if error else skip("not tried")
    taken = [one for one in found if one.problem]
    if taken:
        words = "; ".join(
            f"{one.purpose} {one.port} on {one.address or 'all interfaces'}: {one.problem}"
            + (f" by {one.holder}" if one.holder else "")
            for one in taken
        )
        return fail(words, on(host, f"ss -ltnp 'sport = :{taken[0].port}'; end that process, or choose another port"))
    return ok(", ".join(f"{one.purpose} {one.port}" for one in found) + " free")


def paths(host: Host, seen: Seen) -> Verdict:
    """Every other host reaches this one on the rendezvous port and on an ephemeral port."""
    if not seen.together:
        return skip("one host")
    error = seen.problems.get(f"paths:{host.name}")
    if error is not None:
        return fail(error.message, error.next_step)
    found = [path for path in seen.paths if path.target == host.name]
    if not found:
        return skip("no other host could try")
    broken = [path for path in found if path.problem]
    if not broken:
        slowest = max((path.connect_s or 0.0) for path in found)
        sources = len({path.source for path in found})
        ports = ", ".join(_port_words(found, ephemeral) for ephemeral in (False, True) if _of(found, ephemeral))
        return ok(f"reached from {sources} host{'s' if sources > 1 else ''} on {ports} in at most {slowest * 1000:.1f} ms")
    words = "; ".join(
        f"{path.source} to {path.address}:{path.port}{' (ephemeral)' if path.ephemeral else ''} {path.problem}"
        for path in broken[:6]
    )
    more = f"; and {len(broken) - 6} more" if len(broken) > 6 else ""
    low, high = system(host).ephemeral_ports or (32768, 60999)
    callers = " ".join(sorted({path.source for path in broken}))
    return fail(
        f"{words}{more}",
        on(
            host,
            f"let TCP {seen.endpoints.rendezvous_port} and {low}-{high} in from {callers} (nft, ufw, cloud security group)",
        ),
    )


def _of(found: Iterable[PathTry], ephemeral: bool) -> list[PathTry]:
    return [path for path in found if path.ephemeral == ephemeral]


def _port_words(found: Iterable[PathTry], ephemeral: bool) -> str:
    port = _of(found, ephemeral)[0].port
    return f"ephemeral port {port}" if ephemeral else f"port {port}"
