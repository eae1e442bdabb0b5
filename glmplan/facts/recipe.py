"""The schema of `profiles/recipes/*.toml`: deployments that somebody ran, as options and what came of them."""

from __future__ import annotations

from typing import Literal

from glmplan.facts.base import Frozen


class RecipeLayout(Frozen):
    """The layout that was run."""

    tp_size: int
    pp_size: int
    stages: tuple[int, ...] | None = None


class Recipe(Frozen):
    """`options` are those of `glmplan size`, spelled with underscores; `reported` is what its author measured."""

    schema_version: Literal[1]
    name: str
    title: str
    source: str
    reported: str
    options: dict[str, str | int]
    layout: RecipeLayout
