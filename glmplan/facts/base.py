"""The frozen base of every fact, and a number that carries its source."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Frozen(BaseModel):
    """Immutable and strict about names: a typo in a file is an error, never a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Sourced(Frozen, Generic[T]):
    """A value from outside with where it was read. `None` means unknown, never zero."""

    value: T | None = None
    source: str = Field(min_length=3)
