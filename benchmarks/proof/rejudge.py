"""Do recorded answers still give the recorded verdicts?  python -m benchmarks.proof.rejudge docs/proof/*.json [--write]

Answers lie in NAME-logs.tar.gz beside NAME.json. A record without compared answers is judged from its figures (speed) or
from what its commands printed (launch, in NAME.txt); `tune` is taken as it is. `--write` replaces verdicts that these no
longer give, in the record and, but for launch, in the text. Exit 1 when one does not hold or is not what is recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.proof import agreement, eagle, harness, judge, pipeline, speed


def rejudged(path: Path) -> dict[str, Any]:
    """The verdict that a record's answers or figures give today, as JSON has it."""
    record = json.loads(path.read_text())
    verdict: dict[str, Any] = record["verdict"]
    parts: Mapping[str, Any] = verdict.get("parts", {})
    if any("ports" in part for part in parts.values()):
        verdict = from_answers(record["proof"], verdict, path)
    elif any("stock" in part for part in parts.values()):
        verdict = speed.of_rates({kv: judge.judge_speed(part["stock"], part["port"]) for kv, part in parts.items()})
    elif "steps" in verdict:
        verdict = pipeline.rejudged(verdict, pipeline.texts(path))
    found: dict[str, Any] = json.loads(json.dumps(verdict))
    return found


def from_answers(proof: str, verdict: Mapping[str, Any], path: Path) -> dict[str, Any]:
    outcomes = harness.recorded(path)
    if proof.startswith("eagle"):
        return eagle.verdict(outcomes)
    others = sorted({name.rpartition("-")[2] for name in outcomes if "-sm" in name}, reverse=True)
    return agreement.verdict(list(verdict["parts"]), others, outcomes, verdict["prompts"])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args(words)
    wrong = 0
    for path in asked.records:
        record, now = json.loads(path.read_text()), rejudged(path)
        same = now == record["verdict"]
        if not same and asked.write and "servers" in record:
            harness.write_record(path, {**record, "verdict": now})
        elif not same and asked.write:
            path.write_text(json.dumps({**record, "verdict": now}, indent=1) + "\n")
        wrong += not now["holds"] or not (same or asked.write)
        print(f"{path}: {'holds' if now['holds'] else 'DOES NOT HOLD'}{'' if same else ', which is not what was recorded'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
