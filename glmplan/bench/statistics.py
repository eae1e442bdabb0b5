"""From the time stamps of answers to the numbers of a level. Pure: same answers, same numbers.

Answers that failed, and those that an interruption cut, are in no rate and no percentile.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from glmplan.bench.result import Counted, FailureCount, Level, Prefill, Spread


@dataclass
class Answer:
    """One request. `marks` are (seconds, tokens so far) of every chunk that brought tokens; `began_s` is its sending.

    `counted_by` and `steps_known` say whether the totals, and the tokens of each chunk, are the server's own counts.
    """

    began_s: float
    ended_s: float = 0.0
    marks: list[tuple[float, int]] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    counted_by: Counted = "chunks"
    steps_known: bool = False
    failure: str = ""
    status: int | None = None
    cut: bool = False

    @property
    def complete(self) -> bool:
        """Whether it counts."""
        return not self.failure and not self.cut

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token."""
        return self.marks[0][0] - self.began_s if self.marks else None

    @property
    def decoded(self) -> int:
        """Tokens after the first chunk."""
        return self.tokens - (self.marks[0][1] if self.marks else self.tokens)

    @property
    def decoding_s(self) -> float:
        """Seconds from the first to the last chunk with tokens."""
        return self.marks[-1][0] - self.marks[0][0] if self.marks else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies, with linear interpolation; `values` must not be empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> Spread | None:
    """Median and 99th percentile; None of nothing."""
    if not values:
        return None
    return Spread(p50_s=percentile(values, 0.5), p99_s=percentile(values, 0.99), values=len(values))


def token_gaps(answer: Answer) -> list[float]:
    """Seconds between one stream's tokens."""
    found: list[float] = []
    for (before_s, before), (now_s, now) in zip(answer.marks, answer.marks[1:], strict=False):
        found += [(now_s - before_s) / (now - before)] * (now - before)
    return found


def covered_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one interval is open."""
    total, open_until = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, open_until))
        open_until = max(open_until, end)
    return total


def failures(answers: Iterable[Answer]) -> tuple[FailureCount, ...]:
    """Ways of failing, the most frequent first."""
    counted = Counter(answer.failure for answer in answers if answer.failure)
    return tuple(FailureCount(words=words, requests=count) for words, count in counted.most_common())


def level(
    answers: Sequence[Answer],
    concurrency: int | None,
    rate_per_s: float | None,
    interrupted: bool = False,
    notes: tuple[str, ...] = (),
) -> Level:
    """The numbers of one load."""
    asked = [answer for answer in answers if not answer.cut]
    good = [answer for answer in asked if answer.complete]
    seconds = max(a.ended_s for a in asked) - min(a.began_s for a in asked) if asked else 0.0
    tokens = sum(answer.tokens for answer in good)
    decoding = [answer for answer in good if answer.decoded > 0 and answer.decoding_s > 0]
    busy_s = covered_s((answer.marks[0][0], answer.marks[-1][0]) for answer in decoding)
    cached = [answer.cached_tokens for answer in good if answer.cached_tokens is not None]
    return Level(
        concurrency=concurrency,
        rate_per_s=rate_per_s,
        requests=len(asked),
        completed=len(good),
        failures=failures(asked),
        seconds=seconds,
        prompt_tokens=sum(answer.prompt_tokens or 0 for answer in good),
        output_tokens=tokens,
        cached_tokens=sum(cached) if cached else None,
        counted_by="usage" if good and all(answer.counted_by == "usage" for answer in good) else "chunks",
        output_tokens_per_s=tokens / seconds if tokens and seconds > 0 else None,
        decode_tokens_per_s=sum(a.decoded for a in decoding) / busy_s if busy_s > 0 else None,
        stream_tokens_per_s=percentile([a.decoded / a.decoding_s for a in decoding], 0.5) if decoding else None,
        ttft=spread([answer.ttft_s for answer in good if answer.ttft_s is not None]),
        itl=spread([gap for answer in decoding for gap in token_gaps(answer)]),
        itl_of_chunks=any(not answer.steps_known for answer in decoding),
        interrupted=interrupted,
        notes=notes,
    )


def prefill(length: int, answers: Sequence[Answer]) -> Prefill:
    """The prefill rate at one length; the server's own count of the prompt wins over the length that was meant."""
    asked = [answer for answer in answers if not answer.cut]
    good = [answer for answer in asked if answer.complete and answer.ttft_s]
    times = spread([answer.ttft_s for answer in good if answer.ttft_s])
    counts = [answer.prompt_tokens or length for answer in good]
    tokens = round(percentile([float(count) for count in counts], 0.5)) if counts else length
    return Prefill(
        prompt_tokens=tokens,
        requests=len(asked),
        failures=failures(asked),
        ttft=times,
        tokens_per_s=tokens / times.p50_s if times else None,
    )
