"""What runs where, from the profiles and the proof records: docs/support.md and profiles/proof/*.toml.

Run:  python benchmarks/support.py [--write]
A record is a docs/proof/*.json as benchmarks/proof/harness.py writes it; one without servers or comparisons is passed over
by name on stderr. The page and the packaged summary follow from the profiles and those files alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from glmplan.facts.engine_profile import AttentionOption, EngineProfile, QuantizationOption  # noqa: E402
from glmplan.facts.profiles import engine_names, engine_profile  # noqa: E402
from glmplan.facts.support import ProofProfile, ProofRun, Support, support_of  # noqa: E402
from glmplan.facts.toml import toml_text  # noqa: E402
from glmplan.kernels.engines import parse_port_line  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
RECORDS = ROOT / "docs" / "proof"
SUMMARY = ROOT / "profiles" / "proof"

ROWS = {"packed": "fp8_packed", "raw": "fp8_raw", "bf16": "bf16"}
"""KV rows as the plugin's line calls them -> the format's id in an engine profile."""
SCHEME = "fp8"
"""What benchmarks/proof/make_checkpoint.py makes: block-FP8 weights, GLM-5.2's shapes, few layers."""
SCHEMES = ("fp8", "bf16", "nvfp4", "int4", "w4afp8")


def runs_of(record: Mapping[str, Any], name: str) -> Iterator[ProofRun]:
    """Every server of a record that said it has the port and whose answers were compared, with a control beside them."""
    verdict, servers = record["verdict"], record["servers"]
    for server in sorted(servers):
        said = [line for text in servers[server]["port_lines"] if (line := parse_port_line(text))]
        parts = [part for part in verdict.get("parts", {}).values() if server in part.get("ports", {}) and part["controls"]]
        for line in said[:1] if parts else ():
            yield ProofRun(
                engine=line.engine,
                engine_version=line.engine_version,
                glmplan_version=line.glmplan,
                gpu=record["setting"]["gpu"].split("x ", 1)[-1].split(",")[0].removeprefix("NVIDIA "),
                sm=line.sm,
                compiled_for=line.compiled_for,
                kv_format=ROWS[line.settings["kv"]],
                scheme=SCHEME,
                date=record["date"],
                record=f"docs/proof/{name}",
                checks=[{"id": record["proof"].split("-")[0], "holds": all(part["holds"] for part in parts)}],
            )


def proof_runs(folder: Path = RECORDS) -> list[ProofRun]:
    """The runs of every record, by file name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        mine = list(runs_of(record, path.name)) if {"proof", "verdict", "servers"} <= record.keys() else []
        if not mine:
            print(f"{path.name}: compares no server that has the port", file=sys.stderr)
        found += mine
    return found


def summaries(runs: Iterable[ProofRun]) -> dict[str, str]:
    """File name under profiles/proof -> its text."""
    kept: dict[str, list[ProofRun]] = {}
    for run in runs:
        kept.setdefault(f"{run.engine}-{run.engine_version}.toml", []).append(run)
    return {
        name: toml_text(ProofProfile(schema_version=1, runs=tuple(group)).model_dump(mode="json"))
        for name, group in sorted(kept.items())
    }


@dataclass(frozen=True)
class Choice:
    """What a kernel-port mode gives one SM of an engine: the option by default KV rows, or None."""

    mode: str
    option: AttentionOption | None


def choices(engine: EngineProfile, sm: int) -> list[Choice]:
    """Without --kernel-port, and with force where that gives something else."""
    on_sm = (option for option in engine.attention if sm in option.sms)
    mine = [option for option in on_sm if engine.kv_format(option.kv_format).dtype != "fp4"]
    usual = Choice("auto", mine[0] if mine else None)
    forced = next((option for option in mine if option.plugin), None)
    return [usual] if forced is None or forced is usual.option else [usual, Choice("force", forced)]


def quantization(engine: EngineProfile, scheme: str, sm: int) -> QuantizationOption | None:
    return next((found for found in engine.quantization if found.scheme == scheme and sm in found.sms), None)


def support(engine: EngineProfile, option: AttentionOption, sm: int, scheme: str | None = None) -> Support:
    """How sure an option is on an SM; of one scheme, only runs with that scheme count."""
    runs = [run for run in engine.proof if scheme in (None, run.scheme)]
    return support_of(runs, option.kv_format, option.plugin, option.evidence, [sm])


def cell(engine: EngineProfile, choice: Choice, scheme: str, sm: int) -> str:
    """Proven, expected or refused, with where the evidence stands, or what is missing."""
    weights = quantization(engine, scheme, sm)
    if weights is None or choice.option is None:
        return f"refused: no {'attention' if weights else 'weight kernel'}"
    proven = support(engine, choice.option, sm, scheme).evidence == "proven"
    return f"{'proven' if proven else 'expected'}: {choice.option.id}, {label(engine, weights)}"


def label(engine: EngineProfile, weights: QuantizationOption) -> str:
    """A name for one of the engine's ways to load a scheme: fp8-a, fp8-b."""
    same = [found for found in engine.quantization if found.scheme == weights.scheme]
    return f"{weights.scheme}-{'abcdefgh'[same.index(weights)]}"


