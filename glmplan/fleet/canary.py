"""Does the server answer rightly? Questions with known answers, asked over its own HTTP interface.

A green /health proves nothing: ranks above 0 always say 200, and so does a server whose scheduler is stuck. The canaries
catch what breaks silently: wrong quantisation (fact, arithmetic), a wrong index page layout (needle past the 2,048 tokens
that sparse attention selects), a pipeline cut on a layer without an indexer (both needles), a missing tool parser (tool),
nondeterminism (repeat), a draft model that changes answers (mtp). `reference` compares token ids and log-probabilities with
a trusted server's, for checkpoints whose text means nothing. `ask` is any callable, so nothing here opens a connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from glmplan.errors import GlmplanError, NotHealthyError, UnreachableError, UsageError, WrongAnswersError
from glmplan.facts.base import Frozen
from glmplan.fleet import questions
from glmplan.fleet.questions import ARITHMETIC, FACT, Question
from glmplan.fleet.reference import Reference, compare
from glmplan.fleet.served import Ask, Served
from glmplan.units import nearest

TITLES = {
    "fact": "the capital of France",
    "arithmetic": "17 x 24 = 408",
    "needle": "a number placed past 2,048 tokens, where sparse attention has to select",
    "long-needle": "a number placed past 16 k tokens (skipped where the context is shorter)",
    "tool": "a tool call with the right argument",
    "repeat": "two equal greedy runs",
    "mtp": "the same text as a server without MTP (--without-mtp-url)",
    "reference": "the tokens and log-probabilities of a trusted server (--reference)",
}
NAMES = tuple(TITLES)
NEEDLE_TOKENS, LONG_NEEDLE_TOKENS = 2_304, 16_896
"""Tokens before the needle: past 2,048 and past 16 k by half a page of 512, whatever the chat template adds before."""
AFTER_TOKENS = 2_304
"""Tokens after the needle, so that the newest 2,048 alone do not hold it."""
ANSWER_TOKENS = 1_024
"""A reasoning model that thinks in spite of being asked not to spends hundreds of tokens before a one-word answer."""
SHORT_ANSWER_TOKENS = 64
MOST_SILENT = 2
AN_ANSWER = "an answer"
"""What a canary expected that got none."""
TIE_NATS = 0.1
"""Two tokens whose log-probabilities lie this near may change places between equal runs: BF16 keeps 8 bits of a logit, which
is 0.06 at logits of 16 to 32."""


class CanarySettings(Frozen):
    """Which server is asked and what. `without_mtp` is a second server in `run_canaries`, never a setting."""

    model: str | None = None
    context_tokens: int | None = Field(default=None, ge=1)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    timeout_s: float = Field(default=300.0, gt=0)
    reference: Reference | None = None
    engine_family: Literal["sglang", "vllm"] | None = None


class CanaryResult(Frozen):
    """One canary. `status` skip has its reason in `note`; `prompt` is shortened where it is long."""

    name: str
    status: Literal["pass", "fail", "skip"]
    prompt: str = ""
    expected: str = ""
    got: str = ""
    note: str = ""
    seconds: float = 0.0

    @property
    def unanswered(self) -> bool:
        """It failed because no answer came."""
        return self.status == "fail" and self.expected == AN_ANSWER

    @property
    def difference(self) -> str:
        """The words for a canary that failed."""
        return f"{self.name} expected {self.expected!r} and got {self.got!r}"


@dataclass(frozen=True)
class _Asked:
    """What a canary may use. `plain` is the same model without MTP."""

    settings: CanarySettings
    server: Served
    plain: Served | None


class _Skipped(Exception):
    """A canary that cannot be asked here."""


def run_canaries(
    ask: Ask,
    settings: CanarySettings,
    on_result: Callable[[CanaryResult], None] | None = None,
    without_mtp: Ask | None = None,
) -> tuple[CanaryResult, ...]:
    """Ask them one after another, cheapest first; a failure does not end the run, a server that is gone does. Where two in a
    row got no answer in the whole of their time, the rest is not asked: that server hangs."""
    server = _served(ask, settings)
    plain = _served(without_mtp, settings) if without_mtp is not None else None
    found: list[CanaryResult] = []
    silent = 0
    for name in chosen(settings):
        began = time.monotonic()
        if silent == MOST_SILENT:
            note = f"not asked: the {MOST_SILENT} before got no answer within {settings.timeout_s:g} s each"
            result = CanaryResult(name=name, status="skip", note=note)
        else:
            result = _one(name, settings, server, plain)
            took = time.monotonic() - began
            silent = silent + 1 if result.unanswered and took >= settings.timeout_s else 0
        found.append(result.model_copy(update={"seconds": round(time.monotonic() - began, 2)}))
        if on_result is not None:
            on_result(found[-1])
    return tuple(found)


def _served(ask: Ask, settings: CanarySettings) -> Served:
    return Served(ask, settings.timeout_s, settings.model, settings.context_tokens)


def chosen(settings: CanarySettings) -> tuple[str, ...]:
    """The names to run; unknown ones are refused."""
    for name in (*settings.only, *settings.skip):
        if name not in NAMES:
            raise UsageError(f"No canary is named {name!r}.", nearest(name, list(NAMES)))
    return tuple(name for name in NAMES if (not settings.only or name in settings.only) and name not in settings.skip)


def require_right(results: tuple[CanaryResult, ...]) -> None:
    """Raise WrongAnswersError naming every canary that failed, or if none could be asked at all."""
    bad = [result for result in results if result.status == "fail"]
    if bad:
        words = "; ".join(f"canary {one.difference}" for one in bad)
        raise WrongAnswersError(f"The server answers wrongly: {words}.", "Do not serve from it. Read its log.")
    if not any(result.status == "pass" for result in results):
        notes = "; ".join(f"{one.name}: {one.note}" for one in results)
        raise WrongAnswersError(f"No canary could be asked ({notes}), so nothing is proven.", "Ask with --reference.")


def _one(name: str, settings: CanarySettings, server: Served, plain: Served | None) -> CanaryResult:
    try:
        return _CANARIES[name](_Asked(settings, server, plain))
    except _Skipped as reason:
        return CanaryResult(name=name, status="skip", note=str(reason))
    except (UnreachableError, NotHealthyError):
        raise
    except (GlmplanError, OSError) as error:
        words = error.message if isinstance(error, GlmplanError) else f"{type(error).__name__}: {error}"
        return CanaryResult(name=name, status="fail", expected=AN_ANSWER, got=words)


def _question(server: Served, question: Question) -> CanaryResult:
    answer = server.chat(question.prompt, ANSWER_TOKENS)
    return _judged(question, answer)


def _judged(question: Question, answer: Any) -> CanaryResult:
    text = questions.text_of(answer)
    right = question.right(text)
    note = ""
    if not right and not text and questions.first_choice(answer).get("finish_reason") == "length":
        note = f"the answer's {ANSWER_TOKENS} tokens were all spent on thinking"
    return CanaryResult(
        name=question.name, status="pass" if right else "fail", prompt=shortened(question.prompt),
        expected=question.expected, got=shortened(text), note=note,
    )  # fmt: skip


def shortened(text: str, length: int = 300) -> str:
    """A text with its middle left out where it is long."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... [{len(text) - 2 * half:,} characters] ... {text[-half:]}"


