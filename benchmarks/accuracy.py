"""How near glmplan's ledger comes to deployments that were reported: predicted against reported, record by record.

`python benchmarks/accuracy.py` prints docs/accuracy.md, `--write` writes it. Every prediction is made by the classes
that plan (`Candidate`, `Evaluation`, `WeightLedger`), given the record's layout, KV format and settings. An error is
predicted / reported - 1. Nothing here is fitted: a record only chooses inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from accuracy_records import GIB, GPUS, MISSES, MLA_368, QUANTITIES, USED_KINDS, Reading, load_records, missing, read

from glmplan.facts.engine_profile import AttentionOption, EngineProfile, KvFormat
from glmplan.facts.gpu import Gpu
from glmplan.facts.inventory import declared_inventory
from glmplan.facts.model_config import ModelConfig, parse_model_config
from glmplan.facts.profiles import checkpoint_profile, engine_profile, gpu_profile, model_profile
from glmplan.model.kv_cache import range_cell
from glmplan.model.weights import weights_by_rule
from glmplan.planning.evaluate import Candidate, Evaluation
from glmplan.planning.layout import seat_ranks
from glmplan.planning.ports import choose_attention
from glmplan.planning.request import Request, Target

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
AIMS = {"weights": 0.01, "pool": 0.02, "end to end": 0.02, "total": 0.03}
NAMED_ABOVE = 0.05
_FORWARD = {"activations", "sampling logits", "indexer logits"}
_NOT_COUNTED = {
    "pools": {*_FORWARD, "CUDA graphs"},
    "graphs": _FORWARD,
    "fraction": {"other processes", "CUDA context"},
    "fraction + graphs": {"other processes", "CUDA context"},
    "parts": {*_FORWARD, "CUDA graphs", "other processes", "CUDA context"},
}
"""Ledger items that a record's figure of used memory is without, by its kind; the margin is in none of them."""


@dataclass(frozen=True)
class Comparison:
    """One quantity of one record: bytes of a GPU, or tokens."""

    reading: Reading
    quantity: str
    reported: int
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over reported, less one."""
        return self.predicted / self.reported - 1


def engine_of(reading: Reading) -> EngineProfile:
    """The engine's rules, with the forks' 368-byte KV row added.

    The SGLang records with a draft are of 0.5.15, which by their logs loads it before it sizes the pool (0.5.13 does not).
    """
    assert reading.engine is not None
    engine = engine_profile(reading.engine)
    if engine.family == "sglang":
        loaded_first = {"draft_before_pool": True, "draft_embedding_while_sizing": True}
        engine = engine.model_copy(update={"mtp": engine.mtp.model_copy(update=loaded_first)})
    row = KvFormat(id=MLA_368, flag="nvfp4_ds_mla", dtype="fp4", row_bytes=368, source="record 27")
    return engine.model_copy(update={"kv_formats": (*engine.kv_formats, row)})


def config_of(reading: Reading) -> ModelConfig:
    """The model's sizes, with as many experts as the checkpoint was pruned to."""
    assert reading.model is not None
    raw = dict(model_profile(reading.model).config)
    if reading.experts is not None:
        raw["n_routed_experts"] = reading.experts
    return parse_model_config(raw, f"record {reading.id}")


def option_of(reading: Reading, engine: EngineProfile, gpu: Gpu) -> AttentionOption:
    """The backend that the engine takes on the GPU, with the record's KV format and any DCP."""
    option = choose_attention(engine.attention, [gpu])
    assert option is not None
    return option if reading.kv_format is None else option.model_copy(update={"kv_format": reading.kv_format})


@cache
def evaluation(reading: Reading) -> Evaluation:
    """The record's deployment as the planner evaluates it."""
    assert reading.model is not None
    assert reading.checkpoint is not None
    engine, config, layout = engine_of(reading), config_of(reading), reading.layout
    checkpoint = checkpoint_profile(model_profile(reading.model), reading.checkpoint)
    weights = weights_by_rule(config, checkpoint.storage_rules(), checkpoint.repository)
    target = Target(
        reading.model, config, weights, checkpoint.scheme, checkpoint.name, checkpoint.repository, engine,
        checkpoint.certainty, "",
    )  # fmt: skip
    hosts = declared_inventory(f"{layout.gpus}x {reading.gpu}", layout.nodes, None).hosts
    request = Request(
        context_tokens=reading.context_tokens or config.max_position_embeddings,
        mtp_steps=reading.mtp_steps,
        mem_fraction=reading.mem_fraction,
        chunk_tokens=reading.chunk_tokens,
        graph_max_bs=reading.batch,
    )
    seats = seat_ranks(layout, [(host, list(host.gpus)) for host in hosts])
    found = Candidate(target, request, layout, seats, option_of(reading, engine, hosts[0].gpus[0])).evaluate()
    assert found is not None
    return found


def weights_bytes(reading: Reading, draft: bool) -> int:
    """Weight bytes of a rank and its RoPE table, which engines count with them; all records have one stage."""
    candidate = evaluation(reading).candidate
    ledger = candidate.ledger(0)
    return candidate.rope_bytes + sum(item.bytes for item in ledger.stage_items(0, len(ledger.layers), draft))


