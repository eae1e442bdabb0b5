"""The schema of `profiles/gpus/*.toml`: what is published or measured about a GPU model.

Units: bytes, bytes/s, FLOP/s (dense, without sparsity). A value of None means the hardware lacks it or nobody measured
it; the source says which.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from glmplan.facts.base import Frozen, Sourced
from glmplan.facts.gpu import Gpu
from glmplan.units import MIB


class Link(Frozen):
    """How a GPU reaches its neighbours: PCIe generation and lanes, NVLink (or Infinity Fabric) bytes/s in one direction."""

    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    peer_link_bytes_per_s: int | None = None
    source: str


class GpuProfile(Frozen):
    """One GPU model. `nvml_names` are regular expressions for NVML's product name; the MiB range tells variants apart."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    vendor: Literal["nvidia", "amd"] = "nvidia"
    support: Literal["serve", "size-only"] = "serve"
    nvml_names: tuple[str, ...]
    nvml_memory_mib: tuple[int, int]
    gpus_per_node: int = Field(ge=1)
    unified_memory: bool = False
    sm: Sourced[int]
    memory_total_bytes: Sourced[int]
    memory_usable_bytes: Sourced[int]
    memory_bandwidth_bytes_per_s: Sourced[int]
    bf16_flop_per_s: Sourced[int]
    fp8_flop_per_s: Sourced[int]
    fp4_flop_per_s: Sourced[int]
    shared_memory_per_block_bytes: Sourced[int]
    link: Link
    note: str = ""

    def matches(self, nvml_name: str, memory_total_bytes: int) -> bool:
        """Whether NVML's product name and total memory are this model's."""
        low, high = self.nvml_memory_mib
        if not low <= memory_total_bytes // MIB <= high:
            return False
        return any(re.fullmatch(pattern, nvml_name, re.IGNORECASE) for pattern in self.nvml_names)

    def gpu(self, index: int) -> Gpu:
        """One idle GPU of this model. The profile loader guarantees that both memory figures are known."""
        assert self.memory_total_bytes.value is not None
        assert self.memory_usable_bytes.value is not None
        return Gpu(
            index=index,
            name=self.title,
            profile=self.name,
            vendor=self.vendor,
            sm=self.sm.value,
            memory_total_bytes=self.memory_total_bytes.value,
            memory_usable_bytes=self.memory_usable_bytes.value,
            unified_memory=self.unified_memory,
            peer_link_bytes_per_s=self.link.peer_link_bytes_per_s,
        )
