"""What the two ways of reading GPUs, `nvml` and `nvidia_smi`, share: sentences about the driver, and names of readings."""

from __future__ import annotations

from typing import Any

from . import procfs
from .errors import NodeError

DECLARE = 'plan for GPUs that you name: --gpus "8x rtx-4090-48g"'
NO_GPUS = (
    "The NVIDIA driver runs but reports 0 GPUs on this machine.",
    f"Look for the card with `lspci | grep -i nvidia`, give a container its GPUs (docker run --gpus all), or {DECLARE}.",
)
NO_LIBRARY = (
    "NVML could not be loaded: this machine has no NVIDIA driver (libnvidia-ml.so.1 not found).",
    f"Install the NVIDIA driver, or {DECLARE}.",
)
NO_MODULE = (
    "The NVIDIA driver is installed, but its kernel module is not loaded.",
    f"Load it with `sudo modprobe nvidia` (`dmesg` says why it does not load), or {DECLARE}.",
)

# nvml.h, nvmlClocksEventReasons; bit 0 (idle) is no throttling
THROTTLE_WORDS = {
    0x002: "application-clocks",
    0x004: "power-cap",
    0x008: "hardware-slowdown",
    0x010: "sync-boost",
    0x020: "software-thermal",
    0x040: "hardware-thermal",
    0x080: "power-brake",
    0x100: "display-clocks",
}


def mismatch(version: str) -> NodeError:
    """The library and the kernel module are of different drivers."""
    return NodeError(
        "driver-mismatch",
        f"The NVIDIA library libnvidia-ml.so.1 ({version}) does not match the loaded kernel module, "
        "as after a driver update without a reboot.",
        "Reboot, or stop all GPU programs and reload the kernel module: "
        "`sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && sudo modprobe nvidia`.",
    )


def lost(index: int, words: object) -> NodeError:
    """A GPU fell off the bus."""
    return NodeError(
        "gpu-lost",
        f"GPU {index} does not answer: {words}. It fell off the bus or needs a reset.",
        f"Reset it with `sudo nvidia-smi -r -i {index}`, or reboot; `dmesg | grep -i xid` says what happened.",
    )


def memory_fields(total: int, reserved: int | None, free: int, unified: bool = False) -> dict[str, Any]:
    """Four readings by name; in use is what is neither free nor kept by the driver."""
    return {
        "memory_total_bytes": total,
        "memory_reserved_bytes": reserved,
        "memory_free_bytes": free,
        "memory_in_use_bytes": max(0, total - (reserved or 0) - free),
        "unified_memory": unified,
    }


def unified_memory(name: str) -> dict[str, Any]:
    """The system's memory as that of its only GPU."""
    system = procfs.memory()
    if not {"MemTotal", "MemAvailable"} <= system.keys():
        raise NodeError(
            "gpu-unreadable",
            f"{name} shares the system's memory, but /proc/meminfo does not say how much there is.",
            f"Mount /proc, or {DECLARE}.",
        )
    return memory_fields(system["MemTotal"], 0, system["MemAvailable"], unified=True)
