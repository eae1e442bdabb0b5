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

from pydantic import Field, FiniteFloat, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from glmplan.errors import GlmplanError
from glmplan.facts.base import Frozen

Request = Callable[[str, str, "dict[str, Any] | None"], Any]
Family = Literal["sglang", "vllm"]

TOLERANCE_NATS = 0.1
"""Mean difference that is still the same model. BF16 keeps 8 bits: a logit of 16 to 32 moves in steps of 0.06 to 0.12, and
kernels add in different orders. On H200s, a small random checkpoint with packed FP8 or BF16 rows, beyond 2,048 tokens
(docs/proof, the agreement records of 2026-11-22): 0.03 to 0.10 between right servers over the first 24 tokens of an answer,
in all 50 that agreed so long; over the last 64 tokens of a prompt 0.01 to 0.15, and 0.23 to 0.37 where attention lost half
of the chosen slots. After the worst prompt of a record: 0.08 to 0.11 between one GPU and TP2, PP2 or both, 0.18 to 0.21
where attention lost slots (docs/proof, launch-pipeline-tp1 and both records of launch-shared; these allowed 0.12, because
random weights come near 0.1)."""
TIE_NATS = 2 * TOLERANCE_NATS
"""Two tokens this near to the trusted server are a tie: either may move. Random weights have ties everywhere and need more;
how much was not measured."""
MOST_TOLERANCE_NATS, MOST_TIE_NATS = 2.0, 10.0
"""More makes no sense. A tolerance of 2 takes a token that is seven times as likely for the same; at a window of 10 a token
that is 22,000 times less likely ties with the best."""
NOISE_TIMES = 2.0
"""After a prompt where the trusted server differs from itself, another may differ this many times as much, up to
NOISE_LIMIT."""
NOISE_LIMIT = 1.5
"""Times the tolerance: the most that a server may differ after one prompt, from itself or from another. So 0.15
where the tolerance is 0.1: above every right answer that was seen, below all that was wrong (TOLERANCE_NATS)."""
ALTERNATIVES = 5
ANSWER_TOKENS = 24
MOST_TRIES = 12
"""Requests per prompt: one, and one more after each tie."""
LEAST_TOKENS = MOST_TRIES
"""Tokens that every prompt of a record has. Each request compares one or more, so these are compared, whatever ties."""
NO_CHANCE = -9999.0
"""vLLM says this for a log-probability of -inf (0.33.0 `entrypoints/openai/completion/serving.py:765`)."""
LENGTHS = (8, 70, 700, 2_600, 5_000, 17_500)
"""Prompt lengths: within one page of 64, past one, and past the 2,048 tokens of sparse attention and past 16 k."""
FIRST_ID, LAST_ID = 5, 999
"""Ids that exist in every vocabulary and are neither padding nor an end of text in GLM's."""


class ReferenceToken(Frozen):
    """One greedy token and the tokens that were nearest to it, as (id, log-probability)."""

    id: int
    logprob: FiniteFloat
    alternatives: tuple[tuple[int, FiniteFloat], ...] = ()


