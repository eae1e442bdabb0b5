"""The cables of the test network: a switch namespace, the link to this machine, and one link per host."""

from __future__ import annotations

import fcntl
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NETNS_ETC = Path("/etc/netns")
"""What `ip netns exec` lays over /etc, per namespace."""


def command(*argv: object) -> str:
    """A command's output; its failure is an error with its words."""
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def quiet(words: str) -> None:
    """A command that may fail."""
    subprocess.run(words.split(), capture_output=True, check=False, timeout=120)


def ip(words: str) -> str:
    """One line of iproute2."""
    return command("ip", *words.split())


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until it is so, mostly for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


class Switch:
    """A bridge in a namespace of its own, so that no firewall of this machine sees what hosts say to each other."""

    def __init__(self, tag: str) -> None:
        self.namespace, self.link = f"{tag}-sw", f"{tag}c"
        self.prefix = ""

    def open(self) -> None:
        """Build it, with a link to this machine, on a /24 that nothing here uses."""
        with _machine_lock():
            _sweep()
            self.prefix = _free_prefix()
            ip(f"netns add {self.namespace}")
            ip(f"link add {self.link} type veth peer name uplink netns {self.namespace}")
            ip(f"addr add {self.prefix}.254/24 dev {self.link}")
        ip(f"link set {self.link} up")
        ip(f"-n {self.namespace} link add br0 type bridge")
        ip(f"-n {self.namespace} link set br0 up")
        ip(f"-n {self.namespace} link set uplink master br0 up")

    def plug(self, namespace: str, number: int) -> str:
        """Make a host's namespace and plug it in; returns its address."""
        ip(f"netns add {namespace}")
        ip(f"-n {namespace} link set lo up")
        ip(f"-n {self.namespace} link add p{number} type veth peer name eth0 netns {namespace}")
        ip(f"-n {self.namespace} link set p{number} master br0 up")
        ip(f"-n {namespace} addr add {self.prefix}.{number}/24 dev eth0")
        ip(f"-n {namespace} link set eth0 up")
        return f"{self.prefix}.{number}"

    def set(self, address: str, state: str) -> None:
        """Pull ("down") or plug ("up") the cable of the host with this address."""
        ip(f"-n {self.namespace} link set p{address.rsplit('.', 1)[1]} {state}")

    def close(self) -> None:
        """Remove it; safe when it was never built."""
        quiet(f"ip link del {self.link}")
        remove_namespace(self.namespace)


def remove_namespace(name: str) -> None:
    """Remove a namespace and its files."""
    quiet(f"ip netns del {name}")
    shutil.rmtree(NETNS_ETC / name, ignore_errors=True)


@contextmanager
def _machine_lock() -> Iterator[None]:
    with (Path(tempfile.gettempdir()) / "glmplan-netns.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _free_prefix() -> str:
    """The first three numbers of a /24 that no route here names."""
    taken = ip("-4 route show table all") + ip("-4 -o addr")
    chooser = random.SystemRandom()
    while True:
        prefix = f"10.{chooser.randrange(64, 250)}.{chooser.randrange(1, 255)}"
        if f"{prefix}." not in taken:
            return prefix


def _sweep() -> None:
    """Remove what killed test processes left: empty namespaces that name a process which is gone."""
    for line in ip("netns list").splitlines():
        name = line.split()[0]
        part = re.fullmatch(r"gp([0-9a-f]+)x[0-9]+-.*", name)
        if part and not Path(f"/proc/{int(part[1], 16)}").exists() and _is_empty(name):
            quiet(f"ip link del {name.split('-')[0]}c")
            remove_namespace(name)


def _is_empty(namespace: str) -> bool:
    """Whether it is there and nothing runs in it; its own process may have removed it since it was listed."""
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False, timeout=120)
    return done.returncode == 0 and not done.stdout.strip()
