"""Proof (e): does EAGLE with the MTP layer draft and verify on the port as it does on the stock engine?

`SITE=~/site python -m benchmarks.proof.eagle OUT [--seconds 500] [--per-gpu 4]`
The checkpoint has an MTP layer and tokens with a likely successor, so that drafts are accepted. Greedy answers must agree
with the stock engine's as far as two stock runs do, and as many drafts must be accepted. Three draft steps, four draft
tokens, CUDA graphs on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.proof import harness, judge
from benchmarks.proof.agreement import BACKENDS, flags, prompt
from benchmarks.proof.harness import Client, Job, Outcome

LENGTHS = (50, 1500, 3000, 9000)
BATCH = (50, 2040, 3000, 700, 9000, 60, 1500, 2500)
NEW_TOKENS = 64
MODEL = {"mtp": ("--gain", "0.1", "--sharp", "4", "--steady", "8", "--chain", "0.014", "--mtp")}
DRAFT = (
    "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", "4", "--max-running-requests", "16",
)  # fmt: skip
ACCEPTED_SLACK = 0.1


def ask(client: Client) -> dict[str, Any]:
    """Tokens by prompt name, and the tokens per verification of each."""
    groups = {f"single-{length}": [prompt(length)] for length in LENGTHS}
    groups["batch"] = [prompt(length, 1 + number) for number, length in enumerate(BATCH)]
    answers: dict[str, Any] = {}
    for name, group in groups.items():
        for number, reply in enumerate(client.generate(group, NEW_TOKENS)):
            told = reply["meta_info"]
            tokens = reply.get("output_ids") or told.get("output_ids") or []
            verified = told.get("spec_verify_ct") or 0
            answers[name if len(group) == 1 else f"{name}-{number}"] = {
                "tokens": tokens, "logprobs": [0.0] * len(tokens), "prompt": [],
                "per_verification": len(tokens) / verified if verified else None,
            }  # fmt: skip
    return answers


def jobs(version: str) -> list[Job]:
    stock, _, port = BACKENDS[version]["fp8"]
    bf16_stock, _, bf16_port = BACKENDS[version]["bf16"]
    off, force = {"GLMPLAN_PORT": "off"}, {"GLMPLAN_PORT": "force"}
    as_sm89 = {**force, "GLMPLAN_RUN_AS": "sm89"}
    return [
        Job("fp8-stock", (*flags("fp8", stock), *DRAFT), ask, off, "mtp"),
        Job("fp8-port", (*flags("fp8", port), *DRAFT), ask, force, "mtp"),
        Job("bf16-stock", (*flags("bf16", bf16_stock), *DRAFT), ask, off, "mtp"),
        Job("bf16-port", (*flags("bf16", bf16_port), *DRAFT), ask, force, "mtp"),
        Job("fp8-again", (*flags("fp8", stock), *DRAFT), ask, off, "mtp"),
        Job("fp8-sm89", (*flags("fp8", port), *DRAFT), ask, as_sm89, "mtp"),
        Job("bf16-again", (*flags("bf16", bf16_stock), *DRAFT), ask, off, "mtp"),
        Job("bf16-sm89", (*flags("bf16", bf16_port), *DRAFT), ask, as_sm89, "mtp"),
    ]


def accepted(answers: Mapping[str, Any]) -> float:
    """Mean tokens per verification; 1 means that no draft was ever accepted."""
    found = [item["per_verification"] for item in answers.values() if item["per_verification"]]
    return fmean(found) if found else 0.0


def verdict(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for kv in ("fp8", "bf16"):
        results = {name: outcomes[f"{kv}-{name}"].result for name in ("stock", "again", "port", "sm89")}
        if not all(results.values()):
            missing = ", ".join(name for name, result in results.items() if not result)
            parts[kv] = {"holds": False, "lines": [f"no answers from {missing}"]}
            continue
        answers = {name: result for name, result in results.items() if result}
        apart = {name: judge.distance(answers["stock"], answers[name]) for name in ("again", "port", "sm89")}
        found = judge.judge_agreement(
            {"again": apart["again"]}, {name: apart[name] for name in ("port", "sm89")}, {}, len(LENGTHS) + len(BATCH)
        )
        per = {name: round(accepted(result), 3) for name, result in answers.items()}
        limit = min(per["stock"], per["again"]) * (1 - ACCEPTED_SLACK)
        found["tokens_per_verification"] = per
        found["holds"] &= per["stock"] > 1.2 and min(per["port"], per["sm89"]) >= limit
        found["lines"].append(f"tokens per verification: {per}; at least {limit:.2f} and more than 1.2 with stock")
        parts[kv] = found
    lines = [line for kv, part in parts.items() for line in (f"KV {kv}", *part["lines"])]
    holds = all(part["holds"] for part in parts.values())
    return {"holds": holds, "prompts": len(LENGTHS) + len(BATCH), "parts": parts, "lines": lines}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--per-gpu", type=int, default=4)
    asked = parser.parse_args()
    setting = harness.prepare(MODEL)
    outcomes = harness.run(jobs(setting.version), setting, asked.seconds, asked.per_gpu, first_wave=len(setting.gpus))
    found = verdict(outcomes)
    harness.write(asked.out, f"eagle-{setting.version}", setting, outcomes, found)
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
