"""Are the GPUs the ones that were planned, free, and in good shape? One function a check, over recorded facts."""

from __future__ import annotations

from collections.abc import Iterable

from glmplan.doctor.finding import Verdict, fail, ok, skip, warn
from glmplan.doctor.seen import Seen, on
from glmplan.facts.gpu import Gpu
from glmplan.facts.host import Host
from glmplan.units import MIB, format_bytes

NO_GPUS = "no NVIDIA GPU or driver was found"
IDLE_BYTES = 512 * MIB
"""What a GPU may hold beside an engine without being called busy: a desktop, a monitoring agent."""
HARMFUL_THROTTLING = ("hardware-slowdown", "software-thermal", "hardware-thermal", "power-brake")
REPLAN = "glmplan size --hosts ... --save plan.json"
NEEDED_LANES = 8
"""Fewer PCIe lanes than this halve the speed of a rank that talks over PCIe with every layer."""


def numbers(gpus: Iterable[Gpu] | Iterable[int]) -> str:
    """`GPU 0, 1 and 3`; a run of more than three is shortened."""
    indexes = [gpu.index if isinstance(gpu, Gpu) else gpu for gpu in gpus]
    if len(indexes) > 3 and indexes == list(range(indexes[0], indexes[0] + len(indexes))):
        return f"GPUs {indexes[0]}-{indexes[-1]}"
    words = [str(index) for index in indexes]
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"GPU{'s' if len(words) > 1 else ''} {listed}"


def present(host: Host, seen: Seen) -> Verdict:
    """The GPUs that the plan names are there, of the kind that it names."""
    node, problem = seen.node(host), host.gpu_problem
    if problem is not None and (host.gpus or problem.kind != "no-driver" or node is not None):
        return fail(problem.message, on(host, problem.next_step or "nvidia-smi"))
    if not host.gpus:
        return skip(NO_GPUS)
    kinds: dict[str, int] = {}
    for gpu in seen.gpus(host):
        kinds[gpu.label] = kinds.get(gpu.label, 0) + 1
    words = " + ".join(f"{count}x {name}" for name, count in kinds.items())
    if node is None:
        return ok(words) if len(kinds) < 2 else warn(f"different GPUs in one host: {words}", REPLAN)
    have = {gpu.index: gpu for gpu in host.gpus}
    missing = [index for index in node.gpu_indexes if index not in have]
    if missing:
        return fail(f"the plan uses {numbers(missing)}, which the host does not have ({words or 'none'})", REPLAN)
    other = [have[index] for index in node.gpu_indexes if node.sm is not None and have[index].sm not in (None, node.sm)]
    if other:
        found = " and ".join(f"{numbers([gpu])} is sm_{gpu.sm}" for gpu in other[:4])
        return fail(f"{found}; the plan chose kernels for sm_{node.sm}", REPLAN)
    return ok(f"{words}, as planned ({node.gpu})")


def memory(host: Host, seen: Seen) -> Verdict:
    """Every GPU has the bytes its rank was planned with, beside what others hold now."""
    if not host.gpus:
        return skip(NO_GPUS)
    ranks = {rank.gpu_index: rank for rank in seen.ranks(host)}
    short, busy = [], []
    for gpu in seen.gpus(host):
        rank = ranks.get(gpu.index)
        needed = rank.total_bytes - sum(item.bytes for item in rank.items if item.group == "others") if rank else 0
        if needed > gpu.available_bytes:
            short.append(
                f"GPU {gpu.index} has {format_bytes(gpu.available_bytes)} free of {format_bytes(gpu.capacity_bytes)} "
                f"and its rank needs {format_bytes(needed)}"
            )
        elif gpu.memory_in_use_bytes > IDLE_BYTES:
            busy.append(f"GPU {gpu.index}: {format_bytes(gpu.memory_in_use_bytes)} in use")
    if short:
        return fail("; ".join(short[:4]), on(host, "nvidia-smi --query-compute-apps=pid,used_memory --format=csv"))
    if busy:
        return warn("; ".join(busy), on(host, "nvidia-smi --query-compute-apps=pid,used_memory --format=csv"))
    least = min(gpu.available_bytes for gpu in seen.gpus(host)) if seen.gpus(host) else 0
    return ok(f"at least {format_bytes(least)} free on every GPU" + (", enough for the plan" if ranks else ""))


