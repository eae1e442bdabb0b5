"""Do the answers say that the port changes nothing beyond what the stock engine changes by itself?

Pure: answers in, verdict out; `rejudge` repeats it from the recorded ones.

Two servers are compared over the same prompts by
- prompt_mean, prompt_p99   |difference| of log-probabilities of given prompt tokens (teacher-forced: the prefill path);
- prompt_worst              its means per prompt, over the half of the prompts that differ most: what is wrong only beyond
                            the 2,048 tokens of sparse attention is not thinned out by short prompts;
- answer_mean, answer_worst the same of generated tokens up to the first that differs (the decode path); an answer of fewer
                            than LEAST_TOKENS such tokens has no mean of its own;
- differing of compared     greedy tokens: how many answers come to a token that differs, of the tokens compared until then;
- parting                   mean |difference| of the log-probabilities that each gave its own token, where the two differ.
Behind its first differing token an answer is no longer compared, for the two then read different text (agreement: the mean
share of an answer before it, printed and not judged, as one early tie takes a whole answer with it).
Noise is the larger distance of (stock, stock again) and (stock, the engine's other kernels): two right ways to compute. A
port holds within twice the noise, or within FLOOR where the noise is smaller still: bf16 rounding of one layer moves a
log-probability by about that much. Counts are judged by chance: were tokens of the port no likelier to differ than those of
the noisiest stock server, so many would differ in more than LEAST_CHANCE of all runs. With 20 prompts that is a blunt
figure: alone it would have noticed no control so far; the log-probabilities are the sharp ones.
Where the stock kernel is itself the coarser one, all are measured from a server with BF16 rows: a port holds within twice
the distance of another right kernel with BF16 rows, or a tenth beyond the coarse one's (NO_FARTHER), whichever is more.
A control whose attention is wrong on purpose must be noticed, or the comparison proves nothing. Only servers that answered
every prompt, with numbers, count as noise, port or control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb, isfinite
from statistics import fmean
from typing import Any

FACTOR = 2.0
NO_FARTHER = 1.1
FLOOR = {
    "prompt_mean": 0.01, "prompt_p99": 0.1, "prompt_worst": 0.01, "answer_mean": 0.01, "answer_worst": 0.01, "parting": 0.05,
}  # fmt: skip
LEAST_TOKENS = 4
LEAST_CHANCE = 0.005
"""Of a right port in one comparison; all proofs together make 25. As answers end at their first differing token, the tokens
compared are chance, too, which errs on the safe side."""

Answer = Mapping[str, Any]
Answers = Mapping[str, Answer]
Distance = dict[str, float]


def same_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens agree before the first that differs."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def distance(first: Answers, second: Answers) -> Distance:
    """How far two servers' answers are apart, over the prompts both have."""
    prompt: list[list[float]] = []
    answer: list[list[float]] = []
    agreed, gaps, compared = [], [], 0
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        prompt.append([abs(x - y) for x, y in zip(a["prompt"], b["prompt"], strict=True)])
        same = same_tokens(a["tokens"], b["tokens"])
        apart = [abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)]
        answer.append(apart[:same])
        gaps += apart[same : same + 1]
        compared += len(apart[: same + 1])
        agreed.append(same / len(a["tokens"]))
    tokens = [value for values in prompt for value in values]
    return {
        "prompt_mean": mean(tokens), "prompt_p99": quantile(tokens, 0.99), "prompt_worst": worst_half(prompt),
        "answer_mean": mean([value for values in answer for value in values]), "answer_worst": worst_half(answer),
        "parting": mean(gaps), "differing": float(len(gaps)), "compared": float(compared), "agreement": mean(agreed),
        "prompts": float(len(agreed)),
    }  # fmt: skip