class ReferenceEntry(Frozen):
    """One prompt of token ids and the greedy tokens after it. `noise_nats`: how much the trusted server differed from itself
    here; None: not known."""

    name: str
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    tokens: tuple[ReferenceToken, ...] = Field(min_length=LEAST_TOKENS)
    noise_nats: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class Reference(Frozen):
    """What `glmplan verify --record` writes. `noise_nats`: how much the trusted server differed from itself on the whole.
    `tie_nats` is None in records made before it was a number of its own."""

    schema_version: Literal[1] = 1
    model: str
    engine_family: Family
    engine_version: str = ""
    tolerance_nats: float = Field(default=TOLERANCE_NATS, gt=0, le=MOST_TOLERANCE_NATS, allow_inf_nan=False)
    tie_nats: float | None = Field(default=None, gt=0, le=MOST_TIE_NATS, allow_inf_nan=False)
    noise_nats: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    entries: tuple[ReferenceEntry, ...] = Field(min_length=1)

    @field_validator("noise_nats")
    @classmethod
    def _whole_is_accepted(cls, noise: float, known: ValidationInfo) -> float:
        """`record` would have refused a server of more noise, and noise makes the limit."""
        most = known.data.get("tolerance_nats")
        if most is not None and noise > most:
            raise _too_noisy(most)
        return noise

    @field_validator("entries")
    @classmethod
    def _entries_are_accepted(cls, entries: tuple[ReferenceEntry, ...], known: ValidationInfo) -> tuple[ReferenceEntry, ...]:
        """The same, prompt by prompt."""
        tolerance = known.data.get("tolerance_nats")
        for place, entry in enumerate(entries):
            if tolerance is not None and entry.noise_nats is not None and entry.noise_nats > NOISE_LIMIT * tolerance:
                where = (place, "noise_nats")
                found = _too_noisy(NOISE_LIMIT * tolerance)
                raise ValidationError.from_exception_data(
                    cls.__name__, [{"type": found, "loc": where, "input": entry.noise_nats}]
                )
        return entries

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
        return max(self.tolerance_nats, min(NOISE_TIMES * noise, NOISE_LIMIT * self.tolerance_nats))