def _needle(server: Served, name: str, before: int) -> CanaryResult:
    """Ask with more filler where the server's own count says that the needle lay too shallow."""
    limit = server.context_tokens
    wanted = before + AFTER_TOKENS
    if limit is not None and wanted + ANSWER_TOKENS > limit:
        raise _Skipped(f"it needs {wanted + ANSWER_TOKENS:,} tokens of context; the server has {limit:,}")
    scale = 1.0
    for _ in range(3):
        question = questions.needle(name, round(before * scale), round(AFTER_TOKENS * scale))
        answer = server.chat(question.prompt, ANSWER_TOKENS)
        count = questions.prompt_tokens(answer)
        if count is None or count >= wanted:
            break
        scale *= 1.05 * wanted / max(count, 1)
    result = _judged(question, answer)
    if count is not None and count < wanted:
        return result.model_copy(update={"status": "skip", "note": f"the prompt has only {count:,} tokens"})
    depth = f"{count:,} tokens" if count is not None else "tokens not counted by the server"
    return result.model_copy(update={"note": result.note or depth})


def _tool(asked: _Asked) -> CanaryResult:
    prompt = "What is the weather in Paris now? Use the tool."
    answer = asked.server.chat(prompt, ANSWER_TOKENS, tools=[questions.WEATHER_TOOL], tool_choice="auto")
    problem = questions.tool_problem(answer)
    return CanaryResult(
        name="tool", status="fail" if problem else "pass", prompt=prompt, expected='get_weather({"city": "Paris"})',
        got=problem or 'get_weather({"city": "Paris"})',
    )  # fmt: skip


