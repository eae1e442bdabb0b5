"""A driver's reading as facts: which profile a GPU matches, and how much of its memory a program can be given.

Units: bytes. Usable = total - reserved where the driver tells what it keeps; else the matching profile's figure, and
without a profile total less 2 %. In use = usable - free, so what the driver keeps is never counted as use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmplan.errors import ProbeError
from glmplan.facts.gpu import Gpu, GpuProblem
from glmplan.facts.gpu_profile import GpuProfile


class NoDriverError(ProbeError):
    """A machine has no NVIDIA driver, or the driver has no GPU."""


def problem_error(problem: GpuProblem, where: str = "") -> ProbeError:
    """The exception for GPUs that could not be read; `where` names the host."""
    kind = NoDriverError if problem.kind == "no-driver" else ProbeError
    return kind(f"{where}: {problem.message}" if where else problem.message, problem.next_step)


def gpu(reading: Mapping[str, Any], profiles: Sequence[GpuProfile]) -> Gpu:
    """One GPU of the node program's answer."""
    fields = dict(reading)
    total, free, reserved = (fields[f"memory_{name}_bytes"] for name in ("total", "free", "reserved"))
    profile = next((one for one in profiles if one.matches(fields["name"], total)), None)
    usable = total - reserved if reserved is not None else _usable(profile, total)
    del fields["memory_reserved_bytes"], fields["memory_free_bytes"]
    fields.update(
        profile=profile.name if profile else None,
        memory_usable_bytes=usable,
        memory_in_use_bytes=max(0, usable - free),
    )
    return Gpu.model_validate(fields)


def _usable(profile: GpuProfile | None, total: int) -> int:
    known = profile.memory_usable_bytes.value if profile else None
    return total - total // 50 if known is None else min(known, total)
