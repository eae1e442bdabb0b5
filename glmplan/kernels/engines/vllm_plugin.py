"""How do our kernels get into vLLM? The plugin of its entry-point group `vllm.general_plugins`.

`register` runs in every process of the engine, before any has its GPU: it names our attention backend and, below sm_89, the
model classes without fp8e4nv kernels, and waits in the workers. There, when the device is set and before the model is built,
it replaces the indexer's functions, tests the kernels on that GPU against their references and says PortLine on stderr.
It acts only for GLM-5.2 and where the engine has no kernels for the SM. GLMPLAN_PORT=force acts anywhere but on sm_100 (for
proofs on a GPU the engine serves), off nowhere. GLMPLAN_RUN_AS compiles our kernels, and chooses the model, for another SM.
What cannot be served ends the process. A launcher must pass `--attention-backend CUSTOM`; auto-selection never picks it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

try:
    from glmplan import __version__
    from glmplan.errors import UnsupportedError
    from glmplan.kernels import packed
    from glmplan.kernels.engines import PORT, PortLine
    from glmplan.kernels.engines.process import OLDEST_SM, SHAPES, fatal_errors, port_mode, requested_sm, say
    from glmplan.kernels.engines.vllm_versions import BACKEND, BACKEND_CLASS, BACKEND_FLAG, FP8_SM, VERSIONS, Release, Target
except (ImportError, SyntaxError) as broken:  # the engine would log it and go on without us
    if os.environ.get("GLMPLAN_PORT", "").strip() != "off":
        os.write(2, f"glmplan port failed: glmplan is half-installed ({broken}). Install it again.\n".encode())
        os._exit(1)
    raise

ARCHITECTURE = "GlmMoeDsaForCausalLM"
PARTITION = "VLLM_PP_LAYER_PARTITION"
SERVED_FAMILIES = (8, 9, 12)

_registered = _activated = False


def register() -> None:
    """The entry point."""
    global _registered
    with fatal_errors("Loading glmplan's kernels into vLLM"):
        mode = port_mode()
        if _registered or mode == "off":
            return
        packed.require_whole()
        asked, sm = requested_sm(), advertised_sm()
        if sm is None:
            return
        release = release_of(engine_version(), mode, sm)
        if release is not None and acts(release, mode, sm):
            prepare(release, asked or sm)
            _registered = True


def release_of(version: str, mode: str, sm: int) -> Release | None:
    """The engine's row of the table; None where an unknown version serves this GPU by itself."""
    base = version.partition("+")[0]
    if base not in VERSIONS and (mode == "force" or sm < 90):
        raise UnsupportedError(
            f"glmplan's kernels are known to fit vLLM {' and '.join(VERSIONS)}, not {version}.",
            f"Install it, or set {PORT}=off.",
        )
    return VERSIONS.get(base)


def acts(release: Release, mode: str, sm: int) -> bool:
    """Whether the port serves: where asked, and where the engine cannot."""
    possible = sm >= OLDEST_SM and sm // 10 in SERVED_FAMILIES
    if mode == "force" and not possible:
        raise UnsupportedError(
            f"{PORT}=force cannot serve sm_{sm}: glmplan's kernels inside vLLM are for sm_80 to sm_90 and sm_120.",
            f"Unset {PORT}.",
        )
    return possible and (mode == "force" or sm not in release.serves)


