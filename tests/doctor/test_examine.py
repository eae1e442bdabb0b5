"""`glmplan doctor` over real sshd on three hosts with their own addresses: every fault is set up for real."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmplan.doctor import deep_run
from glmplan.doctor.checks import chosen
from glmplan.doctor.examine import Visit, examine
from glmplan.fleet.hosts import Fleet
from glmplan.transport.base import parse_hosts
from glmplan.transport.open import SshOptions
from tests.doctor.torch_python import needs_torch, torch_python
from tests.netns import Network, three_hosts

__all__ = ["three_hosts"]

QUICK_S = 15.0
"""About 1.5 s where nothing else runs; every limit of the product that could be waited for is longer than the rest."""


class Doctor:
    """The command line with its own HOME, against a network."""

    def __init__(self, hosts: Network, home: Path) -> None:
        self.hosts = hosts
        self._environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(home), "XDG_STATE_HOME": str(home / "state"),
            "GLMPLAN_SSH_CONFIG": str(hosts.ssh_config), "COLUMNS": "160",
        }  # fmt: skip

    def run(self, *arguments: str, names: str = "h1,h2,h3") -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        command = [sys.executable, "-m", "glmplan", "doctor", "--hosts", names, *arguments]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False, timeout=300)

    def findings(self, *arguments: str, code: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
        """Its report by check and host."""
        done = self.run("--json", *arguments)
        assert done.returncode == code, done.stderr + done.stdout
        return {(one["check"], one["host"]): one for one in json.loads(done.stdout)["findings"]}


@pytest.fixture
def doctor(three_hosts: Network, tmp_path: Path) -> Iterator[Doctor]:
    """The doctor; rules and links of the hosts are as before at the end."""
    yield Doctor(three_hosts, tmp_path)
    for name in three_hosts.hosts:
        three_hosts.restore_link(name)
        three_hosts.run(name, ["sh", "-c", "command -v iptables >/dev/null && iptables -F INPUT || true"])


def no_process_is_left(hosts: Network, within_s: float = 40.0) -> bool:
    """Whether the hosts are idle again in time."""
    deadline = time.monotonic() + within_s
    while any(hosts.pids(name) for name in hosts.hosts) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(hosts.pids(name) for name in hosts.hosts)


def test_three_hosts_are_judged_in_seconds(doctor: Doctor) -> None:
    doctor.run("--only", "reachable")  # what the first start compiles is not the hosts' time
    done = doctor.run("--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["elapsed_s"] < QUICK_S
    found = {(one["check"], one["host"]): one for one in report["findings"]}
    for name in ("h1", "h2", "h3"):
        assert found["paths", name]["status"] == "ok"
        assert "reached from 2 hosts on port 20000, ephemeral port" in found["paths", name]["evidence"]
        assert f"eth0 {doctor.hosts[name].address}" in found["interface", name]["evidence"]
        assert found["clock", name]["status"] == "ok"
        assert found["hostname", name]["status"] == "ok"
    assert found["mtu", "all hosts"]["status"] == "ok"
    assert no_process_is_left(doctor.hosts)


def test_nothing_is_written_on_the_hosts(doctor: Doctor) -> None:
    doctor.run()
    for name in doctor.hosts.hosts:
        assert [path for path in doctor.hosts[name].home.rglob("*") if path.is_file()] == []


def test_people_see_hosts_evidence_and_repairs(doctor: Doctor) -> None:
    out = doctor.run().stdout
    assert [line for line in out.splitlines() if line in ("h1", "h2", "h3", "all hosts")] == ["h1", "h2", "h3", "all hosts"]
    assert "  warn  engine         no Python with SGLang or vLLM was found" in out
    assert "repair on h2: python3 -m venv" in out
    assert out.splitlines()[-1].startswith("3 hosts in ")


def test_a_dropped_port_is_named_with_both_ends(doctor: Doctor) -> None:
    if doctor.hosts.run("h2", ["sh", "-c", "command -v iptables && iptables -L -n"], check=False).returncode:
        pytest.skip("needs iptables")
    doctor.hosts.run("h2", ["iptables", "-A", "INPUT", "-p", "tcp", "--dport", "32768:60999", "--syn", "-j", "DROP"])
    doctor.hosts.run("h3", ["iptables", "-A", "INPUT", "-p", "tcp", "--dport", "20000", "-j", "REJECT"])
    found = doctor.findings("--only", "paths", code=1)
    assert found["paths", "h1"]["status"] == "ok"
    evidence = found["paths", "h2"]["evidence"]
    assert f"h1 to {doctor.hosts['h2'].address}:" in evidence
    assert "(ephemeral) silent" in evidence
    assert ":20000" not in evidence
    assert f"h2 to {doctor.hosts['h3'].address}:20000 refused" in found["paths", "h3"]["evidence"]
    assert "let TCP 20000 and 32768-60999 in from h1 h2" in found["paths", "h3"]["repair"]
    assert no_process_is_left(doctor.hosts)


def test_a_port_in_use_names_the_process(doctor: Doctor) -> None:
    doctor.hosts.mute("h1", 20000)
    try:
        found = doctor.findings("--only", "ports,paths", code=1)
        assert "rendezvous 20000 on all interfaces: taken by pid" in found["ports", "h1"]["evidence"]
        assert found["ports", "h2"]["status"] == "ok"
        assert found["paths", "h1"]["status"] == "ok"  # what holds the port is reached
    finally:
        doctor.hosts.unmute("h1")


def test_a_host_that_is_down_is_told_and_the_others_are_judged(doctor: Doctor) -> None:
    doctor.hosts.drop_link("h2")
    began = time.monotonic()
    found = doctor.findings("--only", "reachable,paths", code=5)
    assert time.monotonic() - began < 20
    assert found["reachable", "h2"]["status"] == "fail"
    assert found["reachable", "h2"]["repair"]
    assert found["paths", "h1"]["evidence"].startswith("reached from 1 host on")
    assert found["paths", "h3"]["status"] == "ok"


@needs_torch
def test_an_all_reduce_over_three_hosts(doctor: Doctor) -> None:
    found = doctor.findings("--deep", "--only", "all-reduce,links", "--engine-python", torch_python())
    assert "3 ranks, gloo on the CPUs, right by value" in found["all-reduce", "all hosts"]["evidence"]
    for name in ("h1", "h2", "h3"):
        assert "2 links to other hosts" in found["links", name]["evidence"]
    assert no_process_is_left(doctor.hosts)


@needs_torch
def test_a_closed_firewall_fails_the_all_reduce_with_torchs_words(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    if doctor.hosts.run("h1", ["sh", "-c", "command -v iptables && iptables -L -n"], check=False).returncode:
        pytest.skip("needs iptables")
    doctor.hosts.run("h1", ["iptables", "-A", "INPUT", "-i", "eth0", "-p", "tcp", "--dport", "20000", "-j", "REJECT"])
    monkeypatch.setattr(deep_run, "JOIN_S", 5.0)
    visit = Visit(chosen("all-reduce", with_deep=True), engine_pythons=(torch_python(),), deep=True)
    with Fleet(parse_hosts("h1,h2,h3"), SshOptions(config=str(doctor.hosts.ssh_config))) as hosts:
        report = examine(hosts, visit)
    assert (report.exit_code, report.count("fail")) == (1, 1)
    evidence = report.findings[0].evidence
    assert "h1 rank 0: DistStoreError: Timed out" in evidence
    assert "1/3 clients joined" in evidence
    assert "h2 rank 1: DistNetworkError: The client socket has" in evidence
    assert no_process_is_left(doctor.hosts)
