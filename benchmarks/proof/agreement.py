"""Proofs (a), (b), (c): does the port answer as the stock engine does, native and compiled as sm_89 and sm_80?

`SITE=~/site python -m benchmarks.proof.agreement OUT [--kv fp8 bf16 raw] [--as sm89 sm80] [--seconds 500] [--per-gpu 4]`
Per KV format one server each: stock, stock again, stock with the engine's other kernels (or chunks), the port, the port as
each SM, and a control whose attention is wrong on purpose. Prompts of random ids: 50 to 40,000 one by one, then 16 of mixed
lengths at once; greedy, with log-probabilities of the last prompt tokens and of the answer. Decode runs from CUDA graphs.
`judge` says what holds.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.proof import harness, judge
from benchmarks.proof.harness import Client, Job, Outcome

LENGTHS = (50, 1500, 3000, 9000, 40000)
BATCH = (50, 60, 1500, 2040, 2060, 3000, 3000, 200, 9000, 700, 50, 4100, 6000, 1000, 2500, 12000)
OTHERS = ["sm89", "sm80"]
"""What the port is compiled as besides natively."""
NEW_TOKENS, JUDGED_TOKENS, IDS = 32, 64, 8000
MODEL = {"plain": ("--gain", "0.1", "--sharp", "4", "--steady", "8")}

COARSE = ("raw",)
"""Formats whose stock kernel rounds queries and probabilities to e4m3 (0.5.23, tilelang_kernel.py:1198, :1119), as the port
does not: stock and port are both measured from a stock server with BF16 rows, and so is the engine's other BF16 kernel."""
FEW_GRAPHS = ("--cuda-graph-bs-decode", "1", "16")
"""TileLang compiles that kernel and the one that adds its parts up anew for most batch sizes (_pick_inner_iter, :59): four
pairs for these graphs and the prompts here, seven for seven graphs."""
# (prefill, decode) of the stock engine, of its other kernels, and of the port
BACKENDS: dict[str, dict[str, tuple[tuple[str, str], tuple[str, str], tuple[str, str]]]] = {
    "0.5.23": {
        "fp8": (("flashmla_sparse", "flashmla_kv"), ("flashmla_kv", "flashmla_kv"), ("triton", "triton")),
        "bf16": (("flashmla_sparse", "flashmla_sparse"), ("tilelang", "tilelang"), ("triton", "triton")),
        "raw": (("tilelang", "tilelang"), ("tilelang", "tilelang"), ("tilelang", "tilelang")),
    },
    "0.5.13.post1": {
        "fp8": (("flashmla_sparse", "flashmla_kv"), ("flashmla_kv", "flashmla_kv"), ("tilelang", "tilelang")),
        "bf16": (("flashmla_sparse", "flashmla_sparse"), ("tilelang", "tilelang"), ("tilelang", "tilelang")),
    },
}


def prompt(length: int, seed: int = 0) -> list[int]:
    source = random.Random(length * 1000 + seed)
    return [source.randrange(IDS) for _ in range(length)]


def ask(client: Client) -> dict[str, Any]:
    """Answers by prompt name."""
    prompts = {f"single-{length}": [prompt(length)] for length in LENGTHS}
    prompts["batch"] = [prompt(length, 1 + number) for number, length in enumerate(BATCH)]
    for name, group in prompts.items():
        starts = [max(len(ids) - JUDGED_TOKENS, 0) for ids in group]
        replies = client.generate(group, NEW_TOKENS, return_logprob=True, logprob_start_len=starts)
        for number, reply in enumerate(replies):
            client.found[name if len(group) == 1 else f"{name}-{number}"] = answer(reply["meta_info"])
    return client.found


def answer(told: Mapping[str, Any]) -> dict[str, Any]:
    rows = told["output_token_logprobs"]
    given = [row[0] for row in told["input_token_logprobs"] if row[0] is not None]
    return {
        "tokens": [row[1] for row in rows],
        "logprobs": [round(row[0], 6) for row in rows],
        "prompt": [round(value, 6) for value in given],
    }


def flags(kv: str, backends: tuple[str, str]) -> tuple[str, ...]:
    dtype = "bfloat16" if kv == "bf16" else "fp8_e4m3"
    graphs = FEW_GRAPHS if kv in COARSE else ()
    return (
        "--kv-cache-dtype", dtype, "--dsa-prefill-backend", backends[0], "--dsa-decode-backend", backends[1], *graphs,
        "--max-total-tokens", "160000",
    )  # fmt: skip


