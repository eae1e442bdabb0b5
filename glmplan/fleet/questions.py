"""The questions whose answers are known beforehand, as chat messages, and how an answer is judged.

Everything is made from seeds, so every run asks the same. A needle is one sentence about a lighthouse, placed among
numbered sentences about warehouses: only a server that finds the right KV pages can repeat its number.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

TOWNS = ("Torvik", "Almeda", "Brakel", "Corda", "Dunmore", "Estrel", "Fonte", "Garsund", "Holt", "Istria", "Jarrow", "Kelso")
GOODS = ("blue glass", "oak planks", "dried figs", "copper wire", "wool", "lamp oil", "paper", "salt", "clay tiles", "rope")
FILLER_TOKENS = 18
"""Tokens of one filler sentence at least, by GLM's tokenizer and by others of its size; the server's count corrects it."""

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class Question:
    """One prompt, what a right answer is, and the check."""

    name: str
    prompt: str
    expected: str
    right: Callable[[str], bool]


def _has_word(word: str) -> Callable[[str], bool]:
    return lambda answer: re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) is not None


def _has_number(number: int) -> Callable[[str], bool]:
    wanted = str(number)
    return lambda answer: wanted in re.findall(r"[0-9]+", re.sub(r"(?<=[0-9])[ ,_.](?=[0-9]{3}\b)", "", answer))


FACT = Question("fact", "What is the capital of France? Answer with one word.", "Paris", _has_word("Paris"))
ARITHMETIC = Question("arithmetic", "What is 17 x 24? Answer with the number only.", "408", _has_number(408))


def needle(name: str, before_tokens: int, after_tokens: int) -> Question:
    """A question about one sentence that lies at least so many tokens deep."""
    source = random.Random(f"glmplan {name}")
    code = source.randrange(1_000_000, 10_000_000)
    lines = [_filler(source, number) for number in range(1, (before_tokens + after_tokens) // FILLER_TOKENS + 2)]
    lines.insert(before_tokens // FILLER_TOKENS + 1, f"The access code of the lighthouse at Brennay is {code}.")
    prompt = (
        "Read the notes and answer the question after them.\n\n"
        + "\n".join(lines)
        + "\n\nWhat is the access code of the lighthouse at Brennay? Answer with the number only."
    )
    return Question(name, prompt, str(code), _has_number(code))


def _filler(source: random.Random, number: int) -> str:
    town, goods, count = source.choice(TOWNS), source.choice(GOODS), source.randrange(10, 99)
    return f"Note {number}: the warehouse at {town} counted {count} crates of {goods} on day {source.randrange(1, 365)}."


def text_of(answer: Any) -> str:
    """The answer of a chat completion without its thinking; empty where there is none."""
    message = _message(answer)
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return strip_thinking(str(content))


def strip_thinking(text: str) -> str:
    """The text after the thinking; a thinking that never ended leaves nothing."""
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    elif "<think>" in text:
        text = text.split("<think>", 1)[0]
    return text.strip()


def tool_problem(answer: Any) -> str | None:
    """What is wrong with the call of get_weather for Paris, or None."""
    calls = _message(answer).get("tool_calls") or []
    if not calls:
        return f"no tool call; the text was {text_of(answer)[:200]!r}"
    function = calls[0].get("function", {}) if isinstance(calls[0], dict) else {}
    if function.get("name") != "get_weather":
        return f"a call of {function.get('name')!r}"
    try:
        arguments = json.loads(function.get("arguments") or "")
    except (TypeError, ValueError):
        return f"arguments that are no JSON: {str(function.get('arguments'))[:200]!r}"
    city = arguments.get("city") if isinstance(arguments, dict) else None
    return None if isinstance(city, str) and "paris" in city.lower() else f"arguments {arguments!r}"


def _message(answer: Any) -> dict[str, Any]:
    choice = first_choice(answer)
    message = choice.get("message")
    return message if isinstance(message, dict) else {}


def first_choice(answer: Any) -> dict[str, Any]:
    """The first choice of a completion; empty where the answer has another shape."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def prompt_tokens(answer: Any) -> int | None:
    """Tokens of the prompt as the server counted them."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None
