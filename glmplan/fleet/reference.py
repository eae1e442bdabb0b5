"""Answers of a trusted server to prompts of token ids, and the comparison of another server with them.

It judges servers whose text means nothing: test checkpoints with random weights, or a checkpoint without its tokenizer. Both
engines are asked in their own way: SGLang at /generate with `input_ids` (0.5.23 `srt/managers/tokenizer_manager.py:3098`:
triples of log-probability, id, text), vLLM at /v1/completions with token ids (0.33.0
`entrypoints/openai/completion/protocol.py:164`: tokens as "token_id:N"). Log-probabilities are natural logarithms.

A token may differ where the trusted server itself saw a tie; the comparison then goes on with the trusted server's token, so
one tie does not hide the rest.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from glmplan.errors import GlmplanError
from glmplan.facts.base import Frozen

Request = Callable[[str, str, "dict[str, Any] | None"], Any]
Family = Literal["sglang", "vllm"]

TOLERANCE_NATS = 0.1
"""Mean difference that is still the same model. BF16 keeps 8 bits: a logit of 16 to 32 moves in steps of 0.06 to 0.12, and
kernels add in different orders. A wrong page layout or a wrong cut gives whole nats."""
ALTERNATIVES = 5
ANSWER_TOKENS = 24
LEAST_COMPARED = 0.5
"""Share of the recorded tokens that must have been compared for a verdict."""
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
    """One prompt of token ids and the greedy tokens after it."""

    name: str
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    tokens: tuple[ReferenceToken, ...] = Field(min_length=1)


class Reference(Frozen):
    """What `glmplan verify --record` writes. `noise_nats`: how much the trusted server differed from itself."""

    schema_version: Literal[1] = 1
    model: str
    engine_family: Family
    engine_version: str = ""
    tolerance_nats: float = Field(default=TOLERANCE_NATS, gt=0)
    noise_nats: float = Field(default=0.0, ge=0)
    entries: tuple[ReferenceEntry, ...] = Field(min_length=1)


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
    request: Request, model: str, family: Family, version: str, context_tokens: int | None, tolerance_nats: float
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
        model=model, engine_family=family, engine_version=version, tolerance_nats=tolerance_nats, entries=entries
    )
    again = _compare_all(request, first, model, family)
    if not again.right(tolerance_nats):
        raise GlmplanError(
            f"The server disagrees with itself: {again.words()}; {tolerance_nats:g} nats are allowed.",
            "Record on an idle server, or allow more with --tolerance.",
        )
    return first.model_copy(update={"noise_nats": round(again.mean, 4)})


@dataclass
class _Tally:
    """Differences so far. `wrong` is the first token that no tie explains."""

    recorded: int = 0
    compared: int = 0
    total: float = 0.0
    largest: float = 0.0
    ties: int = 0
    wrong: str = ""

    @property
    def mean(self) -> float:
        return self.total / self.compared if self.compared else 0.0

    def right(self, tolerance: float) -> bool:
        return not self.wrong and self.mean <= tolerance and self.compared >= LEAST_COMPARED * self.recorded

    def words(self) -> str:
        if self.wrong:
            return self.wrong
        text = f"a mean difference of {self.mean:.4f} nats (largest {self.largest:.4f}) over {self.compared} tokens"
        return text + (f", {self.ties} ties" if self.ties else "")


def compare(request: Request, reference: Reference, model: str, family: Family | None) -> Compared:
    """Ask the server every recorded prompt and judge its tokens and log-probabilities."""
    found = _compare_all(request, reference, model, family or detect_family(request)[0])
    share = f"{found.compared} of {found.recorded} tokens compared"
    return Compared(
        right=found.right(reference.tolerance_nats),
        expected=f"the recorded tokens, log-probabilities within {reference.tolerance_nats:g} nats on average",
        got=found.words(),
        note=share,
    )


def _compare_all(request: Request, reference: Reference, model: str, family: Family) -> _Tally:
    tally = _Tally(recorded=sum(len(entry.tokens) for entry in reference.entries))
    for entry in reference.entries:
        _compare_entry(request, entry, reference.tolerance_nats, (family, model), tally)
        if tally.wrong:
            break
    return tally


def _compare_entry(
    request: Request, entry: ReferenceEntry, tolerance: float, server: tuple[Family, str], tally: _Tally
) -> None:
    """One prompt; after a tie it is asked again with the recorded tokens up to there."""
    place = 0
    for _ in range(MOST_TRIES):
        ids = [*entry.prompt_ids, *(token.id for token in entry.tokens[:place])]
        got = greedy(request, *server, ids, len(entry.tokens) - place)
        for have, want in zip(got, entry.tokens[place:], strict=False):
            place += 1
            if not _take(have, want, tolerance, tally):
                tally.wrong = (
                    f"token {have.id} ({have.logprob:.3f} nats) instead of {want.id} ({want.logprob:.3f}) at place {place} "
                    f"after the prompt of {entry.name}"
                )
                return
            if have.id != want.id:
                break
        else:
            return
        if place == len(entry.tokens):
            return


def _take(have: ReferenceToken, want: ReferenceToken, tolerance: float, tally: _Tally) -> bool:
    """Count one token; False where it is wrong. A tie: the two lie within twice the tolerance, as either may move."""
    if have.id == want.id:
        expected = want.logprob
    else:
        near = {token: value for token, value in want.alternatives if want.logprob - value <= 2 * tolerance}
        if have.id not in near:
            return False
        expected = near[have.id]
        tally.ties += 1
    difference = abs(have.logprob - expected)
    tally.compared += 1
    tally.total += difference
    tally.largest = max(tally.largest, difference)
    return True
