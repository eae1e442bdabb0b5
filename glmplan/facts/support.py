"""What is proven: records of real servers whose answers were compared, and what they say about an attention option.

A record is one server of an engine version with glmplan's kernels on one GPU: `profiles/proof/*.toml`, written by
benchmarks/support.py from docs/proof/*.json. Proven means that every check of a run on that very SM, with kernels compiled
for it and with those KV rows, holds. A run compiled for another SM than its GPU's says that the compiled kernels are right,
not that the other card serves: it is quoted, and the option stays what its profile says.
Left out: stock kernels, which no record is about, and the checkpoint's own weight kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from pydantic import Field

from glmplan.facts.base import Frozen

Claim = Literal["expected", "reported"]
"""What a profile may say of itself: expected from reading the source, or reported by others. Proven is a record's to say."""
Evidence = Literal["proven", "expected", "reported"]


class ProofCheck(Frozen):
    """One thing that was compared, by the name of its proof, and whether all of it held."""

    id: str = Field(min_length=1)
    holds: bool


class ProofRun(Frozen):
    """One server with glmplan's kernels: `sm` is its GPU's, `compiled_for` what the kernels were compiled for."""

    engine: Literal["sglang", "vllm"]
    engine_version: str
    glmplan_version: str
    gpu: str
    sm: int
    compiled_for: int
    kv_format: str
    scheme: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    record: str
    checks: tuple[ProofCheck, ...] = Field(min_length=1)

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    @property
    def place(self) -> str:
        """`ran compiled for sm_89 on one H200, 2026-11-22`."""
        how = "ran" if self.sm == self.compiled_for else f"ran compiled for sm_{self.compiled_for}"
        return f"{how} on one {self.gpu}, {self.date}"


class ProofProfile(Frozen):
    """The runs of one engine version."""

    schema_version: Literal[1]
    runs: tuple[ProofRun, ...]


class Support(NamedTuple):
    """How sure an option is on some SMs, and the runs that say so; no words where there is no run."""

    evidence: Evidence
    words: str


def support_of(runs: Iterable[ProofRun], kv_format: str, plugin: bool, claimed: Claim, sms: Iterable[int | None]) -> Support:
    """What the runs of an engine version make of an option's own claim on these SMs."""
    if not plugin:
        return Support(claimed, "")
    mine = [run for run in runs if run.kv_format == kv_format]
    found = [_on(mine, sm) for sm in sms]
    proven = bool(found) and all(on_sm.evidence == "proven" for on_sm in found)
    return Support("proven" if proven else claimed, "; ".join(dict.fromkeys(on_sm.words for on_sm in found if on_sm.words)))


def _on(runs: list[ProofRun], sm: int | None) -> Support:
    """One SM: a run that does not hold undoes those that do."""
    own = [run for run in runs if run.sm == run.compiled_for == sm]
    told = own or [run for run in runs if run.compiled_for == sm]
    words = "; ".join(_sentences(sorted(told, key=lambda run: (run.holds, run.date, run.record))))
    return Support("proven" if own and all(run.holds for run in own) else "expected", words)


def _sentences(runs: Iterable[ProofRun]) -> list[str]:
    """`ran on one H200, 2026-11-22 (agreement, eagle)`: the checks of one place and day together, failed ones apart."""
    checks: dict[tuple[str, bool], list[str]] = {}
    for run in runs:
        ids = [check.id for check in run.checks if check.holds == run.holds]
        checks.setdefault((run.place, run.holds), []).extend(ids)
    said = {key: ", ".join(dict.fromkeys(ids)) for key, ids in checks.items()}
    return [f"{place} ({ids})" if holds else f"{place}, where {ids} DID NOT HOLD" for (place, holds), ids in said.items()]
