"""The stand-in's completions in the shapes of the OpenAI API and of SGLang's /generate."""

from __future__ import annotations

import time
import zlib
from typing import Any

from .standin_options import Options
from .standin_text import continue_ids, logprob, reply, token_id, tokens_of, tool_call

RUNNER_UP_NATS = 3.0
"""How far the second-best token lies behind: no ties."""


class Refused(Exception):
    """A request that an engine answers with 400."""


def chat(body: dict[str, Any], options: Options) -> dict[str, Any]:
    """/v1/chat/completions."""
    messages = body["messages"]
    if not isinstance(messages, list) or not messages:
        raise Refused("messages is empty")
    prompt = "\n".join(_content(message) for message in messages)
    count = _checked(prompt, options)
    tools = body.get("tools") if body.get("tool_choice") != "none" else None
    call = tool_call(_content(messages[-1]), tools) if tools else None
    if call is not None and not options.fault("wrong-answer"):
        calls = [{"id": _name("call_", prompt), "type": "function", "index": 0, "function": call}]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        choice: dict[str, Any] = {"message": message, "finish_reason": "tool_calls"}
        return _completion("chat.completion", options, prompt, count, 16, choice)
    pieces, reason = _spoken(prompt, body.get("max_completion_tokens") or body.get("max_tokens"), options)
    choice = {"message": {"role": "assistant", "content": "".join(pieces)}, "finish_reason": reason}
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [_spoken_token(piece, int(body.get("top_logprobs") or 0)) for piece in pieces]}
    return _completion("chat.completion", options, prompt, count, len(pieces), choice)


def complete(body: dict[str, Any], options: Options) -> dict[str, Any]:
    """/v1/completions, of text or of token ids."""
    prompt, limit = body["prompt"], body.get("max_tokens") or 16
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return _complete_ids(prompt, int(limit), body, options)
    text = prompt if isinstance(prompt, str) else str(prompt[0])
    count = _checked(text, options)
    pieces, reason = _spoken(text, limit, options)
    choice: dict[str, Any] = {"text": "".join(pieces), "finish_reason": reason}
    if body.get("logprobs") is not None:
        choice["logprobs"] = {"tokens": pieces, "token_logprobs": [logprob(piece) for piece in pieces],
                              "top_logprobs": [_top(piece, int(body["logprobs"])) for piece in pieces]}  # fmt: skip
    return _completion("text_completion", options, text, count, len(pieces), choice)


def _complete_ids(ids: list[int], limit: int, body: dict[str, Any], options: Options) -> dict[str, Any]:
    """vLLM's answer to token ids: ids come back as `token_id:N` and, when asked for, as `token_ids`."""
    found = _ids(ids, limit, options)
    names = [f"token_id:{one}" for one in found]
    choice: dict[str, Any] = {"text": " ".join(map(str, found)), "finish_reason": "length", "token_ids": found}
    if body.get("logprobs") is not None:
        choice["logprobs"] = {"tokens": names, "token_logprobs": [logprob(name) for name in names],
                              "top_logprobs": [_top(name, int(body["logprobs"])) for name in names]}  # fmt: skip
    return _completion("text_completion", options, str(ids), len(ids), len(found), choice)


def generate(body: dict[str, Any], options: Options) -> dict[str, Any]:
    """SGLang's /generate, of `text` or `input_ids` (srt/managers/io_struct.py GenerateReqInput)."""
    sampling = body.get("sampling_params") or {}
    limit = int(sampling.get("max_new_tokens") or 128)
    if body.get("input_ids"):
        ids = _ids(body["input_ids"], limit, options)
        pieces, reason, count, prompt = [f"{one} " for one in ids], "length", len(body["input_ids"]), str(body["input_ids"])
    else:
        prompt = str(body["text"])
        count = _checked(prompt, options)
        pieces, reason = _spoken(prompt, limit, options)
        ids = [token_id(piece) for piece in pieces]
    told: dict[str, Any] = {"id": _name("", prompt), "prompt_tokens": count, "completion_tokens": len(ids),
                            "cached_tokens": 0, "finish_reason": {"type": reason, "length": limit}}  # fmt: skip
    if body.get("return_logprob"):
        scores = [logprob(f"token_id:{one}") for one in ids]
        most = int(body.get("top_logprobs_num") or 0)
        told["output_token_logprobs"] = [[scores[at], one, None] for at, one in enumerate(ids)]
        told["output_top_logprobs"] = [
            [[scores[at], one, None], [scores[at] - RUNNER_UP_NATS, one ^ 1, None]][:most] for at, one in enumerate(ids)
        ]
    return {"text": "".join(pieces), "output_ids": ids, "meta_info": told}


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return str(content)


def _checked(prompt: str, options: Options) -> int:
    count = len(tokens_of(prompt))
    _require_room(count, options)
    return count


def _require_room(count: int, options: Options) -> None:
    if count >= options.context_tokens:
        raise Refused(
            f"The input ({count} tokens) is longer than the model's context length ({options.context_tokens} tokens)."
        )


def _spoken(prompt: str, limit: Any, options: Options) -> tuple[list[str], str]:
    """The answer's pieces, cut at the limit, and why it ends."""
    text = "Lyon, 407, blue." if options.fault("wrong-answer") else reply(prompt)
    pieces = tokens_of(text)
    return (pieces, "stop") if limit is None or len(pieces) <= int(limit) else (pieces[: int(limit)], "length")


def _ids(ids: list[int], limit: int, options: Options) -> list[int]:
    _require_room(len(ids), options)
    return continue_ids([*ids, 0] if options.fault("wrong-answer") else ids, limit)


def _spoken_token(piece: str, most: int) -> dict[str, Any]:
    tops = [{"token": name, "logprob": score, "bytes": None} for name, score in _top(piece, most).items()]
    return {"token": piece, "logprob": logprob(piece), "bytes": list(piece.encode()), "top_logprobs": tops}


def _top(piece: str, most: int) -> dict[str, float]:
    ranked = [(piece, logprob(piece)), (piece + "?", logprob(piece) - RUNNER_UP_NATS)]
    return dict(ranked[:most])


def _name(prefix: str, prompt: str) -> str:
    return f"{prefix}{zlib.crc32(prompt.encode()):08x}"


def _completion(
    kind: str, options: Options, prompt: str, prompt_tokens: int, tokens: int, choice: dict[str, Any]
) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    return {"id": _name("cmpl-", prompt), "object": kind, "created": int(time.time()), "model": options.model,
            "choices": [{"index": 0, **choice}], "usage": usage}  # fmt: skip