def foreign_processes(host: Host, seen: Seen) -> Verdict:
    """Nobody else computes on these GPUs."""
    if not host.gpus:
        return skip(NO_GPUS)
    found: dict[tuple[int, str], list[int]] = {}
    for gpu in seen.gpus(host):
        for one in gpu.processes:
            held = f", {format_bytes(one.used_bytes)}" if one.used_bytes else ""
            words = f"pid {one.pid} {one.command or 'unknown'} of {one.owner or 'an unknown user'}{held}"
            found.setdefault((one.pid, words), []).append(gpu.index)
    if not found:
        return ok("no process on the GPUs")
    lines = [f"{words} on {numbers(indexes)}" for (_, words), indexes in found.items()]
    pids = " ".join(str(pid) for pid in dict.fromkeys(pid for pid, _ in found))
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    return warn("; ".join(lines[:4]) + more, on(host, f"ask the owner, or end it: kill {pids}"))


def mig(host: Host, seen: Seen) -> Verdict:
    """No GPU is cut into MIG instances."""
    if not host.gpus:
        return skip(NO_GPUS)
    cut = [gpu for gpu in seen.gpus(host) if gpu.mig]
    if cut:
        indexes = ",".join(str(gpu.index) for gpu in cut)
        return fail(f"MIG is on: {numbers(cut)}; engines need whole GPUs", on(host, f"sudo nvidia-smi -i {indexes} -mig 0"))
    return ok("MIG is off")


def ecc(host: Host, seen: Seen) -> Verdict:
    """ECC is the same on all GPUs: it takes memory, and the fullest rank decides for all."""
    known = [gpu for gpu in seen.gpus(host) if gpu.ecc is not None]
    if not known:
        return skip("no GPU tells an ECC mode")
    off = [gpu for gpu in known if not gpu.ecc]
    if off and len(off) < len(known):
        indexes = ",".join(str(gpu.index) for gpu in off)
        return warn(
            f"ECC is off on {numbers(off)} and on on the others", on(host, f"sudo nvidia-smi -i {indexes} -e 1 and reboot")
        )
    return ok("ECC is off on every GPU" if off else "ECC is on")


def pcie(host: Host, seen: Seen) -> Verdict:
    """Every GPU has its lanes. The generation of an idle GPU falls by itself and is no fault."""
    known = [gpu for gpu in seen.gpus(host) if gpu.pcie_width is not None]
    if not known:
        return skip("no GPU tells its PCIe width")
    narrow = [gpu for gpu in known if gpu.pcie_width_max and gpu.pcie_width and gpu.pcie_width < gpu.pcie_width_max]
    generations = sorted({gpu.pcie_generation_max for gpu in known if gpu.pcie_generation_max})
    words = f"PCIe {'/'.join(map(str, generations)) or '?'}"
    if not narrow:
        return ok(f"{words} x{min(gpu.pcie_width or 0 for gpu in known)} on every GPU")
    lanes = "; ".join(f"GPU {gpu.index} x{gpu.pcie_width} of x{gpu.pcie_width_max}" for gpu in narrow)
    slow = any((gpu.pcie_width or 0) < NEEDED_LANES and not gpu.has_fast_link for gpu in narrow)
    more = f"; fewer than x{NEEDED_LANES} slow down every layer" if slow else ""
    return warn(
        f"{lanes}{more}", on(host, "reseat the card or riser, look at bifurcation in the BIOS, then: nvidia-smi -q -d PCIE")
    )


