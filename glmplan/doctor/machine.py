"""Is the machine around the GPUs fit: memory, limits, IOMMU, leftovers, clock? One function a check, over recorded facts."""

from __future__ import annotations

from glmplan.doctor.finding import Verdict, fail, ok, skip, warn
from glmplan.doctor.gpus import numbers
from glmplan.doctor.seen import Seen, on, system
from glmplan.facts.host import Host
from glmplan.units import GIB, MIB, format_bytes

RANK_MEMORY_BYTES = 6 * GIB
"""Host memory a rank takes at load, an estimate: 4 GiB of CUDA libraries and Python, and shard pages being copied."""
SHARED_LOW_BYTES = 1 * GIB
SHARED_LEAST_BYTES = 256 * MIB
"""NCCL asks for shared memory per rank and channel; containers start with 64 MiB (NCCL user guide, troubleshooting)."""
OPEN_FILES = 65_536
"""A server of many connections with one file per shard and rank; login shells start with 1,024."""
CLOCK_WARN_S = 2.0
"""Logs of several hosts cannot be read together beyond this; minutes break TLS."""
CLOCK_FAIL_S = 300.0


def memory(host: Host, seen: Seen) -> Verdict:
    """The host has memory for the ranks' processes beside the page cache."""
    available = system(host).memory_available_bytes
    if available is None:
        return skip("the host does not tell its memory")
    ranks = len(seen.gpus(host))
    needed = ranks * RANK_MEMORY_BYTES
    words = f"{format_bytes(available)} available"
    if host.memory_total_bytes:
        words += f" of {format_bytes(host.memory_total_bytes)}"
    if available < needed:
        return warn(
            f"{words}; {ranks} ranks take about {format_bytes(needed)} while loading (estimate)",
            on(host, "free -g; end what takes it: a rank that the system kills dies with exit code -9"),
        )
    return ok(words)


def shared_memory(host: Host, seen: Seen) -> Verdict:
    """/dev/shm has room for NCCL and for the engine's queues."""
    free, total = system(host).shared_memory_free_bytes, system(host).shared_memory_total_bytes
    if free is None:
        return skip("/dev/shm cannot be read")
    words = f"{format_bytes(free)} free in /dev/shm" + (f" of {format_bytes(total)}" if total else "")
    repair = on(host, "sudo mount -o remount,size=32G /dev/shm; in a container: --shm-size 32g or --ipc host")
    if free < SHARED_LEAST_BYTES and len(seen.gpus(host)) > 1:
        return fail(f"{words}: NCCL between GPUs fails below {format_bytes(SHARED_LEAST_BYTES)}", repair)
    return ok(words) if free >= SHARED_LOW_BYTES else warn(f"{words}, which is little", repair)


def swap(host: Host, seen: Seen) -> Verdict:
    """Nothing of the host lives in swap now."""
    total, used = system(host).swap_total_bytes, system(host).swap_used_bytes
    if total is None:
        return skip("the host does not tell its swap")
    if used and used > GIB:
        return warn(
            f"{format_bytes(used)} of {format_bytes(total)} swap in use: the host runs short of memory",
            on(host, "free -g; then: sudo swapoff -a && sudo swapon -a"),
        )
    return ok(f"{format_bytes(used or 0)} of {format_bytes(total)} swap in use" if total else "no swap")


def limits(host: Host, seen: Seen) -> Verdict:
    """Open files, locked memory and processes are not limited below what an engine needs."""
    found = system(host).limits
    if not found:
        return skip("the host does not tell its limits")
    low = []
    files = found.get("open_files")
    if files is not None and files < OPEN_FILES:
        low.append(f"open files {files:,} (ulimit -n; {OPEN_FILES:,} is enough)")
    locked = found.get("locked_memory_bytes")
    if locked is not None and any(nic.rdma_device for nic in system(host).nics):
        low.append(f"locked memory {format_bytes(locked)} (ulimit -l), and RDMA needs it unlimited")
    processes = found.get("processes")
    if processes is not None and processes < 4096:
        low.append(f"processes {processes:,} (ulimit -u)")
    if low:
        repair = "set nofile, memlock and nproc in /etc/security/limits.d/glmplan.conf and log in again"
        return warn("; ".join(low), on(host, repair))
    return ok("open files, locked memory and processes suffice")


def iommu(host: Host, seen: Seen) -> Verdict:
    """On PCIe boxes nothing stands between GPUs: a translating IOMMU or ACS makes direct copies slow, stuck or wrong."""
    facts, gpus = system(host), seen.gpus(host)
    if len(gpus) < 2:
        return skip("fewer than two GPUs")
    if all(gpu.has_fast_link for gpu in gpus):
        return skip("the GPUs talk over NVLink")
    if facts.iommu is None and facts.acs_bridges is None:
        return skip("neither IOMMU nor ACS can be read here")
    if facts.virtual_machine:
        return skip("a virtual machine: IOMMU and ACS belong to its host")
    found, repairs = [], []
    if facts.iommu == "translated":
        found.append("the IOMMU translates addresses")
        repairs.append("add iommu=pt (or intel_iommu=off, amd_iommu=off) to the kernel's command line and reboot")
    if facts.acs_bridges:
        found.append(f"ACS redirects on {facts.acs_bridges} PCIe bridges")
        repairs.append("turn ACS off in the BIOS, or on each bridge: sudo setpci -s BRIDGE ECAP_ACS+0x6.w=0000")
    if found:
        words = " and ".join(found)
        return warn(
            f"{words}: direct copies between GPUs may be slow or wrong",
            on(host, "; ".join([*repairs, "then glmplan doctor --deep --only copies"])),
        )
    return ok(f"IOMMU {facts.iommu or 'unknown'}, ACS redirects on no bridge")


def leftovers(host: Host, seen: Seen) -> Verdict:
    """No engine process of an earlier run is left."""
    found = system(host).leftovers
    if not found:
        return ok("no process of an engine runs")
    lines = []
    for one in found[:4]:
        where = f" on {numbers(one.gpu_indexes)}" if one.gpu_indexes else ""
        name = f" (deployment {one.deployment})" if one.deployment else ""
        lines.append(f"pid {one.pid} {one.command or 'unknown'} of {one.owner or 'an unknown user'}{name}{where}")
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    names = sorted({one.deployment for one in found if one.deployment})
    stray = [str(one.pid) for one in found if not one.deployment]
    repairs = [f"glmplan stop {name}" for name in names] + ([on(host, f"kill {' '.join(stray[:20])}")] if stray else [])
    return warn("; ".join(lines) + more, "; ".join(repairs))


def clock(host: Host, seen: Seen) -> Verdict:
    """The host's clock agrees with the machine that asks."""
    ahead_s, unsure_s = system(host).clock_offset_s, system(host).clock_error_s
    if ahead_s is None or unsure_s is None:
        return skip("the clock was not read")
    away = max(abs(ahead_s) - unsure_s, 0.0)
    words = f"{abs(ahead_s):.2f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine (± {unsure_s:.2f} s)"
    repair = on(host, "sudo timedatectl set-ntp true; chronyc tracking")
    if away > CLOCK_FAIL_S:
        return fail(f"{words}: certificates and tokens are judged by time", repair)
    return warn(f"{words}: logs cannot be read side by side", repair) if away > CLOCK_WARN_S else ok(words)