def prepare(release: Release, compiled_for: int) -> None:
    """What must be known before arguments are resolved; touches no GPU, as workers may be forked from here."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from glmplan.kernels.engines import vllm_hooks

    register_backend(AttentionBackendEnum[BACKEND], BACKEND_CLASS)
    if compiled_for < FP8_SM:
        for architecture, path in release.models.items():
            ModelRegistry.register_model(architecture, path)
    vllm_hooks.install((release.ready,), engine_version())


def device_ready(original: Callable[..., Any], wrapper: Any) -> Any:
    """WorkerWrapperBase.init_device: this process has its GPU and its groups, nothing of the model is built yet."""
    result = original(wrapper)
    with fatal_errors("Putting glmplan's kernels into vLLM"):
        activate(wrapper.vllm_config)
    return result


def activate(config: Any) -> None:
    """Patch, self-test, say so; once per process."""
    global _activated
    if _activated or ARCHITECTURE not in (getattr(config.model_config, "architectures", None) or ()):
        return
    require_servable(config)
    if config.parallel_config.pipeline_parallel_size > 1:
        require_own_topk(config.model_config.hf_text_config)
    _activated = True
    from glmplan.kernels import run_as
    from glmplan.kernels.engines import vllm_hooks

    version, sm = engine_version(), run_as.device_sm()
    compiled_for = requested_sm() or sm
    require_one_kind(compiled_for, requested_sm() or advertised_sm())
    release = VERSIONS[version.partition("+")[0]]
    for target in release.needs:
        vllm_hooks.expected(target, version)
    replaced = vllm_hooks.install(chosen(release, compiled_for), version)
    from glmplan.kernels.engines import vllm_selftest

    kv = "packed" if config.cache_config.cache_dtype.startswith("fp8") else "bf16"
    vllm_selftest.run(kv, heads=config.model_config.get_num_attention_heads(config.parallel_config))
    settings = {"mode": port_mode(), "backend": BACKEND, "kv": kv}
    registered = (f"AttentionBackendEnum.{BACKEND}", *(release.models if compiled_for < FP8_SM else ()))
    say(PortLine(__version__, "vllm", version, sm, compiled_for, settings, (*registered, *replaced)).render())


def chosen(release: Release, compiled_for: int) -> tuple[Target, ...]:
    """The targets that this SM needs replaced."""
    return tuple(target for target in release.targets if not target.below_sm or compiled_for < target.below_sm)


def require_one_kind(compiled_for: int, first: int | None) -> None:
    """The model classes follow from the node's first GPU; a rank that needs the others could not compile its kernels."""
    if first is not None and (compiled_for < FP8_SM) != (first < FP8_SM):
        raise UnsupportedError(
            f"This rank's GPU is sm_{compiled_for} and the first of its node is sm_{first}; below sm_{FP8_SM} vLLM needs "
            "other model classes, and a node has one kind.",
            "Serve with GPUs of one kind: CUDA_VISIBLE_DEVICES.",
        )


def require_servable(config: Any) -> None:
    """GLM-5.2's shapes, and our backend chosen by flag."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    model = config.model_config.hf_text_config
    for name, size in SHAPES.items():
        if getattr(model, name, None) != size:
            found = getattr(model, name, None)
            raise UnsupportedError(f"The model's {name} is {found}; glmplan's kernels are for GLM-5.2's {size}.")
    backend = config.attention_config.backend
    if backend is not AttentionBackendEnum[BACKEND]:
        raise UnsupportedError(
            f"vLLM's attention backend is {getattr(backend, 'name', 'auto')}; glmplan's kernels are {BACKEND}.",
            f"Start vLLM with {' '.join(BACKEND_FLAG)}, or set {PORT}=off.",
        )
    if backend.get_path() != BACKEND_CLASS:
        raise UnsupportedError(
            f"Another plugin has registered {backend.get_path()} as vLLM's {BACKEND} attention backend.",
            "Leave it out with VLLM_PLUGINS=glmplan.",
        )


def require_own_topk(model: Any) -> None:
    """The stage of this rank begins on a layer that selects tokens by itself."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.distributed.utils import get_pp_indices

    from glmplan.kernels.engines import stages

    group = get_pp_group()
    with suppress(ValueError):  # a partition that does not add up: the engine's own words name it
        first, _ = get_pp_indices(model.num_hidden_layers, group.rank_in_group, group.world_size)
        stages.require_own_topk(model, group.rank_in_group, first, f"vLLM {engine_version()}", PARTITION)


def advertised_sm() -> int | None:
    """The SM of the first visible GPU by NVML, which creates no CUDA context; None where vLLM sees no NVIDIA GPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    capability = current_platform.get_device_capability()
    return None if capability is None else capability.major * 10 + capability.minor


def engine_version() -> str:
    import vllm

    return str(vllm.__version__)
