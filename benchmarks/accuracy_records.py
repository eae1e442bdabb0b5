"""The figures that deployments reported, as numbers, and what glmplan must be given to predict them.

Bytes and tokens. SGLang and vLLM count in GiB whatever unit they print, so "GB" is read as GiB; `DECIMAL` lists the
records that mean 10^9. A text is read by rules: brackets are dropped, parts joined with + are added, a range counts as
its middle. `FIXES` holds what no rule can read, `LEFT_OUT` what cannot be compared, each with its reason.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmplan.planning.layout import Layout

Record = dict[str, Any]

RECORDS = Path(__file__).resolve().parent.parent / "tests" / "recorded" / "measurements.json"
GIB = 1 << 30
QUANTITIES = ("weights", "pool", "end to end", "total")
MLA_368 = "nvfp4_368"
"""The 368-byte rows of nvfp4_ds_mla in vLLM forks, which no engine profile has."""


@dataclass(frozen=True)
class Reading:
    """One deployment: its settings as far as stated, then its figures in bytes per GPU.

    `weights_draft` and `pool_draft`: the figure includes the MTP layer. `tokens` are of one attention group over all
    its context shards. `used` is what a GPU holds of the items that `used_kind` names.
    """

    id: int
    label: str
    model: str | None
    checkpoint: str | None
    experts: int | None
    engine: str | None
    gpu: str | None
    layout: Layout
    kv_format: str | None
    mtp_steps: int
    context_tokens: int | None
    mem_fraction: float | None
    chunk_tokens: int | None
    batch: int | None
    weights: int | None
    weights_draft: bool
    pool: int | None
    pool_draft: bool
    tokens: int | None
    used_kind: str | None
    used: int | None


DECIMAL = {
    24: "79.1 GB is a quarter of the 317.9 GB on disk, which are 10^9",
    25: "as record 24",
    44: "the pool is --kv-cache-memory-bytes 10,950,000,000",
}
USED_KINDS = {
    "pools": "capacity less the memory that SGLang finds available once the pool stands",
    "graphs": "the same once CUDA graphs are captured",
    "fraction": "what vLLM fills: its fraction of the capacity, for weights, pool, activations and non-torch memory",
    "fraction + graphs": "the same and the graphs, which this build captures outside its fraction",
    "parts": "weights, non-torch memory and pool as the author lists them",
}
USED: dict[int, str] = {7: "pools", 8: "pools", 9: "pools", 10: "graphs", 11: "pools", 12: "parts"}
USED |= dict.fromkeys((16, 17, 20, 21, 22), "fraction + graphs")  # log of 17: VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=0
USED |= dict.fromkeys((24, 46, 51), "fraction")

FIXES: dict[int, dict[str, Any]] = {
    8: {"batch": 128},  # max-running 256 is over all DP ranks; server_args in the log give graphs for at most 128
    10: {"weights_draft": False},  # memory_usage.weight is the target's alone (SGLang 0.5.23 internal_state.py:80)
    11: {"kv_format": "fp8_packed"},  # its notes: sized with 708 bytes a layer, allocated 788
    33: {"tokens": 435_968},  # the engine's own estimate for the 3.25 GiB that it found too small
    40: {"kv_format": "fp8_raw"},  # its notes: 78 x (576 + 132) bytes
    # one page of 64 tokens instead of a pool: 2.742 MiB KV and 0.628 MiB index, without the draft's
    43: {"kv_format": "fp8_raw", "tokens": 64, "pool": round(3.370 * (1 << 20)), "pool_draft": False,
         "layout": Layout(8, 1, 1, 8)},
    49: {"tokens": 1, "pool": 31_976},  # bytes per token at DCP1 instead of a pool
}  # fmt: skip

_PINNED = "the author set the number of tokens"
_UNKNOWN = "the quantiser's layout is in no profile (AutoRound, EXL3, NF3, AQLM, INT4/INT8 mixes)"
_OTHER = "hardware, engine or checkpoint that no profile describes"
LEFT_OUT: dict[tuple[int, str], str] = {
    **{(number, "pool"): _PINNED for number in (3, 4, 5)},
    **{(number, "weights"): _UNKNOWN for number in (1, 3, 4, 5, 27, 31, 33, 44)},
    **{(number, "end to end"): _UNKNOWN for number in (1, 27, 28, 31, 32, 33, 38, 47, 99)},
    (25, "end to end"): "started while an earlier process still held memory",
    (26, "weights"): "repeats the figure of record 24, which is without the MTP layer",
    (43, "end to end"): "states the bytes of a page, not a pool",
    (46, "weights"): "465 GB on disk over 8 nodes, not a reading",
    (48, "end to end"): "the pool is 1 % of the memory, and its two fractions contradict its tokens",
    (52, "weights"): "does not state how many experts are left",
    (103, "end to end"): "does not state how many experts are left",
}

_KERNELS = (
    "These are runs of a vLLM fork with its own MoE and attention kernels (b12x). Beside weights and pool they take "
    "7.0 GiB of the fraction (0.865 x 94.97 - 56.62 - 18.51 for record 16), the same with and without MTP and at every "
    "DCP. glmplan applies vLLM 0.33.0's rules, which do not know these kernels' workspaces."
)
_BATCH = (
    "Chunk and batch are not stated: glmplan assumes its own 16 sequences where vLLM 0.33.0 would take up to 1,024, and "
    "the author counts 1.29 GiB for the workspaces of a DCP patch. 6.7 GiB lie beside weights and pool "
    "(0.92 x 94.97 - 73.67 - 6.97), and the pool is 7 % of the card."
)
_SHARED = (
    "GB10 shares its memory with the system, and this build replaces the sparse attention and adds DCP to it. "
    "6.4 GiB lie beside weights and pool if its weights are glmplan's 57.1 GiB (0.78 x 121 - 57.1 - 30.9)."
)
MISSES: dict[tuple[int, str], str] = {
    **{(number, quantity): _KERNELS for number in (16, 17, 20, 21, 22) for quantity in ("end to end", "total")},
    **{(24, quantity): _BATCH for quantity in ("end to end", "total")},
    **{(46, quantity): _SHARED for quantity in ("end to end", "total")},
}
"""Why a record is missed by more than 5 %; a line stays unused while the record is not."""

GPUS = {
    "MI355X": "mi355x", "MI300X": "mi300x", "GB200": "gb200", "GB10": "gb10", "RTX PRO 6000": "rtx-pro-6000",
    "A800": "a100-80g", "GH200": "gh200-96g",
}  # fmt: skip
_CHECKPOINTS = (
    (r"amd/GLM-5\.2-MXFP4", "glm-5.2", "mxfp4"),
    (r"nvidia/GLM-5\.2-NVFP4|0xSero/GLM-5\.2-504B-Nvidia", "glm-5.2", "nvfp4"),
    (r"GLM-5\.1-NVFP4-MTP", "glm-5.1", "nvfp4-mtp"),
    (r"zai-org/GLM-5-FP8", "glm-5", "fp8"),
    (r"GLM-5\.2-FP8", "glm-5.2", "fp8"),
)


def amount(text: str | None, decimal: bool = False) -> int | None:
    """Bytes of "52.62 GB target + 2.74 GB NextN draft", "6.96-6.97 GiB" or "~57 GiB"; None where none is stated."""
    parts = re.sub(r"\([^)]*\)", "", text or "").split("+")
    found = [m for m in (re.search(r"([0-9.]+)(?:-([0-9.]+))?\s*G(i?)B", part) for part in parts) if m]
    total = 0.0
    for match in found:
        middle = (float(match[1]) + float(match[2] or match[1])) / 2
        total += middle * (10**9 if decimal and not match[3] else GIB)
    return round(total) if found else None


def token_count(value: Any) -> int | None:
    """Tokens of 319232, "~560k (DCP4 ~2.1M)" or "710,593 (DCP4) / ..."."""
    found = re.match(r"~?([0-9][0-9,.]*)\s*([kKM]?)", value) if isinstance(value, str) else None
    if found:
        return round(float(found[1].replace(",", "")) * {"": 1, "k": 1000, "K": 1000, "M": 1_000_000}[found[2]])
    return value if isinstance(value, int) else None


def _number(pattern: str, text: str | None) -> int | None:
    found = re.search(pattern, text or "")
    return int(found[1]) if found else None


def _engine(record: Record) -> str | None:
    """The engine profile whose rules hold: SGLang before 0.5.2x has 0.5.13.post1's, any vLLM has 0.33.0's."""
    name, version = record["engine"] or "", record["engine_version"] or ""
    if "SGLang" in name and "NPU" not in name and "KTransformers" not in name:
        return "sglang-0.5.23" if version.startswith(("main", "0.5.2")) else "sglang-0.5.13.post1"
    if "vLLM" in name and not re.search("TileRT|AFD|offload", name):
        return "vllm-pr38476" if "TRITON_MLA_SPARSE" in name else "vllm-0.33.0"
    return None


def _kv_format(record: Record) -> str | None:
    """The row format that the record names; None leaves it to the engine's backend on that GPU."""
    text = record["kv_dtype"] or ""
    for mark, name in (("nvfp4_ds_mla", MLA_368), ("bf16", "bf16"), ("_ds_mla", "fp8_packed"), ("576", "fp8_raw")):
        if mark in text:
            return name
    return None


