"""Which attention backends and weight kernels run on a set of GPUs, and why.

An option suits a plan when every GPU in it is listed; the first that suits, in the engine profile's order, is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable

from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.engine_profile import AttentionOption, EngineProfile, QuantizationOption
from glmplan.facts.gpu import Gpu
from glmplan.planning.request import KernelPort
from glmplan.units import nearest

KV_DTYPES = ("auto", "fp8", "bf16")


def sm_name(gpu: Gpu) -> str:
    """`sm_89`; AMD GPUs have no SM, and an unknown GPU's may not be readable."""
    if gpu.sm is not None:
        return f"sm_{gpu.sm}"
    return "AMD" if gpu.vendor == "amd" else "SM unknown"


def _suits(option: AttentionOption | QuantizationOption, gpu: Gpu) -> bool:
    return option.amd if gpu.vendor == "amd" else gpu.sm in option.sms


def attention_options(engine: EngineProfile, kv_dtype: str, kernel_port: KernelPort = "auto") -> tuple[AttentionOption, ...]:
    """The engine's options for a KV dtype: auto, fp8, bf16 or one format's id. 4-bit KV only when named.

    `kernel_port` off leaves out those that need glmplan's kernels; force leaves out the others.
    """
    ids = [kv.id for kv in engine.kv_formats]
    if kv_dtype not in KV_DTYPES and kv_dtype not in ids:
        raise UsageError(
            f"{engine.title} has no KV dtype {kv_dtype!r}.", nearest(kv_dtype, list(dict.fromkeys([*KV_DTYPES, *ids])))
        )
    found = []
    for option in engine.attention:
        kv = engine.kv_format(option.kv_format)
        wanted = kv.dtype != "fp4" if kv_dtype == "auto" else kv_dtype in (kv.dtype, kv.id)
        if wanted and kernel_port in ("auto", "force" if option.plugin else "off"):
            found.append(option)
    return tuple(found)


def kinds(gpus: Iterable[Gpu]) -> list[Gpu]:
    """One GPU of each vendor and SM."""
    return list({(gpu.vendor, gpu.sm): gpu for gpu in gpus}.values())


def choose_attention(options: Iterable[AttentionOption], gpus: Iterable[Gpu]) -> AttentionOption | None:
    """The first option that every GPU runs."""
    seen = kinds(gpus)
    return next((option for option in options if all(_suits(option, gpu) for gpu in seen)), None)


def quantization_for(engine: EngineProfile, scheme: str, gpu: Gpu) -> QuantizationOption | None:
    """How the engine loads this checkpoint scheme on this GPU."""
    return next((q for q in engine.quantization if q.scheme == scheme and _suits(q, gpu)), None)


def require_support(
    engine: EngineProfile, scheme: str, kv_dtype: str, gpus: Iterable[Gpu], kernel_port: KernelPort = "auto"
) -> None:
    """Refuse an inventory of which no GPU can run this checkpoint with this engine."""
    options = attention_options(engine, kv_dtype, kernel_port)
    problems = []
    for gpu in kinds(gpus):
        problem = support_problem(engine, scheme, kv_dtype, options, gpu)
        if problem is None:
            return
        problems.append(problem)
    raise UnsupportedError(problems[0][0], problems[0][1])


def support_problem(
    engine: EngineProfile, scheme: str, kv_dtype: str, options: tuple[AttentionOption, ...], gpu: Gpu
) -> tuple[str, str] | None:
    """Why a GPU cannot be used, as (sentence, next step); None when it can."""
    where = f"{gpu.label} ({sm_name(gpu)})"
    if quantization_for(engine, scheme, gpu) is None:
        sms = sorted({sm for q in engine.quantization if q.scheme == scheme for sm in q.sms})
        runs_on = f"it runs it on {', '.join(f'sm_{sm}' for sm in sms)}" if sms else "it has no kernel for it"
        return (
            f"{engine.title} cannot run a {scheme} checkpoint on {where}: {runs_on}.",
            "Choose another --checkpoint (fp8, nvfp4, awq-int4) or another --engine.",
        )
    if choose_attention(options, [gpu]) is not None:
        return None
    wanted = "" if kv_dtype == "auto" else f" with {kv_dtype} KV cache"
    others = [option for option in attention_options(engine, kv_dtype) if _suits(option, gpu)]
    if others and others[0].plugin:
        return f"{engine.title} has no sparse attention{wanted} of its own for {where}.", "Use --kernel-port auto."
    if others:
        return f"glmplan's kernels do not serve {engine.title}{wanted} on {where}.", "Use --kernel-port auto."
    step = "Use --kv-dtype auto." if kv_dtype != "auto" else "Use --engine sglang or --engine vllm."
    return f"{engine.title} has no sparse attention{wanted} for {where}.", step
