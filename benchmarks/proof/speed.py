"""Proof (f): how fast are prefill and decode of the small model, stock against port, at 1, 16 and 64 streams?

`SITE=~/site python -m benchmarks.proof.speed OUT [--seconds 500]`
One server a GPU, nothing beside it. Prefill: a prompt with one new token. Decode: the same prompts with 1 and with 1 +
STEPS new tokens; the difference is STEPS steps of all streams, from CUDA graphs. Medians of three, prompts never repeated,
no prefix cache. The small model is nearly all overhead outside attention, so these are differences to expect, not a
model's speed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.proof import harness, judge
from benchmarks.proof.agreement import BACKENDS, MODEL, flags, prompt
from benchmarks.proof.harness import Client, Job, Outcome

STREAMS, LENGTH, STEPS, REPEATS = (1, 16, 64), 4096, 128, 3
PREFILL = (3000, 9000, 40000)


def timed(client: Client, lengths: list[int], new_tokens: int, seed: int) -> float:
    prompts = [prompt(length, seed * 100 + number) for number, length in enumerate(lengths)]
    begin = time.perf_counter()
    client.generate(prompts, new_tokens)
    return time.perf_counter() - begin


def ask(client: Client) -> dict[str, Any]:
    """Tokens a second by what was measured."""
    rates = client.found
    seed = iter(range(10, 10_000))
    for length in PREFILL:
        timed(client, [length], 1, next(seed))
        seconds = median(timed(client, [length], 1, next(seed)) for _ in range(REPEATS))
        rates[f"prefill {length}"] = round(length / seconds, 1)
    for streams in STREAMS:
        lengths = [LENGTH] * streams
        timed(client, lengths, 4, next(seed))
        first = median(timed(client, lengths, 1, next(seed)) for _ in range(REPEATS))
        whole = median(timed(client, lengths, 1 + STEPS, next(seed)) for _ in range(REPEATS))
        rates[f"decode {streams} streams"] = round(streams * STEPS / max(whole - first, 1e-9), 1)
    return rates


def jobs(version: str) -> list[Job]:
    found = []
    for kv in ("fp8", "bf16"):
        stock, _, port = BACKENDS[version][kv]
        room = ("--max-total-tokens", "300000")
        found.append(Job(f"{kv}-stock", (*flags(kv, stock)[:-2], *room), ask, {"GLMPLAN_PORT": "off"}))
        found.append(Job(f"{kv}-port", (*flags(kv, port)[:-2], *room), ask, {"GLMPLAN_PORT": "force"}))
    return found


def verdict(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    pairs = {kv: [outcomes[f"{kv}-{name}"].result or {} for name in ("stock", "port")] for kv in ("fp8", "bf16")}
    return of_rates({kv: judge.judge_speed(stock, port) for kv, (stock, port) in pairs.items()})


def of_rates(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    lines = [line for kv, part in parts.items() for line in (f"KV {kv}, tokens a second", *part["lines"])]
    return {"holds": all(part["holds"] for part in parts.values()), "parts": parts, "lines": lines}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0)
    asked = parser.parse_args()
    setting = harness.prepare(MODEL)
    outcomes = harness.run(jobs(setting.version), setting, asked.seconds)
    found = harness.judged(lambda: verdict(outcomes))
    harness.write(asked.out, f"speed-{setting.version}", setting, outcomes, found)
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
