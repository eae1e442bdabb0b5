"""Which GPUs this host has, as the driver tells it through NVML.

Units: bytes; watts for the power limit. `index` is NVML's: PCI bus order. CUDA uses the same order only under
CUDA_DEVICE_ORDER=PCI_BUS_ID, and NVML does not look at CUDA_VISIBLE_DEVICES.

Memory: total, what the driver keeps (`memory_reserved_bytes`) and free, of nvmlDeviceGetMemoryInfo_v2; a driver without
that call gives no reserved (None). Where NVML answers "Not Supported" for the memory of the only GPU, that GPU shares the
system's memory (GB10): total is MemTotal, free is MemAvailable.

A reading that the driver refuses is None or empty. `mig` is False where the driver does not know the mode.
`throttle_reasons` leaves idleness out. The PCIe generation of an idle GPU is lower than under load.

Source: pynvml of nvidia-ml-py 13.615.71. Left out: MIG instances, whole command lines (they may hold secrets), and pid
translation: in a container NVML's pid may name another process or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import procfs
from .driver import (
    DECLARE,
    NO_GPUS,
    NO_LIBRARY,
    NO_MODULE,
    THROTTLE_WORDS,
    lost,
    memory_fields,
    mismatch,
    unified_memory,
)
from .errors import NodeError

# nvml.h, nvmlGpuTopologyLevel, in nvidia-smi's words
PATH_WORDS = {0: "INT", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
P2P_READ, P2P_WRITE, P2P_OK, P2P_UNKNOWN = 0, 1, 0, 6
SWITCH = 2  # nvmlIntNvLinkDeviceType_t


def read(nvml: Any, indexes: Sequence[int] | None, peers: bool) -> dict[str, Any]:
    """The driver's versions, the GPUs (or those of `indexes`), their peers, and one problem per unreadable GPU."""
    with _session(nvml):
        count = nvml.nvmlDeviceGetCount()
        if count == 0:
            raise NodeError("no-driver", *NO_GPUS)
        cuda = ask(nvml, "nvmlSystemGetCudaDriverVersion_v2")
        found: dict[str, Any] = {
            "driver_version": ask(nvml, "nvmlSystemGetDriverVersion"),
            "nvml_version": ask(nvml, "nvmlSystemGetNVMLVersion"),
            "cuda_version": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            "count": count,
            "gpus": [],
            "peers": [],
            "problems": [],
        }
        handles: dict[int, Any] = {}
        for index in range(count):
            if indexes is None or index in indexes:
                try:
                    handles[index] = _handle_and_gpu(nvml, index, found["gpus"])
                except NodeError as problem:
                    found["problems"].append(problem)
        if peers and len(handles) > 1 and not found["problems"]:
            found["peers"] = _peers(nvml, handles)
        return found


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    """Between nvmlInit and nvmlShutdown."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _start_error(nvml, error) from error
    try:
        yield
    except nvml.NVMLError as error:
        raise NodeError("nvml", f"NVML failed: {error} (code {error.value}).", "See what `nvidia-smi` says.") from error
    finally:
        ask(nvml, "nvmlShutdown")


def ask(nvml: Any, call: str, *arguments: object) -> Any:
    """The gate of every optional reading: the answer, or None where the driver refuses. A lost GPU still raises."""
    try:
        return getattr(nvml, call)(*arguments)
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired):
        raise
    except (nvml.NVMLError, AttributeError):  # an old pynvml lacks the newer calls
        return None


def _start_error(nvml: Any, error: Any) -> NodeError:
    """Say why nvmlInit failed."""
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return NodeError("no-driver", *NO_LIBRARY)
    if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return NodeError("no-driver", *NO_MODULE)
    if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return mismatch(ask(nvml, "nvmlSystemGetNVMLVersion") or "unknown version")
    return NodeError(
        "nvml", f"NVML could not start: {error} (code {error.value}).", f"See what `nvidia-smi` says, or {DECLARE}."
    )


def _handle_and_gpu(nvml: Any, index: int, gpus: list[dict[str, Any]]) -> Any:
    """Read one GPU into `gpus`; what NVML raises becomes a NodeError that names the index."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpus.append(_gpu(nvml, index, handle))
        return handle
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired) as error:
        raise lost(index, error) from error
    except nvml.NVMLError as error:
        raise NodeError(
            "gpu-unreadable",
            f"GPU {index} could not be read: {error} (code {error.value}).",
            "Compare with `nvidia-smi`; a GPU in MIG mode tells its memory to root only.",
        ) from error


