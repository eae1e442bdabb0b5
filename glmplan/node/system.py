"""What this host is around its GPUs and network: system, memory, limits, PCIe settings, variables, leftovers.

Units: bytes. Whatever cannot be read is None or empty. `limits` holds soft limits; None there is "unlimited".
"""

from __future__ import annotations

import getpass
import glob
import os
import platform
import re
import resource
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from . import procfs

LIMITS = {
    "open_files": resource.RLIMIT_NOFILE,
    "locked_memory_bytes": resource.RLIMIT_MEMLOCK,
    "processes": resource.RLIMIT_NPROC,
    "stack_bytes": resource.RLIMIT_STACK,
    "address_space_bytes": resource.RLIMIT_AS,
}
VARIABLES = re.compile(
    r"(NCCL|GLOO|CUDA|SGLANG|SGL|VLLM|TORCH|PYTORCH|TRITON|UCX|NVSHMEM|FLASHINFER|HF|OMP)_.*"
    r"|NVIDIA_VISIBLE_DEVICES|MASTER_ADDR|MASTER_PORT|WORLD_SIZE|RANK|LOCAL_RANK|HOST_IP|PYTHONPATH|PYTHONHOME"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|CONDA_PREFIX|TMPDIR|XDG_STATE_HOME|GLMPLAN_NODE"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)(API_?)?KEY(_|$)", re.IGNORECASE)
NAME_LOOKUP_S = 1.0
ENGINE_WORDS = {
    "sglang.launch_server": "sglang.launch_server",
    "sglang::": "sglang worker",
    "sglang.srt": "sglang worker",
    "vllm serve": "vllm serve",
    "vllm.entrypoints": "vllm.entrypoints",
    "VLLM::": "vllm worker",
    "ray::": "ray worker",
}


def identity() -> dict[str, Any]:
    """System, user, processor and time."""
    release = procfs.read_text("/etc/os-release") or ""
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]+)', release, re.MULTILINE)
    cpu = procfs.read_text("/proc/cpuinfo") or ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpu, re.MULTILINE)
    try:
        user: str | None = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return {
        "os_name": pretty[1] if pretty else platform.system(),
        "kernel_version": platform.release(),
        "virtual_machine": "hypervisor" in flags[1].split() if flags else None,
        "container": in_container(),
        "user": user,
        "home": os.path.expanduser("~"),
        "python_version": platform.python_version(),
        "boot_id": procfs.read_text("/proc/sys/kernel/random/boot_id"),
        "cpu_model": model[1].strip() if model else None,
        "cpu_count": len(os.sched_getaffinity(0)),
        "numa_nodes": len(glob.glob("/sys/devices/system/node/node[0-9]*")) or None,
    }


def in_container() -> bool:
    """Whether this is a container, as far as it shows."""
    marks = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")
    names = ("container", "KUBERNETES_SERVICE_HOST")  # systemd-nspawn and podman set the lower-case one
    if any(name in os.environ for name in names) or any(map(os.path.exists, marks)):
        return True
    return bool(re.search(r"docker|containerd|kubepods|lxc|libpod", procfs.read_text("/proc/1/cgroup") or ""))


def memory_and_limits() -> dict[str, Any]:
    """RAM that is free, swap, shared memory, process limits and the ephemeral port range."""
    found = procfs.memory()
    swap, swap_free = found.get("SwapTotal"), found.get("SwapFree")
    shared: Any = None
    with suppress(OSError):
        shared = os.statvfs("/dev/shm")
    return {
        "memory_available_bytes": found.get("MemAvailable"),
        "swap_total_bytes": swap,
        "swap_used_bytes": None if swap is None or swap_free is None else swap - swap_free,
        "shared_memory_total_bytes": None if shared is None else shared.f_blocks * shared.f_frsize,
        "shared_memory_free_bytes": None if shared is None else shared.f_bavail * shared.f_frsize,
        "limits": {name: _limit(kind) for name, kind in LIMITS.items()},
        "ephemeral_ports": _ephemeral_ports(),
    }


