"""How do our kernels get into SGLang? The plugin of its entry-point group `sglang.srt.plugins`.

`register` runs in every engine process. In the one that parses arguments it lifts the engine's backend check where the port
serves; in a scheduler it waits until the process has its GPU and the model's configuration, and then patches, tests the
kernels on that GPU against their references and says PortLine on stderr, all before the model is built.
It acts only for GLM-5.2's shapes and where the engine has no kernels for the SM. GLMPLAN_PORT=force acts anywhere (for
proofs on a GPU the engine serves), off nowhere. What cannot be served ends the process: SGLang would log an exception and
go on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

try:
    from glmplan import __version__
    from glmplan.errors import UnsupportedError
    from glmplan.kernels import packed
    from glmplan.kernels.engines import PORT, PortLine
    from glmplan.kernels.engines.process import OLDEST_SM, SHAPES, end_process, fatal_errors, port_mode, requested_sm, say
except (ImportError, SyntaxError) as broken:  # the engine would log it and go on without us
    if os.environ.get("GLMPLAN_PORT", "").strip() != "off":
        os.write(2, f"glmplan port failed: glmplan is half-installed ({broken}). Install it again.\n".encode())
        os._exit(1)
    raise

DENSE_PREFILL = "SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD"
SCHEDULER = "sglang.srt.managers.scheduler"
PARTITION = "SGLANG_PP_LAYER_PARTITION"
MTP_ALGORITHMS = ("EAGLE", "NEXTN", "FROZEN_KV_MTP")
"""Of --speculative-algorithm: drafts of the model's own MTP layer (0.5.23, srt/arg_groups/speculative_hook.py:87)."""

_activated = False
_tabled = False


def register() -> None:
    """The entry point."""
    with fatal_errors("Loading glmplan's kernels into SGLang"):
        mode = port_mode()
        if mode == "off":
            return
        packed.require_whole()
        requested_sm()
        if release_of(mode) is not None:
            install_early()


def release_of(mode: str) -> Any:
    """The engine's row of the table; None where an unknown version serves this GPU by itself."""
    from glmplan.kernels.engines.sglang_versions import VERSIONS

    version = engine_version()
    if version in VERSIONS:
        return VERSIONS[version]
    if mode == "force" or (device_sm() or 90) < 90:
        raise UnsupportedError(
            f"glmplan's kernels are known to fit SGLang {' and '.join(VERSIONS)}, not {version}.",
            f"Install one of these, or set {PORT}=off.",
        )
    return None


def install_early() -> None:
    """What must be in place before arguments are resolved and before a scheduler has its GPU."""
    from glmplan.kernels.engines import sglang_expert_tables, sglang_hooks, sglang_tables

    sglang_expert_tables.require_readable()
    version = engine_version()
    early = _release().early
    if SCHEDULER not in sys.modules:
        early = tuple(target for target in early if not target.hook.endswith(":before_load_model"))
    if sglang_tables.folder() is not None:
        sglang_tables.require_readable()
        early = (*early, _release().block_fp8)
    sglang_hooks.install(early, version)


def check_backends(
    original: Callable[..., None],
    kv_cache_dtype: str,
    prefill_backend: str | None,
    decode_backend: str | None,
    *,
    hip: bool,
    dcp_size: int = 1,
) -> None:
    """0.5.23's refusal of backends, lifted where these backends lead to our attention."""
    sm = device_sm()
    if hip or sm is None or not acts(port_mode(), sm, (prefill_backend, decode_backend)):
        original(kv_cache_dtype, prefill_backend, decode_backend, hip=hip, dcp_size=dcp_size)
    elif dcp_size > 1:
        end_process(UnsupportedError(f"glmplan's kernels serve --dcp-size 1, not {dcp_size}."))


def before_load_model(original: Callable[..., Any], runner: Any) -> Any:
    """ModelRunner.load_model: the GPU is chosen, the model's configuration is read, nothing of it is built yet."""
    with fatal_errors("Putting glmplan's kernels into SGLang"):
        activate(runner)
        use_expert_tables()
    return original(runner)


def use_expert_tables() -> None:
    """Tables of experts, on any GPU. Not earlier: the lookup's package imports half of the engine."""
    global _tabled
    from glmplan.kernels.engines import sglang_expert_tables, sglang_hooks

    if _tabled or sglang_expert_tables.folder() is None:
        return
    _tabled = True
    sglang_hooks.install((_release().moe_configs,), engine_version())


