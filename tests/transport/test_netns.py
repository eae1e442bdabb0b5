"""The hosts of the tests are as separate as they claim, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import netns
from tests.netns import Network
from tests.netns_wire import wait_for

pytestmark = pytest.mark.skipif(netns.why_not() is not None, reason=str(netns.why_not()))


def ssh(hosts: Network, name: str, command: str, connect_s: int = 30) -> subprocess.CompletedProcess[str]:
    """A command through ssh itself."""
    argv = ["ssh", "-F", str(hosts.ssh_config), "-o", f"ConnectTimeout={connect_s}", name, command]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)


def remains(tag: str) -> str:
    """What of a network is still there."""
    listed = [
        subprocess.run(words, capture_output=True, text=True, check=True).stdout
        for words in (["ip", "netns"], ["ip", "link"])
    ]
    folders = " ".join(path.name for path in netns.NETNS_ETC.glob("*")) if netns.NETNS_ETC.exists() else ""
    return "\n".join(line for line in "\n".join([*listed, folders]).splitlines() if tag in line)


def test_each_host_is_itself(three_hosts: Network) -> None:
    """Name, home, address, boot id and processes; they reach each other by name."""
    for name in ("h1", "h2", "h3"):
        words = ssh(
            three_hosts, name, "hostname; echo $HOME; cat /proc/sys/kernel/random/boot_id; ip -o -4 addr"
        ).stdout.split()
        assert words[0] == name
        assert Path(words[1]) == three_hosts[name].home
        assert f"{three_hosts[name].address}/24" in words
        assert three_hosts.run(name, ["hostname"]).stdout == f"{name}\n"
    boots = {ssh(three_hosts, name, "cat /proc/sys/kernel/random/boot_id").stdout for name in three_hosts.hosts}
    assert len(boots) == 3
    reach = "import socket; socket.create_connection(('h3', 22), 20)"
    assert three_hosts.run("h2", ["python3", "-c", reach]).returncode == 0


def test_processes_of_one_host(one_host: Network) -> None:
    """They are seen from here, not from another host, and end with the host."""
    ssh(one_host, "h1", "setsid sleep 77 >/dev/null 2>&1 </dev/null &")
    wait_for("sleep to be alone", lambda: list(one_host.pids("h1").values()) == ["sleep 77"])
    assert "netns" not in ssh(one_host, "h1", "cat /proc/*/cmdline").stdout
    pid = next(iter(one_host.pids("h1")))
    before = ssh(one_host, "h1", "cat /proc/sys/kernel/random/boot_id").stdout
    one_host.reboot("h1")
    assert not Path(f"/proc/{pid}").exists()
    assert ssh(one_host, "h1", "cat /proc/sys/kernel/random/boot_id").stdout not in ("", before)


def test_orphans_are_reaped(one_host: Network) -> None:
    """No zombies under PID 1."""
    ssh(one_host, "h1", "(sh -c 'sleep 0.05 &' &)")
    wait_for("no orphan", lambda: not one_host.pids("h1"))
    wait_for("no zombie", lambda: ") Z " not in one_host.run("h1", ["sh", "-c", "cat /proc/[0-9]*/stat"], False).stdout)


def test_environment_and_disk(one_host: Network) -> None:
    """What a host is given."""
    one_host.set_environment("h1", {"WORDS": "a b", "PATH": netns.PATH})
    assert ssh(one_host, "h1", "echo $WORDS").stdout == "a b\n"
    one_host.small_disk("h1", 1 << 16)
    assert ssh(one_host, "h1", "head -c 200000 /dev/zero > ~/.local/state/glmplan/x").returncode != 0


def test_links_and_services(one_host: Network) -> None:
    """Down and up again."""
    one_host.drop_link("h1")
    assert ssh(one_host, "h1", "true", 2).returncode == 255
    one_host.restore_link("h1")
    wait_for("the link", lambda: ssh(one_host, "h1", "true", 5).returncode == 0)
    for stop in (one_host.stop_sshd, one_host.mute_sshd):
        stop("h1")
        assert ssh(one_host, "h1", "true", 2).returncode == 255
        one_host.start_sshd("h1")
        assert ssh(one_host, "h1", "true").returncode == 0


def fail_inside(folder: Path, seen: list[str]) -> None:
    """A test that fails while its hosts are up."""
    with netns.network("a", "b", folder=folder) as hosts:
        assert remains(hosts.tag)
        seen.append(hosts.tag)
        raise ZeroDivisionError


def test_nothing_remains(tmp_path: Path) -> None:
    """Also when the test in it fails."""
    tags: list[str] = []
    with pytest.raises(ZeroDivisionError):
        fail_inside(tmp_path / "net", tags)
    assert remains(tags[0]) == ""


def test_a_killed_test_process_leaves_no_process(tmp_path: Path) -> None:
    """Its hosts end with it; the next network removes the names."""
    program = (
        "import sys, time; from pathlib import Path; from tests import netns\n"
        "with netns.network('a', folder=Path(sys.argv[1])) as hosts:\n"
        "    print(hosts.tag, hosts['a'].init_pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "net"], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        tag, pid = process.stdout.readline().split()
        os.kill(process.pid, signal.SIGKILL)
    wait_for("its host to end", lambda: not Path(f"/proc/{pid}").exists())
    end = time.monotonic() + 30
    while remains(tag) and time.monotonic() < end:
        with netns.network("b", folder=tmp_path / f"other{time.monotonic_ns()}"):
            pass
    assert remains(tag) == ""
