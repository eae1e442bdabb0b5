"""Prompts that no prefix cache has seen: token ids or words, different from the very first token on.

The ids lie between those of padding and text ends and the end of the smallest vocabulary, as in `fleet.reference`. Every
prompt starts with a number of the run and one of its own, so that also prompts of the same words differ at once.
"""

from __future__ import annotations

import itertools
import random
import secrets

from glmplan.fleet.reference import FIRST_ID, LAST_ID

HEAD = 8
"""Ids of the head: four for the prompt and four for the run in turns; 995^4 is 10^12 of each."""
WORDS = (
    "river", "copper", "window", "seven", "garden", "signal", "winter", "paper", "engine", "valley", "silver", "bridge",
    "letter", "island", "marble", "orange", "travel", "mirror", "forest", "number", "candle", "harbor", "yellow", "planet",
    "ladder", "button", "castle", "shadow", "summer", "pocket", "hammer", "violin",
)  # fmt: skip


class Prompts:
    """Prompts of one run; no two are alike. `seed` makes them repeatable, for tests."""

    def __init__(self, seed: int | None = None) -> None:
        self._run = seed if seed is not None else secrets.randbits(48)
        self._serial = itertools.count(1)

    def ids(self, tokens: int) -> list[int]:
        """That many token ids."""
        serial = next(self._serial)
        source = random.Random(f"{self._run} {serial}")
        head = [digit for pair in zip(_digits(serial), _digits(self._run), strict=True) for digit in pair]
        return [*head, *(source.randint(FIRST_ID, LAST_ID) for _ in range(tokens - HEAD))][:tokens]

    def words(self, count: int) -> str:
        """That many words after the head; how many tokens they are, only the server knows."""
        serial = next(self._serial)
        source = random.Random(f"{self._run} {serial}")
        return " ".join([f"{serial} {self._run:x}", *(source.choice(WORDS) for _ in range(max(count - 1, 0)))])


def _digits(number: int) -> list[int]:
    """A number as four ids, the fastest changing first."""
    span, found = LAST_ID - FIRST_ID + 1, []
    for _ in range(HEAD // 2):
        number, digit = divmod(number, span)
        found.append(FIRST_ID + digit)
    return found
