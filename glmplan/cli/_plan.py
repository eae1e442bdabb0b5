"""From options to a plan: find the hardware and the model, search, and say what would fit when nothing does."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace

from glmplan.cli._hosts import HostOptions, probed, require_all
from glmplan.cli._options import PlanningOptions
from glmplan.cli._target import Loaded, config_target, folder_target, profiled_target
from glmplan.errors import GlmplanError, UsageError
from glmplan.facts.engine_profile import EngineProfile
from glmplan.facts.host import Inventory
from glmplan.facts.inventory import declared_inventory, default_inventory, read_inventory
from glmplan.facts.profiles import add_gpu_profile, engine_profile, gpu_profile, gpu_profiles, model_profile, recipe
from glmplan.planning.build import Context, build_plan
from glmplan.planning.plan import Plan
from glmplan.planning.request import KERNEL_PORTS, OBJECTIVES, KernelPort, Pins, Request, Target
from glmplan.planning.search import CONTEXT_LADDER, Found, search_ladder
from glmplan.units import nearest, parse_tokens

COUNT_CONTEXT_TOKENS = 131_072
"""The context that `--gpu NAME` without a count is answered for, when none is given."""
MOST_COUNTED_NODES = 64
MOST_REQUESTS = 65_536


@dataclass(frozen=True)
class Inputs:
    """Everything a search needs."""

    inventory: Inventory
    loaded: Loaded
    request: Request
    contexts: tuple[int, ...]
    with_changes: bool


def make_plan(options: PlanningOptions, with_changes: bool = True, inventory: Inventory | None = None) -> Plan:
    """Resolve the options and plan; a layout that does not fit is a plan with `fits` false.

    `with_changes` also works out, for every layout not chosen, what would make it fit. An `inventory` that was read
    already stands in for the hardware options.
    """
    for path in options.profile or []:
        add_gpu_profile(path)
    options = with_recipe(options)
    engine = engine_profile(options.engine or "sglang")
    loaded = _load(options, engine)
    request = _request(options, loaded.target, engine)
    contexts = _contexts(options, loaded.target, request)
    if options.gpu is not None:
        return _count(
            options, Inputs(declared_inventory(f"1x {options.gpu}", 1, 1), loaded, request, contexts, with_changes)
        )
    found = inventory if inventory is not None else find_inventory(options)
    if found.origin in ("probe", "file"):
        request = with_measurements(request)
    return _plan(options, Inputs(found, loaded, request, contexts, with_changes))


def with_measurements(request: Request) -> Request:
    """The request with what earlier launches measured; it counts only for real hosts, never for hardware in words."""
    from glmplan.fleet.calibration import measured_runtimes

    return replace(request, measured=measured_runtimes())


def with_recipe(options: PlanningOptions) -> PlanningOptions:
    """The options with a recipe's where the user gave none."""
    if options.recipe is None:
        return options
    found = recipe(options.recipe)
    plain = PlanningOptions()
    unknown = sorted(set(found.options) - set(vars(plain)))
    if unknown:
        raise UsageError(f"The recipe {found.name} has an unknown option {unknown[0]!r}.", "Correct the recipe.")
    hardware = {"gpus", "nodes", "gpus_per_node", "gpu", "inventory", "hosts"}
    own_hardware = any(getattr(options, name) is not None for name in hardware)
    own_model = any(getattr(options, name) is not None for name in ("model_config", "model_path"))
    chosen = {}
    for name, value in found.options.items():
        if (name in hardware and own_hardware) or (name == "checkpoint" and own_model):
            continue
        if getattr(options, name) == getattr(plain, name):
            chosen[name] = value
    return replace(options, **chosen)  # type: ignore[arg-type]


