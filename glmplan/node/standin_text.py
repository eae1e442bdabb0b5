"""What the stand-in says: it reads the prompt and answers from it, the same for the same prompt.

A product or sum of two numbers is worked out, a fact is looked for among the sentences of the prompt (a needle in filler),
a few capitals are known, a given tool is called. Anything else gets the text continued by counting. It is no language
model; it makes wrong wiring visible, such as a prompt that arrives cut.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

CAPITALS = {"france": "Paris", "germany": "Berlin", "italy": "Rome", "spain": "Madrid", "japan": "Tokyo", "china": "Beijing"}
COUNTING = (
    "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, "
    "seventeen, eighteen, nineteen, twenty"
)
SMALL = frozenset(
    (
        "a", "an", "and", "answer", "are", "as", "at", "be", "by", "for", "from", "in", "is", "it", "its", "me", "now",
        "number", "of", "on", "only", "or", "question", "say", "tell", "that", "the", "this", "to", "use", "was", "what",
        "which", "who", "with", "word",
    )
)  # fmt: skip
"""Words that say nothing about what is asked."""
VOCABULARY = 154_880
"""Token ids of GLM-5.2 (config.json `vocab_size`)."""
_TOKEN = re.compile(r"\s*(?:[^\W\d_]{1,6}|\d{1,3}|[^\w\s]|_)|\s+")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")
_SUM = re.compile(r"(-?\d[\d,]*)\s*(x|×|\*|times|multiplied by|plus|\+|minus|-)\s*(-?\d[\d,]*)", re.IGNORECASE)


def tokens_of(text: str) -> list[str]:
    """The text in pieces about as long as a real tokenizer's; joined they are the text again."""
    return _TOKEN.findall(text)


def token_id(piece: str) -> int:
    """A number for a piece, the same everywhere."""
    return zlib.crc32(piece.encode()) % VOCABULARY


def logprob(piece: str) -> float:
    """A log-probability for a piece, the same everywhere, in nats."""
    return -0.01 - (token_id(piece) % 100) / 1000


def continue_ids(ids: list[int], count: int) -> list[int]:
    """Token ids after token ids; depends on every one of them."""
    seed = zlib.crc32(json.dumps(ids).encode())
    return [zlib.crc32(f"{seed} {at}".encode()) % VOCABULARY for at in range(count)]


def reply(prompt: str) -> str:
    """The answer to a prompt."""
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(prompt) if sentence.strip()]
    question = next((s for s in reversed(sentences) if s.endswith("?")), sentences[-1] if sentences else "")
    lower = question.lower()
    if "capital" in lower:
        for country, capital in CAPITALS.items():
            if country in lower:
                return capital
    return _number(question) or _found(question, sentences) or _counted(prompt)


def _number(question: str) -> str | None:
    found = _SUM.search(question)
    if not found:
        return None
    left, right = (int(found[at].replace(",", "")) for at in (1, 3))
    sign = found[2].lower()
    if sign in ("plus", "+"):
        return str(left + right)
    return str(left - right) if sign in ("minus", "-") else str(left * right)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - SMALL


def _found(question: str, sentences: list[str]) -> str | None:
    """What follows "is" in the sentence that shares most words with the question, at least half of them."""
    wanted = _words(question)
    best, best_score = None, max(1, (len(wanted) + 1) // 2)
    for sentence in sentences:
        _, verb, rest = sentence.rpartition(" is ")
        score = len(wanted & _words(sentence)) if verb and not sentence.endswith("?") else 0
        if score > best_score or (score == best_score and best is None and score > 0):
            best, best_score = rest, score
    return best.strip().rstrip(".!") if best else None


def _counted(prompt: str) -> str:
    """A text that names the prompt by its checksum, so that two different prompts give two answers."""
    return f"{COUNTING}. ({zlib.crc32(prompt.encode()):08x})"


def tool_call(prompt: str, tools: list[dict[str, Any]]) -> dict[str, Any] | None:
    """{"name", "arguments"} of the tool that shares most words with the prompt; its required arguments from the prompt."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), dict)]
    wanted = _words(prompt)
    if not functions:
        return None
    chosen = max(functions, key=lambda function: len(wanted & _words(_described(function))))
    schema = chosen.get("parameters") or {}
    names = schema.get("required") or list(schema.get("properties") or {})
    arguments = {name: _argument(prompt, (schema.get("properties") or {}).get(name) or {}) for name in names}
    return {"name": chosen.get("name", ""), "arguments": json.dumps(arguments)}


def _described(function: dict[str, Any]) -> str:
    return f"{function.get('name', '')} {function.get('description', '')}".replace("_", " ")


def _argument(prompt: str, schema: dict[str, Any]) -> Any:
    """A value of the asked type that the prompt mentions."""
    if schema.get("enum"):
        return next((value for value in schema["enum"] if str(value).lower() in prompt.lower()), schema["enum"][0])
    if schema.get("type") in ("integer", "number"):
        found = re.search(r"-?\d+", prompt)
        return int(found[0]) if found else 0
    if schema.get("type") == "boolean":
        return True
    names = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", prompt)
    return names[0] if names else prompt[:80]
