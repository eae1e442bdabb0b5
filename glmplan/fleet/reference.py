"""Answers of a trusted server to prompts of token ids, and the comparison of another server with them.

It judges servers whose text means nothing: test checkpoints with random weights, or a checkpoint without its tokenizer. Both
engines are asked in their own way: SGLang at /generate with `input_ids` (0.5.23 `srt/managers/tokenizer_manager.py:3098`:
triples of log-probability, id, text), vLLM at /v1/completions with token ids (0.33.0
`entrypoints/openai/completion/protocol.py:164`: tokens as "token_id:N"). Log-probabilities are natural logarithms.

Log-probabilities are judged prompt by prompt: attention that is wrong beyond 2,048 tokens is exact before, and one mean over
all prompts would hide it. A token may differ where the trusted server itself saw a tie; the comparison then goes on with the
trusted server's token, so one tie does not hide the rest.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from glmplan.errors import GlmplanError
from glmplan.facts.base import Frozen

Request = Callable[[str, str, "dict[str, Any] | None"], Any]
Family = Literal["sglang", "vllm"]

TOLERANCE_NATS = 0.1
"""Mean difference that is still the same model. BF16 keeps 8 bits: a logit of 16 to 32 moves in steps of 0.06 to 0.12, and
kernels add in different orders. Beyond 2,048 tokens of a small random checkpoint, two starts of one server lie 0.06 apart,
other right kernels 0.06 to 0.08, wrong tokens of sparse attention 0.18 to 0.30; a wrong page layout gives whole nats."""
TIE_NATS = 2 * TOLERANCE_NATS
"""Two tokens this near to the trusted server are a tie: either may move. Random weights need more; 0.28 was seen."""
NOISE_TIMES = 2.0
"""After a prompt where the trusted server differs from itself, another may differ this many times as much."""
NOISE_LIMIT = 1.5
"""Times the tolerance: what a trusted server may differ from itself after one prompt; after all, on average, once. Right
servers do by up to 0.09, with a standard error of 0.012 to 0.014 over 24 tokens, so 0.15 lies four of these above."""
ALTERNATIVES = 5
ANSWER_TOKENS = 24
LEAST_COMPARED = 0.5
"""Share of the recorded tokens that must have been compared for a verdict, on the whole and after one prompt."""
LEAST_TOKENS = ANSWER_TOKENS // 2
"""Tokens that must have been compared for a verdict on one prompt: the mean of 12 is uncertain by a fifth. A prompt with
fewer counts in the mean of the whole alone."""
MOST_TRIES = 12
"""Requests per prompt: one, and one more after each tie."""
LENGTHS = (8, 70, 700, 2_600, 5_000, 17_500)
"""Prompt lengths: within one page of 64, past one, and past the 2,048 tokens of sparse attention and past 16 k."""
FIRST_ID, LAST_ID = 5, 999
"""Ids that exist in every vocabulary and are neither padding nor an end of text in GLM's."""


class ReferenceToken(Frozen):
    """One greedy token and the tokens that were nearest to it, as (id, log-probability)."""

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class ReferenceEntry(Frozen):
    """One prompt of token ids and the greedy tokens after it. `noise_nats`: how much the trusted server differed from itself
    here; None: not known."""

    name: str
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    tokens: tuple[ReferenceToken, ...] = Field(min_length=1)
    noise_nats: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class Reference(Frozen):
    """What `glmplan verify --record` writes. `noise_nats`: how much the trusted server differed from itself on the whole.
    `tie_nats` is None in records made before it was a number of its own."""

    schema_version: Literal[1] = 1
    model: str
    engine_family: Family
    engine_version: str = ""
    tolerance_nats: float = Field(default=TOLERANCE_NATS, gt=0, allow_inf_nan=False)
    tie_nats: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    noise_nats: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    entries: tuple[ReferenceEntry, ...] = Field(min_length=1)

    @property
    def tie_window_nats(self) -> float:
        """Where `tie_nats` is not known, what it was: twice the tolerance."""
        return 2 * self.tolerance_nats if self.tie_nats is None else self.tie_nats

    @property
    def limit_nats(self) -> float:
        """The largest mean difference over all prompts."""
        return self._limit(self.noise_nats)

    @property
    def limits_nats(self) -> tuple[float, ...]:
        """The largest mean difference after each prompt; where its own noise is not known, the whole's counts."""
        return tuple(self._limit(self.noise_nats if one.noise_nats is None else one.noise_nats) for one in self.entries)

    def _limit(self, noise: float) -> float:
        return max(self.tolerance_nats, NOISE_TIMES * noise)