def find_inventory(options: PlanningOptions) -> Inventory:
    """The hardware named by the options; without any, this machine's GPUs or the embedded default."""
    named = [name for name in ("gpus", "gpu", "inventory", "hosts") if getattr(options, name) is not None]
    if len(named) > 1:
        raise UsageError(f"--{named[0]} and --{named[1]} contradict each other.", "Give one of them.")
    if options.gpus is not None:
        return declared_inventory(options.gpus, options.nodes, options.gpus_per_node)
    if options.nodes is not None or options.gpus_per_node is not None:
        raise UsageError("--nodes and --gpus-per-node need --gpus.", 'Add --gpus "24x rtx-4090-48g", for example.')
    if options.inventory is not None:
        return read_inventory(options.inventory)
    if options.hosts is not None:
        return probed_inventory(options)
    from glmplan.probe.gpus import NoDriverError
    from glmplan.probe.local import probe_local

    try:
        return Inventory(origin="probe", hosts=(probe_local(gpu_profiles()),))
    except NoDriverError as error:
        print(
            f"glmplan: {error.message} Sizing the embedded default instead: 3 nodes of 8 RTX 4090 48 GB.",
            file=sys.stderr,
        )
        return default_inventory()


def probed_inventory(options: HostOptions) -> Inventory:
    """The GPUs of `--hosts` as they are now; a host that fails is printed and ends the command with exit code 5."""
    from glmplan.probe.remote import inventory_of

    return inventory_of(require_all(probed(options)))


def _load(options: PlanningOptions, engine: EngineProfile) -> Loaded:
    named = [name for name in ("checkpoint", "model_config", "model_path") if getattr(options, name) is not None]
    if len(named) > 1:
        first, second = (name.replace("_", "-") for name in named[:2])
        raise UsageError(f"--{first} and --{second} contradict each other.", "Give one of them.")
    if options.model_path is not None:
        return folder_target(options.model_path, engine, options.served_model)
    if options.model_config is not None:
        return config_target(options.model_config, engine, options.served_model)
    return profiled_target(options.model, options.checkpoint or "fp8", engine, options.served_model)


def _request(options: PlanningOptions, target: Target, engine: EngineProfile) -> Request:
    concurrency = 1 if options.concurrency is None else options.concurrency
    if not 1 <= concurrency <= MOST_REQUESTS:
        raise UsageError(
            f"--concurrency is {concurrency}; it must lie in 1 to {MOST_REQUESTS:,}.", "Give the requests at once."
        )
    fraction = options.mem_fraction
    if fraction is not None and not 0.1 <= fraction <= 0.99:
        raise UsageError(f"--mem-fraction is {fraction:g}; it must lie in 0.1 to 0.99.", "Try 0.9.")
    if options.chunk is not None and (options.chunk < 64 or options.chunk % 64):
        raise UsageError(f"--chunk is {options.chunk}; it must be a multiple of 64.", "Try 4096.")
    if options.graph_max_bs is not None and not 0 <= options.graph_max_bs <= 4096:
        raise UsageError(f"--graph-max-bs is {options.graph_max_bs}; it must lie in 0 to 4096.", "Try 32.")
    if options.objective not in OBJECTIVES:
        raise UsageError(f"No objective is named {options.objective!r}.", nearest(options.objective, list(OBJECTIVES)))
    steps = _mtp_steps(options.mtp or "off", engine)
    if steps and not target.weights.mtp:
        raise UsageError(f"--mtp is on, but the checkpoint {target.checkpoint_name} has no MTP layer.", "Turn --mtp off.")
    return Request(
        context_tokens=0,
        concurrency=concurrency,
        kv_dtype=options.kv_dtype,
        kernel_port=_kernel_port(options.kernel_port),
        mtp_steps=steps,
        mem_fraction=fraction,
        chunk_tokens=options.chunk,
        graph_max_bs=options.graph_max_bs,
        pins=parse_pins(options.pin, target, engine),
        objective=options.objective,
        allow_cross_node_tp=options.allow_cross_node_tp,
        allow_pipeline_mtp=options.allow_pipeline_mtp,
    )


def _kernel_port(text: str) -> KernelPort:
    found = next((port for port in KERNEL_PORTS if port == text), None)
    if found is None:
        raise UsageError(f"No kernel port is named {text!r}.", nearest(text, list(KERNEL_PORTS)))
    return found


def _mtp_steps(text: str, engine: EngineProfile) -> int:
    word = text.strip().lower()
    if word in ("off", "no", "0"):
        return 0
    if word in ("on", "yes"):
        return engine.mtp.default_steps
    if word.isdecimal() and 1 <= int(word) <= 8:
        return int(word)
    raise UsageError(f"--mtp is {text!r}.", "Write off, on, or the draft steps 1 to 8.")