def _batch(record: Record) -> int | None:
    """Sequences that graphs are captured for; 0 without graphs."""
    text = record["flags"] or ""
    if re.search("no CUDA graph|enforce-eager", text):
        return 0
    return _number(r"graph max bs (\d+)", text) or _number(r"(?:seqs|max-running) (\d+)", text)


def _used(record: Record, capacity: int) -> int | None:
    """Bytes in use on one GPU, from whatever the record states about it."""
    kind = USED.get(record["id"])
    if kind is None:
        return None
    pool, available = amount(record["kv_mem_per_gpu"]), amount(record["avail_mem"])
    if kind == "parts":
        return (amount(record["other_mem"]) or 0) + (pool or 0)
    if kind in ("pools", "graphs"):
        return capacity - (available or 0)
    graphs = amount(record["graph_mem"]) if kind == "fraction + graphs" else 0
    return round(record["mem_fraction"] * capacity) + (graphs or 0)


def _layout(record: Record) -> Layout:
    tp, dp, ep, dcp = (record[key] if isinstance(record[key], int) else 1 for key in ("tp", "dp", "ep", "dcp"))
    return Layout(tp, 1, record["nodes"] or 1, dp, ep, dcp)


def _label(record: Record) -> str:
    checkpoint = re.sub(r"^.*/", "", record["checkpoint"] or record["model"])
    gpu, layout = re.sub(r" *[(].*", "", record["gpu"] or "GPU not stated"), str(_layout(record)).replace("xPP1", "")
    return f"{record['n_gpu']}x {gpu}, {layout}, {checkpoint}, {record['engine']}"


