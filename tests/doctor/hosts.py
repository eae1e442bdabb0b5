"""Hosts as the doctor sees them: a healthy one, and changes of single facts."""

from __future__ import annotations

from typing import Any

from glmplan.doctor.checks import CHECKS
from glmplan.doctor.finding import Verdict
from glmplan.doctor.seen import Seen
from glmplan.facts.host import Host
from glmplan.facts.system import Disk, EngineEnvironment, ModelFiles, Nic, PeerLink, System
from glmplan.planning.network import choose_links
from glmplan.planning.plan import Plan
from glmplan.units import GIB
from tests import samples

VENV = "/root/venv/bin/python3"


def system(number: int = 1, **changes: Any) -> System:
    """The surroundings of a healthy host; `changes` overwrite facts."""
    facts: dict[str, Any] = {
        "user": "alice",
        "python_version": "3.11.2",
        "virtual_machine": False,
        "memory_available_bytes": 500 * GIB,
        "swap_total_bytes": 0,
        "swap_used_bytes": 0,
        "shared_memory_total_bytes": 256 * GIB,
        "shared_memory_free_bytes": 256 * GIB,
        "limits": {"open_files": 1_048_576, "locked_memory_bytes": None, "processes": None},
        "ephemeral_ports": (32768, 60999),
        "clock_offset_s": 0.01,
        "clock_error_s": 0.02,
        "hostname_addresses": (f"10.0.0.{number}",),
        "nics": (
            Nic(name="lo", kind="loopback", up=True, addresses=("127.0.0.1/8",), mtu=65536),
            Nic(name="eth0", up=True, addresses=(f"10.0.0.{number}/24",), speed_bits_per_s=100 * 10**9, mtu=9000),
        ),
        "peers": tuple(
            PeerLink(gpu_index=a, peer_index=b, path="PHB", p2p=True) for a in range(8) for b in range(8) if a != b
        ),
        "disks": (
            Disk(path="/models/glm", mount="/models", filesystem="xfs", total_bytes=4000 * GIB, free_bytes=900 * GIB),
            Disk(path="/root/.local/state", mount="/", free_bytes=90 * GIB),
            Disk(path="/tmp", mount="/", free_bytes=90 * GIB),
        ),
        "iommu": "passthrough",
        "acs_bridges": 0,
        "nvcc": "/usr/local/cuda/bin/nvcc",
        "nvcc_version": "13.0.88",
        "engines": (engine(),),
        "model": model(),
    }
    return System(**{**facts, **changes})


def engine(**changes: Any) -> EngineEnvironment:
    """SGLang of the default plan."""
    facts: dict[str, Any] = {
        "python": VENV, "python_version": "3.11.2", "engine": "sglang", "engine_version": "0.5.23",
        "torch_version": "2.14.1", "cuda_version": "13.0", "nccl_version": "2.28.9", "triton_version": "3.7.0",
    }  # fmt: skip
    return EngineEnvironment(**{**facts, **changes})


def model(**changes: Any) -> ModelFiles:
    """A whole checkpoint."""
    facts: dict[str, Any] = {
        "path": "/models/glm", "exists": True, "config": True, "tokenizer": True, "files_expected": 141,
        "files_present": 141, "bytes_present": 703 * GIB, "index_digest": "aa", "config_digest": "bb",
    }  # fmt: skip
    return ModelFiles(**{**facts, **changes})


def host(number: int = 1, gpu: str = "rtx-4090-48g", gpu_changes: dict[str, Any] | None = None, **changes: Any) -> Host:
    """A healthy host h1 of eight GPUs; `changes` are of its surroundings."""
    made = samples.host(f"h{number}", gpu, 8, **{"pcie_width": 16, "pcie_width_max": 16, **(gpu_changes or {})})
    return made.model_copy(
        update={
            "hostname": f"node{number}", "driver_version": "580.95.05", "cuda_version": "13.0",
            "memory_total_bytes": 512 * GIB, "system": system(number, **changes),
        }
    )  # fmt: skip


def plan() -> Plan:
    """Three nodes of eight RTX 4090 48 GB, planned without knowing hosts."""
    return samples.plan()


def seen(*hosts: Host, **changes: Any) -> Seen:
    """What a visit to these hosts saw; three healthy ones when none is given."""
    found = hosts or tuple(host(number) for number in (1, 2, 3))
    names = tuple(one.name for one in found)
    return Seen(**{"hosts": found, "names": names, "links": choose_links(found) if len(found) > 1 else (), **changes})


def verdict(name: str, what: Seen, of: int = 0) -> Verdict:
    """What the check of that name says about one of the hosts, or about all."""
    check = next(check for check in CHECKS if check.name == name)
    if check.judge_all is not None:
        return check.judge_all(what)
    assert check.judge is not None
    return check.judge(what.hosts[of], what)