def _limit(kind: int) -> int | None:
    """What a worker gets: the supervisor raises open files to the hard limit; None is unlimited."""
    soft, hard = resource.getrlimit(kind)
    counts = hard if kind == resource.RLIMIT_NOFILE else soft
    return None if counts == resource.RLIM_INFINITY else counts


def _ephemeral_ports() -> list[int] | None:
    words = (procfs.read_text("/proc/sys/net/ipv4/ip_local_port_range") or "").split()
    return [int(word) for word in words] if len(words) == 2 and all(map(str.isdecimal, words)) else None


def hostname_addresses() -> list[str]:
    """What this host's own name resolves to here; a resolver that hangs is left behind."""
    found: list[str] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            answers = socket.getaddrinfo(platform.node(), None, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(answer[4][0]) for answer in answers))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NAME_LOOKUP_S)
    return list(found)


def pcie() -> dict[str, Any]:
    """The IOMMU's mode (off, translated, passthrough) and how many PCI bridges redirect peer traffic (ACS)."""
    return {"iommu": _iommu(), "acs_bridges": _acs_bridges()}


def _iommu(root: str = "/sys") -> str | None:
    if not os.path.isdir(f"{root}/class"):
        return None
    if not glob.glob(f"{root}/class/iommu/*"):
        return "off"
    kinds = {procfs.read_text(path) for path in glob.glob(f"{root}/kernel/iommu_groups/*/type")}
    return "passthrough" if kinds and kinds <= {"identity", None} else "translated"


def _acs_bridges(root: str = "/sys/bus/pci/devices") -> int | None:
    """Bridges whose ACS control word redirects requests; None where the configuration space is for root only."""
    count, readable = 0, False
    for folder in glob.glob(f"{root}/*"):
        if not (procfs.read_text(f"{folder}/class") or "").startswith("0x0604"):
            continue
        try:
            with open(f"{folder}/config", "rb") as stream:
                space = stream.read(4096)
        except OSError:
            continue
        if len(space) > 256:
            readable = True
            count += acs_redirects(space)
    return count if readable else None


def acs_redirects(space: bytes) -> bool:
    """Whether a 4 KiB PCI configuration space has ACS request redirection (or source validation) switched on.

    PCIe 5.0, 7.7.8: extended capability 0x000D, control word at offset 6; bits 0 (validation), 2 and 3 (redirection).
    """
    place = 0x100
    for _ in range(64):
        header = int.from_bytes(space[place : place + 4], "little")
        if header in (0, 0xFFFFFFFF):
            return False
        if header & 0xFFFF == 0x000D:
            return bool(int.from_bytes(space[place + 6 : place + 8], "little") & 0b1101)
        place = header >> 20 & 0xFFC
        if place < 0x100:
            return False
    return False


def variables() -> dict[str, str]:
    """Variables of a login here that change how engines behave; none whose name speaks of a secret, no URL's password."""
    return {
        name: re.sub(r"//[^/@\s]+@", "//***@", value)[:500]
        for name, value in sorted(os.environ.items())
        if VARIABLES.fullmatch(name) and not SECRET.search(name)
    }


def leftovers(gpus: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Processes of engines, or of deployments of this user, with the GPUs on which they hold memory."""
    held: dict[int, list[int]] = {}
    for gpu in gpus:
        for process in gpu["processes"]:
            held.setdefault(process["pid"], []).append(gpu["index"])
    found = []
    for pid in procfs.pids():
        deployment = procfs.variable(pid, "GLMPLAN_DEPLOYMENT")
        words = _engine_words(pid)
        if pid != os.getpid() and (deployment or words):
            found.append(
                {
                    "pid": pid,
                    "owner": procfs.owner(pid),
                    "command": words or procfs.read_text(f"/proc/{pid}/comm") or None,
                    "deployment": deployment,
                    "gpu_indexes": held.get(pid, []),
                }
            )
    return found


def _engine_words(pid: int) -> str | None:
    """Which engine's process this is; only these words are told, since whole command lines may hold secrets."""
    line = " ".join(procfs.command_line(pid)[:6])
    return next((words for mark, words in ENGINE_WORDS.items() if mark in line), None)
