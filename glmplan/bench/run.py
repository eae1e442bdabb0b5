"""The whole benchmark: find the way to ask, warm up, load by load, then prefill by length; what there is when it is cut.

Warm-up before each load is one request a stream of the load's own prompt length with few tokens, before each prefill length
one request; all with prompts of their own, in none of the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from glmplan import __version__
from glmplan.bench import load, statistics
from glmplan.bench.prompts import Prompts
from glmplan.bench.result import Level, Prefill, Report
from glmplan.bench.statistics import Answer
from glmplan.bench.stream import Endpoint, Server
from glmplan.bench.way import Way
from glmplan.errors import UsageError

LEAST_REQUESTS, WAVES = 8, 3
"""Requests of a level where none are named: three a stream, and never fewer than eight."""
RATE_SECONDS, LEAST_RATE_REQUESTS = 30, 20
PREFILL_REQUESTS = 3
WARMUP_TOKENS = 8
MOST_TOKENS = 200_000_000
"""Prompt tokens of one level, all made before it begins: about 1.5 GB of requests."""
LEAST_PROMPT = 64
"""A request takes as much room as this many tokens at least."""
CACHED_SHARE = 0.01
"""Share of the prompts that may come from the prefix cache (of random first tokens) without being told."""


@dataclass(frozen=True)
class Settings:
    """What to ask. `rate_per_s` takes the place of `concurrency`."""

    concurrency: tuple[int, ...] = (1, 4, 8, 16, 32)
    rate_per_s: float | None = None
    prompt_tokens: int = 1024
    output_tokens: int = 128
    prefill: tuple[int, ...] = ()
    requests_per_level: int | None = None
    timeout_s: float = 600.0
    endpoint: Endpoint | None = None

    def requests(self, concurrency: int | None) -> int:
        """Requests of one level."""
        if self.requests_per_level is not None:
            return self.requests_per_level
        if concurrency is None:
            return max(LEAST_RATE_REQUESTS, round((self.rate_per_s or 0) * RATE_SECONDS))
        return max(LEAST_REQUESTS, WAVES * concurrency)

    def check(self, context_tokens: int | None) -> None:
        """Refuse what the server's context cannot hold, or this machine's memory, before anything is asked."""
        most = max(self.requests(one) for one in ((None,) if self.rate_per_s is not None else self.concurrency))
        if most * max(self.prompt_tokens, LEAST_PROMPT) > MOST_TOKENS:
            raise UsageError(
                f"{most:,} requests of {self.prompt_tokens:,} tokens are too many for one level; {MOST_TOKENS:,} prompt "
                "tokens are the limit.",
                "Ask for fewer: --requests-per-level, --concurrency, --rate.",
            )
        need = self.prompt_tokens + self.output_tokens
        if context_tokens is not None and need > context_tokens:
            raise UsageError(
                f"{self.prompt_tokens:,} prompt and {self.output_tokens:,} output tokens are {need:,}; the server's context "
                f"is {context_tokens:,}.",
                "Ask for fewer: --prompt-tokens, --output-tokens.",
            )


class Observer(Protocol):
    """Who is told how far the benchmark is."""

    def begins(self, label: str, requests: int) -> None:
        """A load begins."""

    def answered(self) -> None:
        """One more of its requests has ended."""

    def level(self, level: Level) -> None:
        """A load has ended."""

    def prefill(self, prefill: Prefill) -> None:
        """A prompt length was measured."""

    def close(self) -> None:
        """Nothing more comes."""


MeasureLevel = Callable[["int | None", Settings, Observer], "tuple[Level, int]"]
"""Measures one level: the level, and how many requests warmed it up."""


class Own:
    """Measures with requests of our own."""

    def __init__(self, way: Way, prompts: Prompts) -> None:
        self._way, self._prompts = way, prompts

    def _bodies(self, count: int, prompt_tokens: int, output_tokens: int) -> list[bytes]:
        ask = self._way.server
        return [ask.body(self._way.prompt(self._prompts, prompt_tokens), output_tokens) for _ in range(count)]

    def level(self, concurrency: int | None, settings: Settings, observer: Observer) -> tuple[Level, int]:
        """One level, after its warm-up."""
        count, server = settings.requests(concurrency), self._way.server
        label = f"concurrency {concurrency}" if concurrency else f"{settings.rate_per_s:g} requests/s"
        observer.begins(label, count)
        warm = min(concurrency or 1, count)
        bodies = self._bodies(warm, settings.prompt_tokens, min(WARMUP_TOKENS, settings.output_tokens))
        warmed = load.at_once(server, bodies, warm, _nothing)
        if warmed.interrupted:
            return statistics.level((), concurrency, settings.rate_per_s, interrupted=True), 0
        bodies = self._bodies(count, settings.prompt_tokens, settings.output_tokens)
        if concurrency is not None:
            found = load.at_once(server, bodies, concurrency, lambda _: observer.answered())
        else:
            assert settings.rate_per_s is not None
            found = load.arriving(server, bodies, settings.rate_per_s, lambda _: observer.answered())
        notes = (*found.notes, *_odd(found.answers, settings))
        level = statistics.level(found.answers, concurrency, settings.rate_per_s, found.interrupted, notes)
        return level, len(warmed.answers)

    def prefill(self, length: int, observer: Observer) -> tuple[Prefill, int, bool]:
        """One prompt length, after one request that does not count; and whether it was cut."""
        observer.begins(f"prefill of {length:,} tokens", PREFILL_REQUESTS)
        warmed = load.at_once(self._way.server, self._bodies(1, length, 1), 1, _nothing)
        if warmed.interrupted:
            return statistics.prefill(length, ()), 0, True
        found = load.at_once(self._way.server, self._bodies(PREFILL_REQUESTS, length, 1), 1, lambda _: observer.answered())
        return statistics.prefill(length, found.answers), 1, found.interrupted


def _nothing(answer: Answer) -> None:
    """A warm-up's answer."""


