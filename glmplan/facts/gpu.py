"""What one GPU is: as a profile, a file or NVML says it.

Units: bytes. `memory_total_bytes` is what NVML and nvidia-smi print as total. `memory_usable_bytes` is what a CUDA
program can be given on the idle card (total less what the driver keeps; cudaMemGetInfo's total). `None` is unknown.
"""

from __future__ import annotations

from pydantic import Field

from glmplan.facts.base import Frozen


class GpuProcess(Frozen):
    """A process that holds memory on a GPU; `owner` and `command` are None where the system hides them."""

    pid: int
    used_bytes: int | None = None
    owner: str | None = None
    command: str | None = None


class Gpu(Frozen):
    """One GPU of one host."""

    index: int = Field(ge=0)
    name: str
    profile: str | None = None
    vendor: str = "nvidia"
    uuid: str | None = None
    sm: int | None = None
    memory_total_bytes: int = Field(gt=0)
    memory_usable_bytes: int = Field(gt=0)
    memory_in_use_bytes: int = Field(default=0, ge=0)
    mig: bool = False
    unified_memory: bool = False
    ecc: bool | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    nvlink_active: int | None = None
    peer_link_bytes_per_s: int | None = None
    power_limit_w: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    processes: tuple[GpuProcess, ...] = ()

    @property
    def label(self) -> str:
        """The profile's name where one matched, else NVML's."""
        return self.profile or self.name

    @property
    def capacity_bytes(self) -> int:
        """Bytes an engine could take on the idle card."""
        return self.memory_usable_bytes

    @property
    def available_bytes(self) -> int:
        """Bytes an engine can take beside what other processes hold now."""
        return max(self.memory_usable_bytes - self.memory_in_use_bytes, 0)

    @property
    def has_fast_link(self) -> bool:
        """Whether peers are reached over a switch-grade link (NVLink on all peers) rather than PCIe or a bridge."""
        if self.nvlink_active is not None:
            return self.nvlink_active > 4
        return (self.peer_link_bytes_per_s or 0) >= 200_000_000_000


class GpuProblem(Frozen):
    """Why GPUs of a host could not be read; `kind` is the node program's: no-driver, driver-mismatch, gpu-lost, ..."""

    kind: str
    message: str
    next_step: str = ""