def token_bytes(reading: Reading, draft: bool) -> int:
    """Bytes of one token in the pool of a rank."""
    engine, config = engine_of(reading), config_of(reading)
    kv = engine.kv_format(reading.kv_format or evaluation(reading).candidate.option.kv_format)
    return range_cell(config, engine, kv, 0, config.num_hidden_layers, draft).allocated


def used_bytes(reading: Reading) -> int:
    """What the ledger adds up to for the tokens that the record held, by the items that its figure counts."""
    assert reading.tokens is not None
    assert reading.used_kind is not None
    candidate, draft = evaluation(reading).candidate, reading.mtp_steps > 0
    skipped = _NOT_COUNTED[reading.used_kind]
    items = candidate.reserve_items(0, candidate.tightest_gpu(0))
    runtime = sum(item.bytes for item in items if item.group != "margin" and item.name not in skipped)
    pool = reading.tokens // reading.layout.dcp * token_bytes(reading, draft)
    return weights_bytes(reading, draft) - candidate.rope_bytes + pool + runtime


def compare(reading: Reading, quantity: str) -> Comparison:
    """Predicted and reported of one quantity."""
    if quantity == "weights":
        reported, predicted = reading.weights, float(weights_bytes(reading, reading.weights_draft))
    elif quantity == "pool":
        assert reading.pool is not None
        reported = reading.tokens
        predicted = reading.pool / token_bytes(reading, reading.pool_draft) * reading.layout.dcp
    elif quantity == "end to end":
        reported, predicted = reading.tokens, float(evaluation(reading).pool_tokens * reading.layout.dcp)
    else:
        reported, predicted = reading.used, float(used_bytes(reading))
    assert reported is not None
    return Comparison(reading, quantity, reported, predicted)


@cache
def readings() -> tuple[Reading, ...]:
    """All records."""
    capacities = {name: gpu_profile(name).gpu(0).capacity_bytes for name in GPUS.values()}
    return tuple(read(record, capacities) for record in load_records())


@cache
def comparisons(quantity: str) -> tuple[Comparison, ...]:
    """Every record that can be compared in a quantity."""
    return tuple(compare(reading, quantity) for reading in readings() if missing(reading, quantity) is None)


def typical(found: list[Comparison] | tuple[Comparison, ...]) -> float:
    """The median of the errors' sizes."""
    return median(abs(one.error) for one in found)


def percent(value: float, digits: int = 2) -> str:
    """`-0.0312` -> `-3.12 %`."""
    return f"{value * 100:+.{digits}f} %"


def summary_rows() -> Iterator[str]:
    """One row per quantity: how many, median, worst, aim and verdict."""
    tokens = comparisons("end to end")
    families = {name: [c for c in tokens if (c.reading.engine or "").startswith(name)] for name in ("sglang", "vllm")}
    rows: tuple[tuple[str, str, tuple[Comparison, ...] | list[Comparison]], ...] = (
        ("weights per GPU", "weights", comparisons("weights")),
        ("KV tokens from the reported pool", "pool", comparisons("pool")),
        ("KV tokens end to end", "end to end", tokens),
        ("of these: SGLang", "", families["sglang"]),
        ("of these: vLLM builds", "", families["vllm"]),
        ("total per GPU", "total", comparisons("total")),
    )
    for title, quantity, found in rows:
        worst = max(found, key=lambda one: abs(one.error))
        aim, verdict = "", ""
        if quantity:
            aim = f"{AIMS[quantity]:.0%}".replace("%", " %")
            verdict = "met" if typical(found) <= AIMS[quantity] else "missed"
        where = f"{percent(worst.error)} (record {worst.reading.id})"
        yield f"| {title} | {len(found)} | {typical(found) * 100:.2f} % | {where} | {aim} | {verdict} |"


def weight_rows() -> Iterator[str]:
    """The table of weights."""
    for one in comparisons("weights"):
        draft = ", with MTP" if one.reading.weights_draft else ""
        figures = f"{one.reported / GIB:.2f} | {one.predicted / GIB:.2f} | {percent(one.error)}"
        yield f"| {one.reading.id} | {one.reading.label}{draft} | {figures} |"


def token_rows() -> Iterator[str]:
    """The table of KV tokens: from the reported pool and end to end."""
    pools = {one.reading.id: one for one in comparisons("pool")}
    whole = {one.reading.id: one for one in comparisons("end to end")}
    for reading in readings():
        if reading.id not in pools and reading.id not in whole:
            continue
        cells = []
        for found in (pools, whole):
            one = found.get(reading.id)
            cells += [f"{one.predicted:,.0f}", percent(one.error)] if one else ["", ""]
        gap = ""
        if reading.id in whole:
            tokens = (whole[reading.id].predicted - whole[reading.id].reported) / reading.layout.dcp
            gap = f"{tokens * token_bytes(reading, reading.mtp_steps > 0) / GIB:+.2f}"
        yield f"| {reading.id} | {reading.label} | {reading.tokens:,} | {' | '.join(cells)} | {gap} |"


