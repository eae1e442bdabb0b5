"""What one host is, and the inventory a plan is made for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glmplan.facts.base import Frozen
from glmplan.facts.gpu import Gpu, GpuProblem
from glmplan.facts.system import System


class Host(Frozen):
    """One machine: `name` is the SSH name or a label, `address` what other nodes connect to.

    `network` holds the NCCL and gloo variables that bind a node to the interface of that address. `gpu_problem` says why
    `gpus` is empty or lacks some.
    """

    name: str
    address: str | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    nvml_version: str | None = None
    hostname: str | None = None
    memory_total_bytes: int | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: GpuProblem | None = None
    network: dict[str, str] = Field(default_factory=dict)
    system: System | None = None


class Inventory(Frozen):
    """The hosts to plan for, in order. `origin` tells the user where these facts came from."""

    schema_version: Literal[1] = 1
    origin: Literal["probe", "declared", "file", "default"] = "declared"
    hosts: tuple[Host, ...] = Field(min_length=1)

    @property
    def gpu_count(self) -> int:
        """GPUs over all hosts."""
        return sum(len(host.gpus) for host in self.hosts)
