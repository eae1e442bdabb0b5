"""Do recorded answers still give the recorded verdicts?  python -m benchmarks.proof.rejudge docs/proof/*.json [--write]

Answers lie in NAME-logs.tar.gz beside NAME.json; of launches, what their commands printed lies in NAME.txt. Which servers
and prompts there have to be is the scripts' to say, not the record's. `tune` is taken as it is. `--write` replaces verdicts
that are no longer given. Exit 1 when one does not hold, cannot be judged, or is not what is recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.proof import agreement, eagle, harness, judge, pipeline, speed, vllm_agreement
from benchmarks.proof.agreement import OTHERS
from benchmarks.proof.harness import Outcome


def rejudged(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict that a record's answers, figures or printed words give today, as JSON has it."""
    proof, setting, verdict = record["proof"], record["setting"], record["verdict"]
    if proof.startswith(("agreement-", "eagle-")):
        verdict = from_answers(proof, setting, harness.recorded(path, record["servers"]))
    elif proof.startswith("speed-"):
        verdict = of_speed(path, record)
    elif proof.startswith("launch-"):
        verdict = pipeline.rejudged(verdict, path)
    elif not proof.startswith("tune-"):
        raise ValueError(f"no script makes a proof {proof}")
    found: dict[str, Any] = json.loads(json.dumps(verdict))
    return found


def from_answers(proof: str, setting: Mapping[str, str], found: Mapping[str, Outcome]) -> dict[str, Any]:
    """Of every server that the proof asks; one that the record lacks gave no answers."""
    formats = [word for word in proof.split("-") if word in vllm_agreement.DTYPES or word in agreement.COARSE]
    if proof.startswith("eagle-"):
        return eagle.verdict(of_jobs(eagle.jobs(setting["sglang"]), found))
    if "vllm" in setting:
        formats = formats or list(vllm_agreement.DTYPES)
        outcomes = of_jobs(vllm_agreement.jobs(formats, OTHERS), found)
        return agreement.verdict(formats, OTHERS, outcomes, len(vllm_agreement.LENGTHS) + len(vllm_agreement.BATCH))
    return agreement.verdict(formats, OTHERS, of_jobs(agreement.jobs(setting["sglang"], formats, OTHERS), found))


def of_jobs(jobs: Sequence[harness.Job], found: Mapping[str, Outcome]) -> dict[str, Outcome]:
    return {job.name: found.get(job.name) or Outcome(job.name, 0, [], {}) for job in jobs}


def of_speed(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """From the rates that the servers' tasks gave, or, of the one record without those, from its figures."""
    if harness.answers_beside(path).exists():
        return speed.verdict(harness.recorded(path, record["servers"]))
    return speed.of_rates(
        {kv: judge.judge_speed(part["stock"], part["port"]) for kv, part in record["verdict"]["parts"].items()}
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args(words)
    return 1 if sum(not holds(path, asked.write) for path in asked.records) else 0


def holds(path: Path, write: bool) -> bool:
    """Whether the record holds and says so; tells it."""
    try:
        record = json.loads(path.read_text())
        now = rejudged(path, record)
    except (OSError, KeyError, ValueError, TypeError) as error:
        print(f"{path}: DOES NOT HOLD, it cannot be judged: {type(error).__name__}: {error}")
        return False
    same = now == record["verdict"]
    if not same and write:
        save(path, {**record, "verdict": now})
    print(f"{path}: {'holds' if now['holds'] else 'DOES NOT HOLD'}{'' if same else ', which is not what was recorded'}")
    return bool(now["holds"]) and (same or write)


def save(path: Path, record: Mapping[str, Any]) -> None:
    """With the text beside it, but for what commands printed: that is kept as it came."""
    if "servers" in record:
        harness.write_record(path, record)
    else:
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