def jobs(version: str, formats: list[str], others: list[str]) -> list[Job]:
    """The first of each format come first: they compile what the rest find."""
    found: list[list[Job]] = []
    for kv in formats:
        stock, other, port = BACKENDS[version][kv]
        off, force = {"GLMPLAN_PORT": "off"}, {"GLMPLAN_PORT": "force"}
        exact, exact_other, _ = BACKENDS[version]["bf16"]
        row = [Job(f"{kv}-stock", flags(kv, stock), ask, off), Job(f"{kv}-port", flags(kv, port), ask, force)]
        if kv in COARSE:
            row.append(Job(f"{kv}-reference", flags("bf16", exact), ask, off))
            row.append(Job(f"{kv}-exact", flags("bf16", exact_other), ask, off))
        row += [Job(f"{kv}-{sm}", flags(kv, port), ask, {**force, "GLMPLAN_RUN_AS": sm}) for sm in others]
        row.append(Job(f"{kv}-again", flags(kv, stock), ask, off))
        # where the engine has one kernel only, prefill in other chunks is its other right way to compute
        chunks = ("--chunked-prefill-size", "4096") if other == stock else ()
        row.append(Job(f"{kv}-other", (*flags(kv, other), *chunks), ask, off))
        row.append(Job(f"{kv}-control", flags(kv, port), ask, {**force, "PROOF_SABOTAGE": "1"}))
        found.append(row)
    longest = max(map(len, found))
    return [row[step] for step in range(longest) for row in found if step < len(row)]


def verdict(
    formats: list[str], others: list[str], outcomes: Mapping[str, Outcome], prompts: int = len(LENGTHS) + len(BATCH)
) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for kv in formats:
        base = f"{kv}-reference" if kv in COARSE else f"{kv}-stock"
        stock = outcomes[base].result or {}
        distances = {
            name: judge.distance(stock, outcome.result)
            for name, outcome in outcomes.items()
            if name.startswith(f"{kv}-") and name != base and outcome.result and stock
        }
        coarse = kv in COARSE
        own = [f"{kv}-again", f"{kv}-other"]
        group = {
            kind: {name: distances[name] for name in names if name in distances}
            for kind, names in {
                "noise": [f"{kv}-exact"] if coarse else own,
                "coarse": [f"{kv}-stock", *own] if coarse else [],
                "ports": [f"{kv}-port", *(f"{kv}-{sm}" for sm in others)],
                "controls": [f"{kv}-control"],
            }.items()
        }
        parts[kv] = judge.judge_agreement(**group, prompts=prompts)
        mine = {name: outcome for name, outcome in outcomes.items() if name.startswith(f"{kv}-")}
        needless = {f"{kv}-stock", *own} if coarse and group["noise"] else {f"{kv}-other"}
        silent = [name for name, outcome in mine.items() if not outcome.result]
        missing = [name for name in silent if name not in needless]
        astray = [name for name, outcome in mine.items() if outcome.result and has_port(outcome) != wants_port(name)]
        parts[kv]["holds"] &= not missing and not astray
        parts[kv]["lines"] += [f"no answers from {name}{'' if name in missing else ', not needed'}" for name in silent]
        parts[kv]["lines"] += [f"{name} says that it has the port, or not, against what was asked" for name in astray]
    return of_parts(parts, prompts)


def of_parts(parts: Mapping[str, Mapping[str, Any]], prompts: int) -> dict[str, Any]:
    """The whole of what was found of each KV format."""
    lines = [line for kv, part in parts.items() for line in (f"KV {kv}", *part["lines"])]
    return {"holds": all(part["holds"] for part in parts.values()), "prompts": prompts, "parts": parts, "lines": lines}


def wants_port(name: str) -> bool:
    return not name.endswith(("-stock", "-again", "-other", "-reference", "-exact"))


def has_port(outcome: Outcome) -> bool:
    return any(harness.MARKER in line for line in outcome.port_lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kv", nargs="+", default=["fp8", "bf16"], choices=["fp8", "bf16", "raw"])
    parser.add_argument("--as", dest="others", nargs="*", default=OTHERS)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--per-gpu", type=int, default=4)
    asked = parser.parse_args()
    setting = harness.prepare(MODEL)
    listed = jobs(setting.version, asked.kv, asked.others)
    outcomes = harness.run(listed, setting, asked.seconds, asked.per_gpu, first_wave=max(2 * len(asked.kv), 3))
    found = harness.judged(lambda: verdict(asked.kv, asked.others, outcomes))
    harness.write(asked.out, f"agreement-{setting.version}-{'-'.join(asked.kv)}", setting, outcomes, found)
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
