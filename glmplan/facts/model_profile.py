"""The schema of `profiles/models/*.toml`: a model's sizes and the checkpoints that exist of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from glmplan.facts.base import Frozen
from glmplan.facts.checkpoint import LINEAR, Format, StorageRule, StorageRules
from glmplan.facts.model_config import ModelConfig, parse_model_config

Certainty = Literal["exact", "derived", "estimate"]


class RuleEntry(Frozen):
    """`roles` of `layers` ("3-77", absent: all) are stored as `format`."""

    roles: tuple[str, ...]
    layers: str | None = Field(default=None, pattern=r"^[0-9]+-[0-9]+$")
    format: Format

    @model_validator(mode="after")
    def _matches_something(self) -> RuleEntry:
        unknown = sorted(set(self.roles) - LINEAR)
        if unknown:
            raise ValueError(f"no tensor has the role {unknown[0]!r}; roles are {', '.join(sorted(LINEAR))}")
        if self.layers is not None:
            first, last = (int(part) for part in self.layers.split("-"))
            if first > last:
                raise ValueError(f"the layers {self.layers!r} run backwards")
        return self

    def rule(self) -> StorageRule:
        """The rule as the weight ledger uses it."""
        if self.layers is None:
            return StorageRule(frozenset(self.roles), self.format)
        first, last = (int(part) for part in self.layers.split("-"))
        return StorageRule(frozenset(self.roles), self.format, frozenset(range(first, last + 1)))


class CheckpointProfile(Frozen):
    """One published checkpoint. `certainty`: exact (from its own config), derived (meets its published size)."""

    name: str = Field(pattern=r"^[a-z0-9.-]+$")
    repository: str
    scheme: Literal["bf16", "fp8", "nvfp4", "w4afp8", "int4", "mxfp4"]
    certainty: Certainty
    source: str
    published_bytes: int | None = None
    published_source: str | None = None
    without_mtp: bool = False
    f32_roles: tuple[str, ...] = ("router_bias",)
    note: str = ""
    rules: tuple[RuleEntry, ...] = ()

    @model_validator(mode="after")
    def _f32_roles_exist(self) -> CheckpointProfile:
        unknown = sorted(set(self.f32_roles) - LINEAR - {"router", "router_bias", "norm"})
        if unknown:
            raise ValueError(f"no tensor has the role {unknown[0]!r}")
        return self

    def storage_rules(self) -> StorageRules:
        """The storage rule of every tensor."""
        return StorageRules(
            tuple(entry.rule() for entry in self.rules),
            without_mtp=self.without_mtp,
            f32_roles=frozenset(self.f32_roles),
        )


class ModelProfile(Frozen):
    """One model of the family."""

    schema_version: Literal[1]
    name: str
    title: str
    source: str
    config: dict[str, Any]
    checkpoints: tuple[CheckpointProfile, ...]

    def model_config_(self) -> ModelConfig:
        """The validated sizes."""
        return parse_model_config(self.config, f"profile {self.name}")
