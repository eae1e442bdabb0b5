"""Are the model's files whole and equal on every node, is there room, and how long will loading take?"""

from __future__ import annotations

from glmplan.doctor.finding import Verdict, fail, ok, skip, warn
from glmplan.doctor.seen import Seen, on, system
from glmplan.facts.host import Host
from glmplan.facts.system import Disk
from glmplan.units import GIB, format_bytes

STATE_FREE_BYTES = 1 * GIB
"""Logs of a launch, rotated, and the engine's compile caches."""
SLOW_LOAD_S = 1800.0
"""Half an hour: beyond it, a copy on a local disk is worth its time."""


def model_files(host: Host, seen: Seen) -> Verdict:
    """Every file that the index names is there with the bytes that its header promises."""
    found = system(host).model
    if found is None:
        return skip("no model folder was named (--model-path, or a plan with one)")
    wanted = seen.plan.model_path if seen.plan else found.path
    fetch = on(
        host,
        f"hf download {wanted}" if "/" in wanted and not wanted.startswith("/") else f"copy the files to {wanted}",
    )
    if not found.exists:
        return fail(f"{found.path} is not on the host", fetch)
    problems = []
    if not found.config:
        problems.append("config.json is missing or no JSON")
    if found.missing:
        expected = f" of {found.files_expected}" if found.files_expected else ""
        problems.append(f"{found.files_present}{expected} files, without {', '.join(found.missing[:3])}")
    problems += list(found.wrong[:3])
    if not found.files_present and not found.missing:
        problems.append("no safetensors file")
    if problems:
        return fail(f"{found.path}: {'; '.join(problems)}", fetch)
    files = f"{found.files_present} file{'s' if found.files_present != 1 else ''}"
    words = f"{files}, {format_bytes(found.bytes_present)} in {found.path}"
    if not found.tokenizer:
        return warn(f"{words}, but no tokenizer", fetch)
    if found.files_expected is None and found.files_present > 1:
        return warn(f"{words}, and no index to compare with", fetch)
    return ok(f"{words}, whole")


def models_equal(seen: Seen) -> Verdict:
    """All nodes have the same checkpoint."""
    found = {host.name: system(host).model for host in seen.hosts}
    if len(seen.hosts) < 2:
        return skip("one host")
    digests = {name: (model.index_digest, model.config_digest) for name, model in found.items() if model and model.exists}
    if not digests:
        return skip("no model folder was read")
    if len(set(digests.values())) > 1:
        words = ", ".join(
            f"{name} {index or 'no index'}/{config or 'no config'}" for name, (index, config) in digests.items()
        )
        return fail(f"index and config differ (digests): {words}", "copy one checkpoint to all nodes: rsync -a --delete")
    return ok(f"the same index and config.json on {len(digests)} hosts")


def disk_space(host: Host, seen: Seen) -> Verdict:
    """There is room for logs and state, and for the checkpoint where it is not there yet."""
    facts = system(host)
    if not facts.disks:
        return skip("no file system was read")
    model = facts.model
    low = []
    if seen.plan and model is not None and not model.complete and seen.plan.weights.file_bytes:
        lacking = seen.plan.weights.file_bytes - model.bytes_present
        place = facts.disks[0]
        if place.free_bytes is not None and place.free_bytes < lacking:
            low.append(
                f"{format_bytes(place.free_bytes)} free in {place.path}, and {format_bytes(lacking)} of the checkpoint lack"
            )
    low += [_free(disk) for disk in facts.disks[-2:] if disk.free_bytes is not None and disk.free_bytes < STATE_FREE_BYTES]
    if low:
        return fail("; ".join(low), on(host, "make room: df -h; du -xsh ~/.cache/* ~/.local/state/*"))
    return ok("; ".join(dict.fromkeys(_free(disk) for disk in facts.disks)))


def _free(disk: Disk) -> str:
    free = "unknown" if disk.free_bytes is None else format_bytes(disk.free_bytes)
    return f"{free} free in {disk.mount or disk.path}"


def disk_read(host: Host, seen: Seen) -> Verdict:
    """How fast the model folder is read, and what that makes of a start."""
    measured = next((disk for disk in system(host).disks if disk.read_bytes_per_s), None)
    if measured is None or not measured.read_bytes_per_s:
        return skip("nothing was read (no model folder, or files too small)")
    rate = measured.read_bytes_per_s
    words = f"{format_bytes(rate)}/s from {measured.path} ({measured.filesystem or 'unknown file system'}"
    words += f", {format_bytes(measured.read_sample_bytes)} read)"
    weights = sum(rank.weights_bytes for rank in seen.ranks(host))
    if not weights:
        return ok(words)
    seconds = weights / rate
    words += f": {format_bytes(weights)} of this node take {seconds / 60:.1f} min"
    if seconds > SLOW_LOAD_S:
        return warn(words, on(host, "copy the checkpoint to a local NVMe disk and plan with --served-model that path"))
    return ok(words)
