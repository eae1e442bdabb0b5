"""A real HTTP server that answers rightly from the prompt, and wrongly in the ways a broken engine does."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS_PER_TOKEN = 0.75
ONE_TO_TWENTY = "one, two, three, four, five, six, seven, eight, nine, ten"


class Behaviour:
    """What is wrong with the server; all right by default. `asked` keeps (path, headers, body)."""

    def __init__(self, **faults: Any) -> None:
        self.faults = faults
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.turn = 0

    def __getattr__(self, name: str) -> Any:
        return self.faults.get(name)


def right_answer(prompt: str, behaviour: Behaviour) -> str:
    """Found in the prompt, as a model that reads would."""
    if "capital of France" in prompt:
        return "The capital is Lyon." if behaviour.wrong_fact else "Paris"
    if "17 x 24" in prompt:
        return str(17 * 24 + (1 if behaviour.wrong_sum else 0))
    found = re.search(r"access code of the lighthouse at Brennay is ([0-9]+)", prompt)
    if found:
        sight = behaviour.sees_words or 10**9
        return found[1] if len(prompt[: found.start()].split()) < sight else "I do not know."
    if "Count from one" in prompt:
        behaviour.turn += 1
        return ONE_TO_TWENTY.replace("seven", "soixante") if behaviour.restless and behaviour.turn % 2 else ONE_TO_TWENTY
    return "I do not know."


def chat(body: dict[str, Any], behaviour: Behaviour) -> tuple[int, Any]:
    if behaviour.no_switch and "chat_template_kwargs" in body:
        return 400, {"error": {"message": "chat_template_kwargs is not accepted"}}
    prompt = body["messages"][-1]["content"]
    text = right_answer(prompt, behaviour)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    reason = "stop"
    if body.get("tools"):
        call = {"name": "get_weather", "arguments": behaviour.arguments or '{"city": "Paris"}'}
        message = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
        if behaviour.no_tool_parser:
            message = {"role": "assistant", "content": "<tool_call>get_weather<arg_key>city"}
    elif behaviour.thinks == "forever":
        message, reason = {"role": "assistant", "content": "<think>Let me see"}, "length"
    elif behaviour.thinks:
        message["content"] = f"<think>Perhaps 7? {behaviour.thinks}</think>\n{text}"
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
    if body.get("logprobs"):
        gap = 0.01 if behaviour.tie else 2.0
        tops = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.5 - gap}]
        choice["logprobs"] = {
            "content": [{"token": word, "logprob": -0.5, "top_logprobs": tops} for word in text.split(" ")]
        }
    usage = {"prompt_tokens": round(len(prompt.split()) / (behaviour.words_per_token or WORDS_PER_TOKEN))}
    return 200, {"choices": [choice], "usage": usage}


def token(ids: list[int], place: int, behaviour: Behaviour) -> tuple[int, float, list[tuple[int, float]]]:
    """A greedy token that depends on every id before it, with its runner-up."""
    seed = sum((place + 1) * one for place, one in enumerate(ids[-4096:])) % 9973
    chosen, logprob = seed % 500, -0.5 - (seed % 7) / 10
    second = (chosen + 1) % 500
    near = seed % 5 == 0 or bool(behaviour.only_ties)
    gap = (behaviour.tie_gap or 0.02) if near else 1.0
    logprob += (behaviour.drift or 0.0) if len(ids) > (behaviour.drift_after or 0) else 0.0
    if behaviour.swaps_ties and near:
        chosen, second, logprob = second, chosen, logprob - gap
        return chosen, logprob, [(chosen, logprob), (second, logprob - 0.001)]
    if behaviour.broken_after is not None and len(ids) > behaviour.broken_after:
        chosen = (chosen + 250) % 500
    runner_up = logprob - gap
    if len(ids) > (behaviour.odd_after or 0):
        logprob, runner_up = instead(behaviour.odd, logprob), instead(behaviour.odd_runner_up, runner_up)
    return chosen, logprob, [(chosen, logprob), (second, runner_up)]


def instead(odd: Any, right: float) -> Any:
    return right if odd is None else None if odd == "null" else odd


def tokens(ids: list[int], count: int, behaviour: Behaviour) -> list[tuple[int, float, list[tuple[int, float]]]]:
    ids, found = list(ids), []
    short = behaviour.short_after is not None and len(ids) > behaviour.short_after
    for place in range(min(count, behaviour.faults.get("short_tokens", 3)) if short else count):
        found.append(token(ids, place, behaviour))
        ids.append(found[-1][0])
    return found


def generate(body: dict[str, Any], behaviour: Behaviour) -> tuple[int, Any]:
    if behaviour.no_logprobs:
        return 200, {"text": "x", "meta_info": {}}
    found = tokens(body["input_ids"], body["sampling_params"]["max_new_tokens"], behaviour)
    own = [(logprob, one, None) for one, logprob, _ in found]
    tops = [[(value, one, None) for one, value in ranked] for _, _, ranked in found]
    return 200, {"text": "", "meta_info": {"output_token_logprobs": own, "output_top_logprobs": tops}}


def complete(body: dict[str, Any], behaviour: Behaviour) -> tuple[int, Any]:
    found = tokens(body["prompt"], body["max_tokens"], behaviour)
    logprobs = {
        "tokens": [f"token_id:{one}" for one, _, _ in found],
        "token_logprobs": [logprob for _, logprob, _ in found],
        "top_logprobs": [{f"token_id:{one}": value for one, value in ranked} for _, _, ranked in found],
    }
    return 200, {"choices": [{"text": "", "logprobs": logprobs}]}


def answer(method: str, path: str, body: Any, behaviour: Behaviour) -> tuple[int, Any]:
    family = behaviour.family or "sglang"
    if path == "/v1/models":
        return 200, {"data": [{"id": "glm", "max_model_len": behaviour.context or 131_072}]}
    if path == "/server_info" and family == "sglang":
        return 200, {"version": "0.5.23"}
    if path == "/version" and family == "vllm":
        return 200, {"version": "0.33.0"}
    if path == "/v1/chat/completions":
        return chat(body, behaviour)
    if path == "/generate" and family == "sglang":
        return generate(body, behaviour)
    if path == "/v1/completions" and family == "vllm":
        return complete(body, behaviour)
    return 404, "not found"


@contextmanager
def serving(behaviour: Behaviour | None = None) -> Iterator[tuple[str, Behaviour]]:
    """A server on a free port: its address and what it was asked."""
    known = behaviour or Behaviour()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            known.asked.append((self.path, dict(self.headers), body))
            if known.key and self.headers.get("Authorization") != f"Bearer {known.key}":
                status, found = 401, {"error": "Unauthorized"}
            elif known.redirects:
                status, found = 302, ""
            else:
                time.sleep(known.sleeps_s or 0)
                status, found = answer(method, self.path, body, known)
            content = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", known.redirects)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", known
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