def _odd(answers: Sequence[Answer], settings: Settings) -> tuple[str, ...]:
    """What a reader of the numbers should know."""
    good = [answer for answer in answers if answer.complete]
    short = [answer for answer in good if answer.counted_by == "usage" and answer.tokens < settings.output_tokens]
    cached, asked = sum(a.cached_tokens or 0 for a in good), sum(a.prompt_tokens or 0 for a in good)
    found = []
    if short:
        least = min(answer.tokens for answer in short)
        found.append(
            f"{len(short)} of {len(good)} answers are shorter than {settings.output_tokens} tokens (down to {least}): the "
            "server does not keep ignore_eos"
        )
    if asked and cached > CACHED_SHARE * asked:
        found.append(f"{cached:,} of {asked:,} prompt tokens came from the prefix cache: prefill is faster than it seems")
    return tuple(found)


def run(settings: Settings, measure: MeasureLevel, own: Own, observer: Observer, report: Report) -> Report:
    """Fill the report; after an interruption, or a load of which nothing was answered, with what there is."""
    levels: list[Level] = []
    prefills: list[Prefill] = []
    warm, cut = 0, False
    loads: tuple[int | None, ...] = (None,) if settings.rate_per_s is not None else settings.concurrency
    for concurrency in loads:
        level, warmed = measure(concurrency, settings, observer)
        warm, cut = warm + warmed, level.interrupted
        if level.requests or not cut:
            levels.append(level)
            observer.level(level)
        if cut or not level.completed:
            break
    if not cut and (not levels or levels[-1].completed):
        for length in settings.prefill:
            found, warmed, cut = own.prefill(length, observer)
            warm += warmed
            if found.requests or not cut:
                prefills.append(found)
                observer.prefill(found)
            if cut:
                break
    return report.model_copy(
        update={
            "levels": tuple(levels), "prefill": tuple(prefills), "warmup_requests": report.warmup_requests + warm,
            "interrupted": cut,
        }
    )  # fmt: skip


def blank(settings: Settings, way: Way, family: str | None, version: str) -> Report:
    """The report before anything was measured."""
    server: Server = way.server
    return Report(
        glmplan_version=__version__,
        url=server.url,
        model=server.model,
        engine_family=family,
        engine_version=version,
        measured_with="glmplan",
        endpoint=server.endpoint,
        prompts=way.words,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        prompt_tokens=settings.prompt_tokens,
        output_tokens=settings.output_tokens,
        warmup_requests=1,
    )
