"""`glmplan probe`: what this machine's driver says about its GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from glmplan.facts.host import Host

EXAMPLES = """Examples:

glmplan probe

glmplan probe --json"""


def probe(as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False) -> None:
    """Read the local GPUs through NVML: names, memory, links, processes."""
    from glmplan.facts.profiles import gpu_profiles
    from glmplan.probe.nvml import probe_local

    host = probe_local(gpu_profiles())
    if as_json:
        typer.echo(host.model_dump_json(indent=1))
    else:
        _print(host)


def _print(host: Host) -> None:
    from rich.table import Table

    from glmplan.cli._output import console
    from glmplan.units import format_bytes

    out = console()
    out.print(
        f"[bold]{host.hostname}[/]: {len(host.gpus)} GPU{'s' if len(host.gpus) != 1 else ''}, driver "
        f"{host.driver_version}, CUDA {host.cuda_version}, RAM "
        f"{format_bytes(host.memory_total_bytes) if host.memory_total_bytes else 'unknown'}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPU", "name", "profile", "SM", "usable", "in use", "PCIe", "NVLinks", "power", "notes"):
        table.add_column(name, no_wrap=name != "notes", overflow="fold")
    for gpu in host.gpus:
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
            "; ".join(notes),
        )
    out.print(table)
