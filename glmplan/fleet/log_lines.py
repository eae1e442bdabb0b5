"""What single log lines of the engines mean: the rank that wrote them, the phase they begin, the memory they state.

Literals were read in the released wheels. SGLang 0.5.23 (below `srt/`): `distributed/bootstrap.py:115,190,220`,
`model_executor/model_runner.py:1274,1373`, `mem_cache/memory_pool.py:2087`, `mem_cache/kv_cache_configurator.py:499`,
`model_executor/model_runner_components/cuda_graph_setup.py:684-792`, `managers/scheduler.py:1269,6279`,
`entrypoints/http_server.py:2600`, `utils/common.py:1414,2630,3684`. SGLang 0.5.13.post1:
`model_executor/model_runner.py:1088,1226,1280,1434,2895,3037`. vLLM 0.33.0: `logger.py:28`,
`v1/executor/multiproc_executor.py:1196`, `v1/worker/gpu/model_runner.py:399,429,1164`, `v1/worker/gpu_worker.py:660,773`,
`v1/core/kv_cache_utils.py:1148`, `distributed/parallel_state.py:2386`. The "GB" of SGLang's lines are GiB (bytes / 2^30).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from glmplan.units import GIB

Family = Literal["sglang", "vllm"]
Rank = tuple[int, int]
"""(pp_rank, tp_rank)."""


class Phase(IntEnum):
    """How far a rank has come; a rank never goes back. `label` is the word for people."""

    STARTING = 0
    JOINING = 1
    LOADING = 2
    LOADED = 3
    ALLOCATED = 4
    CAPTURING = 5
    CAPTURED = 6
    READY = 7

    @property
    def label(self) -> str:
        """The word in tables and profiles."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a log line states; None where it says nothing about them. `tokens` is the KV pool's size."""

    startup_bytes: int | None = None
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    graph_bytes: int | None = None
    free_bytes: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Meaning:
    """What one line tells: a phase that has begun, memory, or shards read so far."""

    phase: Phase | None = None
    memory: Memory = Memory()
    shards: tuple[int, int] | None = None


def _gib(text: str) -> int:
    return round(float(text.replace(",", "")) * GIB)


_Read = Callable[[re.Match[str]], Memory]


@dataclass(frozen=True, slots=True)
class _Pattern:
    pattern: re.Pattern[str]
    phase: Phase | None
    memory: _Read = lambda _: Memory()


def _line(pattern: str, phase: Phase | None, memory: _Read = lambda _: Memory()) -> _Pattern:
    return _Pattern(re.compile(pattern), phase, memory)


_NUMBER = r"(-?[0-9][0-9.,]*)"

_SGLANG = (
    _line(r"Init (?:torch distributed|parallel) begin", Phase.JOINING),
    _line(
        rf"Init torch distributed ends\. elapsed=.* mem usage={_NUMBER} GB", Phase.JOINING,
        lambda m: Memory(startup_bytes=_gib(m[1])),
    ),
    _line(
        rf"Memory baseline taken\. mem usage={_NUMBER} GB", Phase.JOINING, lambda m: Memory(startup_bytes=_gib(m[1]))
    ),
    _line(rf"Load weight begin\. avail mem={_NUMBER} GB", Phase.LOADING, lambda m: Memory(free_bytes=_gib(m[1]))),
    _line(
        rf"Load weight end\..*avail mem={_NUMBER} GB, mem usage={_NUMBER} GB", Phase.LOADED,
        lambda m: Memory(free_bytes=_gib(m[1]), weights_bytes=_gib(m[2])),
    ),
    _line(
        rf"KV Cache (?:is allocated|VA upper bound)\..*#tokens: ([0-9]+), KV size: {_NUMBER} GB", Phase.LOADED,
        lambda m: Memory(tokens=int(m[1]), kv_bytes=_gib(m[2])),
    ),
    _line(rf"Memory pool end\. avail mem={_NUMBER} GB", Phase.ALLOCATED, lambda m: Memory(free_bytes=_gib(m[1]))),
    _line(r"Capture .*(?:CUDA|cuda) graph begin", Phase.CAPTURING),
    _line(
        rf"Capture .*(?:CUDA|cuda) graph end\..*mem usage={_NUMBER} GB[.,] avail mem={_NUMBER} GB", Phase.CAPTURED,
        lambda m: Memory(graph_bytes=_gib(m[1]), free_bytes=_gib(m[2])),
    ),
    _line(
        rf"max_total_num_tokens=([0-9]+), .*available_gpu_mem={_NUMBER} GB", Phase.CAPTURED,
        lambda m: Memory(tokens=int(m[1]), free_bytes=_gib(m[2])),
    ),
)  # fmt: skip

