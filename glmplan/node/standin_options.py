"""What the stand-in worker takes from an engine's command line and from GLMPLAN_REHEARSE_* variables.

SGLang's and vLLM's spellings are understood; flags that say nothing about ranks, addresses, the model's name or the API key
are ignored. Ranks are seated as SGLang seats them (0.5.13.post1 and 0.5.23, srt/entrypoints/engine.py
`_calculate_rank_ranges`), which for the layouts that glmplan plans is also vLLM's order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from .errors import NodeError

RENDEZVOUS_S = 120.0
"""How long ranks wait for one another; an engine waits 600 s, a rehearsal has nothing to load."""
PEER_SILENT_S = 15.0
"""After this long without a word a peer counts as lost (a cut link sends no goodbye)."""

SPELLINGS = {
    "--tp-size": "tp", "--tp": "tp", "--tensor-parallel-size": "tp", "-tp": "tp",
    "--pp-size": "pp", "--pp": "pp", "--pipeline-parallel-size": "pp", "-pp": "pp",
    "--dp-size": "dp", "--dp": "dp", "--data-parallel-size": "dp", "-dp": "dp",
    "--nnodes": "nodes", "-n": "nodes", "--node-rank": "node_rank", "-r": "node_rank",
    "--dist-init-addr": "rendezvous", "--nccl-init-addr": "rendezvous",
    "--master-addr": "address", "--master-port": "port",
    "--host": "http_host", "--port": "http_port",
    "--model-path": "model", "--model": "model", "--served-model-name": "served",
    "--context-length": "context", "--max-model-len": "context", "--max-total-tokens": "pool",
    "--base-gpu-id": "base_gpu", "--dist-timeout": "timeout", "--config": "config",
    "--api-key": "api_key", "--api-key-file": "api_key_file",
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A practice fault: `rank` is a world rank, `seconds` for those that take time."""

    name: str
    rank: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Options:
    """One node of the rehearsal."""

    tp_size: int = 1
    pp_size: int = 1
    nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 20000
    http_host: str = "127.0.0.1"
    http_port: int = 30000
    model: str = "model"
    context_tokens: int = 131072
    pool_tokens: int = 131072
    base_gpu: int = 0
    timeout_s: float = RENDEZVOUS_S
    peer_silent_s: float = PEER_SILENT_S
    family: str = "sglang"
    api_key: str | None = field(default=None, repr=False)
    faults: tuple[Fault, ...] = ()

    @property
    def world_size(self) -> int:
        """All ranks of all nodes."""
        return self.tp_size * self.pp_size

    def ranks(self) -> list[int]:
        """World ranks of this node: pp_rank * tp_size + tp_rank."""
        stages, nodes_a_stage = max(self.pp_size // self.nodes, 1), max(self.nodes // self.pp_size, 1)
        tp_here = self.tp_size // nodes_a_stage
        first_stage = self.node_rank // nodes_a_stage * stages
        first_tp = self.node_rank % nodes_a_stage * tp_here
        return [
            stage * self.tp_size + first_tp + tp
            for stage in range(first_stage, first_stage + stages)
            for tp in range(tp_here)
        ]

    def fault(self, name: str, rank: int | None = None) -> Fault | None:
        """The fault of this name that is meant for this rank."""
        return next((fault for fault in self.faults if fault.name == name and fault.rank == rank), None)

    def prefix(self, rank: int) -> str:
        """SGLang's log prefix: stages and TP ranks are named where there are several."""
        stage = f" PP{rank // self.tp_size}" if self.pp_size > 1 else ""
        return f"{stage} TP{rank % self.tp_size}" if self.tp_size > 1 else stage


def parse(words: list[str]) -> Options:
    """The options of an engine's command line; raises NodeError `usage` for one that cannot be rehearsed."""
    family, words = _family(words)
    found, loose = _values(words)
    try:
        return _options(family, found, loose, "--headless" in words)
    except ValueError as error:
        raise NodeError("usage", f"The command line cannot be rehearsed: {error}.", "Correct the number.") from None


def _family(words: list[str]) -> tuple[str, list[str]]:
    """Which engine is meant, and the words after its program."""
    for at, word in enumerate(words[:4]):
        if word.endswith(("sglang.launch_server", "sglang")):
            return "sglang", words[at + 1 :]
        if word == "serve":
            return "vllm", words[at + 1 :]
    return ("vllm" if {"--master-addr", "--max-model-len", "--headless"} & set(words) else "sglang"), words


def _values(words: list[str]) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    loose = []
    waiting, flag_seen = None, False
    for word in words:
        name, equals, value = word.partition("=")
        if waiting is not None and not word.startswith("--"):
            found[waiting], waiting = word, None
        elif name in SPELLINGS or name.replace("_", "-") in SPELLINGS:
            key = SPELLINGS.get(name) or SPELLINGS[name.replace("_", "-")]
            waiting, flag_seen = (None if equals else key), True
            if equals:
                found[key] = value
        elif word.startswith("-"):
            waiting, flag_seen = None, True
        elif not flag_seen:
            loose.append(word)
    return found, loose


def _options(family: str, found: dict[str, str], loose: list[str], headless: bool) -> Options:
    """A headless node of vLLM has no port of its own; its stand-in takes one that the system picks."""
    address, port = _rendezvous(found)
    tp_size = int(found.get("tp", 1)) * (int(found.get("dp", 1)) if family == "vllm" else 1)
    context = int(found.get("context", 131072))
    options = Options(
        tp_size=tp_size, pp_size=int(found.get("pp", 1)), nodes=int(found.get("nodes", 1)),
        node_rank=int(found.get("node_rank", 0)), address=address, port=port,
        http_host=found.get("http_host", "127.0.0.1"),
        http_port=0 if headless else int(found.get("http_port", 30000 if family == "sglang" else 8000)),
        model=found.get("served") or found.get("model") or (loose[0] if loose else "model"),
        context_tokens=context, pool_tokens=int(found.get("pool", context)), base_gpu=int(found.get("base_gpu", 0)),
        timeout_s=float(os.environ.get("GLMPLAN_REHEARSE_TIMEOUT_S", RENDEZVOUS_S)),
        peer_silent_s=float(os.environ.get("GLMPLAN_REHEARSE_PEER_S", PEER_SILENT_S)),
        family=family, api_key=_api_key(found), faults=_faults(os.environ.get("GLMPLAN_REHEARSE_FAULT", "")),
    )  # fmt: skip
    _require_layout(options)
    return options


def _require_layout(options: Options) -> None:
    tp, pp, nodes = options.tp_size, options.pp_size, options.nodes
    if min(tp, pp, nodes) < 1 or not 0 <= options.node_rank < nodes:
        raise ValueError(f"TP{tp} x PP{pp} on node {options.node_rank} of {nodes}")
    if (pp % nodes and nodes % pp) or tp % max(nodes // pp, 1):
        raise ValueError(f"TP{tp} x PP{pp} does not cover {nodes} nodes")


def _rendezvous(found: dict[str, str]) -> tuple[str, int]:
    if "rendezvous" in found:
        address, _, port = found["rendezvous"].rpartition(":")
        return address.strip("[]"), int(port)
    return found.get("address", "127.0.0.1"), int(found.get("port", 29501))


def _api_key(found: dict[str, str]) -> str | None:
    """From a file, from the engine's YAML (`api-key: KEY`), or from the command line."""
    for name in ("api_key_file", "config"):
        if name in found:
            with open(found[name], encoding="utf-8") as stream:
                text = stream.read()
            if name == "api_key_file" or _yaml_key(text) is not None:
                return api_key_of(text)
    return found.get("api_key") or os.environ.get("VLLM_API_KEY")


def api_key_of(text: str) -> str:
    """The key in a file: the value of `api-key:` where there is one, else the whole text."""
    found = _yaml_key(text)
    return text.strip() if found is None else found


def _yaml_key(text: str) -> str | None:
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip().replace("_", "-") == "api-key":
            return _unquoted(value.strip())
    return None


def _unquoted(text: str) -> str:
    """A YAML scalar in quotes or without."""
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


RANKED = ("die-at-load", "die-serving", "stall", "oom")
TIMED = ("slow-load", "slow-answer")
KNOWN = (*RANKED, "wrong-answer", "no-answer", *TIMED)


def _faults(text: str) -> tuple[Fault, ...]:
    """`die-at-load:3,slow-load:5` as faults."""
    found = []
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition(":")
        if name not in KNOWN:
            raise ValueError(f"GLMPLAN_REHEARSE_FAULT={text} has no fault {name!r}; there are {', '.join(KNOWN)}")
        try:
            found.append(_fault(name, value))
        except ValueError:
            form = f"{name}:SECONDS" if name in TIMED else f"{name}:RANK, or {name}:RANK:SECONDS"
            raise ValueError(
                f"GLMPLAN_REHEARSE_FAULT={text}: {entry!r} has no number where one is needed; write {form}"
            ) from None
    return tuple(found)


def _fault(name: str, value: str) -> Fault:
    rank, _, seconds = value.partition(":")
    if name in TIMED:
        return Fault(name, None, float(value))
    return Fault(name, int(rank), float(seconds or 0)) if name in RANKED else Fault(name)