def matrix(engine: EngineProfile) -> Iterator[str]:
    yield f"| SM | `--kernel-port` | {' | '.join(SCHEMES)} |"
    yield "|" + "---|" * (len(SCHEMES) + 2)
    attention = {sm for option in engine.attention for sm in option.sms}
    for sm in sorted(attention | {sm for found in engine.quantization for sm in found.sms}):
        for choice in choices(engine, sm):
            cells = [cell(engine, choice, scheme, sm) for scheme in SCHEMES]
            yield f"| sm_{sm} | {choice.mode} | {' | '.join(cells)} |"


def attention_table(engine: EngineProfile) -> Iterator[str]:
    yield "| attention | KV rows | backends (prefill / decode) | by | SM | evidence | source |"
    yield "|---|---|---|---|---|---|---|"
    for option in engine.attention:
        by = "glmplan's kernels" if option.plugin else "the engine"
        backends = option.prefill if option.prefill == option.decode else f"{option.prefill} / {option.decode}"
        where = ", ".join(map(str, option.sms)) or "AMD"
        cells = [option.id, option.kv_format, backends, by, where, told(engine, option), option.source]
        yield f"| {' | '.join(cells)} |"


def told(engine: EngineProfile, option: AttentionOption) -> str:
    """The claim of the profile, and SM by SM what runs say beyond it."""
    found = [(sm, support(engine, option, sm)) for sm in option.sms]
    said = [f"sm_{sm} {one.evidence}: {one.words}" for sm, one in found if one.words]
    return "; ".join([option.evidence, *said])


def weights_table(engine: EngineProfile) -> Iterator[str]:
    yield "| weights | kernel | SM | evidence | source |"
    yield "|---|---|---|---|---|"
    for found in engine.quantization:
        if found.sms:
            where = ", ".join(map(str, found.sms))
            yield f"| {label(engine, found)} | {found.kernel} | {where} | {found.evidence} | {found.source} |"


INTRODUCTION = """# What runs where

Made by `python benchmarks/support.py --write` from `profiles/engines/` and `docs/proof/*.json`; a test keeps it so.
`glmplan size` prints the same evidence for the plan's GPUs.

- **proven**: on that SM, with kernels compiled for it, this engine version with glmplan's kernels served a small checkpoint
  of that scheme (GLM-5.2's shapes, few layers). Every comparison with the stock engine held, and a control with wrong
  attention was noticed. Its weight kernels were Triton's; the released weights were not run.
- **expected**: the released engine's source says that it runs, or, where the tables say *reported*, other people's
  deployments. A run compiled for an SM on another GPU is quoted and leaves it expected: it shows that those kernels are
  right, not that the card serves.
- **refused**: `glmplan size` and `launch` end with exit code 4.

A cell names the attention and the way the weights are loaded; both stand in the tables under it. `--kernel-port auto` is the
default; `force` takes glmplan's kernels on a GPU that the engine serves by itself. AMD GPUs are sized only.
glmplan's kernels alone, against their references on one H200: [native](kernels/h200-native.txt), [compiled for
sm_89](kernels/h200-sm89.txt) and [for sm_80](kernels/h200-sm80.txt)."""


def page(engines: Iterable[EngineProfile] | None = None, records: Iterable[str] | None = None) -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    if engines is None:
        engines = [engine_profile(name) for name in sorted({engine_profile(name).id for name in engine_names()})]
    names = sorted(path.name for path in RECORDS.glob("*.json")) if records is None else list(records)
    listed = ", ".join(f"[{name}](proof/{name})" for name in names) or "none yet"
    lines += ["", f"Proof records: {listed}."]
    for engine in engines:
        about = f" ({engine.note})" if engine.note else ""
        lines += ["", f"## {engine.title}{about}"]
        for table in (matrix, attention_table, weights_table):
            lines += ["", *table(engine)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, or write it and the summaries it needs."""
    if "--write" not in sys.argv:
        print(page(), end="")
        return
    wanted = summaries(proof_runs())
    if wanted:
        SUMMARY.mkdir(exist_ok=True)
    for path in SUMMARY.glob("*.toml"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (SUMMARY / name).write_text(text, encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
