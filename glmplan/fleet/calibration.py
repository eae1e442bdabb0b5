"""Predicted against measured memory, rank by rank, and its record for later plans.

Measured comes from the engine's log (weights, KV cache, graphs; two decimals of a GiB, so 5 MiB are noise) and from NVML
after the canaries (everything: PyTorch keeps what its largest forward pass took). Records lie in
`$XDG_STATE_HOME/glmplan/calibration/*.json`, one per engine, GPU and layout, the newest wins. Only runtime memory is
learned: weights and KV cache are arithmetic, and a difference there is a defect to look at, not a number to adopt.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from glmplan.facts.base import Frozen
from glmplan.fleet.diagnosis import GpuMemory
from glmplan.fleet.phases import NodeProgress
from glmplan.planning.measured import MeasuredRuntime, MeasuredStage, RuntimeKey
from glmplan.planning.plan import Plan, PlanRank

LOG_ROUNDING_BYTES = 5_368_710
"""Half a unit of the log's last digit, 0.005 GiB: stated values are taken that much higher."""

Part = Literal["weights", "kv_cache", "graphs", "startup", "runtime", "total"]


class MeasuredRank(Frozen):
    """What one rank took. `used_bytes` is NVML's for the deployment's processes; None was not seen."""

    pp_rank: int
    tp_rank: int
    startup_bytes: int | None = None
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    graph_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    tokens: int | None = None

    @property
    def runtime_bytes(self) -> int | None:
        """Everything beside weights and KV cache, graphs included."""
        if self.used_bytes is None or self.weights_bytes is None or self.kv_bytes is None:
            return None
        return max(self.used_bytes - self.weights_bytes - self.kv_bytes, 0) + 2 * LOG_ROUNDING_BYTES


class Difference(Frozen):
    """One part of a rank's memory."""

    part: Part
    predicted_bytes: int
    measured_bytes: int

    @property
    def difference_bytes(self) -> int:
        """Measured less predicted: above 0, the rank takes more than was planned."""
        return self.measured_bytes - self.predicted_bytes


class RankComparison(Frozen):
    """Predicted against measured for one rank; parts that were not measured are left out."""

    pp_rank: int
    tp_rank: int
    host: str
    gpu_index: int
    gpu: str
    parts: tuple[Difference, ...]


class Calibration(Frozen):
    """One measured deployment. `key` is what a later plan must equal for the measurement to count."""

    schema_version: Literal[1] = 1
    glmplan_version: str
    measured_s: float
    deployment: str = ""
    key: dict[str, int | str]
    stages: tuple[dict[str, int | None], ...] = Field(min_length=1)
    ranks: tuple[RankComparison, ...]


def measure(
    plan: Plan, nodes: Mapping[int, NodeProgress], gpus: Mapping[int, Mapping[int, GpuMemory]]
) -> tuple[MeasuredRank, ...]:
    """What log and NVML say of every rank; `nodes` and `gpus` by node_rank, GPUs then by index."""
    found = []
    for rank in plan.ranks:
        node = nodes.get(rank.node_rank)
        progress = node.ranks.get((rank.pp_rank, rank.tp_rank)) if node is not None else None
        gpu = gpus.get(rank.node_rank, {}).get(rank.gpu_index)
        memory = progress.memory if progress is not None else None
        found.append(
            MeasuredRank(
                pp_rank=rank.pp_rank,
                tp_rank=rank.tp_rank,
                startup_bytes=memory.startup_bytes if memory else None,
                weights_bytes=memory.weights_bytes if memory else None,
                kv_bytes=memory.kv_bytes if memory else None,
                graph_bytes=memory.graph_bytes if memory else None,
                free_bytes=memory.free_bytes if memory else None,
                used_bytes=gpu.used_bytes if gpu else None,
                tokens=memory.tokens if memory else None,
            )
        )
    return tuple(found)


def compare(plan: Plan, measured: Iterable[MeasuredRank]) -> tuple[RankComparison, ...]:
    """Both accounts side by side."""
    by_rank = {(one.pp_rank, one.tp_rank): one for one in measured}
    return tuple(
        RankComparison(
            pp_rank=rank.pp_rank, tp_rank=rank.tp_rank, host=rank.host, gpu_index=rank.gpu_index, gpu=rank.gpu,
            parts=tuple(_parts(rank, by_rank[rank.pp_rank, rank.tp_rank])),
        )
        for rank in plan.ranks
        if (rank.pp_rank, rank.tp_rank) in by_rank
    )  # fmt: skip


def _parts(rank: PlanRank, seen: MeasuredRank) -> Iterable[Difference]:
    """The RoPE table is made with the weights, and engines count it there."""
    named = {item.name: item.bytes for item in rank.items}
    rope = named.get("RoPE table", 0)
    runtime = sum(item.bytes for item in rank.items if item.group == "runtime") - rope
    pairs: tuple[tuple[Part, int, int | None], ...] = (
        ("weights", rank.weights_bytes + rope, seen.weights_bytes),
        ("kv_cache", rank.kv_cache_bytes, seen.kv_bytes),
        ("graphs", named.get("CUDA graphs", 0), seen.graph_bytes),
        ("startup", named.get("CUDA context", 0) + named.get("NCCL buffers", 0), seen.startup_bytes),
        ("runtime", runtime, seen.runtime_bytes),
        ("total", rank.weights_bytes + rope + rank.kv_cache_bytes + runtime, seen.used_bytes),
    )
    for part, predicted, value in pairs:
        if value is not None:
            yield Difference(part=part, predicted_bytes=predicted, measured_bytes=value)