def activate(runner: Any) -> None:
    """Patch, self-test, say so; once per process."""
    global _activated
    if _activated or not _is_dsa(runner.model_config.hf_config):
        return
    mode, sm = port_mode(), device_sm()
    backends = chosen_backends(runner)
    if sm is None or not acts(mode, sm, backends):
        return
    require_servable(runner.model_config.hf_config, sm, backends)
    require_served_drafts(runner)
    _activated = True
    from glmplan.kernels.engines import sglang_hooks

    version = engine_version()
    if not _release().relays_topk and runner.pp_size > 1:
        require_own_topk(runner, version)
    os.environ[DENSE_PREFILL] = "0"  # the engine asks at every batch; on sm_90 and sm_100 it would go around us
    kv = kv_layout(runner, backends)
    replaced = sglang_hooks.install(_release().targets, version)
    from glmplan.kernels.engines import sglang_selftest

    sglang_selftest.run(kv, heads=attention_heads(runner))
    settings = {"mode": mode, "prefill": str(backends[0]), "decode": str(backends[1]), "kv": kv}
    say(PortLine(__version__, "sglang", version, sm, requested_sm() or sm, settings, replaced).render())


def acts(mode: str, sm: int, backends: tuple[str | None, str | None]) -> bool:
    """Whether the port serves: where asked, where the engine cannot, and where its own check would refuse our backends."""
    release = _release()
    if mode == "force" or sm not in release.serves:
        return True
    return sm >= 120 and set(backends) <= set(release.backends)


def require_servable(config: Any, sm: int, backends: tuple[str | None, str | None]) -> None:
    if sm < OLDEST_SM:
        raise UnsupportedError(f"This GPU is sm_{sm}; glmplan's kernels need sm_{OLDEST_SM} or newer.")
    for name, size in SHAPES.items():
        if getattr(config, name, size) != size:
            raise UnsupportedError(
                f"The model's {name} is {getattr(config, name)}; glmplan's kernels are for GLM-5.2's {size}."
            )
    ours = _release().backends
    for flag, backend in zip(("--dsa-prefill-backend", "--dsa-decode-backend"), backends, strict=True):
        if backend not in ours:
            raise UnsupportedError(
                f"{flag} is {backend}, which runs the engine's own attention; glmplan's kernels serve {' and '.join(ours)}.",
                f"Set both --dsa-*-backend flags to {ours[0]}, or {PORT}=off.",
            )


def require_served_drafts(runner: Any) -> None:
    """Drafts of the MTP layer run through the replaced backend, too; a drafter of its own runs on what it likes."""
    try:
        from sglang.srt.runtime_context import get_spec

        chosen = get_spec()
    except ImportError:
        chosen = runner.server_args
    backend = chosen.speculative_draft_attention_backend
    if chosen.speculative_algorithm in MTP_ALGORITHMS and backend not in (None, "dsa", "nsa"):  # one and its old name
        raise UnsupportedError(
            f"--speculative-draft-attention-backend is {backend}, which leaves glmplan's kernels; they serve dsa.",
            f"Leave this flag out, or set {PORT}=off.",
        )


def require_own_topk(runner: Any, version: str) -> None:
    """The stage of this rank begins on a layer that selects tokens by itself."""
    from sglang.srt.distributed.utils import get_pp_indices

    from glmplan.kernels.engines import stages

    config = runner.model_config.hf_config
    with suppress(ValueError):  # a partition that does not add up: the engine's own words name it
        first, _ = get_pp_indices(config.num_hidden_layers, runner.pp_rank, runner.pp_size)
        stages.require_own_topk(config, runner.pp_rank, first, f"SGLang {version}", PARTITION)


def chosen_backends(runner: Any) -> tuple[str | None, str | None]:
    """(prefill, decode) as the engine resolved them."""
    try:
        from sglang.srt.runtime_context import get_exec
    except ImportError:
        return runner.server_args.dsa_prefill_backend, runner.server_args.dsa_decode_backend
    kernel = get_exec().kernel
    return kernel.dsa_prefill_backend, kernel.dsa_decode_backend


def kv_layout(runner: Any, backends: tuple[str | None, str | None]) -> str:
    """`bf16`, `packed` or `raw`: the rows the pool will hold."""
    try:
        from sglang.srt.runtime_context import get_model

        dtype = get_model().kv_cache_dtype
    except ImportError:
        dtype = runner.server_args.kv_cache_dtype
    if dtype != "fp8_e4m3":
        return "bf16"
    return "raw" if _release().raw and backends == ("tilelang", "tilelang") else "packed"


def attention_heads(runner: Any) -> int:
    """Query heads of this rank."""
    heads: int = runner.model_config.num_attention_heads
    try:
        from sglang.srt.runtime_context import get_parallel

        return heads // get_parallel().attn_tp_size
    except ImportError:
        from sglang.srt.layers.dp_attention import get_attention_tp_size

        return heads // get_attention_tp_size()


def device_sm() -> int | None:
    """The SM of this process's GPU, None where PyTorch sees no NVIDIA GPU."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return int(major) * 10 + int(minor)


def engine_version() -> str:
    from sglang.version import __version__

    return str(__version__)


def _release() -> Any:
    from glmplan.kernels.engines.sglang_versions import VERSIONS

    return VERSIONS[engine_version()]


def _is_dsa(config: Any) -> bool:
    from sglang.srt.configs.model_config import is_deepseek_dsa

    return bool(is_deepseek_dsa(config))
