"""Are the engine's functions the ones we know, and do all their callers see ours after patching?

Patching goes through the engine's own HookRegistry, which logs and continues when a target is missing; so every target is
looked at before and after, and any difference raises.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from glmplan.errors import UnsupportedError
from glmplan.kernels.engines.sglang_versions import Target

OFF = "Set GLMPLAN_PORT=off to run without glmplan's kernels."


def install(targets: Iterable[Target], version: str) -> tuple[str, ...]:
    """Patch the targets; the paths replaced."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    originals = {target.path: expected(target, version) for target in targets}
    source = HookSource(plugin_name="glmplan", dist_name="glmplan")
    for target in targets:
        kind = HookType.AROUND if target.around else HookType.REPLACE
        HookRegistry.register(target.path, hook_of(target), kind, source=source)
    HookRegistry.apply_hooks()
    for path, original in originals.items():
        require_replaced(path, original, version)
    return tuple(originals)


def expected(target: Target, version: str) -> Callable[..., Any]:
    """The engine's function; raises when it is not there or takes other parameters."""
    owner_path, name = target.path.rsplit(".", 1)
    try:
        original = getattr(pkgutil.resolve_name(owner_path), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"SGLang {version} has no {target.path} here ({' '.join(str(error).split())[:200]}).", OFF
        ) from error
    found = parameters(original)
    if found is not None and found != target.parameters:
        raise UnsupportedError(
            f"{target.path} of SGLang {version} takes ({', '.join(found)}) and not ({', '.join(target.parameters)}).", OFF
        )
    return original  # type: ignore[no-any-return]


def parameters(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """Parameter names of a function, through decorators; None where C code does not tell."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def hook_of(target: Target) -> Callable[..., Any]:
    module, function = target.hook.split(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def require_replaced(path: str, original: Callable[..., Any], version: str) -> None:
    """Neither the owner nor a module that imported the function by name still holds the engine's."""
    owner_path, name = path.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_path)
    if getattr(owner, name) is original:
        raise UnsupportedError(f"SGLang {version} did not replace {path}; its log says why.", OFF)
    if isinstance(owner, ModuleType):
        stale = next(holders(original), None)
        if stale is not None:
            raise UnsupportedError(f"{stale} of SGLang {version} still holds the replaced {path}.", OFF)


def holders(original: Callable[..., Any]) -> Iterator[str]:
    """Modules of the engine with a name bound to this very function."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.") and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    yield f"{name}.{attribute}"
