"""`glmplan probe --hosts` and `size --hosts` over real SSH: three hosts, each with a driver and addresses of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from glmplan.facts.inventory import read_inventory
from glmplan.probe.remote import ProbeReport
from tests import fake_nvidia_smi, fake_nvml_build, netns
from tests.netns import Network
from tests.netns_wire import wait_for

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("LD_LIBRARY_PATH", "FAKE_NVML_FACTS", "FAKE_NVML_CALLS", "PYTHONPATH", "PATH")


def driver(folder: Path, machine: str, through: str) -> dict[str, str]:
    """What a host's sessions need to see these GPUs, through pynvml or through nvidia-smi."""
    folder.mkdir()
    if through == "nvidia-smi":
        found = fake_nvidia_smi.environment(folder, machine)
        found["PATH"] = f"{folder}:{netns.PATH}"
    else:
        fake_nvml_build.build(folder)
        (folder / "pynvml.py").write_text(Path(pynvml.__file__).read_text())
        found = {**fake_nvml_build.environment(folder, machine), "PYTHONPATH": str(folder), "PATH": netns.PATH}
    return {name: found[name] for name in NEEDED if name in found}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """h1 and h2 with two H200 each, read in the two ways; h3 with eight RTX 4090."""
    if reason := netns.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    environment = {
        "h1": driver(folder / "nvml1", "two-h200", "pynvml"),
        "h2": driver(folder / "smi", "two-h200", "nvidia-smi"),
        "h3": driver(folder / "nvml3", "eight-4090-48g", "pynvml"),
    }
    (folder / "net").mkdir()
    with netns.network("h1", "h2", "h3", folder=folder / "net", environment=environment) as network:
        yield network


def run(hosts: Network, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GLMPLAN_SSH_CONFIG": str(hosts.ssh_config), "COLUMNS": "140"}
    environment.pop("SSH_AUTH_SOCK", None)
    command = [sys.executable, "-W", "error", "-m", "glmplan", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def probe(hosts: Network, *arguments: str) -> ProbeReport:
    ran = run(hosts, "probe", "--json", *arguments)
    assert ran.stdout, ran.stderr
    return ProbeReport.model_validate_json(ran.stdout)


def test_every_host_tells_its_own_gpus_and_address(hosts: Network) -> None:
    first, second, third = probe(hosts, "--hosts", hosts.names).hosts
    assert [gpu.name for gpu in first.gpus] == [gpu.name for gpu in second.gpus] == ["NVIDIA H200"] * 2
    assert first.nvml_version
    assert second.nvml_version is None
    assert [gpu.profile for gpu in third.gpus] == ["rtx-4090-48g"] * 8
    assert [host.address for host in (first, second, third)] == [hosts[name].address for name in ("h1", "h2", "h3")]
    assert set(first.network) == {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    assert first.system is not None
    assert third.system is not None
    assert first.system.boot_id != third.system.boot_id
    assert first.system.clock_offset_s is not None
    assert first.system.clock_error_s is not None
    assert abs(first.system.clock_offset_s) <= first.system.clock_error_s + 0.1


def test_three_hosts_are_probed_in_seconds(hosts: Network) -> None:
    """About 1.5 s where nothing else runs."""
    begin = time.monotonic()
    assert run(hosts, "probe", "--hosts", hosts.names).returncode == 0
    assert time.monotonic() - begin < 15


def test_the_screen_names_every_host(hosts: Network) -> None:
    out = run(hosts, "probe", "--hosts", hosts.names).stdout
    for name in ("h1", "h2", "h3"):
        assert name in out
        assert hosts[name].address in out


def test_a_saved_inventory_sizes_as_the_hosts_do(hosts: Network, tmp_path: Path) -> None:
    path = tmp_path / "inventory.toml"
    report = probe(hosts, "--hosts", "h1,h2", "--save", str(path))
    assert read_inventory(path).hosts == report.hosts
    arguments = ("--checkpoint", "awq-int4", "--context", "8k", "--json")
    saved, asked = (
        json.loads(run(hosts, "size", *source, *arguments).stdout)
        for source in (("--inventory", str(path)), ("--hosts", "h1,h2"))
    )
    assert saved["ranks"] == asked["ranks"]
    assert saved["nodes"] == asked["nodes"]
    assert asked["nodes"][0]["address"] == hosts["h1"].address


def test_one_host_that_is_down_hides_none_of_the_others(hosts: Network) -> None:
    hosts.stop_sshd("h2")
    try:
        ran = run(hosts, "probe", "--hosts", hosts.names, "--json")
        sized = run(hosts, "size", "--hosts", hosts.names)
    finally:
        hosts.start_sshd("h2")
    report = ProbeReport.model_validate_json(ran.stdout)
    assert ran.returncode == sized.returncode == 5
    assert [host.name for host in report.hosts] == ["h1", "h3"]
    assert [failure.name for failure in report.failures] == ["h2"]
    assert "1 of 3 hosts failed: h2." in sized.stderr


def test_a_probe_leaves_nothing_behind(hosts: Network) -> None:
    before = {name: sorted(path for path in hosts[name].home.rglob("*")) for name in hosts.hosts}
    assert run(hosts, "probe", "--hosts", hosts.names).returncode == 0
    assert before == {name: sorted(path for path in hosts[name].home.rglob("*")) for name in hosts.hosts}
    wait_for("its processes to end", lambda: not any(hosts.pids(name) for name in hosts.hosts))
