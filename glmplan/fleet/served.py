"""A running server as the canaries see it: requests over any channel, its model, its context, greedy chat.

`Ask` is any callable: `http_ask` opens connections from here; a launch asks through the head node instead, where the
server's port is loopback's. A failed request is a GlmplanError with the server's own words.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from glmplan.errors import GlmplanError, NotHealthyError, UsageError

Ask = Callable[[str, str, "dict[str, Any] | None", float], "tuple[int, Any]"]
"""(method, path, JSON body or None, timeout_s) -> (HTTP status, body: decoded JSON, or text)."""

MOST_BYTES = 64 * 1024 * 1024
"""Longer answers are cut: a chat completion with log-probabilities of 1,024 tokens is below 1 MiB."""


class HttpError(GlmplanError):
    """The server answered with another status than 200."""

    def __init__(self, status: int, answer: Any) -> None:
        words = answer.get("error", answer) if isinstance(answer, dict) else answer
        words = words.get("message", words) if isinstance(words, dict) else words
        super().__init__(f"HTTP {status}: {str(words)[:300]}")
        self.status = status


class NoAnswerError(GlmplanError):
    """The server took the request and said nothing in time."""


class Served:
    """One server. `model` and `context_tokens` are what the user said, or what /v1/models lists."""

    def __init__(self, ask: Ask, timeout_s: float, model: str | None = None, context_tokens: int | None = None) -> None:
        self._ask, self._timeout_s = ask, timeout_s
        self._model, self._context_tokens = model, context_tokens
        self._listed: dict[str, Any] | None = None
        self._can_switch_thinking = True

    def request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The decoded answer of a request that succeeded."""
        status, answer = self._ask(method, path, body, self._timeout_s)
        if isinstance(answer, str | bytes):
            try:
                answer = json.loads(answer)
            except ValueError:
                answer = answer if isinstance(answer, str) else answer.decode(errors="replace")
        if status != 200:
            raise HttpError(status, answer)
        return answer

    def _first_model(self) -> dict[str, Any]:
        if self._listed is None:
            answer = self.request("GET", "/v1/models", None)
            models = answer.get("data") if isinstance(answer, dict) else None
            if not isinstance(models, list) or not models or not isinstance(models[0], dict):
                raise GlmplanError("The server lists no model at /v1/models.", "Name one with --model.")
            self._listed = models[0]
        return self._listed

    @property
    def model(self) -> str:
        """The served model's name."""
        return self._model or str(self._first_model().get("id"))

    @property
    def context_tokens(self) -> int | None:
        """The longest request; both engines list it as max_model_len."""
        if self._context_tokens is not None:
            return self._context_tokens
        listed = self._first_model().get("max_model_len")
        return listed if isinstance(listed, int) else None

    def chat(self, prompt: str, tokens: int, **more: Any) -> Any:
        """A greedy chat completion with thinking off; a server that refuses that switch is asked without it."""
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
        body |= {"model": self.model, "stream": False, **more}
        if self._can_switch_thinking:
            try:
                quiet = {"chat_template_kwargs": {"enable_thinking": False}}
                return self.request("POST", "/v1/chat/completions", body | quiet)
            except HttpError as error:
                if error.status not in (400, 422):
                    raise
        answer = self.request("POST", "/v1/chat/completions", body)
        self._can_switch_thinking = False
        return answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server; it is reported as the answer it is."""

    def redirect_request(self, *_: Any) -> None:
        return None


def http_ask(url: str, api_key: str | None = None) -> Ask:
    """Requests to a server from here. The key travels in a header only."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UsageError(f"{url!r} is not the address of an HTTP server.", "Write it like http://10.0.0.1:30000.")
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))

    def ask(method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(base + path, data=content, headers=headers, method=method)
        try:
            with opener.open(request, timeout=timeout_s) as answer:
                return answer.status, _decoded(answer.read(MOST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _decoded(error.read(MOST_BYTES))
        except TimeoutError:
            raise _silent(base, timeout_s) from None
        except (OSError, ValueError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _silent(base, timeout_s) from None
            words = getattr(reason, "strerror", None) or reason
            raise NotHealthyError(f"{base} does not answer: {words}.", "Check the address, and that it runs.") from None

    return ask


def _silent(base: str, timeout_s: float) -> NoAnswerError:
    return NoAnswerError(f"{base} gave no answer within {timeout_s:g} s.", "Look at its log, or allow more: --timeout.")


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")
