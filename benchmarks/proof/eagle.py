"""Proof (e): does EAGLE with the MTP layer draft and verify on the port as it does on the stock engine?

`SITE=~/site python -m benchmarks.proof.eagle OUT [--seconds 500] [--per-gpu 4]`
The checkpoint has an MTP layer and tokens with a likely successor, so that drafts are accepted. Answers are judged as in
`agreement`: noise is the larger distance of stock to stock again and to the engine's other kernels, all with drafts; the
answers' log-probabilities are those of the verification. As many drafts must be accepted as with stock. A control whose
attention is wrong on purpose must be noticed. Three draft steps, four draft tokens, CUDA graphs on for verification, draft
and draft extend.
`spec_verify_ct`: verifications of one answer, in meta_info once it is whole (0.5.23, tokenizer_manager.py:3172).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.proof import agreement, harness
from benchmarks.proof.agreement import BACKENDS, JUDGED_TOKENS, answer, flags, prompt
from benchmarks.proof.harness import Client, Job, Outcome

LENGTHS = (50, 1500, 3000, 9000)
BATCH = (50, 2040, 3000, 700, 9000, 60, 1500, 2500, 200, 2060, 90, 4100, 1000, 2047, 400, 6000)
NEW_TOKENS = 64
MODEL = {"mtp": ("--gain", "0.1", "--sharp", "4", "--steady", "8", "--chain", "0.014", "--mtp")}
DRAFT = (
    "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", "4", "--max-running-requests", "16",
)  # fmt: skip
ACCEPTED_SLACK, LEAST_ACCEPTED = 0.1, 1.2
FORMATS, PORTS = ("fp8", "bf16"), ("port", "sm89")


def ask(client: Client) -> dict[str, Any]:
    """Answers by prompt name, and the tokens per verification of each."""
    groups = {f"single-{length}": [prompt(length)] for length in LENGTHS}
    groups["batch"] = [prompt(length, 1 + number) for number, length in enumerate(BATCH)]
    for name, group in groups.items():
        starts = [max(len(ids) - JUDGED_TOKENS, 0) for ids in group]
        replies = client.generate(group, NEW_TOKENS, return_logprob=True, logprob_start_len=starts)
        for number, reply in enumerate(replies):
            told = answer(reply["meta_info"])
            verified = reply["meta_info"].get("spec_verify_ct") or 0
            told["per_verification"] = len(told["tokens"]) / verified if verified else None
            client.found[name if len(group) == 1 else f"{name}-{number}"] = told
    return client.found


def jobs(version: str) -> list[Job]:
    off, force = {"GLMPLAN_PORT": "off"}, {"GLMPLAN_PORT": "force"}
    rows = []
    for kv in FORMATS:
        stock, other, port = (flags(kv, backends) + DRAFT for backends in BACKENDS[version][kv])
        rows.append(
            [
                Job(f"{kv}-stock", stock, ask, off, "mtp"),
                Job(f"{kv}-port", port, ask, force, "mtp"),
                Job(f"{kv}-again", stock, ask, off, "mtp"),
                Job(f"{kv}-sm89", port, ask, {**force, "GLMPLAN_RUN_AS": "sm89"}, "mtp"),
                Job(f"{kv}-other", other, ask, off, "mtp"),
                Job(f"{kv}-control", port, ask, {**force, "PROOF_SABOTAGE": "1"}, "mtp"),
            ]
        )
    return [job for step in zip(*rows, strict=True) for job in step]


def accepted(answers: Mapping[str, Any]) -> float:
    """Mean tokens per verification; 1 means that no draft was ever accepted, 0 that the server does not draft."""
    found = [item["per_verification"] for item in answers.values() if item["per_verification"]]
    return fmean(found) if found else 0.0


def verdict(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """That of `agreement`, and whether drafts are accepted."""
    found = agreement.verdict(list(FORMATS), list(PORTS[1:]), outcomes, len(LENGTHS) + len(BATCH))
    for kv, part in found["parts"].items():
        judge_drafts(part, {name: outcome for name, outcome in outcomes.items() if name.startswith(f"{kv}-")})
    return agreement.of_parts(found["parts"], found["prompts"])


def judge_drafts(part: dict[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """One KV format. The port says its line once: the draft model is the same process."""
    per = {name: round(accepted(outcome.result), 3) for name, outcome in outcomes.items() if outcome.result}
    stock = {name: tokens for name, tokens in per.items() if not agreement.wants_port(name)}
    limit = min(stock.values(), default=0.0) * (1 - ACCEPTED_SLACK)
    repeated = [name for name in per if len(outcomes[name].port_lines) > 1]
    part["tokens_per_verification"] = per
    part["holds"] &= not repeated and all(per[name] >= limit for name in part.get("ports", ()))
    part["holds"] &= any(name.endswith("-stock") and tokens > LEAST_ACCEPTED for name, tokens in per.items())
    part["lines"] += [f"{name} has {len(outcomes[name].port_lines)} lines of the port" for name in repeated]
    part["lines"].append(f"tokens per verification: {per}; at least {limit:.2f}, and more than {LEAST_ACCEPTED} with stock")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--per-gpu", type=int, default=4)
    asked = parser.parse_args()
    setting = harness.prepare(MODEL)
    outcomes = harness.run(jobs(setting.version), setting, asked.seconds, asked.per_gpu, first_wave=2 * len(FORMATS))
    found = harness.judged(lambda: verdict(outcomes))
    harness.write(asked.out, f"eagle-{setting.version}", setting, outcomes, found)
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
