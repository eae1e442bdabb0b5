"""The network interfaces of this host, its addresses, and its InfiniBand or RoCE ports.

Units: bits/s. Addresses come from the kernel through netlink (all of them, also aliases and IPv6), the rest from sysfs. A
speed of -1 (virtual interfaces, links that are down) is None.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from contextlib import suppress
from typing import Any

from . import procfs

NETLINK_ROUTE, RTM_GETADDR, RTM_NEWADDR, NLMSG_DONE, NLMSG_ERROR = 0, 22, 20, 3, 2
REQUEST_DUMP = 0x301
IFA_ADDRESS, IFA_LOCAL = 1, 2
TENTATIVE_OR_FAILED = 0x48  # IFA_F_TENTATIVE | IFA_F_DADFAILED
HARDWARE_INFINIBAND, HARDWARE_LOOPBACK = 32, 772
FLAG_UP, FLAG_RUNNING = 0x1, 0x40
SIOCGIFFLAGS, SIOCGIFMTU, SIOCGIFADDR, SIOCGIFNETMASK = 0x8913, 0x8921, 0x8915, 0x891B


def nics() -> list[dict[str, Any]]:
    """Every interface with an address, or with hardware behind it."""
    try:
        names = socket.if_nameindex()
    except OSError:
        return []
    addresses = _addresses()
    routes = _default_routes()
    found = [_nic(index, name, addresses, routes) for index, name in names]
    return [nic for nic in found if nic["addresses"] or nic["driver"]]


def _nic(index: int, name: str, addresses: dict[int, list[str]] | None, routes: set[str]) -> dict[str, Any]:
    folder = f"/sys/class/net/{name}"
    if procfs.read_int(f"{folder}/ifindex") != index:
        folder = "/nonexistent"  # the sysfs of another network namespace
    flags = _ioctl(name, SIOCGIFFLAGS, "H") or 0
    state = procfs.read_text(f"{folder}/operstate")
    speed = procfs.read_int(f"{folder}/speed")
    rdma = _names(f"{folder}/device/infiniband")
    own = addresses.get(index, []) if addresses is not None else _first_address(name)
    return {
        "name": name,
        "kind": _kind(folder, name, own),
        "up": state != "down" and bool(flags & FLAG_UP and flags & FLAG_RUNNING),
        "addresses": own,
        "speed_bits_per_s": speed * 10**6 if speed and speed > 0 else None,
        "mtu": procfs.read_int(f"{folder}/mtu") or _ioctl(name, SIOCGIFMTU, "i"),
        "driver": _link_name(f"{folder}/device/driver"),
        "rdma_device": rdma[0] if rdma else None,
        "default_route": name in routes,
    }


def _kind(folder: str, name: str, addresses: list[str]) -> str:
    hardware = procfs.read_int(f"{folder}/type")
    if hardware == HARDWARE_LOOPBACK or name == "lo" or any(one.startswith("127.") for one in addresses):
        return "loopback"
    if hardware == HARDWARE_INFINIBAND:
        return "infiniband"
    if os.path.exists(f"{folder}/wireless") or os.path.exists(f"{folder}/phy80211"):
        return "wireless"
    bonded = os.path.exists(f"{folder}/bonding")
    return "ethernet" if bonded or os.path.exists(f"{folder}/device") else "virtual"


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _link_name(path: str) -> str | None:
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None


def _ioctl(name: str, request: int, kind: str) -> int | None:
    """One number of an interface."""
    answer = _raw_ioctl(name, request)
    return None if answer is None else int(struct.unpack_from(kind, answer, 16)[0])


def _raw_ioctl(name: str, request: int) -> bytes | None:
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return fcntl.ioctl(probe.fileno(), request, struct.pack("16s240x", name.encode()[:15]))
    return None


def _first_address(name: str) -> list[str]:
    """The one IPv4 address that ioctl tells, where netlink is not to be had."""
    address, mask = _raw_ioctl(name, SIOCGIFADDR), _raw_ioctl(name, SIOCGIFNETMASK)
    if address is None or mask is None:
        return []
    bits = bin(int.from_bytes(mask[20:24], "big")).count("1")
    return [f"{socket.inet_ntoa(address[20:24])}/{bits}"]


def _addresses() -> dict[int, list[str]] | None:
    """Addresses with their prefix by interface index; None where netlink is not to be had."""
    found: dict[int, list[str]] = {}
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as link:
            link.settimeout(2.0)
            link.send(struct.pack("=IHHII", 24, RTM_GETADDR, REQUEST_DUMP, 1, 0) + bytes(8))
            while True:
                data = link.recv(1 << 18)
                if _take(data, found):
                    return found
    except (OSError, AttributeError, struct.error):
        return None


def _take(data: bytes, found: dict[int, list[str]]) -> bool:
    """Read the messages of one packet; True after the last one."""
    place = 0
    while place + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, place)
        if kind in (NLMSG_DONE, NLMSG_ERROR) or length < 16:
            return True
        if kind == RTM_NEWADDR:
            _take_address(data[place + 16 : place + length], found)
        place += (length + 3) & ~3
    return False


def _take_address(message: bytes, found: dict[int, list[str]]) -> None:
    family, prefix, flags, _, index = struct.unpack_from("=BBBBI", message)
    if flags & TENTATIVE_OR_FAILED or family not in (socket.AF_INET, socket.AF_INET6):
        return
    values: dict[int, bytes] = {}
    place = 8
    while place + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, place)
        if length < 4:
            break
        values[kind] = message[place + 4 : place + length]
        place += (length + 3) & ~3
    raw = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS)
    if raw:
        found.setdefault(index, []).append(f"{socket.inet_ntop(family, raw)}/{prefix}")


def _default_routes() -> set[str]:
    """Interfaces that hold a default route, IPv4 or IPv6."""
    rows = [line.split() for line in (procfs.read_text("/proc/net/route") or "").splitlines()[1:]]
    found = {row[0] for row in rows if row[1:2] == ["00000000"] and row[7:8] == ["00000000"]}
    rows = [line.split() for line in (procfs.read_text("/proc/net/ipv6_route") or "").splitlines()]
    return found | {row[9] for row in rows if len(row) > 9 and row[0] == "0" * 32 and row[1] == "00" and row[9] != "lo"}


def rdma_ports(root: str = "/sys/class/infiniband") -> list[dict[str, Any]]:
    """Every port of every InfiniBand or RoCE device; the rate is its text, "400 Gb/sec (4X NDR)", in bits/s."""
    found = []
    for device in _names(root):
        for port in _names(f"{root}/{device}/ports"):
            folder = f"{root}/{device}/ports/{port}"
            rate = re.match(r"([\d.]+)\s*Gb", procfs.read_text(f"{folder}/rate") or "")
            state = procfs.read_text(f"{folder}/state")
            found.append(
                {
                    "device": device,
                    "port": int(port) if port.isdecimal() else 0,
                    "link_layer": procfs.read_text(f"{folder}/link_layer"),
                    "state": state.partition(":")[2].strip() or state if state else None,
                    "rate_bits_per_s": round(float(rate[1]) * 10**9) if rate else None,
                }
            )
    return found
