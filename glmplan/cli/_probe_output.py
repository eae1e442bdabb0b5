"""How the facts of a host look in a terminal: a head line, its GPUs, and a line per subject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from glmplan.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from glmplan.facts.gpu import Gpu
    from glmplan.facts.host import Host
    from glmplan.facts.system import Disk, EngineEnvironment, ModelFiles, Nic, System


def print_host(out: Console, host: Host) -> None:
    """Everything worth reading about one host."""
    name = host.hostname if host.name == "localhost" or not host.hostname else f"{host.name} ({host.hostname})"
    ram = format_bytes(host.memory_total_bytes) if host.memory_total_bytes else "unknown"
    driver = f"driver {host.driver_version}, CUDA {host.cuda_version}" if host.driver_version else "no NVIDIA driver"
    out.print(
        f"[bold]{escape(name or host.name)}[/]: {len(host.gpus)} GPU{'s' if len(host.gpus) != 1 else ''}, {driver}, "
        f"RAM {ram}"
    )
    if host.gpus:
        out.print(_gpu_table(host.gpus))
    if host.gpu_problem is not None:
        out.print(f"[red]GPUs[/]      {escape(host.gpu_problem.message)}", soft_wrap=True)
    if host.system is not None:
        for title, words in _lines(host, host.system):
            out.print(f"[bold]{title:<9}[/] {escape(words)}", soft_wrap=True)


def _gpu_table(gpus: tuple[Gpu, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPU", "name", "profile", "SM", "usable", "in use", "PCIe", "NVLinks", "power", "notes"):
        table.add_column(name, no_wrap=name != "notes", overflow="fold")
    for gpu in gpus:
        pcie = f"{gpu.pcie_generation or '?'} x{gpu.pcie_width or '?'}"
        if (gpu.pcie_generation_max, gpu.pcie_width_max) != (gpu.pcie_generation, gpu.pcie_width):
            pcie += f" (of {gpu.pcie_generation_max or '?'} x{gpu.pcie_width_max or '?'})"
        notes = ["MIG on"] if gpu.mig else []
        notes += [f"pid {p.pid} {p.command or '?'} ({p.owner or '?'})" for p in gpu.processes]
        notes += [f"slowed: {', '.join(gpu.throttle_reasons)}"] if gpu.throttle_reasons else []
        table.add_row(
            str(gpu.index),
            gpu.name,
            gpu.profile or "none",
            "?" if gpu.sm is None else f"sm_{gpu.sm}",
            format_bytes(gpu.memory_usable_bytes),
            format_bytes(gpu.memory_in_use_bytes),
            pcie,
            "?" if gpu.nvlink_active is None else str(gpu.nvlink_active),
            "?" if gpu.power_limit_w is None else f"{gpu.power_limit_w} W",
            escape("; ".join(notes)),
        )
    return table


def _lines(host: Host, system: System) -> Iterator[tuple[str, str]]:
    """Title and words, one line per subject that has anything to say."""
    if system.peers:
        yield "links", _peers(system)
    place = "container" if system.container else "virtual machine" if system.virtual_machine else ""
    yield "system", ", ".join(filter(None, (system.os_name, f"kernel {system.kernel_version}", place, _clock(system))))
    yield "CPU", f"{system.cpu_model or 'unknown'}, {system.cpu_count or '?'} CPUs, {system.numa_nodes or '?'} NUMA nodes"
    yield "memory", _memory(system)
    if host.address is not None:
        yield "address", f"{host.address}" + "".join(f" {name}={value}" for name, value in host.network.items())
    for nic in system.nics:
        if nic.kind != "loopback":
            yield "network", _nic(nic)
    for port in system.rdma:
        rate = f"{port.rate_bits_per_s / 1e9:g} Gbit/s" if port.rate_bits_per_s else "rate unknown"
        yield "RDMA", f"{port.device} port {port.port}: {port.link_layer or '?'}, {port.state or '?'}, {rate}"
    for disk in system.disks:
        yield "disk", _disk(disk)
    for engine in system.engines:
        yield "engine", _engine(engine)
    if system.nvcc:
        yield "nvcc", f"{system.nvcc} {system.nvcc_version or ''}"
    if system.model is not None:
        yield "model", _model(system.model)
    for one in system.leftovers:
        gpus = f", GPUs {', '.join(map(str, one.gpu_indexes))}" if one.gpu_indexes else ""
        yield "running", f"pid {one.pid} {one.command or '?'} ({one.owner or '?'}{gpus}) {one.deployment or ''}".rstrip()


def _clock(system: System) -> str:
    if system.clock_offset_s is None or abs(system.clock_offset_s) <= (system.clock_error_s or 0) + 0.1:
        return ""
    return f"clock {system.clock_offset_s:+.1f} s"


def _peers(system: System) -> str:
    paths = Counter(pair.path or "?" for pair in system.peers)
    p2p = Counter(pair.p2p for pair in system.peers)
    words = ", ".join(f"{path} in {count}" for path, count in paths.most_common())
    able = "all" if p2p[True] == len(system.peers) else "none" if not p2p[True] else str(p2p[True])
    unknown = f", unknown in {p2p[None]}" if p2p[None] else ""
    return f"{len(system.peers)} pairs of GPUs: {words}; P2P in {able}{unknown}"


def _memory(system: System) -> str:
    parts = []
    if system.memory_available_bytes is not None:
        parts.append(f"{format_bytes(system.memory_available_bytes)} available")
    if system.swap_total_bytes is not None and system.swap_used_bytes is not None:
        parts.append(f"swap {format_bytes(system.swap_used_bytes)} of {format_bytes(system.swap_total_bytes)} used")
    if system.shared_memory_free_bytes is not None and system.shared_memory_total_bytes is not None:
        total = format_bytes(system.shared_memory_total_bytes)
        parts.append(f"/dev/shm {format_bytes(system.shared_memory_free_bytes)} of {total} free")
    return ", ".join(parts) or "unknown"


def _nic(nic: Nic) -> str:
    speed = f"{nic.speed_bits_per_s / 1e9:g} Gbit/s" if nic.speed_bits_per_s else "speed unknown"
    rdma = f", RDMA {nic.rdma_device}" if nic.rdma_device else ""
    route = ", default route" if nic.default_route else ""
    state = "up" if nic.up else "down"
    return f"{nic.name}: {nic.kind}, {state}, {speed}, MTU {nic.mtu or '?'}, {' '.join(nic.addresses)}{rdma}{route}"


def _disk(disk: Disk) -> str:
    room = "room unknown"
    if disk.free_bytes is not None and disk.total_bytes is not None:
        room = f"{format_bytes(disk.free_bytes)} of {format_bytes(disk.total_bytes)} free"
    read = ""
    if disk.read_bytes_per_s is not None:
        read = f", reads {format_bytes(disk.read_bytes_per_s)}/s ({format_bytes(disk.read_sample_bytes)} read)"
    return f"{disk.path} on {disk.mount or '?'} ({disk.filesystem or '?'}): {room}{read}"


def _engine(one: EngineEnvironment) -> str:
    words = [f"{one.engine} {one.engine_version}" if one.engine else "no engine"]
    for name in ("torch", "cuda", "nccl", "triton", "glmplan"):
        version = getattr(one, f"{name}_version")
        words += [f"{name} {version}"] if version else []
    return f"{one.python} ({one.python_version or '?'}): {', '.join(words)}"


def _model(model: ModelFiles) -> str:
    if not model.exists:
        return f"{model.path} is not there"
    expected = model.files_expected if model.files_expected is not None else "?"
    words = f"{model.path}: {model.files_present} of {expected} files, {format_bytes(model.bytes_present)}"
    problems = [f"lacks {', '.join(model.missing)}"] if model.missing else []
    problems += [f"wrong: {'; '.join(model.wrong)}"] if model.wrong else []
    problems += [] if model.config else ["no config.json"]
    problems += [] if model.tokenizer else ["no tokenizer"]
    return f"{words}, {'; '.join(problems) if problems else 'complete'}"