def parse_pins(text: str | None, target: Target, engine: EngineProfile) -> Pins:
    """`tp=8,pp=3,stages=26/26/26` as pins; contradictions are refused with the numbers that clash."""
    if text is None:
        return Pins()
    found: dict[str, int] = {}
    stages: tuple[int, ...] | None = None
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if name == "stages" and re.fullmatch(r"[0-9]+(/[0-9]+)*", value):
            stages = tuple(int(layers) for layers in value.split("/"))
        elif name in ("tp", "pp", "dp", "ep", "dcp", "nodes") and sign and value.isdecimal() and int(value) > 0:
            if name in found and found[name] != int(value):
                raise UsageError(f"--pin gives {name} twice: {found[name]} and {value}.", "Give it once.")
            found[name] = int(value)
        else:
            raise UsageError(
                f"--pin cannot be read at {part.strip()!r}.",
                "Write tp=8,pp=3; also dp, ep, dcp, nodes, stages=26/26/26.",
            )
    pins = Pins(**found, stages=stages) if stages is None else Pins(**{"pp": len(stages), **found}, stages=stages)
    _check_pins(pins, target, engine)
    return pins


def _check_pins(pins: Pins, target: Target, engine: EngineProfile) -> None:
    if pins.tp is not None and pins.tp not in engine.parallel.tp_sizes:
        sizes = ", ".join(map(str, engine.parallel.tp_sizes))
        raise UsageError(
            f"tp={pins.tp} is pinned, but {target.config.num_attention_heads} heads and 128-wide blocks allow TP {sizes}.",
            "Pin one of those.",
        )
    for name in ("dp", "ep", "dcp"):
        size = getattr(pins, name) or 1
        if size & (size - 1) or (pins.tp is not None and pins.tp % size):
            raise UsageError(
                f"{name}={size} is pinned, but it must be a power of two that divides TP{pins.tp or ''}.", "Correct the pin."
            )
    if (pins.dcp or 1) not in engine.parallel.dcp_sizes:
        raise UsageError(f"dcp={pins.dcp} is pinned, but {engine.title} does not shard the context.", "Use --engine vllm.")
    if pins.pp is not None and pins.nodes is not None and pins.pp % pins.nodes and pins.nodes % pins.pp:
        raise UsageError(
            f"pp={pins.pp} and nodes={pins.nodes} contradict each other: {engine.title} would start and then wait "
            "for ever, because neither divides the other.",
            "Pin stages that are a multiple of the nodes, or divide them.",
        )
    if pins.stages is None:
        return
    layers = target.config.num_hidden_layers
    if 0 in pins.stages:
        raise UsageError("A pinned stage holds 0 layers.", "Give every stage at least one.")
    if sum(pins.stages) != layers:
        raise UsageError(f"The pinned stages hold {sum(pins.stages)} layers; the model has {layers}.", "Correct them.")
    if pins.pp != len(pins.stages):
        raise UsageError(f"pp={pins.pp} is pinned with {len(pins.stages)} stages.", "Give as many stages as pp.")
    if engine.parallel.relays_topk:
        return
    starts = [layer for layer, full in enumerate(target.config.indexer_full[:layers]) if full and layer]
    for stage in range(1, len(pins.stages)):
        start = sum(pins.stages[:stage])
        if not target.config.indexer_full[start]:
            raise UsageError(
                f"Stage {stage} would begin on layer {start}, which shares the top-k of an earlier layer; "
                f"{engine.title} does not send it between stages, and the model would answer nonsense.",
                f"Begin stages on {_listed(starts)}." if starts else "No layer but the first can begin one: use pp=1.",
            )


def _listed(layers: list[int]) -> str:
    """`layers 1, 2, 6`; of many, the first four and the last."""
    few = [*layers[:4], layers[-1]] if len(layers) > 5 else layers
    words = ", ".join(map(str, few)) if few == layers else f"{', '.join(map(str, few[:-1]))}, ... {few[-1]}"
    return f"layer {words}" if len(layers) == 1 else f"layers {words}"


