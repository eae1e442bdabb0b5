"""Which GPUs this machine has, as the driver tells it through NVML.

Units: bytes; watts for the power limit. `index` is NVML's: PCI bus order. CUDA uses the same order only under
CUDA_DEVICE_ORDER=PCI_BUS_ID, and NVML does not look at CUDA_VISIBLE_DEVICES.

Memory: usable = total - reserved, both of nvmlDeviceGetMemoryInfo_v2. A driver without that call gives no `reserved`:
usable is then the matching profile's figure, and without a profile total less 2 %. In use = usable - free, so what the
driver keeps is never counted as use. Where NVML answers "Not Supported" for the memory of the only GPU, that GPU shares
the system's memory (GB10): total and usable are MemTotal, in use is MemTotal - MemAvailable.

A reading that the driver refuses is None or empty. `mig` is False where the driver does not know the mode.
`throttle_reasons` leaves idleness out. The PCIe generation of an idle GPU is lower than under load.

Source: pynvml of nvidia-ml-py 13.615.71, which is imported only when a probe runs. Left out: MIG instances, whole
command lines (they may hold secrets), and pid translation: in a container NVML's pid may name another process or none.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from glmplan.errors import ProbeError
from glmplan.facts.gpu import Gpu, GpuProcess
from glmplan.facts.gpu_profile import GpuProfile
from glmplan.facts.host import Host
from glmplan.units import KIB

DECLARE = 'plan for GPUs that you name: --gpus "8x rtx-4090-48g"'

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


class NoDriverError(ProbeError):
    """This machine has no NVIDIA driver, or the driver has no GPU."""


class _Memory(NamedTuple):
    total_bytes: int
    usable_bytes: int
    in_use_bytes: int
    profile: GpuProfile | None
    unified: bool


def probe_local(profiles: Iterable[GpuProfile]) -> Host:
    """Read every GPU of this machine; raise ProbeError when one of them, or all of them, cannot be read.

    `profiles` are read only once a driver answers.
    """
    with _session() as nvml:
        count = nvml.nvmlDeviceGetCount()
        if count == 0:
            raise NoDriverError(
                "The NVIDIA driver runs but reports 0 GPUs on this machine.",
                "Look for the card with `lspci | grep -i nvidia`, give a container its GPUs (docker run --gpus all), "
                f"or {DECLARE}.",
            )
        known = tuple(profiles)
        cuda = _ask(nvml, "nvmlSystemGetCudaDriverVersion_v2")
        return Host(
            name="localhost",
            hostname=os.uname().nodename,
            driver_version=_ask(nvml, "nvmlSystemGetDriverVersion"),
            nvml_version=_ask(nvml, "nvmlSystemGetNVMLVersion"),
            cuda_version=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            memory_total_bytes=_system_memory().get("MemTotal"),
            gpus=tuple(_probe_gpu(nvml, index, known) for index in range(count)),
        )


@contextmanager
def _session() -> Iterator[Any]:
    """The pynvml module between nvmlInit and nvmlShutdown."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _start_error(pynvml, error) from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise ProbeError(f"NVML failed: {error} (code {error.value}).", "See what `nvidia-smi` says.") from error
    finally:
        _ask(pynvml, "nvmlShutdown")


def _ask(nvml: Any, call: str, *arguments: object) -> Any:
    """The gate of every optional reading: the answer, or None where the driver refuses. A lost GPU still raises."""
    try:
        return getattr(nvml, call)(*arguments)
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired):
        raise
    except nvml.NVMLError:
        return None


def _start_error(nvml: Any, error: Any) -> ProbeError:
    """Say why nvmlInit failed."""
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return NoDriverError(
            "NVML could not be loaded: this machine has no NVIDIA driver (libnvidia-ml.so.1 not found).",
            f"Install the NVIDIA driver, or {DECLARE}.",
        )
    if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return NoDriverError(
            "The NVIDIA driver is installed, but its kernel module is not loaded.",
            f"Load it with `sudo modprobe nvidia` (`dmesg` says why it does not load), or {DECLARE}.",
        )
    if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        version = _ask(nvml, "nvmlSystemGetNVMLVersion") or "unknown version"
        return ProbeError(
            f"The NVIDIA library libnvidia-ml.so.1 ({version}) does not match the loaded kernel module, "
            "as after a driver update without a reboot.",
            "Reboot, or stop all GPU programs and reload the kernel module: "
            "`sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && sudo modprobe nvidia`.",
        )
    return ProbeError(f"NVML could not start: {error} (code {error.value}).", f"See what `nvidia-smi` says, or {DECLARE}.")


def _probe_gpu(nvml: Any, index: int, profiles: Sequence[GpuProfile]) -> Gpu:
    """Read one GPU; what NVML raises becomes a ProbeError that names the index."""
    try:
        return _read_gpu(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index), profiles)
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired) as error:
        raise ProbeError(
            f"GPU {index} does not answer: {error}. It fell off the bus or needs a reset.",
            f"Reset it with `sudo nvidia-smi -r -i {index}`, or reboot; `dmesg | grep -i xid` says what happened.",
        ) from error
    except nvml.NVMLError as error:
        raise ProbeError(
            f"GPU {index} could not be read: {error} (code {error.value}).",
            "Compare with `nvidia-smi`; a GPU in MIG mode tells its memory to root only.",
        ) from error