def _too_noisy(most: float) -> PydanticCustomError:
    words = "a trusted server may differ from itself by {most} nats here"
    return PydanticCustomError("too_noisy", words, {"most": f"{most:g}"})


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
    """The greedy tokens after a prompt of token ids, `count` at most."""
    if family == "sglang":
        body: dict[str, Any] = {
            "input_ids": list(ids), "return_logprob": True, "top_logprobs_num": ALTERNATIVES,
            "sampling_params": {"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
        }  # fmt: skip
        return _read(_sglang, request("POST", "/generate", body))[:count]
    body = {
        "model": model, "prompt": list(ids), "max_tokens": count, "temperature": 0, "ignore_eos": True,
        "logprobs": ALTERNATIVES, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    return _read(_vllm, request("POST", "/v1/completions", body))[:count]


def _read(reader: Callable[[Any], list[ReferenceToken]], answer: Any) -> list[ReferenceToken]:
    try:
        return reader(answer)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError):
        raise GlmplanError(f"The server's answer has no log-probabilities: {str(answer)[:200]}.") from None


def _sglang(answer: Any) -> list[ReferenceToken]:
    found = (answer[0] if isinstance(answer, list) else answer)["meta_info"]
    ranked = found.get("output_top_logprobs") or [None] * len(found["output_token_logprobs"])
    return [
        _token(token[1], token[0], [(other[1], other[0]) for other in others or ()])
        for token, others in zip(found["output_token_logprobs"], ranked, strict=True)
    ]


def _vllm(answer: Any) -> list[ReferenceToken]:
    found = answer["choices"][0]["logprobs"]
    return [
        _token(
            _token_id(text),
            logprob,
            [(_token_id(name), value) for name, value in (others or {}).items() if _ID.fullmatch(name)],
        )
        for text, logprob, others in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    ]


class _NoNumberError(Exception):
    """A log-probability is NaN or infinite: which, and of what token."""


def _token(chosen: int, logprob: float | None, others: Sequence[tuple[int, float | None]]) -> ReferenceToken:
    """None is what SGLang makes of NaN and infinity (0.5.23 `srt/utils/json_response.py:16`: orjson writes null). An
    alternative without a chance is left out."""
    alternatives = [(other, value) for other, value in others if value is not None and not value <= NO_CHANCE]
    for one, value in ((chosen, logprob), *alternatives):
        if value is None or not NO_CHANCE < value < math.inf:
            raise _NoNumberError(f"{'null' if value is None else format(value, 'g')} for token {one}")
    return ReferenceToken.model_validate({"id": chosen, "logprob": logprob, "alternatives": alternatives})


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
    try:
        entries = tuple(
            ReferenceEntry(name=name, prompt_ids=ids, tokens=_answer(request, (family, model), name, ids, ANSWER_TOKENS))
            for name, ids in wanted.items()
        )
    except _UnusableError as error:
        raise GlmplanError(f"The server's answers are no reference: {error.message}.", error.next_step) from None
    first = Reference(
        model=model, engine_family=family, engine_version=version, tolerance_nats=tolerance_nats, tie_nats=tie_nats,
        entries=entries,
    )  # fmt: skip
    limits = [NOISE_LIMIT * tolerance_nats] * len(entries)
    again = _compare_all(request, first, (family, model), limits, tolerance_nats)
    if again.problem:
        raise GlmplanError(f"The server disagrees with itself: {again.problem}.", _step(again))
    noisy = tuple(
        entry.model_copy(update={"noise_nats": tally.noise}) for entry, tally in zip(entries, again.tallies, strict=True)
    )
    return first.model_copy(update={"noise_nats": again.whole.noise, "entries": noisy})


def _step(again: _Comparison) -> str:
    """What helps a server that disagrees with itself: a wider limit only where one is known that would do."""
    if again.wrong is not None:
        option = "--ties" if again.wrong.apart_nats <= MOST_TIE_NATS else ""
    else:
        needed = max(again.whole.mean, *(one.mean / NOISE_LIMIT for one in again.tallies))
        option = "--tolerance" if needed <= MOST_TOLERANCE_NATS else ""
    if option:
        return f"Record on an idle server, or allow more with {option}."
    return "Record on an idle server. If it still disagrees, look at its log: no limit makes it a reference."


class _UnusableError(GlmplanError):
    """An answer that cannot be compared. Its message is a part of a sentence; its next step is that of a recording."""


def _answer(
    request: Request, server: tuple[Family, str], name: str, ids: Sequence[int], count: int
) -> tuple[ReferenceToken, ...]:
    """`count` greedy tokens with their log-probabilities; fewer are no answer."""
    try:
        found = greedy(request, *server, ids, count)
    except _NoNumberError as error:
        raise _UnusableError(
            f"a log-probability that is no number after the prompt of {name} ({error})",
            "Look at its log: its weights or its kernels may be wrong.",
        ) from None
    if len(found) < count:
        raise _UnusableError(
            f"{len(found)} of {count} tokens came after the prompt of {name}, though a text's end was to be ignored",
            f"Its context or its limits end the text: let it take {len(ids) + count:,} tokens, or leave such prompts out "
            "with --context.",
        )
    return tuple(found)


@dataclass
class _Tally:
    """Differences so far, after one prompt or after all; `limit` is that of their mean."""

    name: str
    limit: float
    compared: int = 0
    total: float = 0.0
    largest: float = 0.0
    ties: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.compared

    @property
    def noise(self) -> float:
        """The mean as a record keeps it; rounding lifts it over no limit."""
        return min(round(self.mean, 4), self.limit)


@dataclass(frozen=True)
class _Wrong:
    """What no tie explains. `apart_nats`: how far from its own token the trusted server saw the wrong one; infinite where it
    did not, or where no token is wrong."""

    words: str
    apart_nats: float = math.inf


@dataclass
class _Comparison:
    """One tally per prompt. Nothing is asked after what is `wrong`."""

    recorded: int
    limit: float
    tallies: list[_Tally] = field(default_factory=list)
    wrong: _Wrong | None = None

    @property
    def whole(self) -> _Tally:
        return _Tally(
            "all prompts",
            self.limit,
            compared=sum(one.compared for one in self.tallies),
            total=sum(one.total for one in self.tallies),
            largest=max((one.largest for one in self.tallies), default=0.0),
            ties=sum(one.ties for one in self.tallies),
        )

    @property
    def problem(self) -> str:
        """Why the server is not right; empty where it is."""
        if self.wrong is not None:
            return self.wrong.words
        whole, beyond = self.whole, [one for one in self.tallies if one.mean > one.limit]
        if beyond:
            worst = max(beyond, key=lambda one: one.mean / one.limit)
            text = (
                f"a mean difference of {worst.mean:.4f} nats after the prompt of {worst.name}, {worst.limit:g} are allowed"
            )
            return text + (f"; {len(beyond)} prompts exceed their limit" if len(beyond) > 1 else "")
        if whole.mean > whole.limit:
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
        """What was compared, and the prompt that differs most."""
        text = f"{self.whole.compared} of {self.recorded} tokens compared"
        if self.wrong is not None:
            return text
        worst = max(self.tallies, key=lambda one: one.mean)
        return text + f", at most {worst.mean:.3f} nats apart on average ({worst.name})"


def compare(request: Request, reference: Reference, model: str, family: Family | None) -> Compared:
    """Ask the server every recorded prompt and judge its tokens and log-probabilities."""
    server = (family or detect_family(request)[0], model)
    limits = reference.limits_nats
    found = _compare_all(request, reference, server, limits, reference.limit_nats)
    least, most = min(limits), max(limits)
    allowed = f"{least:g}" if least == most else f"{least:g} to {most:g}"
    whole = f" and within {reference.limit_nats:g} over all" if reference.limit_nats < most else ""
    return Compared(
        right=not found.problem,
        expected=f"the recorded tokens, log-probabilities within {allowed} nats on average after every prompt{whole}",
        got=found.words,
        note=found.note,
    )


def _compare_all(
    request: Request, reference: Reference, server: tuple[Family, str], limits: Sequence[float], limit: float
) -> _Comparison:
    found = _Comparison(sum(len(entry.tokens) for entry in reference.entries), limit)
    for entry, own in zip(reference.entries, limits, strict=True):
        found.tallies.append(_Tally(entry.name, own))
        found.wrong = _compare_entry(request, entry, reference.tie_window_nats, server, found.tallies[-1])
        if found.wrong is not None:
            break
    return found


def _compare_entry(
    request: Request, entry: ReferenceEntry, ties: float, server: tuple[Family, str], tally: _Tally
) -> _Wrong | None:
    """One prompt; after a tie it is asked again with the recorded tokens up to there. What was wrong with a token, or with
    the answer; nothing where none was."""
    place = 0
    for _ in range(MOST_TRIES):
        ids = [*entry.prompt_ids, *(token.id for token in entry.tokens[:place])]
        try:
            got = _answer(request, server, entry.name, ids, len(entry.tokens) - place)
        except _UnusableError as error:
            return _Wrong(error.message)
        for have, want in zip(got, entry.tokens[place:], strict=True):
            place += 1
            apart = _take(have, want, ties, tally)
            if apart is not None:
                seen = f"; {apart:.3f} nats lay between them, {ties:g} are a tie" if apart < math.inf else ""
                words = (
                    f"token {have.id} ({have.logprob:.3f} nats) instead of {want.id} ({want.logprob:.3f}) at place {place} "
                    f"after the prompt of {entry.name}{seen}"
                )
                return _Wrong(words, apart)
            if have.id != want.id:
                break
        if place == len(entry.tokens):
            break
    return None


def _take(have: ReferenceToken, want: ReferenceToken, ties: float, tally: _Tally) -> float | None:
    """Count one token. Where it is wrong: how far from its own the trusted server saw it; infinitely, where it did not."""
    expected = want.logprob
    if have.id != want.id:
        expected = dict(want.alternatives).get(have.id, -math.inf)
        if want.logprob - expected > ties:
            return want.logprob - expected
        tally.ties += 1
    difference = abs(have.logprob - expected)
    tally.compared += 1
    tally.total += difference
    tally.largest = max(tally.largest, difference)
    return None