def worst_half(values: Sequence[Sequence[float]]) -> float:
    """The mean over the larger half of the means."""
    means = sorted(mean(each) for each in values if len(each) >= LEAST_TOKENS)
    return mean(means[len(means) // 2 :])


def mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0.0


def limits(noise: Sequence[Distance], coarse: Sequence[Distance] = ()) -> Distance:
    """What a port may be away from stock, or from the better one that all are measured from."""
    scaled = [(FACTOR, one) for one in noise] + [(NO_FARTHER, one) for one in coarse]
    return {name: max(floor, *(factor * one[name] for factor, one in scaled)) for name, floor in FLOOR.items()}


def rate(one: Distance) -> float:
    """Differing tokens per token compared."""
    return one["differing"] / one["compared"] if one["compared"] else 0.0


def chance(found: Distance, usual: Distance) -> float:
    """Of so many differing tokens or more, were they as likely as in `usual`: all that differ in both fall to one of the two
    by the tokens compared in each (the conditional test of two rates)."""
    mine, all_of_them = int(found["differing"]), int(found["differing"] + usual["differing"])
    if not all_of_them:
        return 1.0
    share = found["compared"] / (found["compared"] + usual["compared"])
    return sum(comb(all_of_them, n) * share**n * (1 - share) ** (all_of_them - n) for n in range(mine, all_of_them + 1))


def exceeded(found: Distance, allowed: Distance, usual: Distance) -> list[str]:
    """The figures beyond their limit; not a number is beyond."""
    over = [name for name in FLOOR if not found[name] <= allowed[name]]
    return over + ([] if chance(found, usual) >= LEAST_CHANCE else ["differing"])


def judge_agreement(
    noise: Mapping[str, Distance], ports: Mapping[str, Distance], controls: Mapping[str, Distance], prompts: int,
    coarse: Mapping[str, Distance] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The verdict over one KV format: every distance is from the stock server, or all from a better one (`coarse`)."""
    given = [noise, controls, coarse or {}]
    noise, controls, coarse = ({name: one for name, one in group.items() if whole(one, prompts)} for group in given)
    used = {*noise, *controls, *coarse}
    partial = [f"{name} did not answer all prompts: not used" for group in given for name in group if name not in used]
    if not (noise or coarse) or not ports:
        return {"holds": False, "lines": ["nothing to compare: a stock or a port server gave no answers", *partial]}
    allowed = limits(list(noise.values()), list(coarse.values()))
    usual = max([*noise.values(), *coarse.values()], key=rate)
    lines = [f"{name:<12} {text(found)}  noise" for name, found in noise.items()]
    lines += [f"{name:<12} {text(found)}  the engine's coarser kernel" for name, found in coarse.items()]
    lines.append(f"{'allowed':<12} {text(allowed)}, differing by a chance of {LEAST_CHANCE:g}")
    holds = bool(controls)
    for name, found in ports.items():
        over = exceeded(found, allowed, usual) + ([] if whole(found, prompts) else ["prompts missing"])
        holds &= not over
        by = f"by a chance of {chance(found, usual):.3f}"
        lines.append(f"{name:<12} {text(found)} {by}  {'holds' if not over else 'beyond: ' + ', '.join(over)}")
    for name, found in controls.items():
        seen = exceeded(found, allowed, usual)
        holds &= bool(seen)
        by = f"noticed by {', '.join(seen)}" if seen else "NOT NOTICED"
        lines.append(f"{name:<12} {text(found)}  wrong on purpose, {by}")
    lines += partial + ([] if controls else ["no control was noticed, for there is none: this proves nothing"])
    found = {"holds": holds, "noise": noise, "allowed": allowed, "ports": ports, "controls": controls, "lines": lines}
    return found | ({"coarse": coarse} if coarse else {})


def whole(found: Distance, prompts: int) -> bool:
    """All prompts were answered, with numbers."""
    return found["prompts"] >= prompts and all(isfinite(found[name]) for name in FLOOR)


def text(found: Distance) -> str:
    said = " ".join(f"{name} {found[name]:.4f}" for name in FLOOR)
    if "differing" not in found:
        return said
    return f"{said} differing {found['differing']:.0f} of {found['compared']:.0f} (agreement {found['agreement']:.2f})"


def judge_speed(stock: Mapping[str, float], port: Mapping[str, float]) -> dict[str, Any]:
    """Speed is recorded, not judged: it holds when every figure was measured on both."""
    names = [name for name in stock if name in port]
    lines = [
        f"{name:<24} stock {stock[name]:>10.1f}  port {port[name]:>10.1f}  {port[name] / stock[name]:.2f}x" for name in names
    ]
    holds = bool(names) and names == list(stock) and stock.keys() == port.keys()
    lines += [] if holds else [f"not measured: {', '.join(sorted(stock.keys() ^ port.keys())) or 'anything'}"]
    return {"holds": holds, "stock": stock, "port": port, "lines": lines}