_VLLM = (
    _line(r"Initializing a V1 LLM engine|rank [0-9]+ in world size [0-9]+ is assigned as", Phase.JOINING),
    _line(r"Starting to load model |Loading model from scratch", Phase.LOADING),
    _line(
        rf"Model loading took {_NUMBER} GiB memory", Phase.LOADED, lambda m: Memory(weights_bytes=_gib(m[1]))
    ),
    _line(rf"Available KV cache memory: {_NUMBER} GiB", Phase.LOADED, lambda m: Memory(kv_bytes=_gib(m[1]))),
    _line(
        rf"reserved {_NUMBER} GiB memory for KV Cache as specified", Phase.LOADED, lambda m: Memory(kv_bytes=_gib(m[1]))
    ),
    _line(r"KV cache size: ([0-9,]+) tokens", Phase.ALLOCATED, lambda m: Memory(tokens=int(m[1].replace(",", "")))),
    _line(r"Capturing CUDA graphs", Phase.CAPTURING),
    _line(
        rf"Graph capturing finished in .* took {_NUMBER} GiB", Phase.CAPTURED, lambda m: Memory(graph_bytes=_gib(m[1]))
    ),
    _line(r"init engine \(profile, create kv cache, warmup model\) took", Phase.CAPTURED),
)  # fmt: skip

_LINES: dict[Family, tuple[_Pattern, ...]] = {"sglang": _SGLANG, "vllm": _VLLM}

_READY: dict[Family, tuple[re.Pattern[str], re.Pattern[str] | None]] = {
    "sglang": (
        re.compile(r"The server is fired up and ready to roll!"),
        re.compile(r"Dummy health check server started"),
    ),
    "vllm": (re.compile(r"Application startup complete"), None),
}
"""The line that ends the start, on the head and on the other nodes. A headless vLLM node writes none."""

_SHARDS = re.compile(r"(?:Loading|Multi-thread loading) .*?[0-9]+%.*?\|\s*([0-9]+)/([0-9]+) \[")

_BAR = re.compile(r"[0-9]+%(?: Completed )?\s*\|")

_SGLANG_PREFIX = re.compile(r"^\[[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:.]+((?: [A-Z_]+[0-9]+)*)\] ")
_VLLM_PREFIX = re.compile(r"^(?:\S+ )?\(([A-Za-z_0-9]+) pid=[0-9]+\) [A-Z]+ ")
_TORCH_PREFIX = re.compile(r"^\[rank([0-9]+)\]:")


def is_bar(text: str) -> bool:
    """Whether the line is a progress bar."""
    return _BAR.search(text) is not None


def shards(text: str) -> tuple[int, int] | None:
    """Files read and files in all, from a progress bar; only world rank 0 draws one."""
    found = _SHARDS.search(text)
    return (int(found[1]), int(found[2])) if found else None


def meaning(family: Family, text: str) -> Meaning:
    """What a line says about its rank."""
    read = shards(text)
    if read is not None:
        return Meaning(Phase.LOADING, shards=read)
    for known in _LINES[family]:
        found = known.pattern.search(text)
        if found:
            return Meaning(known.phase, known.memory(found))
    return Meaning()


def is_ready(family: Family, text: str, head: bool) -> bool:
    """Whether the line says that the node has finished starting."""
    pattern = _READY[family][0 if head else 1]
    return pattern is not None and pattern.search(text) is not None


def has_prefix(family: Family, text: str) -> bool:
    """Whether the line begins a log record, rather than going on with one."""
    return (_SGLANG_PREFIX if family == "sglang" else _VLLM_PREFIX).match(text) is not None


def named_rank(family: Family, text: str, tp_size: int) -> Rank | None:
    """The rank that a line's prefix names; sizes of one are left out of prefixes and are rank 0."""
    torch_rank = _TORCH_PREFIX.match(text)
    if torch_rank:
        return divmod(int(torch_rank[1]), tp_size)
    if family == "sglang":
        found = _SGLANG_PREFIX.match(text)
        words = found[1] if found else ""
    else:
        found = _VLLM_PREFIX.match(text)
        words = found[1].replace("_", " ") if found and found[1].startswith("Worker") else ""
    pp = re.search(r"\bPP([0-9]+)\b", words)
    tp = re.search(r"(?<![A-Z_])TP([0-9]+)\b", words)
    if pp is None and tp is None:
        return None
    return int(pp[1]) if pp else 0, int(tp[1]) if tp else 0