def _contexts(options: PlanningOptions, target: Target, request: Request) -> tuple[int, ...]:
    limit = target.config.max_position_embeddings
    if options.context is None:
        if options.gpu is not None:
            return (min(COUNT_CONTEXT_TOKENS, limit),)
        return tuple(dict.fromkeys(min(context, limit) for context in CONTEXT_LADDER))
    context = parse_tokens(options.context, "--context")
    if context < 1:
        raise UsageError("--context is 0 tokens.", "Give at least 1.")
    if context > limit:
        raise UsageError(
            f"--context {context:,} is above the model's maximum of {limit:,} tokens.", f"Ask for at most {limit:,}."
        )
    return (context,)


def _plan(options: PlanningOptions, inputs: Inputs) -> Plan:
    found = search_ladder(inputs.inventory, inputs.loaded.target, inputs.request, inputs.contexts)
    _require_seated(found)
    advice: tuple[str, ...] = ()
    if found.best is None:
        from glmplan.planning.advice import suggestions

        advice = tuple(suggestions(inputs.inventory, found, _other_targets(options, inputs.loaded.target)))
    context = Context(inputs.inventory.origin, inputs.loaded.file_bytes, advice, inputs.with_changes)
    return build_plan(found, context)


def _require_seated(found: Found) -> None:
    """Refuse a search whose layouts are all illegal, with the first reason: there is no ledger to show."""
    if found.best is None and found.nearest is None:
        first = found.rejected[0]
        raise UsageError(f"No layout is legal: {first.layout}: {first.reason}.", f"Try this: {first.change}.")


def _other_targets(options: PlanningOptions, target: Target) -> list[Target]:
    """Other checkpoints of the same model, where the user named one by profile."""
    if options.model_config is not None or options.model_path is not None:
        return []
    return [
        profiled_target(options.model, checkpoint.name, target.engine, None).target
        for checkpoint in model_profile(options.model).checkpoints
        if checkpoint.name != target.checkpoint_name and checkpoint.name in ("fp8", "nvfp4", "awq-int4", "w4afp8")
    ]


def _count(options: PlanningOptions, inputs: Inputs) -> Plan:
    """The smallest number of one GPU that carries the request: powers of two on one node, then whole nodes."""
    other = next((name for name in ("gpus", "inventory", "hosts") if getattr(options, name) is not None), None)
    if other is not None:
        raise UsageError(f"--gpu and --{other} contradict each other.", "Give one of them.")
    assert options.gpu is not None
    if options.nodes is not None:
        raise UsageError("--gpu and --nodes contradict each other: --gpu finds the count.", "Use --gpus with a count.")
    profile = gpu_profile(options.gpu.lower())
    per_node = options.gpus_per_node or profile.gpus_per_node
    sizes = [(1, count) for count in (1, 2, 4, 8, 16) if count < per_node]
    sizes += [(count, per_node) for count in range(1, MOST_COUNTED_NODES + 1)]
    last: Inputs | None = None
    usable = profile.gpu(0).memory_usable_bytes
    weights = sum(stored.values for layer in inputs.loaded.target.weights.layers for stored in layer.values())
    enough = [(count, each) for count, each in sizes if count * each * usable > weights]
    for count, each in enough or sizes[-1:]:
        inventory = declared_inventory(f"{count * each}x {profile.name}", count, None)
        last = replace(inputs, inventory=inventory)
        try:
            found = search_ladder(inventory, inputs.loaded.target, inputs.request, inputs.contexts)
        except GlmplanError:
            if (count, each) == (enough or sizes)[-1] or _unsupported(inventory, inputs):
                raise
            continue
        if found.best is not None:
            return build_plan(found, Context("declared", inputs.loaded.file_bytes, (), inputs.with_changes, counted=True))
    assert last is not None
    return _plan(options, last)


def _unsupported(inventory: Inventory, inputs: Inputs) -> bool:
    """Whether the GPU itself is refused, so that more of them cannot help."""
    from glmplan.errors import UnsupportedError
    from glmplan.planning.ports import require_support

    try:
        gpus = [gpu for host in inventory.hosts for gpu in host.gpus]
        require_support(
            inputs.loaded.target.engine,
            inputs.loaded.target.scheme,
            inputs.request.kv_dtype,
            gpus,
            inputs.request.kernel_port,
        )
    except UnsupportedError:
        return True
    return False
