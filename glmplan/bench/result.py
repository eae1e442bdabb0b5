"""What a benchmark found, as it is printed, saved and compared.

Seconds are of the monotonic clock of the machine that asked; rates are tokens per second. Unknown is None. Percentiles
interpolate linearly between the two nearest values. Warm-up requests are in none of the numbers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glmplan.facts.base import Frozen

Counted = Literal["usage", "chunks"]
"""Who counted the answer's tokens: the server (`usage`), or we, one for every chunk (`chunks`)."""


class Spread(Frozen):
    """A distribution of seconds: its median, its 99th percentile, and how many values there were."""

    p50_s: float
    p99_s: float
    values: int = Field(ge=1)


class FailureCount(Frozen):
    """Requests that failed in the same way."""

    words: str
    requests: int = Field(ge=1)


class Level(Frozen):
    """One load: so many requests at once (`concurrency`), or arriving at random (`rate_per_s`).

    output_tokens_per_s   tokens of complete answers over the whole time: what the engines call output throughput
    decode_tokens_per_s   tokens after each answer's first, over the time in which at least one stream decoded
    stream_tokens_per_s   the median request's own decode rate
    ttft                  from sending a request to its first token
    itl                   time between tokens of one stream; a chunk of k tokens counts as k equal steps
    itl_of_chunks         the server did not say how many tokens a chunk holds, so `itl` is the time between chunks
    cached_tokens         prompt tokens that the server took from its prefix cache, where it tells
    """

    concurrency: int | None = None
    rate_per_s: float | None = None
    requests: int
    completed: int
    failures: tuple[FailureCount, ...] = ()
    seconds: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    counted_by: Counted
    output_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    stream_tokens_per_s: float | None = None
    ttft: Spread | None = None
    itl: Spread | None = None
    itl_of_chunks: bool = False
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        """Requests without a complete answer."""
        return sum(failure.requests for failure in self.failures)

    @property
    def label(self) -> str:
        """The load in words."""
        return f"concurrency {self.concurrency}" if self.rate_per_s is None else f"{self.rate_per_s:g} requests/s"


class Prefill(Frozen):
    """One prompt length, one request at a time: `tokens_per_s` is the length over the median time to the first token."""

    prompt_tokens: int
    requests: int
    failures: tuple[FailureCount, ...] = ()
    ttft: Spread | None = None
    tokens_per_s: float | None = None


class Beside(Frozen):
    """A number that the plan predicts beside what the server says of itself; None where it says nothing."""

    name: str
    predicted: int
    measured: int | None
    source: str


class Report(Frozen):
    """What `glmplan bench --json` prints."""

    schema_version: Literal[1] = 1
    glmplan_version: str
    url: str
    model: str
    engine_family: str | None
    engine_version: str
    measured_with: str
    endpoint: str
    prompts: str
    started: str
    prompt_tokens: int
    output_tokens: int
    warmup_requests: int
    levels: tuple[Level, ...] = ()
    prefill: tuple[Prefill, ...] = ()
    plan: tuple[Beside, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False