def _gpu(nvml: Any, index: int, handle: Any) -> dict[str, Any]:
    name = _text(nvml.nvmlDeviceGetName(handle))
    capability = ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    mig = ask(nvml, "nvmlDeviceGetMigMode", handle)
    ecc = ask(nvml, "nvmlDeviceGetEccMode", handle)
    processes = ask(nvml, "nvmlDeviceGetComputeRunningProcesses_v3", handle) or ()
    milliwatts = ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle)
    return {
        "index": index,
        "name": name,
        "uuid": _text(ask(nvml, "nvmlDeviceGetUUID", handle)),
        "sm": None if capability is None else capability[0] * 10 + capability[1],
        **_memory(nvml, handle, name),
        "mig": mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        "ecc": None if ecc is None else ecc[0] == nvml.NVML_FEATURE_ENABLED,
        # 0 lanes and generation 0 do not exist: virtual machines say 0 for unknown
        "pcie_generation": ask(nvml, "nvmlDeviceGetCurrPcieLinkGeneration", handle) or None,
        "pcie_generation_max": ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle) or None,
        "pcie_width": ask(nvml, "nvmlDeviceGetCurrPcieLinkWidth", handle) or None,
        "pcie_width_max": ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle) or None,
        "nvlink_active": _nvlink_active(nvml, handle),
        "power_limit_w": None if milliwatts is None else round(milliwatts / 1000),
        "throttle_reasons": _throttle_reasons(nvml, handle),
        "processes": [procfs.process(one.pid, one.usedGpuMemory) for one in processes],
    }


def _text(words: Any) -> Any:
    """Text: pynvml before 11.500 gave bytes."""
    return words.decode(errors="replace") if isinstance(words, bytes) else words


def _memory(nvml: Any, handle: Any, name: str) -> dict[str, Any]:
    """The GPU's memory, read in the best way that the driver offers."""
    version = getattr(nvml, "nvmlMemory_v2", None)
    reading = None if version is None else ask(nvml, "nvmlDeviceGetMemoryInfo", handle, version)
    reserved = None if reading is None else int(reading.reserved)
    if reading is None:
        try:
            reading = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError_NotSupported:
            if nvml.nvmlDeviceGetCount() > 1:
                raise  # two GPUs cannot both own the system's memory
            return unified_memory(name)
    return memory_fields(int(reading.total), reserved, int(reading.free))


def _nvlink_active(nvml: Any, handle: Any) -> int | None:
    """Links that are up; None on a GPU that answers for no link."""
    states = [ask(nvml, "nvmlDeviceGetNvLinkState", handle, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
    known = [state for state in states if state is not None]
    return known.count(nvml.NVML_FEATURE_ENABLED) if known else None


def _throttle_reasons(nvml: Any, handle: Any) -> list[str]:
    """Why the clocks are held down; drivers before 535 know the call by its old name."""
    bits = ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if bits is None:
        bits = ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
    return [word for bit, word in THROTTLE_WORDS.items() if bits & bit]


def _peers(nvml: Any, handles: dict[int, Any]) -> list[dict[str, Any]]:
    """Every pair once, the lower index first."""
    buses = {index: _bus(ask(nvml, "nvmlDeviceGetPciInfo", handle)) for index, handle in handles.items()}
    links = {index: _nvlink_ends(nvml, handle) for index, handle in handles.items()}
    found = []
    for first in handles:
        for second in handles:
            if second > first:
                pair = (handles[first], handles[second])
                path = _nvlink_path(links[first], links[second], buses[second])
                level = None if path else ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", *pair)
                found.append(
                    {
                        "gpu_index": first,
                        "peer_index": second,
                        "path": path or PATH_WORDS.get(-1 if level is None else level),
                        "p2p": _p2p(nvml, *pair),
                    }
                )
    return found


def _bus(pci: Any) -> str | None:
    return None if pci is None else str(_text(pci.busId)).upper()


def _nvlink_ends(nvml: Any, handle: Any) -> list[str]:
    """What each active link of a GPU leads to: a bus id, or "switch"."""
    ends = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if ask(nvml, "nvmlDeviceGetNvLinkState", handle, link) == nvml.NVML_FEATURE_ENABLED:
            kind = ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
            bus = _bus(ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, link))
            ends.append("switch" if kind == SWITCH else bus or "unknown")
    return ends


def _nvlink_path(first: list[str], second: list[str], second_bus: str | None) -> str | None:
    """`NV18`: the links between two GPUs, direct ones or through switches, as nvidia-smi counts them."""
    direct = first.count(second_bus) if second_bus else 0
    links = direct or min(first.count("switch"), second.count("switch"))
    return f"NV{links}" if links else None


def _p2p(nvml: Any, first: Any, second: Any) -> bool | None:
    """Whether the driver lets the two GPUs read and write each other's memory."""
    states = [ask(nvml, "nvmlDeviceGetP2PStatus", first, second, kind) for kind in (P2P_READ, P2P_WRITE)]
    if any(state is None or state == P2P_UNKNOWN for state in states):
        return None
    return all(state == P2P_OK for state in states)