def key_of(plan: Plan, gpu: str) -> RuntimeKey:
    """What the plan's runtime memory depends on, for one kind of GPU."""
    layout, settings = plan.layout, plan.settings
    return RuntimeKey(
        engine=plan.engine, model=plan.model, checkpoint=plan.checkpoint, gpu=gpu, tp_size=layout.tp_size,
        pp_size=layout.pp_size, dp_size=layout.dp_size, ep_size=layout.ep_size, dcp_size=layout.dcp_size,
        gpus_per_node=layout.gpus_per_node, kv_format=settings.kv_format, prefill_backend=settings.prefill_backend,
        decode_backend=settings.decode_backend, chunk_tokens=settings.chunk_tokens,
        context_tokens=settings.context_tokens, graph_max_bs=settings.graph_max_bs,
        max_running_requests=settings.max_running_requests, mtp_steps=settings.mtp_steps,
    )  # fmt: skip


def calibrations(
    plan: Plan, measured: Iterable[MeasuredRank], deployment: str = "", now_s: float | None = None
) -> tuple[Calibration, ...]:
    """One record per kind of GPU; a kind that does not hold a measured rank of every stage gives none."""
    seen = {(one.pp_rank, one.tp_rank): one for one in measured}
    found = []
    for gpu in dict.fromkeys(rank.gpu for rank in plan.ranks):
        stages = [_stage(plan, gpu, stage, seen) for stage in range(plan.layout.pp_size)]
        if all(stage is not None for stage in stages):
            key = key_of(plan, gpu)
            found.append(
                Calibration(
                    glmplan_version=plan.glmplan_version,
                    measured_s=time.time() if now_s is None else now_s,
                    deployment=deployment,
                    key={name: getattr(key, name) for name in RuntimeKey.__slots__},
                    stages=tuple(stage for stage in stages if stage is not None),
                    ranks=tuple(one for one in compare(plan, seen.values()) if one.gpu == gpu),
                )
            )
    return tuple(found)


def _stage(plan: Plan, gpu: str, stage: int, seen: Mapping[tuple[int, int], MeasuredRank]) -> dict[str, int | None] | None:
    """The fullest measured rank of a stage on this kind of GPU; the RoPE table is runtime in a plan's ledger."""
    own = [rank for rank in plan.ranks if rank.pp_rank == stage and rank.gpu == gpu]
    ranks = [(rank, seen[stage, rank.tp_rank]) for rank in own if (stage, rank.tp_rank) in seen]
    runtime = [
        found + sum(item.bytes for item in rank.items if item.name == "RoPE table")
        for rank, one in ranks
        if (found := one.runtime_bytes) is not None
    ]
    if not runtime or len(runtime) < len(own):
        return None
    graphs = [one.graph_bytes for _, one in ranks if one.graph_bytes is not None]
    return {"runtime_bytes": max(runtime), "graph_bytes": max(graphs) + LOG_ROUNDING_BYTES if graphs else None}


def calibration_folder() -> Path:
    """Where records lie on this machine."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(home) / "glmplan" / "calibration"


def save_calibration(found: Calibration, folder: Path | None = None) -> Path:
    """Write the record over an older one of the same key; raises OSError where the folder cannot be written."""
    place = folder or calibration_folder()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = "-".join(str(found.key[part]) for part in ("engine", "gpu"))
    code = hashlib.sha256(json.dumps(found.key, sort_keys=True).encode()).hexdigest()[:10]
    path = place / f"{name}-tp{found.key['tp_size']}-pp{found.key['pp_size']}-{code}.json".replace("/", "_").replace(
        " ", "_"
    )
    handle, temporary = tempfile.mkstemp(dir=place, prefix=".")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(found.model_dump_json(indent=1) + "\n")
    os.replace(temporary, path)
    return path


def load_calibrations(folder: Path | None = None) -> tuple[Calibration, ...]:
    """All readable records, the newest first; a damaged one is passed over, because a plan can do without it."""
    found = []
    for path in sorted((folder or calibration_folder()).glob("*.json")):
        try:
            found.append(Calibration.model_validate_json(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError):
            continue
    return tuple(sorted(found, key=lambda one: -one.measured_s))


def measured_runtimes(folder: Path | None = None) -> tuple[MeasuredRuntime, ...]:
    """The records as the planner takes them."""
    found = []
    for one in load_calibrations(folder):
        day = time.strftime("%Y-%m-%d", time.gmtime(one.measured_s))
        source = f"measured on {day}" + (f" in {one.deployment}" if one.deployment else "")
        try:
            key = RuntimeKey(**one.key)  # type: ignore[arg-type]
            stages = tuple(MeasuredStage(**stage) for stage in one.stages)  # type: ignore[arg-type]
        except TypeError:
            continue
        found.append(MeasuredRuntime(key, stages, source))
    return tuple(found)