def _read_gpu(nvml: Any, index: int, handle: Any, profiles: Sequence[GpuProfile]) -> Gpu:
    name = nvml.nvmlDeviceGetName(handle)
    memory = _memory(nvml, handle, name, profiles)
    capability = _ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    mig = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    ecc = _ask(nvml, "nvmlDeviceGetEccMode", handle)
    processes = _ask(nvml, "nvmlDeviceGetComputeRunningProcesses_v3", handle) or ()
    milliwatts = _ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle)
    return Gpu(
        index=index,
        name=name,
        profile=memory.profile.name if memory.profile else None,
        uuid=_ask(nvml, "nvmlDeviceGetUUID", handle),
        sm=None if capability is None else capability[0] * 10 + capability[1],
        memory_total_bytes=memory.total_bytes,
        memory_usable_bytes=memory.usable_bytes,
        memory_in_use_bytes=memory.in_use_bytes,
        unified_memory=memory.unified,
        mig=mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        ecc=None if ecc is None else ecc[0] == nvml.NVML_FEATURE_ENABLED,
        # 0 lanes and generation 0 do not exist: virtual machines say 0 for unknown
        pcie_generation=_ask(nvml, "nvmlDeviceGetCurrPcieLinkGeneration", handle) or None,
        pcie_generation_max=_ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle) or None,
        pcie_width=_ask(nvml, "nvmlDeviceGetCurrPcieLinkWidth", handle) or None,
        pcie_width_max=_ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle) or None,
        nvlink_active=_nvlink_active(nvml, handle),
        power_limit_w=None if milliwatts is None else round(milliwatts / 1000),
        throttle_reasons=_throttle_reasons(nvml, handle),
        processes=tuple(_process(one.pid, one.usedGpuMemory) for one in processes),
    )


def _memory(nvml: Any, handle: Any, name: str, profiles: Sequence[GpuProfile]) -> _Memory:
    """The GPU's memory and the profile it matches, read in the best way that the driver offers."""
    reading = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle, nvml.nvmlMemory_v2)
    if reading is not None:
        total, usable = int(reading.total), int(reading.total - reading.reserved)
        return _Memory(total, usable, max(0, usable - int(reading.free)), _match(profiles, name, total), unified=False)
    try:
        reading = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        if nvml.nvmlDeviceGetCount() > 1:
            raise  # two GPUs cannot both own the system's memory
        return _unified_memory(name, profiles)
    total = int(reading.total)
    profile = _match(profiles, name, total)
    known = profile.memory_usable_bytes.value if profile else None
    usable = total - total // 50 if known is None else min(known, total)
    return _Memory(total, usable, max(0, usable - int(reading.free)), profile, unified=False)


def _unified_memory(name: str, profiles: Sequence[GpuProfile]) -> _Memory:
    system = _system_memory()
    if not {"MemTotal", "MemAvailable"} <= system.keys():
        raise ProbeError(
            f"{name} shares the system's memory, but /proc/meminfo does not say how much there is.",
            f"Mount /proc, or {DECLARE}.",
        )
    total, available = system["MemTotal"], system["MemAvailable"]
    return _Memory(total, total, max(0, total - available), _match(profiles, name, total), unified=True)


def _match(profiles: Sequence[GpuProfile], name: str, total_bytes: int) -> GpuProfile | None:
    return next((profile for profile in profiles if profile.matches(name, total_bytes)), None)


def _nvlink_active(nvml: Any, handle: Any) -> int | None:
    """Links that are up; None on a GPU that answers for no link."""
    states = [_ask(nvml, "nvmlDeviceGetNvLinkState", handle, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
    known = [state for state in states if state is not None]
    return known.count(nvml.NVML_FEATURE_ENABLED) if known else None


def _throttle_reasons(nvml: Any, handle: Any) -> tuple[str, ...]:
    """Why the clocks are held down; drivers before 535 know the call by its old name."""
    bits = _ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if bits is None:
        bits = _ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
    return tuple(word for bit, word in THROTTLE_WORDS.items() if bits & bit)


def _process(pid: int, used_bytes: int | None) -> GpuProcess:
    """A process with its user's name (the number where it has no name) and its short command, as far as /proc tells."""
    owner = command = None
    with suppress(OSError):
        uid = os.stat(f"/proc/{pid}").st_uid
        owner = str(uid)
        with suppress(KeyError):
            owner = pwd.getpwuid(uid).pw_name
        command = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip() or None
    return GpuProcess(pid=pid, used_bytes=used_bytes, owner=owner, command=command)


def _system_memory() -> dict[str, int]:
    """The byte counts of /proc/meminfo by name; empty where it cannot be read."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    rows = [line.replace(":", "").split() for line in lines]
    return {row[0]: int(row[1]) * KIB for row in rows if row[2:] == ["kB"]}
