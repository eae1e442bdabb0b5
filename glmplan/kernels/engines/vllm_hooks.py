"""Are vLLM's functions the ones we know, and do their callers get ours?

A target is looked up where its callers look it up, so replacing an attribute of a module or class is all there is to it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from glmplan.errors import UnsupportedError
from glmplan.kernels.engines.vllm_versions import Target

OFF = "Set GLMPLAN_PORT=off to run without glmplan's kernels."


def install(targets: Iterable[Target], version: str) -> tuple[str, ...]:
    """Replace the targets, all or none; the paths replaced."""
    found = [(target, expected(target, version)) for target in targets]
    for target, original in found:
        owner, name = _owner(target)
        setattr(owner, name, _ours(target, original))
    return tuple(target.path for target, _ in found)


def expected(target: Target, version: str) -> Callable[..., Any]:
    """The engine's function; raises when it is not there or takes other parameters."""
    try:
        owner, name = _owner(target)
        original = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(f"vLLM {version} has no {target.path} here ({reason}).", OFF) from error
    found = tuple(inspect.signature(original).parameters)
    if found != target.parameters:
        raise UnsupportedError(
            f"{target.path} of vLLM {version} takes ({', '.join(found)}) and not ({', '.join(target.parameters)}).", OFF
        )
    return original  # type: ignore[no-any-return]


def _owner(target: Target) -> tuple[Any, str]:
    path, name = target.path.rsplit(".", 1)
    return pkgutil.resolve_name(path), name


def _ours(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    module, name = target.hook.split(":")
    hook: Callable[..., Any] = getattr(importlib.import_module(module), name)
    if not target.around:
        return hook

    @functools.wraps(original)
    def around(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return around