def total_rows() -> Iterator[str]:
    """The table of used memory."""
    for one in comparisons("total"):
        figures = f"{one.reported / GIB:.2f} | {one.predicted / GIB:.2f} | {percent(one.error)}"
        yield f"| {one.reading.id} | {one.reading.label} | {one.reading.used_kind} | {figures} |"


def missed() -> list[Comparison]:
    """Every comparison that is more than 5 % off."""
    return [one for quantity in QUANTITIES for one in comparisons(quantity) if abs(one.error) > NAMED_ABOVE]


def miss_lines() -> Iterator[str]:
    """Each reason once, with the records that it explains."""
    reasons: dict[str, list[str]] = {}
    for one in missed():
        reason = MISSES.get((one.reading.id, one.quantity))
        if reason is None:
            raise SystemExit(f"Record {one.reading.id} misses {one.quantity} by {percent(one.error)}: add why to MISSES.")
        reasons.setdefault(reason, []).append(f"record {one.reading.id} {one.quantity} {percent(one.error, 1)}")
    for reason, records in reasons.items():
        named = "; ".join(records)
        yield f"- {named[0].upper()}{named[1:]}. {reason}"


def left_out_lines() -> Iterator[str]:
    """Each reason once per quantity, with the records."""
    for quantity in QUANTITIES:
        reasons: dict[str, list[str]] = {}
        for reading in readings():
            reason = missing(reading, quantity)
            if reason is not None:
                reasons.setdefault(reason, []).append(str(reading.id))
        for reason, ids in sorted(reasons.items(), key=lambda item: -len(item[1])):
            yield f"| {quantity} | {reason} | {', '.join(ids)} |"


def page() -> str:
    """docs/accuracy.md."""
    blocks = [
        "# Accuracy", INTRODUCTION,
        table("quantity | records | median | worst | aim for the median | result", summary_rows()), JUDGED,
        "## Weights per GPU, GiB", table("record | deployment | reported | predicted | error", weight_rows()),
        "## KV tokens", TOKENS, table(
            "record | deployment | reported | from its pool | error | end to end | error | GiB a rank", token_rows()
        ),
        "## Total per GPU, GiB", TOTALS, "\n".join(f"- {kind}: {text}." for kind, text in USED_KINDS.items()),
        table("record | deployment | counted | reported | predicted | error", total_rows()),
        "## Missed by more than 5 %", "\n".join(miss_lines()) or "None.",
        "## Left out", table("quantity | reason | records", left_out_lines()),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def table(header: str, rows: Iterator[str]) -> str:
    """A Markdown table."""
    rule = "|".join("---" for _ in header.split("|"))
    return "\n".join([f"| {header} |", f"|{rule}|", *rows])


INTRODUCTION = (
    "`python benchmarks/accuracy.py --write` makes this page from `tests/recorded/measurements.json`: 92 deployments of "
    "GLM-5 family models with the figures that their authors printed. Each prediction comes from the planner's own "
    "ledger, given the record's GPUs, layout, checkpoint, KV format, memory fraction, chunk and batch as far as they "
    "are stated. An error is predicted over reported, less one: above zero glmplan expects more. The median is that of "
    "the errors' sizes. Runs of one author (7 to 10, 12 and 13, 16 to 22, 24 and 25) are close relatives and count one "
    "by one.\n\n"
    "Not every figure is independent. Some profiles took an estimate from these records, and say so in their `source` "
    "fields: the usable memory of MI355X (8), RTX PRO 6000 (24), GB10 (46 to 49) and GH200 (1), NCCL on AMD (8) and on "
    "PCIe (1, 27), CUDA graphs (10, 16, 17), and which experts of GLM-5.1-NVFP4-MTP are NVFP4 (16, 17). Weights and "
    "bytes per token otherwise follow from published configurations and from the engines' code."
)
JUDGED = (
    "The aim for KV tokens is judged on the tokens from the reported pool. That row tests the bytes of a token, which "
    "follow from the model and the engine. End to end, glmplan must also know what the engine keeps beside weights and "
    "pool, and the pool takes the whole of that error: where a pool is 7 % of a card, 1 GiB is 14 % of the tokens."
)
TOKENS = (
    "From its pool: the record's pool in bytes over glmplan's bytes per token, times DCP. End to end: the tokens that "
    "glmplan gives the engine at the record's memory fraction, with glmplan's own reserves; the last column is that "
    "error in memory. Tokens are of one attention-DP group. Records 43 and 49 state bytes for 64 and for 1 token. The "
    "notes of record 33 name two more boots, 592,640 tokens from 4.41 GiB and 544,000 from 4.14 GiB; at 31,976 bytes a "
    "token these are 0.05 % and 2.2 % off."
)
TOTALS = "For the tokens that the record held, by the items that its figure counts, without glmplan's margin:"


def main() -> None:
    """Print the page, or write it."""
    if "--write" in sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
