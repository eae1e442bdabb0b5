"""Where profiles are found and how they are read.

Packaged profiles lie in `glmplan/profiles` inside a wheel, or in `profiles/` of a checkout (recognised by the
pyproject.toml beside it). Files of the user win over packaged ones of the same name: `--profile PATH` (a TOML file),
and the folders of GLMPLAN_PROFILES (os.pathsep-separated, with gpus/, models/, engines/, recipes/ and failures/ inside).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from glmplan.errors import UsageError
from glmplan.facts.engine_profile import EngineProfile
from glmplan.facts.failure_profile import FailureProfile, FailureSignature
from glmplan.facts.gpu_profile import GpuProfile
from glmplan.facts.model_config import first_problem
from glmplan.facts.model_profile import CheckpointProfile, ModelProfile
from glmplan.facts.recipe import Recipe
from glmplan.facts.support import ProofProfile, ProofRun
from glmplan.units import nearest

P = TypeVar("P", bound=BaseModel)

ENGINE_ALIASES = {"sglang": "sglang-0.5.23", "vllm": "vllm-0.33.0"}
"""The newest supported version of each engine."""


@cache
def packaged_folder() -> Path:
    """The folder of packaged profiles."""
    package = Path(__file__).resolve().parent.parent
    if (package / "profiles").is_dir():
        return package / "profiles"
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "profiles").is_dir():
        return checkout / "profiles"
    raise UsageError(
        f"The packaged profiles are missing beside {package}.",
        "Install glmplan again with pip.",
    )


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file; every way it can fail is a UsageError that names the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.", "Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", "Check the path and its permissions.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}.", "Correct that place in the file.") from None


def parse(kind: type[P], path: Path) -> P:
    """Read and validate one file as `kind`."""
    try:
        return kind.model_validate(read_toml(path))
    except ValidationError as error:
        raise UsageError(f"{path}: {first_problem(error)}.", "Correct that entry in the file.") from None


def _user_folders() -> list[Path]:
    listed = os.environ.get("GLMPLAN_PROFILES", "")
    return [Path(part) for part in listed.split(os.pathsep) if part]


def _files(kind: str) -> dict[str, Path]:
    """Profile files by stem; the user's folders win."""
    found = {path.stem: path for path in sorted((packaged_folder() / kind).glob("*.toml"))}
    for folder in _user_folders():
        if not folder.is_dir():
            raise UsageError(f"GLMPLAN_PROFILES names {folder}, which is not a folder.", "Correct or unset it.")
        found |= {path.stem: path for path in sorted((folder / kind).glob("*.toml"))}
    return found


def _path(kind: str, name: str, what: str, known: list[str]) -> Path:
    """The file of that name; an unknown name suggests the near ones among `known`."""
    path = _files(kind).get(name)
    if path is None:
        raise UsageError(f"No {what} is named {name!r}.", nearest(name, known))
    return path


_extra_gpus: dict[str, GpuProfile] = {}


def add_gpu_profile(path: Path) -> GpuProfile:
    """Register a GPU profile of the user for this process; it wins over a packaged one of the same name."""
    profile = parse(GpuProfile, path)
    _require_memory(profile, path)
    _extra_gpus[profile.name] = profile
    return profile


def _require_memory(profile: GpuProfile, path: Path) -> None:
    total, usable = profile.memory_total_bytes.value, profile.memory_usable_bytes.value
    if total is None or usable is None or not 0 < usable <= total:
        raise UsageError(
            f"{path}: memory_total_bytes is {total} and memory_usable_bytes is {usable}; both must be above 0, and usable "
            "no more than total.",
            "Give both; nvidia-smi prints the total.",
        )


def gpu_names() -> list[str]:
    """Names of all GPU profiles."""
    return sorted({*_files("gpus"), *_extra_gpus})


def gpu_profile(name: str) -> GpuProfile:
    """One GPU profile by name; an unknown name suggests the near ones."""
    if name in _extra_gpus:
        return _extra_gpus[name]
    path = _path("gpus", name, "GPU profile", gpu_names())
    profile = parse(GpuProfile, path)
    _require_memory(profile, path)
    return profile


def gpu_profiles() -> Iterator[GpuProfile]:
    """All GPU profiles, the user's first."""
    yield from _extra_gpus.values()
    for name in _files("gpus"):
        if name not in _extra_gpus:
            yield gpu_profile(name)


def model_names() -> list[str]:
    """Names of all model profiles."""
    return sorted(_files("models"))


def model_profile(name: str) -> ModelProfile:
    """One model profile by name."""
    path = _path("models", name, "model profile", model_names())
    return parse(ModelProfile, path)


def checkpoint_profile(model: ModelProfile, name: str) -> CheckpointProfile:
    """One checkpoint of a model by name."""
    for checkpoint in model.checkpoints:
        if checkpoint.name == name:
            return checkpoint
    names = [checkpoint.name for checkpoint in model.checkpoints]
    raise UsageError(f"{model.title} has no checkpoint named {name!r}.", nearest(name, names))


def recipe_names() -> list[str]:
    """Names of all recipes."""
    return sorted(_files("recipes"))


def recipe(name: str) -> Recipe:
    """One recipe by name."""
    path = _path("recipes", name, "recipe", recipe_names())
    return parse(Recipe, path)


def engine_names() -> list[str]:
    """Names and aliases of all engine profiles."""
    return sorted({*_files("engines"), *ENGINE_ALIASES})


def engine_profile(name: str) -> EngineProfile:
    """One engine profile by name or alias."""
    wanted = ENGINE_ALIASES.get(name, name)
    path = _files("engines").get(wanted)
    if path is None:
        raise UsageError(f"No engine profile is named {name!r}.", nearest(name, engine_names()))
    profile = parse(EngineProfile, path)
    known = {kv.id for kv in profile.kv_formats}
    for option in profile.attention:
        if option.kv_format not in known:
            raise UsageError(f"{path}: attention {option.id} names kv_format {option.kv_format!r}.", "Correct the file.")
    return profile.model_copy(update={"proof": proof_runs(profile)})


def proof_runs(engine: EngineProfile) -> tuple[ProofRun, ...]:
    """The packaged proof records of a released engine version; a patched build has none of its own."""
    released = engine.id == f"{engine.family}-{engine.version}"
    path = packaged_folder() / "proof" / f"{engine.id}.toml"
    return parse(ProofProfile, path).runs if released and path.is_file() else ()


def failure_signatures(family: str) -> tuple[FailureSignature, ...]:
    """What is known of failures of an engine family, and then of what all engines share."""
    found: tuple[FailureSignature, ...] = ()
    for name in (family, "common"):
        path = _path("failures", name, "failure profile", sorted(_files("failures")))
        found += parse(FailureProfile, path).signatures
    return found