def nvlink(host: Host, seen: Seen) -> Verdict:
    """Equal GPUs have equally many NVLinks up."""
    known = [gpu for gpu in seen.gpus(host) if gpu.nvlink_active is not None]
    if not known:
        return skip("no GPU has NVLink")
    most: dict[str, int] = {}
    for gpu in known:
        most[gpu.name] = max(most.get(gpu.name, 0), gpu.nvlink_active or 0)
    down = [gpu for gpu in known if (gpu.nvlink_active or 0) < most[gpu.name]]
    if down:
        least = min(gpu.nvlink_active or 0 for gpu in down)
        return warn(
            f"{numbers(down)}: {least} of {max(most[gpu.name] for gpu in down)} NVLinks up",
            on(host, "nvidia-smi nvlink -s; with NVSwitch: systemctl status nvidia-fabricmanager"),
        )
    linked = sorted({links for links in most.values() if links})
    return ok(f"{' or '.join(map(str, linked))} NVLinks up on every GPU") if linked else skip("no NVLink is connected")


def peer_access(host: Host, seen: Seen) -> Verdict:
    """GPUs that share a node reach each other directly."""
    chosen = {gpu.index for gpu in seen.gpus(host)}
    if len(chosen) < 2:
        return skip("fewer than two GPUs")
    peers = [link for link in (host.system.peers if host.system else ()) if {link.gpu_index, link.peer_index} <= chosen]
    known = [link for link in peers if link.p2p is not None]
    if not known:
        return skip("the driver does not tell whether peers reach each other")
    paths = sorted({link.path for link in peers if link.path})
    words = f"over {', '.join(paths)}" if paths else "path unknown"
    without = [link for link in known if not link.p2p]
    if not without:
        return ok(f"direct copies between all {len(chosen)} GPUs {words}")
    if len(without) == len(known):
        return warn(
            f"no direct copies between GPUs ({words}): NCCL goes through /dev/shm, correct and slower",
            "nothing to do on cards without P2P in their driver (GeForce); on others: glmplan doctor --only iommu",
        )
    pairs = ", ".join(f"{link.gpu_index}-{link.peer_index}" for link in without[:6])
    return warn(f"no direct copies between GPUs {pairs} ({words})", on(host, "nvidia-smi topo -p2p r; nvidia-smi topo -m"))


def power(host: Host, seen: Seen) -> Verdict:
    """Equal GPUs have equal power limits: the slowest decides the speed of all."""
    limits: dict[str, dict[int, int]] = {}
    for gpu in seen.gpus(host):
        if gpu.power_limit_w is not None:
            limits.setdefault(gpu.name, {})[gpu.index] = gpu.power_limit_w
    if not limits:
        return skip("no GPU tells its power limit")
    for name, found in limits.items():
        top = max(found.values())
        low = [index for index, watts in found.items() if watts < top]
        if low:
            indexes = ",".join(map(str, low))
            return warn(
                f"{numbers(low)} ({name}): {min(found.values())} W, others {top} W",
                on(host, f"sudo nvidia-smi -i {indexes} -pl {top}"),
            )
    return ok(", ".join(f"{max(found.values())} W" for found in limits.values()))


def throttling(host: Host, seen: Seen) -> Verdict:
    """No GPU is slowed down by heat or its power supply."""
    if not host.gpus:
        return skip(NO_GPUS)
    slowed = {gpu.index: [w for w in gpu.throttle_reasons if w in HARMFUL_THROTTLING] for gpu in seen.gpus(host)}
    slowed = {index: words for index, words in slowed.items() if words}
    if slowed:
        words = "; ".join(f"GPU {index}: {', '.join(reasons)}" for index, reasons in slowed.items())
        return warn(words, on(host, "nvidia-smi -q -d TEMPERATURE,PERFORMANCE (airflow, power cables)"))
    return ok("no GPU is slowed by heat or power supply")