@dataclass(frozen=True)
class Compared:
    """The verdict of a comparison."""

    right: bool
    expected: str
    got: str
    note: str = ""


def detect_family(request: Request) -> tuple[Family, str]:
    """Which engine answers, and its version: SGLang has /server_info, vLLM /version (its own /server_info differs)."""
    for family, path in (("sglang", "/server_info"), ("sglang", "/get_server_info"), ("vllm", "/version")):
        try:
            answer = request("GET", path, None)
        except GlmplanError:
            continue
        if isinstance(answer, dict) and "vllm_config" not in answer:
            return ("vllm" if family == "vllm" else "sglang"), str(answer.get("version", ""))
    raise GlmplanError(
        "The server is neither SGLang nor vLLM: it has no /server_info and no /version.",
        "Reference answers need one of them; ask the other canaries with --only.",
    )


def greedy(request: Request, family: Family, model: str, ids: Sequence[int], count: int) -> list[ReferenceToken]:
    """The greedy tokens after a prompt of token ids."""
    if family == "sglang":
        body: dict[str, Any] = {
            "input_ids": list(ids), "return_logprob": True, "top_logprobs_num": ALTERNATIVES,
            "sampling_params": {"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
        }  # fmt: skip
        return _read(_sglang, request("POST", "/generate", body))
    body = {
        "model": model, "prompt": list(ids), "max_tokens": count, "temperature": 0, "ignore_eos": True,
        "logprobs": ALTERNATIVES, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    return _read(_vllm, request("POST", "/v1/completions", body))


def _read(reader: Callable[[Any], list[ReferenceToken]], answer: Any) -> list[ReferenceToken]:
    try:
        return reader(answer)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise GlmplanError(f"The server's answer has no log-probabilities: {str(answer)[:200]}.") from None


def _sglang(answer: Any) -> list[ReferenceToken]:
    found = (answer[0] if isinstance(answer, list) else answer)["meta_info"]
    ranked = found.get("output_top_logprobs") or [None] * len(found["output_token_logprobs"])
    return [
        ReferenceToken(id=token[1], logprob=token[0], alternatives=tuple((other[1], other[0]) for other in others or ()))
        for token, others in zip(found["output_token_logprobs"], ranked, strict=True)
    ]


def _vllm(answer: Any) -> list[ReferenceToken]:
    found = answer["choices"][0]["logprobs"]
    return [
        ReferenceToken(
            id=_token_id(text),
            logprob=logprob,
            alternatives=tuple((_token_id(name), value) for name, value in (others or {}).items() if _ID.fullmatch(name)),
        )
        for text, logprob, others in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    ]


_ID = re.compile(r"token_id:[0-9]+")


def _token_id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def prompts(context_tokens: int | None) -> dict[str, tuple[int, ...]]:
    """Prompts by name, the same ones every time; those that the context does not hold are left out."""
    fitting = [length for length in LENGTHS if context_tokens is None or length + ANSWER_TOKENS <= context_tokens]
    found = {}
    for length in fitting:
        source = random.Random(f"glmplan reference {length}")
        found[f"{length} tokens"] = tuple(source.randint(FIRST_ID, LAST_ID) for _ in range(length))
    return found


def record(
    request: Request,
    model: str,
    family: Family,
    version: str,
    context_tokens: int | None,
    tolerance_nats: float = TOLERANCE_NATS,
    tie_nats: float = TIE_NATS,
) -> Reference:
    """Ask a trusted server every prompt twice; one that disagrees with itself is not trusted."""
    wanted = prompts(context_tokens)
    if not wanted:
        raise GlmplanError(f"The server's context of {context_tokens:,} tokens holds no prompt.")
    entries = tuple(
        ReferenceEntry(name=name, prompt_ids=ids, tokens=tuple(greedy(request, family, model, ids, ANSWER_TOKENS)))
        for name, ids in wanted.items()
    )
    first = Reference(
        model=model, engine_family=family, engine_version=version, tolerance_nats=tolerance_nats, tie_nats=tie_nats,
        entries=entries,
    )  # fmt: skip
    limits = [NOISE_LIMIT * tolerance_nats] * len(entries)
    again = _compare_all(request, first, (family, model), limits, tolerance_nats)
    if again.problem:
        more = "--ties" if again.wrong else "--tolerance"
        raise GlmplanError(
            f"The server disagrees with itself: {again.problem}.", f"Record on an idle server, or allow more with {more}."
        )
    noisy = tuple(
        entry.model_copy(update={"noise_nats": round(tally.mean, 4) if tally.judged else None})
        for entry, tally in zip(entries, again.tallies, strict=True)
    )
    return first.model_copy(update={"noise_nats": round(again.whole.mean, 4), "entries": noisy})


@dataclass
class _Tally:
    """Differences so far, after one prompt or after all; `limit` is that of their mean."""

    name: str
    recorded: int
    limit: float
    compared: int = 0
    total: float = 0.0
    largest: float = 0.0
    ties: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.compared if self.compared else 0.0

    @property
    def beyond(self) -> bool:
        return not self.mean <= self.limit

    @property
    def enough(self) -> bool:
        return self.compared >= LEAST_COMPARED * self.recorded

    @property
    def judged(self) -> bool:
        """There is a verdict on this prompt."""
        return self.enough and self.compared >= LEAST_TOKENS


@dataclass
class _Comparison:
    """One tally per prompt. `wrong` is the first token that no tie explains; nothing is asked after it."""

    recorded: int
    limit: float
    tallies: list[_Tally] = field(default_factory=list)
    wrong: str = ""

    @property
    def whole(self) -> _Tally:
        return _Tally(
            "all prompts",
            self.recorded,
            self.limit,
            compared=sum(one.compared for one in self.tallies),
            total=sum(one.total for one in self.tallies),
            largest=max((one.largest for one in self.tallies), default=0.0),
            ties=sum(one.ties for one in self.tallies),
        )

    @property
    def problem(self) -> str:
        """Why the server is not right; empty where it is."""
        if self.wrong:
            return self.wrong
        whole, beyond = self.whole, [one for one in self.tallies if one.judged and one.beyond]
        if beyond:
            worst = max(beyond, key=lambda one: one.mean / one.limit)
            text = (
                f"a mean difference of {worst.mean:.4f} nats after the prompt of {worst.name}, {worst.limit:g} are allowed"
            )
            return text + (f"; {len(beyond)} prompts are beyond theirs" if len(beyond) > 1 else "")
        if not whole.enough:
            needed = math.ceil(LEAST_COMPARED * whole.recorded)
            return f"{whole.compared} of {whole.recorded} tokens compared, {needed} are needed"
        if whole.beyond:
            return f"a mean difference of {whole.mean:.4f} nats over {whole.compared} tokens, {whole.limit:g} are allowed"
        return ""

    @property
    def words(self) -> str:
        if self.problem:
            return self.problem
        whole = self.whole
        text = f"a mean difference of {whole.mean:.4f} nats (largest {whole.largest:.4f}) over {whole.compared} tokens"
        return text + (f", {whole.ties} ties" if whole.ties else "")

    @property
    def note(self) -> str:
        """What was compared, the prompt that differs most, and the prompts without a verdict."""
        whole, judged = self.whole, [one for one in self.tallies if one.judged]
        text = f"{whole.compared} of {whole.recorded} tokens compared"
        if self.wrong:
            return text
        if judged:
            worst = max(judged, key=lambda one: one.mean)
            text += f", at most {worst.mean:.3f} nats apart on average ({worst.name})"
        else:
            text += f", {whole.mean:.3f} nats apart on average"
        few = [f"{one.name} ({one.compared} of {one.recorded})" for one in self.tallies if not one.judged]
        return text + (f"; too few to judge alone: {', '.join(few)}" if few else "")


def compare(request: Request, reference: Reference, model: str, family: Family | None) -> Compared:
    """Ask the server every recorded prompt and judge its tokens and log-probabilities."""
    server = (family or detect_family(request)[0], model)
    limits = reference.limits_nats
    found = _compare_all(request, reference, server, limits, reference.limit_nats)
    least, most = min(limits), max(limits)
    allowed = f"{least:g}" if least == most else f"{least:g} to {most:g}"
    return Compared(
        right=not found.problem,
        expected=f"the recorded tokens, log-probabilities within {allowed} nats on average after every prompt",
        got=found.words,
        note=found.note,
    )


def _compare_all(
    request: Request, reference: Reference, server: tuple[Family, str], limits: Sequence[float], limit: float
) -> _Comparison:
    found = _Comparison(sum(len(entry.tokens) for entry in reference.entries), limit)
    for entry, own in zip(reference.entries, limits, strict=True):
        found.tallies.append(_Tally(entry.name, len(entry.tokens), own))
        found.wrong = _compare_entry(request, entry, reference.tie_window_nats, server, found.tallies[-1])
        if found.wrong:
            break
    return found


def _compare_entry(request: Request, entry: ReferenceEntry, ties: float, server: tuple[Family, str], tally: _Tally) -> str:
    """One prompt; after a tie it is asked again with the recorded tokens up to there. What was wrong with a token, or with
    the number of them; nothing where none was."""
    place = 0
    for _ in range(MOST_TRIES):
        ids = [*entry.prompt_ids, *(token.id for token in entry.tokens[:place])]
        asked = len(entry.tokens) - place
        got = greedy(request, *server, ids, asked)
        if len(got) < asked:
            return (
                f"{len(got)} of {asked} tokens came after the prompt of {entry.name}, though a text's end was to be ignored"
            )
        for have, want in zip(got, entry.tokens[place:], strict=False):
            place += 1
            if not _take(have, want, ties, tally):
                return (
                    f"token {have.id} ({have.logprob:.3f} nats) instead of {want.id} ({want.logprob:.3f}) at place {place} "
                    f"after the prompt of {entry.name}{_apart(have, want, ties)}"
                )
            if have.id != want.id:
                break
        else:
            return ""
        if place == len(entry.tokens):
            return ""
    return ""


def _apart(have: ReferenceToken, want: ReferenceToken, ties: float) -> str:
    """How near the trusted server saw a wrong token, where it did."""
    value = dict(want.alternatives).get(have.id)
    return "" if value is None else f"; {want.logprob - value:.3f} nats lay between them, {ties:g} are a tie"


def _take(have: ReferenceToken, want: ReferenceToken, ties: float, tally: _Tally) -> bool:
    """Count one token; False where it is wrong."""
    if have.id == want.id:
        expected = want.logprob
    else:
        near = {token: value for token, value in want.alternatives if want.logprob - value <= ties}
        if have.id not in near:
            return False
        expected = near[have.id]
        tally.ties += 1
    difference = abs(have.logprob - expected)
    tally.compared += 1
    tally.total += difference
    tally.largest = max(tally.largest, difference)
    return True
