"""Hosts for tests: network namespaces with their own addresses, host names, processes, boot ids and a real sshd.

A switch namespace joins the hosts and this machine (the controller). Each host is a network, PID, mount, UTS and IPC
namespace whose PID 1 reaps orphans, so `reboot` and `close` leave nothing behind, also when the test process is killed.
Users are those of this machine; each host has a HOME of its own. Needs root, iproute2, util-linux and openssh-server.

    with network("h1", "h2", "h3", folder=tmp_path) as hosts:
        hosts.drop_link("h2")
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.netns_host import PATH, SSHD, NetHost
from tests.netns_wire import NETNS_ETC, Switch, command, remove_namespace, wait_for

__all__ = ["NETNS_ETC", "PATH", "NetHost", "Network", "network", "three_hosts", "why_not"]

TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "mount")

_serial = itertools.count()


def why_not() -> str | None:
    """Why such hosts cannot be had here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or not Path(SSHD).exists():
        return f"not installed: {', '.join(missing) or 'openssh-server'}"
    probe = ["unshare", "--net", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"namespaces are not permitted here: {done.stderr.strip()}" if done.returncode else None


class Network:
    """The hosts and this machine's way to them. `ssh_config`, `known_hosts` and `key` are the client's files."""

    def __init__(
        self, names: Sequence[str], folder: Path, environment: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        self.folder = folder
        self.ssh_config, self.known_hosts, self.key = folder / "ssh_config", folder / "known_hosts", folder / "id_ed25519"
        self.tag = f"gp{os.getpid():x}x{next(_serial)}"
        self._switch = Switch(self.tag)
        self._timers: list[threading.Timer] = []
        public = folder / "id_ed25519.pub"
        self.hosts = {name: NetHost(name, f"{self.tag}-{name}", folder / name, public) for name in names}
        for name, found in (environment or {}).items():
            self.hosts[name].environment = dict(found)

    @property
    def names(self) -> str:
        """The hosts as `--hosts` takes them."""
        return ",".join(self.hosts)

    @property
    def controller_address(self) -> str:
        """This machine's address on the switch."""
        return f"{self._switch.prefix}.254"

    def __getitem__(self, name: str) -> NetHost:
        return self.hosts[name]

    def run(
        self, name: str, argv: Sequence[str], check: bool = True, stdin: str = "", timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host, past sshd, with the environment that its sessions have."""
        host = self.hosts[name]
        return subprocess.run(
            [*host.enter, *argv],
            env=host.session_environment,
            cwd=host.home,
            input=stdin,
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout_s,
        )

    def pids(self, name: str) -> dict[int, str]:
        """What runs on the host besides PID 1 and sshd: pid as this machine counts -> command line."""
        return {pid: words for pid, words in self.hosts[name].processes().items() if not words.startswith(("sshd", SSHD))}

    def drop_link(self, name: str) -> None:
        """Pull the host's cable."""
        self._switch.set(self.hosts[name].address, "down")

    def restore_link(self, name: str) -> None:
        """Put the cable back; it takes a second or two until frames pass."""
        self._switch.set(self.hosts[name].address, "up")

    def stop_sshd(self, name: str, sessions: bool = False) -> None:
        """End the SSH service (and its open sessions): new connections are refused."""
        self.hosts[name].stop_sshd(sessions)

    def start_sshd(self, name: str) -> None:
        """Start the SSH service."""
        self.hosts[name].start_sshd()

    def mute_sshd(self, name: str) -> None:
        """Replace the SSH service by one that accepts and never answers; `start_sshd` ends that."""
        self.stop_sshd(name)
        self.mute(name, 22)

    def mute(self, name: str, tcp_port: int) -> None:
        """Start a service that accepts on this port and never answers; `unmute` ends it."""
        self.hosts[name].mute(tcp_port)

    def unmute(self, name: str) -> None:
        """End the services that never answer."""
        self.hosts[name].unmute()

    def change_host_key(self, name: str, kind: str = "ed25519") -> None:
        """Give the host another key; known_hosts keeps the old one."""
        self.stop_sshd(name)
        for old in self.hosts[name].folder.glob("host_key_*"):
            old.unlink()
        self.hosts[name].new_host_key(kind)
        self.start_sshd(name)

    def add_host_key(self, name: str, kind: str) -> str:
        """Give the host one more key; returns its `TYPE BASE64`."""
        self.stop_sshd(name)
        line = self.hosts[name].new_host_key(kind)
        self.start_sshd(name)
        return line

    def set_environment(self, name: str, environment: Mapping[str, str]) -> None:
        """Change what new sessions find in their environment."""
        self.hosts[name].environment = dict(environment)
        self.stop_sshd(name)
        self.start_sshd(name)

    def later(self, seconds: float, work: Callable[..., None], *words: Any) -> threading.Timer:
        """Do one of these things in so many seconds, from a thread that `close` waits for: it must not outlive its host."""
        timer = threading.Timer(seconds, work, words)
        self._timers.append(timer)
        timer.start()
        return timer

    def once(self, name: str, words: str, work: Callable[..., None], *more: Any) -> threading.Timer:
        """Do one of these things as soon as this command runs on the host."""

        def wait_and_work() -> None:
            wait_for(f"{words} on {name}", lambda: words in self.pids(name).values())
            work(*more)

        return self.later(0.0, wait_and_work)

    def small_disk(self, name: str, size_bytes: int) -> None:
        """Put the host's state on a disk of this size, until it reboots."""
        state = self.hosts[name].state
        state.mkdir(parents=True, exist_ok=True)
        self.run(name, ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs", str(state)])

    def kill_all(self, name: str) -> None:
        """Switch the host off: every process there is killed at once."""
        self.hosts[name].off()

    def boot(self, name: str) -> None:
        """Switch the host on, with a new boot id, and start sshd."""
        self.hosts[name].boot()

    def reboot(self, name: str) -> None:
        """Off and on again: state on disk stays, processes and boot id do not."""
        self.kill_all(name)
        self.boot(name)

    def open(self) -> None:
        """Build everything."""
        self.folder.mkdir(parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "controller", "-f", self.key)
        self._switch.open()
        for number, host in enumerate(self.hosts.values(), start=1):
            host.address = self._switch.plug(host.namespace, number)
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
        for host in self.hosts.values():
            etc = NETNS_ETC / host.namespace
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            host.home.mkdir(parents=True)
            with self.known_hosts.open("a") as out:
                out.write(f"{host.address} {host.new_host_key('ed25519')}\n")
            host.boot()
        self._write_ssh_config()

    def close(self) -> None:
        """Remove everything; safe to call when half of it was built."""
        for timer in self._timers:
            timer.join()
        for host in self.hosts.values():
            host.off()
        self._switch.close()
        for host in self.hosts.values():
            remove_namespace(host.namespace)

    def _write_ssh_config(self) -> None:
        blocks = [f"Host {host.name}\n  HostName {host.address}\n" for host in self.hosts.values()]
        blocks.append(
            f"Host *\n  User root\n  IdentityFile {self.key}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.known_hosts}\n"
            "  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  BatchMode yes\n"
        )
        self.ssh_config.write_text("".join(blocks))


@contextmanager
def network(*names: str, folder: Path, environment: Mapping[str, Mapping[str, str]] | None = None) -> Iterator[Network]:
    """Hosts of these names, removed at the end whatever happens. `environment` is per host."""
    hosts = Network(names, folder, environment)
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()


@pytest.fixture(scope="module")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """h1, h2 and h3 for a module's tests, or a skip with the reason."""
    if reason := why_not():
        pytest.skip(reason)
    with network("h1", "h2", "h3", folder=tmp_path_factory.mktemp("net")) as hosts:
        yield hosts
