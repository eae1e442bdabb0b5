"""What a host has around its GPUs: network, memory, disks, limits, engines and model files.

Units: bytes, bits per second where the name says so. `None` is unknown; an empty tuple is "none found". Collected by the
node program (`glmplan.node`), which sends these very field names as JSON.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from glmplan.facts.base import Frozen


class Nic(Frozen):
    """A network interface. `addresses` carry their prefix length: "10.0.0.2/24", "fe80::1/64"."""

    name: str
    kind: Literal["ethernet", "infiniband", "wireless", "virtual", "loopback"] = "ethernet"
    up: bool = False
    addresses: tuple[str, ...] = ()
    speed_bits_per_s: int | None = None
    mtu: int | None = None
    driver: str | None = None
    rdma_device: str | None = None
    default_route: bool = False


class RdmaPort(Frozen):
    """A port of an InfiniBand or RoCE device, as /sys/class/infiniband tells it."""

    device: str
    port: int
    link_layer: str | None = None
    state: str | None = None
    rate_bits_per_s: int | None = None


class PeerLink(Frozen):
    """How two GPUs of one host reach each other; `path` in nvidia-smi's words (NV18, PIX, PXB, PHB, NODE, SYS)."""

    gpu_index: int
    peer_index: int
    path: str | None = None
    p2p: bool | None = None


class Disk(Frozen):
    """The file system under a path. `read_bytes_per_s`: a sequential read of `read_sample_bytes`, past the page cache."""

    path: str
    mount: str | None = None
    filesystem: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    read_bytes_per_s: int | None = None
    read_sample_bytes: int = 0


class EngineEnvironment(Frozen):
    """A Python on the host that can import an engine, and the versions that matter beside it."""

    python: str
    python_version: str | None = None
    engine: Literal["sglang", "vllm"] | None = None
    engine_version: str | None = None
    torch_version: str | None = None
    cuda_version: str | None = None
    nccl_version: str | None = None
    triton_version: str | None = None
    glmplan_version: str | None = None


class ModelFiles(Frozen):
    """A model folder judged against its own index; `missing` and `wrong` name the first files of each kind."""

    path: str
    exists: bool = False
    config: bool = False
    tokenizer: bool = False
    files_expected: int | None = None
    files_present: int = 0
    bytes_present: int = 0
    missing: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    index_digest: str | None = None
    config_digest: str | None = None

    @property
    def complete(self) -> bool:
        """Whether every file that the index names is there with the bytes that its header promises."""
        return self.exists and self.config and not self.missing and not self.wrong and self.files_present > 0


class Leftover(Frozen):
    """A process of an engine, or of a deployment, that runs on the host."""

    pid: int
    owner: str | None = None
    command: str | None = None
    deployment: str | None = None
    gpu_indexes: tuple[int, ...] = ()


class System(Frozen):
    """Everything about a host that is not a GPU.

    `clock_offset_s` is the host's clock less that of the machine that asked, known to within `clock_error_s`. `limits`
    are soft limits, None in it is "unlimited". `iommu` is off, passthrough or translated.
    """

    os_name: str | None = None
    kernel_version: str | None = None
    virtual_machine: bool | None = None
    container: bool | None = None
    user: str | None = None
    home: str | None = None
    python_version: str | None = None
    node_time_s: float | None = None
    clock_offset_s: float | None = None
    clock_error_s: float | None = None
    boot_id: str | None = None
    cpu_model: str | None = None
    cpu_count: int | None = None
    numa_nodes: int | None = None
    memory_available_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    shared_memory_total_bytes: int | None = None
    shared_memory_free_bytes: int | None = None
    limits: dict[str, int | None] = Field(default_factory=dict)
    ephemeral_ports: tuple[int, int] | None = None
    hostname_addresses: tuple[str, ...] = ()
    nics: tuple[Nic, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    peers: tuple[PeerLink, ...] = ()
    disks: tuple[Disk, ...] = ()
    iommu: str | None = None
    acs_bridges: int | None = None
    nvcc: str | None = None
    nvcc_version: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    engines: tuple[EngineEnvironment, ...] = ()
    model: ModelFiles | None = None
    leftovers: tuple[Leftover, ...] = ()

    @field_validator("limits", mode="before")
    @classmethod
    def _unlimited(cls, limits: Any) -> Any:
        """TOML has no None: a saved inventory says "unlimited"."""
        if not isinstance(limits, dict):
            return limits
        return {name: None if limit == "unlimited" else limit for name, limit in limits.items()}