def read(record: Record, capacities: dict[str, int]) -> Reading:
    """One record as a reading; what it does not state is None. `capacities` are bytes by GPU profile."""
    text, decimal = record["checkpoint"] or "", record["id"] in DECIMAL
    model, checkpoint = next(((m, name) for pattern, m, name in _CHECKPOINTS if re.search(pattern, text)), (None, None))
    family = re.match(r"GLM-5(?:\.[12])?(?![.0-9])", record["model"])
    gpu = next((profile for name, profile in GPUS.items() if name in (record["gpu"] or "")), None)
    engine, spec = _engine(record), record["spec"] or ""
    steps = 0 if spec.startswith("none") else _number(r"(?:MTP|EAGLE)\s*([0-9])", spec) or 0
    fraction, context, weights, pool = (
        record[key] for key in ("mem_fraction", "context_len", "weights_per_gpu", "kv_mem_per_gpu")
    )
    split = (engine or "").startswith("sglang")  # SGLang prints the draft's weights and pool on lines of their own
    reading = Reading(
        id=record["id"], label=_label(record), engine=engine, gpu=gpu, layout=_layout(record),
        model=model or (family[0].lower() if family else None), checkpoint=checkpoint,
        experts=_number(r"(\d+)/256 experts", record["model"]) or _number(r"\be(\d+)\b", text),
        kv_format=_kv_format(record), mtp_steps=steps, batch=_batch(record),
        context_tokens=context if isinstance(context, int) else None,
        mem_fraction=fraction if isinstance(fraction, float) else None,
        chunk_tokens=_number(r"(?:chunked|batched|batched-tokens) (\d+)", record["flags"]),
        weights=amount(weights, decimal), weights_draft=steps > 0 and (not split or "draft" in (weights or "")),
        pool=amount(pool, decimal), pool_draft=steps > 0 and (not split or "draft" in (pool or "")),
        tokens=token_count(record["kv_tokens"]), used_kind=USED.get(record["id"]),
        used=_used(record, capacities[gpu]) if gpu else None,
    )  # fmt: skip
    return replace(reading, **FIXES.get(reading.id, {}))


def load_records() -> list[Record]:
    """The records as their authors printed them."""
    found: list[Record] = json.loads(RECORDS.read_text(encoding="utf-8"))
    return found


def missing(reading: Reading, quantity: str) -> str | None:
    """Why a reading cannot be compared in one quantity; None where it can."""
    needs: dict[str, tuple[tuple[object, str], ...]] = {
        "weights": ((reading.weights, "states no weights per GPU"),),
        "pool": ((reading.tokens, "states no KV tokens"), (reading.pool, "states KV tokens but no pool size")),
        "end to end": (
            (reading.tokens, "states no KV tokens"),
            (reading.mem_fraction, "states KV tokens but no memory fraction"),
        ),
        "total": ((reading.used, "states no memory in use by items that the ledger has"),),
    }
    for value, reason in needs[quantity]:
        if value is None:
            return reason
    if (reading.id, quantity) in LEFT_OUT:
        return LEFT_OUT[(reading.id, quantity)]
    known = (reading.engine, reading.model) if quantity == "pool" else (reading.engine, reading.checkpoint, reading.gpu)
    return None if all(known) else _OTHER
