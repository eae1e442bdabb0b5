"""How this server wants to be asked: completions with token ids or words, or SGLang's /generate, and who counts tokens.

Found by asking: a short request each way, best first, until one is answered. Token ids give prompts of exact length; words
are for servers that take only text, and their count per token is measured. A server without a tokenizer
(`skip_tokenizer_init` of SGLang) has only /generate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from glmplan.bench.prompts import Prompts
from glmplan.bench.statistics import Answer
from glmplan.bench.stop import Stop
from glmplan.bench.stream import PATHS, Endpoint, Server
from glmplan.errors import GlmplanError, NotHealthyError, UnsupportedError
from glmplan.fleet.served import HttpError

Kind = Literal["ids", "words"]
USAGES: tuple[Literal["each", "end", "none"], ...] = ("each", "end", "none")
OTHER_WAY = (400, 404, 405, 415, 422, 500, 501)
"""Statuses after which another way of asking is worth a try; the others are about the server or the key."""
FIRST_WORDS = 64
TRIAL_TOKENS = 8


@dataclass(frozen=True)
class Way:
    """A way that works. `words_per_token` turns a wanted length into words, 1 for token ids."""

    server: Server
    kind: Kind
    words_per_token: float = 1.0

    def prompt(self, prompts: Prompts, tokens: int) -> list[int] | str:
        """A new prompt of about (words) or exactly (ids) this many tokens."""
        if self.kind == "ids":
            return prompts.ids(tokens)
        return prompts.words(max(1, round(tokens * self.words_per_token)))

    @property
    def words(self) -> str:
        """The kind of prompts in words."""
        return "random token ids" if self.kind == "ids" else "random words"


def find_way(server: Server, told: dict[str, Any], prompts: Prompts, endpoint: Endpoint | None) -> Way:
    """The best way that is answered; raises with the server's words when none is."""
    last: Answer | None = None
    for trial, kind in _candidates(server, told, endpoint):
        prompt = prompts.ids(FIRST_WORDS) if kind == "ids" else prompts.words(FIRST_WORDS)
        answer = trial.ask(trial.body(prompt, TRIAL_TOKENS), Stop())
        if answer.complete:
            ratio = FIRST_WORDS / answer.prompt_tokens if kind == "words" and answer.prompt_tokens else 1.0
            return Way(trial, kind, ratio)
        last = answer
        if answer.status != 200 and answer.status not in OTHER_WAY:
            break
    assert last is not None
    raise _no_way(server, last, told)


def _candidates(server: Server, told: dict[str, Any], endpoint: Endpoint | None) -> Iterator[tuple[Server, Kind]]:
    if endpoint != "generate" and not (endpoint is None and told.get("skip_tokenizer_init")):
        for kind in ("ids", "words"):
            for usage in USAGES:
                yield replace(server, endpoint="completions", usage=usage), kind
    if endpoint == "generate" or (endpoint is None and told):
        yield replace(server, endpoint="generate"), "ids"


def _no_way(server: Server, answer: Answer, told: dict[str, Any]) -> GlmplanError:
    if answer.status is None:
        return NotHealthyError(f"{server.url} does not answer: {answer.failure}.", "Check the address, and that it runs.")
    if answer.status in (401, 403):
        return HttpError(answer.status, f"{answer.failure.partition(': ')[2]} (--api-key-env NAME gives the key)")
    if answer.status in OTHER_WAY:
        paths = " nor ".join(PATHS.values()) if told else PATHS["completions"]
        return UnsupportedError(
            f"{server.url} streams neither token ids nor words at {paths}: {answer.failure}.",
            "Name the model with --model if it is not the first of /v1/models; otherwise the engine is not known here.",
        )
    return NotHealthyError(f"{server.url} did not answer a short request: {answer.failure}.", "Look at its log.")
