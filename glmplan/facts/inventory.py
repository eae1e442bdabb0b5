"""How an inventory is written: as words (`24x rtx-4090-48g`), as a TOML file, or the embedded default.

In a TOML file each `[[hosts]]` has a name, an optional address, and `[[hosts.gpus]]` entries: either a `profile` with a
`count` (and `in_use = "6 GiB"` where others hold memory), or the full facts of one GPU as `glmplan probe` saves them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from glmplan.errors import UsageError
from glmplan.facts.gpu import Gpu
from glmplan.facts.host import Host, Inventory
from glmplan.facts.model_config import first_problem
from glmplan.facts.profiles import gpu_profile, read_toml
from glmplan.facts.toml import toml_text
from glmplan.units import parse_bytes

DEFAULT_GPUS = "24x rtx-4090-48g"
DEFAULT_NODES = 3
MAX_GPUS = 4096


def default_inventory() -> Inventory:
    """Three nodes of eight RTX 4090 48 GB, the first machines that ran GLM-5.2 on consumer GPUs (seed 000)."""
    return declared_inventory(DEFAULT_GPUS, DEFAULT_NODES, None).model_copy(update={"origin": "default"})


def _groups(text: str) -> list[tuple[int, str]]:
    groups = []
    for part in text.split("+"):
        found = re.fullmatch(r"\s*(?:([0-9]+)\s*[xX*]\s*)?([A-Za-z][A-Za-z0-9-]*)\s*", part)
        if not found:
            raise UsageError(
                f"--gpus {text!r} cannot be read at {part.strip()!r}.",
                'Write COUNTx NAME, joined with +: "8x rtx-4090-48g + 8x rtx-5090".',
            )
        groups.append((int(found[1]) if found[1] else 1, found[2].lower()))
    return groups


def declared_inventory(text: str, nodes: int | None, per_node: int | None) -> Inventory:
    """`24x rtx-4090-48g` over `nodes` hosts; groups joined with + stand on hosts of their own, or all on one."""
    groups = _groups(text)
    total = sum(count for count, _ in groups)
    if total < 1 or any(count < 1 for count, _ in groups):
        raise UsageError(f"--gpus {text!r} names 0 GPUs.", "Name at least one GPU.")
    if total > MAX_GPUS:
        raise UsageError(f"--gpus {text!r} names {total:,} GPUs; {MAX_GPUS:,} is the limit.", "Name fewer.")
    if nodes is not None and nodes < 1:
        raise UsageError(f"--nodes is {nodes}; it must be at least 1.", "Give the number of hosts.")
    if per_node is not None and per_node < 1:
        raise UsageError(f"--gpus-per-node is {per_node}; it must be at least 1.", "Give the GPUs of one host.")
    if nodes is not None and per_node is not None and nodes * per_node != total:
        raise UsageError(
            f"--nodes {nodes} of --gpus-per-node {per_node} are {nodes * per_node} GPUs, but --gpus names {total}.",
            "Drop one of the two.",
        )
    if nodes == 1 and len(groups) > 1:
        return Inventory(hosts=(_host("host0", [gpu for count, name in groups for gpu in [name] * count]),))
    hosts: list[list[str]] = []
    for count, name in groups:
        share = nodes if len(groups) == 1 else None
        size = per_node or gpu_profile(name).gpus_per_node
        hosts += _spread(count, name, share, size, text)
    if nodes is not None and len(hosts) != nodes:
        raise UsageError(
            f"--gpus {text!r} makes {len(hosts)} hosts, but --nodes is {nodes}.",
            "Give each group as many GPUs as its hosts hold, set --gpus-per-node, or use --inventory FILE.",
        )
    return Inventory(hosts=tuple(_host(f"host{index}", names) for index, names in enumerate(hosts)))


def _spread(count: int, name: str, nodes: int | None, size: int, text: str) -> list[list[str]]:
    if nodes is not None:
        if count % nodes:
            raise UsageError(
                f"--gpus {text!r} does not divide over {nodes} nodes ({count} / {nodes}).",
                "Give a multiple of the nodes, or describe the hosts in --inventory FILE.",
            )
        return [[name] * (count // nodes) for _ in range(nodes)]
    full, rest = divmod(count, size)
    return [[name] * size for _ in range(full)] + ([[name] * rest] if rest else [])


def _host(label: str, names: list[str]) -> Host:
    profiles = {name: gpu_profile(name) for name in dict.fromkeys(names)}
    return Host(name=label, gpus=tuple(profiles[name].gpu(index) for index, name in enumerate(names)))


def _file_gpus(entries: list[Any], where: str) -> tuple[Gpu, ...]:
    gpus: list[Gpu] = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise UsageError(f"{where}: a gpus entry is not a table.", "Write [[hosts.gpus]] entries.")
        if "memory_total_bytes" in entry:
            try:
                gpus.append(Gpu.model_validate(entry))
            except ValidationError as error:
                raise UsageError(f"{where}: {first_problem(error)}.", "Correct that entry.") from None
            continue
        unknown = sorted(set(entry) - {"profile", "count", "in_use"})
        if unknown or "profile" not in entry:
            problem = f"unknown key {unknown[0]!r}" if unknown else "a gpus entry has no profile"
            raise UsageError(f"{where}: {problem}.", "Use profile, count and in_use, or the facts that probe saves.")
        in_use = parse_bytes(str(entry.get("in_use", "0")), "in_use")
        count = entry.get("count", 1)
        if not isinstance(count, int) or not 1 <= count <= 64:
            raise UsageError(f"{where}: count is {count!r}, not 1 to 64.", "Correct that entry.")
        profile = gpu_profile(str(entry["profile"]))
        if in_use > profile.gpu(0).memory_usable_bytes:
            raise UsageError(
                f"{where}: in_use {entry['in_use']!r} is more than a {profile.name} has.", "Correct that entry."
            )
        for _ in range(count):
            gpus.append(profile.gpu(len(gpus)).model_copy(update={"memory_in_use_bytes": in_use}))
    if len({gpu.index for gpu in gpus}) != len(gpus):
        raise UsageError(f"{where}: two GPUs have the same index.", "Give each its own.")
    return tuple(gpus)


def read_inventory(path: Path) -> Inventory:
    """An inventory file; every problem is a UsageError that names the host."""
    raw = read_toml(path)
    unknown = sorted(set(raw) - {"schema_version", "hosts", "origin"})
    hosts = raw.get("hosts")
    if unknown:
        raise UsageError(f"{path}: unknown key {unknown[0]!r}.", "An inventory has schema_version and [[hosts]].")
    if raw.get("schema_version", 1) != 1:
        raise UsageError(f"{path}: schema_version is {raw['schema_version']!r}; 1 is known.", "Save it again with probe.")
    if not isinstance(hosts, list) or not hosts:
        raise UsageError(f"{path} has no [[hosts]].", "Describe at least one host with its GPUs.")
    found = []
    for number, entry in enumerate(hosts):
        if not isinstance(entry, dict):
            raise UsageError(f"{path}: hosts entry {number} is not a table.", "Write [[hosts]] entries.")
        name = str(entry.get("name", f"host{number}"))
        listed = entry.get("gpus", [])
        if not isinstance(listed, list):
            raise UsageError(f"{path}, host {name}: gpus is not a list.", "Write [[hosts.gpus]] entries.")
        gpus = _file_gpus(listed, f"{path}, host {name}")
        try:
            found.append(Host.model_validate({**entry, "name": name, "gpus": gpus}))
        except ValidationError as error:
            raise UsageError(f"{path}, host {name}: {first_problem(error)}.", "Correct that entry.") from None
    names = [host.name for host in found]
    if len(set(names)) != len(names):
        raise UsageError(f"{path}: two hosts have the same name.", "Give each its own.")
    return Inventory(origin="file", hosts=tuple(found))


def inventory_text(inventory: Inventory) -> str:
    """The inventory as TOML that `read_inventory` reads back with the same hosts."""
    tree = inventory.model_dump(mode="json", exclude_defaults=True, exclude={"schema_version"})
    for entry, host in zip(tree["hosts"], inventory.hosts, strict=True):
        if host.system is not None and "limits" in entry.get("system", {}):
            limits = entry["system"]["limits"]
            entry["system"]["limits"] = {name: "unlimited" if limit is None else limit for name, limit in limits.items()}
    head = "# Saved by glmplan probe. Read it with: glmplan size --inventory FILE\n"
    return head + toml_text({"schema_version": inventory.schema_version, **tree})
