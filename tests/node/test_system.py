"""What the node program says about a host around its GPUs; nothing it says may hold a secret."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glmplan.node import procfs, system

ROOT = Path(__file__).parents[2]


def test_the_user_the_system_and_the_cpus_are_told() -> None:
    found = system.identity()
    assert found["kernel_version"] == os.uname().release
    assert found["cpu_count"] == len(os.sched_getaffinity(0))
    assert found["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(r"[0-9a-f-]{36}", found["boot_id"] or "")


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(system.getpass, "getuser", nameless)
    assert system.identity()["user"] == str(os.getuid())


def test_memory_limits_and_ports() -> None:
    found = system.memory_and_limits()
    assert 0 < found["memory_available_bytes"] <= procfs.memory()["MemTotal"]
    assert 0 <= found["swap_used_bytes"] <= found["swap_total_bytes"]
    assert found["shared_memory_free_bytes"] <= found["shared_memory_total_bytes"]
    low, high = found["ephemeral_ports"]
    assert 0 < low < high < 65536
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert found["limits"]["open_files"] == (None if hard == resource.RLIM_INFINITY else hard)


def test_an_unreadable_proc_is_unknown_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "read_text", lambda path: None)
    assert system.memory_and_limits()["memory_available_bytes"] is None
    assert system.memory_and_limits()["ephemeral_ports"] is None
    assert system.identity()["boot_id"] is None
    assert system.identity()["virtual_machine"] is None
    assert system.pcie()["acs_bridges"] is None


def test_variables_that_change_engines_are_told_and_secrets_never(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "VLLM_API_KEY", "SGLANG_API_KEY", "HF_KEY", "CUDA_SECRET", "HF_HUB_PASSWORD", "MY_OWN", "PATH"):
        monkeypatch.setenv(name, "planted-secret")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth9")
    monkeypatch.setenv("HF_HOME", "/cache")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:planted-secret@mirror.example/x")
    monkeypatch.setenv("PYTHONPATH", "x" * 900)
    found = system.variables()
    assert (found["NCCL_SOCKET_IFNAME"], found["HF_HOME"]) == ("eth9", "/cache")
    assert len(found["PYTHONPATH"]) == 500
    assert found["HF_ENDPOINT"] == "https://***@mirror.example/x"
    assert "planted-secret" not in str(found)
    assert "PATH" not in found


def test_the_hosts_own_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.platform, "node", lambda: "localhost")
    assert {"127.0.0.1", "::1"} & set(system.hostname_addresses())
    monkeypatch.setattr(system.platform, "node", lambda: "no-such-host.invalid")
    assert system.hostname_addresses() == []


def test_a_resolver_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()
    monkeypatch.setattr(system.socket, "getaddrinfo", lambda *arguments, **options: release.wait(10) and [])
    monkeypatch.setattr(system, "NAME_LOOKUP_S", 0.05)
    assert system.hostname_addresses() == []
    release.set()


def configuration_space(*capabilities: tuple[int, int]) -> bytes:
    """4 KiB with extended capabilities (id, control word) in a chain from 0x100."""
    space = bytearray(4096)
    for number, (kind, control) in enumerate(capabilities):
        place = 0x100 + 0x40 * number
        following = place + 0x40 if number + 1 < len(capabilities) else 0
        space[place : place + 4] = (kind | 1 << 16 | following << 20).to_bytes(4, "little")
        space[place + 6 : place + 8] = control.to_bytes(2, "little")
    return bytes(space)


@pytest.mark.parametrize(
    ("capabilities", "redirects"),
    [
        ([], False),
        ([(0x01, 0xFFFF)], False),
        ([(0x01, 0), (0x0D, 0b1101)], True),
        ([(0x0D, 0b0100), (0x01, 0)], True),
        ([(0x0D, 0b0010)], False),
        ([(0x0D, 0)], False),
    ],
)
def test_acs_is_read_from_the_control_word(capabilities: list[tuple[int, int]], redirects: bool) -> None:
    assert system.acs_redirects(configuration_space(*capabilities)) is redirects


@pytest.mark.parametrize("space", [bytes(4096), b"\xff" * 4096, bytes(256), configuration_space((1, 0))[:0x102]])
def test_an_empty_or_short_configuration_space_redirects_nothing(space: bytes) -> None:
    assert system.acs_redirects(space) is False


def test_a_chain_of_capabilities_that_loops_ends() -> None:
    space = bytearray(configuration_space((1, 0)))
    space[0x100:0x104] = (1 | 1 << 16 | 0x100 << 20).to_bytes(4, "little")
    assert system.acs_redirects(bytes(space)) is False


def bridge(root: Path, name: str, kind: str, space: bytes) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "class").write_text(kind)
    (folder / "config").write_bytes(space)


def test_only_bridges_with_acs_on_are_counted(tmp_path: Path) -> None:
    on, off = configuration_space((0x0D, 0b1101)), configuration_space((0x0D, 0))
    bridge(tmp_path, "0000:00:01.0", "0x060400", on)
    bridge(tmp_path, "0000:00:02.0", "0x060400", off)
    bridge(tmp_path, "0000:01:00.0", "0x030200", on)
    assert system._acs_bridges(str(tmp_path)) == 1


def test_configuration_space_for_root_only_is_unknown(tmp_path: Path) -> None:
    bridge(tmp_path, "0000:00:01.0", "0x060400", bytes(64))
    assert system._acs_bridges(str(tmp_path)) is None


def test_the_iommu_is_off_translated_or_passthrough(tmp_path: Path) -> None:
    assert system._iommu(str(tmp_path / "none")) is None
    (tmp_path / "class" / "iommu").mkdir(parents=True)
    assert system._iommu(str(tmp_path)) == "off"
    (tmp_path / "class" / "iommu" / "dmar0").mkdir()
    group = tmp_path / "kernel" / "iommu_groups" / "1"
    group.mkdir(parents=True)
    (group / "type").write_text("identity\n")
    assert system._iommu(str(tmp_path)) == "passthrough"
    (group / "type").write_text("DMA-FQ\n")
    assert system._iommu(str(tmp_path)) == "translated"


def test_engines_and_deployments_that_run_are_found_without_their_secrets() -> None:
    """A real process that looks like an engine, and one of a deployment."""
    sleep = "import time; time.sleep(600)"
    words = ["-c", sleep, "sglang.launch_server", "--api-key", "planted-secret"]
    engine = subprocess.Popen([sys.executable, *words])
    worker = subprocess.Popen([sys.executable, "-c", sleep], env={**os.environ, "GLMPLAN_DEPLOYMENT": "glm-test"})
    try:
        gpus = [{"index": 3, "processes": [{"pid": engine.pid}]}]
        found: dict[int, dict[str, object]] = {}
        for _ in range(1200):  # until both have started: a child has no command line of its own before
            found = {one["pid"]: one for one in system.leftovers(gpus)}
            if {engine.pid, worker.pid} <= set(found):
                break
            time.sleep(0.05)
    finally:
        for process in (engine, worker):
            process.kill()
            process.wait()
    assert found[engine.pid]["command"] == "sglang.launch_server"
    assert found[engine.pid]["gpu_indexes"] == [3]
    assert found[worker.pid]["deployment"] == "glm-test"
    assert "planted-secret" not in str(found)


def test_a_process_that_is_gone_is_no_error() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert procfs.command_line(gone.pid) == []
    assert procfs.variable(gone.pid, "HOME") is None
    assert procfs.process(gone.pid) == {"pid": gone.pid, "used_bytes": None, "owner": None, "command": None}
