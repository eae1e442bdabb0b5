"""Do the recorded answers say that the port changes nothing beyond what the stock engine changes by itself?

Pure: answers in, verdict out. `python -m benchmarks.proof.judge RESULT.json ...` repeats the verdict of recorded figures;
exit 1 when one does not hold.

Two servers are compared over the same prompts by
- prompt_mean, prompt_p99   |difference| of log-probabilities of given prompt tokens (teacher-forced: the prefill path);
- answer_mean               the same of generated tokens, up to the first that differs (the decode path);
- agreement                 share of generated tokens before the first that differs.
Noise is the larger distance of (stock, stock again) and (stock, the engine's other kernels): two right ways to compute. A
port holds within twice the noise, or within FLOOR where the noise is smaller still: bf16 rounding of one layer moves a
log-probability by about that much. Where the stock kernel is itself the coarser one, all are measured from a server with
BF16 rows: a port holds within twice the distance of another right kernel with BF16 rows, or a tenth beyond the coarse one's
(NO_FARTHER), whichever is more. A control whose attention is wrong on purpose must not hold, or the comparison proves
nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

FACTOR = 2.0
NO_FARTHER = 1.1
FLOOR = {"prompt_mean": 0.01, "prompt_p99": 0.1, "answer_mean": 0.01}
AGREEMENT_SLACK = 0.1

Answer = Mapping[str, Any]
Answers = Mapping[str, Answer]
Distance = dict[str, float]


def same_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens agree before the first that differs."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def distance(first: Answers, second: Answers) -> Distance:
    """How far two servers' answers are apart, over the prompts both have."""
    prompt, answer, agreed = [], [], []
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        prompt += [abs(x - y) for x, y in zip(a["prompt"], b["prompt"], strict=True)]
        same = same_tokens(a["tokens"], b["tokens"])
        answer += [abs(x - y) for x, y in zip(a["logprobs"][:same], b["logprobs"][:same], strict=True)]
        agreed.append(same / len(a["tokens"]))
    return {
        "prompt_mean": mean(prompt), "prompt_p99": quantile(prompt, 0.99), "answer_mean": mean(answer),
        "agreement": mean(agreed), "prompts": float(len(agreed)),
    }  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0.0


def limits(noise: Sequence[Distance], coarse: Sequence[Distance] = ()) -> Distance:
    """What a port may be away from stock, or from the better one that all are measured from."""
    scaled = [(FACTOR, one) for one in noise] + [(NO_FARTHER, one) for one in coarse]
    allowed = {name: max(floor, *(factor * one[name] for factor, one in scaled)) for name, floor in FLOOR.items()}
    return allowed | {"agreement": min(one["agreement"] for _, one in scaled) - AGREEMENT_SLACK}


def exceeded(found: Distance, allowed: Distance) -> list[str]:
    """The figures beyond their limit; not a number is beyond."""
    over = [name for name in FLOOR if not found[name] <= allowed[name]]
    return over + (["agreement"] if not found["agreement"] >= allowed["agreement"] else [])


def judge_agreement(
    noise: Mapping[str, Distance], ports: Mapping[str, Distance], controls: Mapping[str, Distance], prompts: int,
    coarse: Mapping[str, Distance] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The verdict over one KV format: every distance is from the stock server, or all from a better one (`coarse`)."""
    coarse = coarse or {}
    if not (noise or coarse) or not ports:
        return {"holds": False, "lines": ["nothing to compare: a stock or a port server gave no answers"]}
    allowed = limits(list(noise.values()), list(coarse.values()))
    lines = [f"{name:<12} {text(found)}  noise" for name, found in noise.items()]
    lines += [f"{name:<12} {text(found)}  the engine's coarser kernel" for name, found in coarse.items()]
    lines.append(f"{'allowed':<12} {text(allowed)}")
    holds = True
    for name, found in ports.items():
        over = exceeded(found, allowed) + (["prompts missing"] if found["prompts"] < prompts else [])
        holds &= not over
        lines.append(f"{name:<12} {text(found)}  {'holds' if not over else 'beyond: ' + ', '.join(over)}")
    for name, found in controls.items():
        seen = bool(exceeded(found, allowed))
        holds &= seen
        lines.append(f"{name:<12} {text(found)}  {'wrong on purpose, noticed' if seen else 'wrong on purpose, NOT NOTICED'}")
    found = {"holds": holds, "noise": noise, "allowed": allowed, "ports": ports, "controls": controls, "lines": lines}
    return found | ({"coarse": coarse} if coarse else {})


def text(found: Distance) -> str:
    return " ".join(f"{name} {found[name]:.5f}" for name in ("prompt_mean", "prompt_p99", "answer_mean", "agreement"))


def judge_speed(stock: Mapping[str, float], port: Mapping[str, float]) -> dict[str, Any]:
    """Speed is recorded, not judged: it holds when every figure was measured on both."""
    names = [name for name in stock if name in port]
    lines = [
        f"{name:<24} stock {stock[name]:>10.1f}  port {port[name]:>10.1f}  {port[name] / stock[name]:.2f}x" for name in names
    ]
    holds = bool(names) and names == list(stock) and stock.keys() == port.keys()
    lines += [] if holds else [f"not measured: {', '.join(sorted(stock.keys() ^ port.keys())) or 'anything'}"]
    return {"holds": holds, "stock": stock, "port": port, "lines": lines}


def rejudge(record: Mapping[str, Any]) -> bool:
    """Whether every verdict in a recorded result follows from its figures. What is judged beside the figures compared here
    (servers that answered, drafts that were accepted, exit codes) is taken from the record: it can only undo a verdict."""
    parts: Mapping[str, Any] = record["verdict"].get("parts", {"": record["verdict"]})
    holds = bool(record["verdict"]["holds"])
    for name, part in parts.items():
        again: Mapping[str, Any] = part
        if "noise" in part:
            groups = (part["noise"], part["ports"], part["controls"])
            again = judge_agreement(*groups, record["verdict"]["prompts"], part.get("coarse"))
        elif "stock" in part:
            again = judge_speed(part["stock"], part["port"])
        holds &= bool(again["holds"]) and bool(part["holds"])
        print("\n".join(filter(None, [name, *again.get("lines", [])])))
    return holds


def main(paths: Sequence[str]) -> int:
    verdicts = {path: rejudge(json.loads(Path(path).read_text())) for path in paths}
    for path, holds in verdicts.items():
        print(f"{path}: {'holds' if holds else 'DOES NOT HOLD'}")
    return 0 if verdicts and all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