REPEATED = "Count from one to twenty in words, separated by commas."


def _repeat(asked: _Asked) -> CanaryResult:
    first, second = (_spoken(asked.server) for _ in range(2))
    return _same("repeat", first, second)


def _mtp(asked: _Asked) -> CanaryResult:
    if asked.plain is None:
        raise _Skipped("needs a second server without MTP, and none was given")
    return _same("mtp", _spoken(asked.plain), _spoken(asked.server))


Spoken = list[tuple[str, float | None, float | None]]
"""Per token: text, its log-probability, and the runner-up's."""


def _spoken(server: Served) -> tuple[str, Spoken]:
    answer = server.chat(REPEATED, SHORT_ANSWER_TOKENS, logprobs=True, top_logprobs=2)
    content = (questions.first_choice(answer).get("logprobs") or {}).get("content") or []
    tokens: Spoken = []
    for token in content:
        ranked = sorted((float(top["logprob"]) for top in token.get("top_logprobs") or ()), reverse=True)
        tokens.append((str(token.get("token")), token.get("logprob"), ranked[1] if len(ranked) > 1 else None))
    message = questions.first_choice(answer).get("message") or {}
    return str(message.get("content") or message.get("reasoning_content") or ""), tokens


def _same(name: str, first: tuple[str, Spoken], second: tuple[str, Spoken]) -> CanaryResult:
    """Equal texts, or texts that part where two tokens were as good as equal."""
    result = CanaryResult(name=name, status="pass", prompt=REPEATED, expected=shortened(first[0]), got=shortened(second[0]))
    if not first[0] and not second[0]:
        return result.model_copy(update={"status": "fail", "expected": "a text", "got": "an empty one"})
    if first[0] == second[0]:
        return result
    pair = next((pair for pair in zip(first[1], second[1], strict=False) if pair[0][0] != pair[1][0]), None)
    if pair is not None and pair[0][1] is not None and pair[0][2] is not None:
        gap = pair[0][1] - pair[0][2]
        if gap <= TIE_NATS:
            note = f"the texts part at {pair[0][0]!r} and {pair[1][0]!r}, which lie {gap:.3f} nats apart: a tie"
            return result.model_copy(update={"note": note})
    return result.model_copy(update={"status": "fail", "note": "the same request gave two texts"})


def _reference(asked: _Asked) -> CanaryResult:
    reference, server = asked.settings.reference, asked.server
    if reference is None:
        raise _Skipped("no recorded answers were given")
    compared = compare(server.request, reference, server.model, asked.settings.engine_family)
    return CanaryResult(
        name="reference", status="pass" if compared.right else "fail", prompt=f"{len(reference.entries)} recorded prompts",
        expected=compared.expected, got=compared.got, note=compared.note,
    )  # fmt: skip


_CANARIES: dict[str, Callable[[_Asked], CanaryResult]] = {
    "fact": lambda asked: _question(asked.server, FACT),
    "arithmetic": lambda asked: _question(asked.server, ARITHMETIC),
    "needle": lambda asked: _needle(asked.server, "needle", NEEDLE_TOKENS),
    "long-needle": lambda asked: _needle(asked.server, "long-needle", LONG_NEEDLE_TOKENS),
    "tool": _tool,
    "repeat": _repeat,
    "mtp": _mtp,
    "reference": _reference,
}
