"""Options that commands share, declared once as a dataclass, and the decorator that spells them out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from glmplan.cli._hosts import HostOptions

HARDWARE, MODEL, LOAD, LAYOUT = "Hardware", "Model and engine", "Load", "Layout"


@dataclass(frozen=True)
class PlanningOptions(HostOptions):
    """What was typed for `size` and `launch`, hosts included. None is 'not given'."""

    gpus: Annotated[
        str | None,
        typer.Option(help='GPUs as words: "24x rtx-4090-48g", groups joined with +.', rich_help_panel=HARDWARE),
    ] = None
    nodes: Annotated[int | None, typer.Option(help="Hosts that --gpus are spread over.", rich_help_panel=HARDWARE)] = None
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs on one host, where it is not the usual count.", rich_help_panel=HARDWARE)
    ] = None
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A GPU without a count: answers with the smallest of 1, 2, 4 in a node, then whole nodes.",
            rich_help_panel=HARDWARE,
        ),
    ] = None
    inventory: Annotated[Path | None, typer.Option(help="Hosts and GPUs from a TOML file.", rich_help_panel=HARDWARE)] = None
    recipe: Annotated[
        str | None,
        typer.Option(help="A deployment that was run, as defaults: 8x-h200, for example.", rich_help_panel=HARDWARE),
    ] = None
    profile: Annotated[
        list[Path] | None,
        typer.Option(help="A GPU profile of your own (TOML); may be repeated.", rich_help_panel=HARDWARE),
    ] = None
    model: Annotated[str, typer.Option(help="glm-5.2, glm-5.1 or glm-5.", rich_help_panel=MODEL)] = "glm-5.2"
    checkpoint: Annotated[
        str | None,
        typer.Option(help="fp8 (default), bf16, nvfp4, w4afp8, awq-int4, mxfp4 or a variant.", rich_help_panel=MODEL),
    ] = None
    model_config: Annotated[
        Path | None, typer.Option(help="Any glm_moe_dsa config.json instead of a profile.", rich_help_panel=MODEL)
    ] = None
    model_path: Annotated[
        Path | None, typer.Option(help="A checkpoint folder here: true tensor bytes are used.", rich_help_panel=MODEL)
    ] = None
    served_model: Annotated[
        str | None, typer.Option(help="What the nodes load: a path there, or a repository.", rich_help_panel=MODEL)
    ] = None
    engine: Annotated[
        str | None,
        typer.Option(help="sglang (newest; default), sglang-0.5.13.post1, vllm, or a patched build.", rich_help_panel=MODEL),
    ] = None
    kernel_port: Annotated[
        str,
        typer.Option(help="glmplan's kernels: auto (where the engine has none), off, or force.", rich_help_panel=MODEL),
    ] = "auto"
    context: Annotated[
        str | None,
        typer.Option(help="Tokens of one request (131072, 128k, 1M). Default: the longest that fits.", rich_help_panel=LOAD),
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(help="Requests of that length at once (default 1).", rich_help_panel=LOAD)
    ] = None
    kv_dtype: Annotated[str, typer.Option(help="auto, fp8, bf16 or a format's id.", rich_help_panel=LOAD)] = "auto"
    mtp: Annotated[
        str | None,
        typer.Option(help="Multi-token prediction: off (default), on, or draft steps (1 to 8).", rich_help_panel=LOAD),
    ] = None
    mem_fraction: Annotated[
        float | None,
        typer.Option(help="The engine's memory fraction, instead of the planned one.", rich_help_panel=LOAD),
    ] = None
    chunk: Annotated[int | None, typer.Option(help="Prefill chunk in tokens.", rich_help_panel=LOAD)] = None
    graph_max_bs: Annotated[
        int | None, typer.Option(help="Largest batch captured in CUDA graphs; 0 for none.", rich_help_panel=LOAD)
    ] = None
    pin: Annotated[
        str | None,
        typer.Option(help="Fix sizes: tp=8,pp=3 (also dp, ep, dcp, nodes, stages=26/26/26).", rich_help_panel=LAYOUT),
    ] = None
    objective: Annotated[str, typer.Option(help="fewest-gpus, latency or kv-tokens.", rich_help_panel=LAYOUT)] = (
        "fewest-gpus"
    )
    allow_cross_node_tp: Annotated[
        bool, typer.Option("--allow-cross-node-tp", help="Let one TP group span hosts.", rich_help_panel=LAYOUT)
    ] = False
    allow_pipeline_mtp: Annotated[
        bool,
        typer.Option("--allow-pipeline-mtp", help="MTP with a pipeline, where experimental.", rich_help_panel=LAYOUT),
    ] = False


def takes_options(options_class: type[HostOptions]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `options`, of this class, as its first parameter, spelled out as options of its own.

    Options that the class inherits come last in the help.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        shared = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
            for f in sorted(fields(options_class), key=lambda f: f.name not in inspect.get_annotations(options_class))
        ]
        names = {parameter.name for parameter in shared}
        hints = _hints(options_class)
        own_hints = inspect.get_annotations(command, eval_str=True)
        own_parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "options"
        ]

        @wraps(command)
        def wrapper(**values: Any) -> None:
            own = {name: values.pop(name) for name in list(values) if name not in names}
            command(options_class(**values), **own)

        signature = inspect.Signature([p.replace(annotation=hints[p.name]) for p in shared] + own_parameters)
        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        wrapper.__annotations__ = {**hints, **{n: h for n, h in own_hints.items() if n not in ("options", "return")}}
        del wrapper.__wrapped__
        return wrapper

    return decorated


def _hints(options_class: type[HostOptions]) -> dict[str, Any]:
    """The annotations of a dataclass and of those it extends."""
    found: dict[str, Any] = {}
    for one in reversed(options_class.__mro__):
        found |= inspect.get_annotations(one, eval_str=True)
    return found


takes_planning_options = takes_options(PlanningOptions)
takes_host_options = takes_options(HostOptions)
