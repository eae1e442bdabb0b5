"""What is to be tuned and where: the engine's Python, an idle GPU, the shapes, and the folder of the tables."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmplan import __version__
from glmplan.errors import GlmplanError, UnsupportedError, UsageError
from glmplan.facts.gpu import Gpu
from glmplan.facts.host import Host
from glmplan.fleet import tune_program
from glmplan.fleet.deployment import owner
from glmplan.fleet.tune_result import Tables
from glmplan.kernels.engines import PORT
from glmplan.kernels.engines.sglang_tune import KINDS, parse_shape
from glmplan.kernels.engines.sglang_tune_experts import parse_experts
from glmplan.kernels.engines.sglang_versions import VERSIONS
from glmplan.kernels.packed import packed_text, user_profiles

PROGRAM = "tune_program.py"
BUSY_BYTES = 1 << 30
"""A GPU on which others hold more than this is not one to measure on."""
MISSING_ENGINE = "Tables are made with the engine that uses them."


def to_go_on(again: bool) -> str:
    """What to do when it ended early."""
    if again:
        return "Run it without --again to keep what is there; with it, all is measured again."
    return "Run the same command again: it goes on with what is missing."


def deployment_name(engine_version: str) -> str:
    """One tuner an engine version and node."""
    return f"tune-sglang-{engine_version}"


@dataclass(frozen=True)
class Tuning:
    """What to tune and where. `shapes` and `experts` are the tuner's own words (N,K and E,N[,HIDDEN,TOP_K]); with neither
    it is all of GLM-5.2's of `kind` at `tp_size`. Tables of experts go to `experts_out`."""

    python: str
    engine_version: str
    gpu_index: int
    gpu: str
    tp_size: int
    out: Path
    shapes: tuple[str, ...] = ()
    rows: str | None = None
    again: bool = False
    kind: str = "both"
    experts: tuple[str, ...] = ()
    experts_out: Path | None = None
    ep_size: int = 1
    quick: bool = False

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its tables go."""
        named = bool(self.shapes or self.experts)
        gemm = bool(self.shapes) if named else self.kind != "moe"
        moe = bool(self.experts) if named else self.kind != "gemm"
        own = [self.out] if gemm else []
        return tuple(dict.fromkeys([*own, *([self.experts_out or self.out] if moe else [])]))

    @property
    def name(self) -> str:
        """The deployment's name on the host."""
        return deployment_name(self.engine_version)

    @property
    def words(self) -> list[str]:
        """The tuner's command line but for where it writes."""
        shapes = ["--shapes", *self.shapes] if self.shapes else []
        experts = ["--experts", *self.experts] if self.experts else []
        rows = ["--rows", self.rows] if self.rows else []
        sizes = ["--tp-size", str(self.tp_size), "--ep-size", str(self.ep_size), "--kind", self.kind]
        return [*sizes, *shapes, *experts, *rows, *(["--quick"] if self.quick else [])]

    @property
    def digest(self) -> str:
        """Tells whether a tuner that runs, or has ended, is this one; the tables that come back do not change it."""
        text = json.dumps([__version__, self.python, self.engine_version, self.words, self.again])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def start_request(self, known: Tables) -> dict[str, Any]:
        """The `start` of the node program."""
        environment = {
            "PYTHONPATH": "@SITE@", "CUDA_VISIBLE_DEVICES": str(self.gpu_index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            PORT: "off",
        }  # fmt: skip
        program = Path(tune_program.__file__).read_text(encoding="utf-8")
        return {
            "deployment": self.name, "digest": self.digest, "owner": owner(),
            "argv": [self.python, f"@FILES@/{PROGRAM}", "@FILES@", *self.words], "environment": environment,
            "gpu_indexes": [self.gpu_index], "site": packed_text(),
            "files": [
                {"name": PROGRAM, "content": program},
                {"name": tune_program.KNOWN, "content": json.dumps(vars(known))},
            ],
        }  # fmt: skip


def tuned_folder(engine_version: str, kind: str = "gemm") -> Path:
    """Where tables of a kind (gemm, moe) lie: in the first folder of GLMPLAN_PROFILES, else in the user's data folder."""
    return user_profiles()[0] / "tuned" / engine_version / kind


def choose_python(host: Host, named: str | None) -> tuple[str, str]:
    """The Python with SGLang on the host, and SGLang's version; one that is known when several are there."""
    found = [one for one in (host.system.engines if host.system else ()) if one.engine == "sglang"]
    if named is not None:
        found = [one for one in found if _is(one.python, named)]
    known = [one for one in found if one.engine_version in VERSIONS]
    if known:
        return known[0].python, str(known[0].engine_version)
    versions = " and ".join(VERSIONS)
    if found:
        raise UnsupportedError(
            f"{host.name} has SGLang {found[0].engine_version} in {found[0].python}; tables can be made for {versions}.",
            f"Install one of them there: pip install sglang=={list(VERSIONS)[-1]}.",
        )
    where = f"{named} on {host.name}" if named else f"{host.name} has no Python with SGLang"
    raise UnsupportedError(
        f"{where} has no SGLang. {MISSING_ENGINE}" if named else f"{where}. {MISSING_ENGINE}",
        f"Install it there (pip install sglang=={list(VERSIONS)[-1]}), or name its Python: --engine-python.",
    )


def _is(python: str, named: str) -> bool:
    """Whether a found interpreter is the one the user named: a path, a folder or a program's name."""
    wanted = named.removeprefix("~").rstrip("/")
    if "/" not in named:
        return os.path.basename(python) == named
    return (
        python == wanted or (named.startswith("~") and python.endswith(wanted)) or python.endswith(f"{wanted}/bin/python3")
    )


def require_gpu(host: Host) -> None:
    """Refuse a host without a GPU."""
    if not host.gpus:
        why = host.gpu_problem.message if host.gpu_problem else "none was found"
        raise UnsupportedError(
            f"{host.name} has no GPU to tune for: {why.rstrip('.')}.", "Tune on a host with the GPU that will serve."
        )


def choose_gpu(host: Host, held: int | None = None) -> tuple[int, str]:
    """The GPU that our own tuner holds already, else the first that is idle: its index and name."""
    ours = [gpu for gpu in host.gpus if gpu.index == held]
    idle = ours or [gpu for gpu in host.gpus if _held_bytes(gpu) < BUSY_BYTES]
    if not idle:
        raise GlmplanError(
            f"All {len(host.gpus)} GPUs of {host.name} are in use; times measured beside others mean nothing.",
            "Stop what runs there first (glmplan status, nvidia-smi).",
        )
    return idle[0].index, idle[0].name


def _held_bytes(gpu: Gpu) -> int:
    """What others hold on a GPU: processes of another container are not listed, their memory is."""
    return max(gpu.memory_in_use_bytes, sum(one.used_bytes or 0 for one in gpu.processes))


def check_experts(experts: Sequence[str]) -> tuple[str, ...]:
    """E,N or E,N,HIDDEN,TOP_K words; refused here before a host is asked."""
    seen: dict[tuple[int, int], str] = {}
    for text in dict.fromkeys(experts):
        found = parse_experts(text)
        other = seen.setdefault((found.experts, found.n), text)
        if other != text:
            raise UsageError(f"{other} and {text} are one table to the engine, which tells them apart by E,N.", "Name one.")
    return tuple(seen.values())


def check_shapes(shapes: Sequence[str]) -> tuple[str, ...]:
    """N,K words; refused here before a host is asked."""
    for text in shapes:
        parse_shape(text)
    return tuple(dict.fromkeys(shapes))


def check_together(kind: str, shapes: Sequence[str], experts: Sequence[str], ep_size: int) -> None:
    """Options that contradict each other; refused here before a host is asked."""
    if kind not in KINDS:
        raise UsageError(f"--kind is {kind!r}.", f"Known are {', '.join(KINDS)}.")
    for named, other, option in ((shapes, "moe", "--shapes"), (experts, "gemm", "--experts")):
        if named and kind == other:
            raise UsageError(f"--kind {kind} leaves out what {option} names.", f"Leave out --kind or {option}.")
    if experts and ep_size > 1:
        raise UsageError(
            "--experts are tuned as if tokens chose among them alone, which is not so with EP.",
            "Leave out --experts: --ep-size and --tp-size tell what a rank holds.",
        )
