"""What one layout on given GPUs needs, holds and lacks, rank by rank.

The pool is what capacity leaves after weights and reserves, on the rank that has least. SGLang's own rule is applied
on top: it divides the smallest free memory of the world by the cell of each stage, so an uneven cluster may get less
than its GPUs could hold (0.5.23 `srt/mem_cache/kv_cache_configurator.py:2990`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from glmplan.facts.engine_profile import AttentionOption, EngineProfile, QuantizationOption
from glmplan.facts.gpu import Gpu
from glmplan.model import workspace
from glmplan.model.kv_cache import KvCell, layer_cell
from glmplan.model.tensors import Role
from glmplan.model.workspace import Shape
from glmplan.planning.layout import Layout, Seat
from glmplan.planning.ledger import LineItem, Split, WeightLedger
from glmplan.planning.measured import RuntimeKey, applied
from glmplan.planning.ports import kinds, quantization_for
from glmplan.planning.request import Request, Target
from glmplan.planning.stages import Cuts, StageCosts, best_cuts, pool_tokens

MAX_FRACTION_STEPS = 9_900
FRACTION_STEPS = 10_000
"""Memory fractions are written with four decimals; 0.99 is the largest ever emitted."""


ROPE_ITEM = "RoPE table"
REQUEST_ITEM = "request table"
STARTUP_ITEMS = ("other processes", "CUDA context", "NCCL buffers")
"""What a rank has lost before it loads a weight."""
NOT_FREED = (*STARTUP_ITEMS, ROPE_ITEM, REQUEST_ITEM, "attention workspace")
"""What is held all the time and so is never part of the free memory that the indexer takes its share of."""


def ceil_div(value: int, by: int) -> int:
    """Integer division rounded up."""
    return -(-value // by)


def chunk_tokens(engine: EngineProfile, request: Request, smallest_total_bytes: int) -> int:
    """The prefill chunk: the user's, or the engine's default for the smallest GPU."""
    if request.chunk_tokens is not None:
        return request.chunk_tokens
    for below, chunk in engine.chunk_by_memory:
        if below == 0 or smallest_total_bytes < below:
            return chunk
    raise AssertionError("the last entry of chunk_by_memory has no bound")


@dataclass(frozen=True)
class Candidate:
    """One layout, the GPUs of each stage, and the attention option they share."""

    target: Target
    request: Request
    layout: Layout
    seats: tuple[tuple[Seat, ...], ...]
    option: AttentionOption

    @cached_property
    def gpus(self) -> list[Gpu]:
        """Every GPU of the candidate."""
        return [seat.gpu for stage in self.seats for seat in stage]

    @property
    def engine(self) -> EngineProfile:
        """The engine version planned for."""
        return self.target.engine

    @property
    def mtp(self) -> bool:
        """Whether the MTP layer is loaded."""
        return self.request.mtp_steps > 0

    @cached_property
    def shape(self) -> Shape:
        """What sizes the workspaces."""
        chunk = chunk_tokens(self.engine, self.request, min(gpu.memory_total_bytes for gpu in self.gpus))
        return Shape(
            chunk_tokens=chunk,
            context_tokens=self.request.context_tokens,
            tp_size=self.layout.tp,
            attention_tp=self.layout.attention_tp,
            graph_rows=self.request.batch * (self.request.mtp_steps + 1),
            draft=self.mtp,
            sampling_rows=self.request.running * (self.request.mtp_steps + 1),
            tokens_per_request=self.request.mtp_steps + 1,
            moe_scratch_percent=max(self._quantization(gpu).moe_scratch_percent for gpu in kinds(self.gpus)),
        )

    @property
    def page(self) -> int:
        """Tokens of one KV page."""
        return self.engine.reserve.page_tokens

    @property
    def slack(self) -> int:
        """Rows the pool allocates beyond its tokens."""
        return self.engine.reserve.pool_slack_tokens

    @cached_property
    def tokens_per_rank(self) -> int:
        """Tokens every rank must cache to carry the request, whole pages, before the pool's slack."""
        per_group = ceil_div(self.request.concurrency, self.layout.dp) * self.request.context_tokens
        return ceil_div(ceil_div(per_group, self.layout.dcp), self.page) * self.page

    def ledger(self, stage: int) -> WeightLedger:
        """Weights per layer of a stage; stages differ where their GPUs load the checkpoint differently."""
        quantization = self._quantization(self.seats[stage][0].gpu)
        fused_on_amd = self.seats[stage][0].gpu.vendor == "amd" and self.engine.family == "sglang" and self.layout.ep > 1
        split = Split(
            self.layout.tp,
            self.layout.attention_tp,
            self.layout.ep,
            quantization.scale_denominator,
            # fused as expert 256, it stands whole in every EP group (0.5.23 fused_moe_triton/layer.py:416)
            shared_tp=self.layout.tp // self.layout.ep if fused_on_amd else None,
        )
        return weight_ledger(self.target, split)

    def _quantization(self, gpu: Gpu) -> QuantizationOption:
        found = quantization_for(self.engine, self.target.scheme, gpu)
        assert found is not None
        return found

    @cached_property
    def cells(self) -> list[KvCell]:
        """KV bytes per token of each layer, the MTP layer last."""
        return layer_cells(self.target, self.option.kv_format)

    def reserve_items(self, stage: int, gpu: Gpu) -> list[LineItem]:
        """Everything on a rank that is neither weights nor KV cache."""
        engine, config, reserve = self.engine, self.target.config, self.engine.reserve
        last = stage == self.layout.pp - 1
        items = [
            LineItem("other processes", gpu.memory_in_use_bytes, "others", "NVML or inventory"),
            LineItem("CUDA context", self._context_bytes(gpu), "runtime", reserve.cuda_context_source),
            LineItem("NCCL buffers", self._nccl_bytes(gpu), "runtime", reserve.nccl_source),
            LineItem(
                "activations", workspace.activation_bytes(engine, config, self.shape, self.option), "runtime",
                f"shapes of one forward pass over {self.shape.chunk_tokens:,} tokens (glmplan.model.workspace)",
            ),
            LineItem(ROPE_ITEM, self.rope_bytes, "runtime", engine.weights.source),
            LineItem("CUDA graphs", workspace.graph_bytes(engine, self.shape), "runtime", reserve.graph_source),
        ]  # fmt: skip
        items += [
            LineItem("attention workspace", self.option.workspace_bytes, "runtime", self.option.source),
            LineItem(
                "indexer decode scratch",
                workspace.decode_scratch_bytes(self.shape, self.option),
                "runtime",
                self.option.source,
            ),
            LineItem(
                REQUEST_ITEM, workspace.request_table_bytes(engine, self.shape), "runtime", "int32 slots of running requests"
            ),
        ]
        if last:
            size = workspace.sampling_bytes(config, self.shape)
            items.append(LineItem("sampling logits", size, "runtime", "rows x vocabulary, BF16 and F32"))
        margin = LineItem("margin", workspace.margin_bytes(gpu.capacity_bytes), "margin", "512 MiB and 1 % of the card")
        outside = sum(item.bytes for item in items if item.group == "runtime" and item.name not in NOT_FREED) + margin.bytes
        scratch = workspace.indexer_scratch_bytes(engine, self.shape, self.option, outside, gpu.capacity_bytes)
        if scratch:
            items.append(LineItem("indexer logits", scratch, "runtime", reserve.indexer_source))
        found = [item for item in [*items, margin] if item.bytes]
        return applied(found, self.request.measured, self._runtime_key(gpu), stage) if self.request.measured else found

    def _runtime_key(self, gpu: Gpu) -> RuntimeKey:
        """What a measurement must equal to stand in for the estimate."""
        layout, request, target = self.layout, self.request, self.target
        return RuntimeKey(
            engine=self.engine.id, model=target.model_name, checkpoint=target.checkpoint_name, gpu=gpu.label,
            tp_size=layout.tp, pp_size=layout.pp, dp_size=layout.dp, ep_size=layout.ep, dcp_size=layout.dcp,
            gpus_per_node=layout.gpus_per_node, kv_format=self.option.kv_format, prefill_backend=self.option.prefill,
            decode_backend=self.option.decode, chunk_tokens=self.shape.chunk_tokens,
            context_tokens=request.context_tokens, graph_max_bs=request.batch,
            max_running_requests=request.running, mtp_steps=request.mtp_steps,
        )  # fmt: skip

    @property
    def rope_bytes(self) -> int:
        """The cosine and sine table over every position, which is made with the weights."""
        config = self.target.config
        return config.max_position_embeddings * config.qk_rope_head_dim * self.engine.weights.rope_element_bytes

    def _context_bytes(self, gpu: Gpu) -> int:
        """AMD's usable memory was read beside a running context (records 8 and 9), so it is not charged again."""
        return 0 if gpu.vendor == "amd" else self.engine.reserve.cuda_context_bytes

    def _nccl_bytes(self, gpu: Gpu) -> int:
        reserve = self.engine.reserve
        if self.layout.gpus == 1:
            return 0
        if gpu.vendor == "amd":
            return reserve.nccl_amd_bytes
        if gpu.has_fast_link:
            tp_bytes, pp_bytes = reserve.nccl_tp_nvlink_bytes, reserve.nccl_pp_nvlink_bytes
        else:
            tp_bytes, pp_bytes = reserve.nccl_tp_pcie_bytes, reserve.nccl_pp_pcie_bytes
        return (tp_bytes if self.layout.tp > 1 else 0) + (pp_bytes if self.layout.pp > 1 else 0)

    @cached_property
    def costs(self) -> StageCosts:
        """The numbers the stage cuts are chosen by; of a stage's GPUs, the one with least left counts."""
        layers, stages = self.target.config.num_hidden_layers, self.layout.pp
        prefix = [0]
        for layer in range(layers):
            prefix.append(prefix[-1] + self.cells[layer].allocated)
        fixed, capacity, weights = [], [], []
        for stage in range(stages):
            ledger = self.ledger(stage)
            ends = sum(ledger.ends(stage == 0, stage == stages - 1, self.mtp).values())
            tightest = self.tightest_gpu(stage)
            fixed.append(ends + self._reserved(stage, tightest))
            capacity.append(tightest.capacity_bytes)
            weights.append(ledger.prefix)
        mtp_cell = self.cells[layers].allocated if self.mtp else 0
        fixed_cells = (*(0 for _ in range(stages - 1)), mtp_cell)
        return StageCosts(tuple(weights), prefix, tuple(fixed), fixed_cells, tuple(capacity))

    def tightest_gpu(self, stage: int) -> Gpu:
        """The GPU of a stage with the least memory to give."""
        return self._tightest[stage]

    @cached_property
    def _tightest(self) -> list[Gpu]:
        found = []
        for stage, seats in enumerate(self.seats):
            unlike = {(s.gpu.capacity_bytes, s.gpu.memory_in_use_bytes, s.gpu.has_fast_link): s.gpu for s in seats}
            found.append(min(unlike.values(), key=lambda gpu: gpu.capacity_bytes - self._reserved(stage, gpu)))
        return found

    def _reserved(self, stage: int, gpu: Gpu) -> int:
        return sum(item.bytes for item in self.reserve_items(stage, gpu))

    @cached_property
    def legal_start(self) -> list[bool]:
        """Which layers may begin a stage."""
        config = self.target.config
        if self.engine.parallel.relays_topk:
            return [True] * config.num_hidden_layers
        return list(config.indexer_full)

    def least_shortfall(self, tokens: int) -> int:
        """Bytes the average rank lacks: a lower bound on the worst rank's shortfall that needs no cut."""
        costs, stages = self.costs, self.layout.pp
        lightest = min(weights[-1] for weights in costs.weights)
        cells = costs.cells[-1] + sum(costs.fixed_cells)
        need = sum(costs.fixed) + lightest + cells * tokens
        return max(ceil_div(need - sum(costs.capacity), stages), 0)

    @property
    def has_room(self) -> bool:
        """Whether every stage's tightest GPU has anything left for weights."""
        costs = self.costs
        return all(fixed < capacity for fixed, capacity in zip(costs.fixed, costs.capacity, strict=True))

    def evaluate(self) -> Evaluation | None:
        """Choose the cuts; None where the layers cannot be cut into that many stages."""
        layers, pinned = self.target.config.num_hidden_layers, self.request.pins.stages
        tokens = self.tokens_per_rank + self.slack
        if pinned is not None:
            starts = [sum(pinned[:index]) for index in range(len(pinned) + 1)]
            return Evaluation(self, tuple(starts))
        cuts = best_cuts(self.costs, layers, self.legal_start, tokens, self.slack, self.page)
        return None if cuts is None else Evaluation(self, cuts)


@dataclass(frozen=True)
class Evaluation:
    """A candidate with its cuts."""

    candidate: Candidate
    cuts: Cuts

    @cached_property
    def shortfalls(self) -> list[int]:
        """Bytes each stage's tightest rank lacks for the request; 0 where it has enough."""
        costs, tokens = self.candidate.costs, self.candidate.tokens_per_rank + self.candidate.slack
        return [
            max(costs.need(stage, self.cuts[stage], self.cuts[stage + 1], tokens) - costs.capacity[stage], 0)
            for stage in range(len(costs.capacity))
        ]

    @cached_property
    def worst_stage(self) -> int:
        """The stage whose rank is fullest at the request."""
        costs, tokens = self.candidate.costs, self.candidate.tokens_per_rank + self.candidate.slack
        fills = [
            costs.need(stage, self.cuts[stage], self.cuts[stage + 1], tokens) / costs.capacity[stage]
            for stage in range(len(costs.capacity))
        ]
        return max(range(len(fills)), key=lambda stage: (self.shortfalls[stage], fills[stage]))

    @cached_property
    def memory_tokens(self) -> int:
        """Tokens a rank can cache by memory alone."""
        return pool_tokens(self.candidate.costs, self.cuts, self.candidate.slack, self.candidate.page)

    @cached_property
    def pool_tokens(self) -> int:
        """Tokens a rank will cache: what memory and the engine's rule at the chosen fraction both allow."""
        return self.budget.tokens

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens over all attention groups and context shards."""
        return self.pool_tokens * self.candidate.layout.dp * self.candidate.layout.dcp

    @property
    def fits(self) -> bool:
        """Whether the request is carried."""
        return not any(self.shortfalls) and self.pool_tokens >= self.candidate.tokens_per_rank

    @cached_property
    def budget(self) -> Budget:
        """The engine's own memory rule at the chosen fraction."""
        rule = _sglang_budget if self.candidate.engine.family == "sglang" else _vllm_budget
        return rule(self)

    def stage_weights(self, stage: int) -> int:
        """Weight bytes of a rank of the stage."""
        ledger = self.candidate.ledger(stage)
        pp = self.candidate.layout.pp
        ends = ledger.ends(stage == 0, stage == pp - 1, self.candidate.mtp)
        return ledger.prefix[self.cuts[stage + 1]] - ledger.prefix[self.cuts[stage]] + sum(ends.values())

    def stage_cells(self, stage: int) -> KvCell:
        """KV bytes per token of a rank of the stage."""
        cells = self.candidate.cells
        total = KvCell(0, 0, 0)
        for layer in range(self.cuts[stage], self.cuts[stage + 1]):
            total = total + cells[layer]
        if self.candidate.mtp and stage == self.candidate.layout.pp - 1:
            total = total + cells[-1]
        return total


@dataclass(frozen=True, slots=True)
class Budget:
    """The fraction to give the engine, and the tokens its rule then makes of it (capped by what memory holds).

    `limit` says what bounds the pool: memory, the engine's rule, or the user's fraction.
    """

    fraction: float
    tokens: int
    limit: str


def _stage_bases(found: Evaluation) -> list[tuple[int, int]]:
    """Free bytes before and after the weights on the tightest rank of each stage, as SGLang measures them."""
    bases = []
    for stage in range(found.candidate.layout.pp):
        gpu = found.candidate.tightest_gpu(stage)
        taken = sum(item.bytes for item in found.candidate.reserve_items(stage, gpu) if item.name in STARTUP_ITEMS)
        before = gpu.capacity_bytes - taken
        bases.append((before, before - found.stage_weights(stage) - found.candidate.rope_bytes))
    return bases


def _draft_correction(found: Evaluation, stage: int) -> tuple[int, int]:
    """Bytes to add to what is free after loading, and to the cell, when SGLang sizes the pool with MTP on.

    0.5.23 still holds the draft's own embedding then; 0.5.13.post1 has not loaded the draft yet.
    """
    candidate = found.candidate
    rules = candidate.engine.mtp
    if not candidate.mtp or stage != candidate.layout.pp - 1:
        return 0, 0
    if not rules.draft_before_pool:
        return sum(candidate.ledger(stage).mtp_account().values()), -candidate.cells[-1].budgeted
    if not rules.draft_embedding_while_sizing:
        return 0, 0
    embedding = candidate.target.weights.outer[Role.EMBEDDING].total
    return -ceil_div(embedding, candidate.layout.attention_tp), 0


def _sglang_budget(found: Evaluation) -> Budget:
    candidate, stages = found.candidate, range(found.candidate.layout.pp)
    bases = _stage_bases(found)
    corrections = [_draft_correction(found, stage) for stage in stages]
    before = max(min(base for base, _ in bases), 1)
    after = min(left + extra for (_, left), (extra, _) in zip(bases, corrections, strict=True))
    cell = max(found.stage_cells(stage).budgeted + corrections[stage][1] for stage in stages)

    def tokens_at(steps: int) -> int:
        pool = after - ceil_div(before * (FRACTION_STEPS - steps), FRACTION_STEPS)
        return max(pool // cell // candidate.page * candidate.page, 0)

    wanted = max(found.memory_tokens, 0)
    if candidate.request.mem_fraction is not None:
        fraction = candidate.request.mem_fraction
        given = tokens_at(round(fraction * FRACTION_STEPS))
        return Budget(fraction, min(given, wanted), "memory" if given >= wanted else "mem-fraction")
    steps = FRACTION_STEPS - (after - wanted * cell) * FRACTION_STEPS // before
    steps = min(max(steps, 1), MAX_FRACTION_STEPS)
    while steps < MAX_FRACTION_STEPS and tokens_at(steps) < wanted:
        steps += 1
    given = tokens_at(steps)
    return Budget(steps / FRACTION_STEPS, min(given, wanted), "memory" if given >= wanted else "engine rule")


def _vllm_budget(found: Evaluation) -> Budget:
    """vLLM gives the pool: total x utilisation less weights, non-torch memory, peak activation and graphs."""
    candidate = found.candidate
    wanted = max(found.memory_tokens, 0)
    steps, rows = 1, []
    for stage in range(candidate.layout.pp):
        gpu = candidate.tightest_gpu(stage)
        kept = sum(
            item.bytes
            for item in candidate.reserve_items(stage, gpu)
            if item.group == "runtime" and item.name != "CUDA context"
        )
        static, cell = kept + found.stage_weights(stage), found.stage_cells(stage).budgeted
        rows.append((gpu.capacity_bytes, static, cell))
        need = static + (wanted + candidate.slack) * cell
        steps = max(steps, ceil_div(need * FRACTION_STEPS, gpu.capacity_bytes))
    fixed = candidate.request.mem_fraction
    if fixed is not None:
        steps = round(fixed * FRACTION_STEPS)
    steps = min(steps, MAX_FRACTION_STEPS)
    page = candidate.page
    given = min((total * steps // FRACTION_STEPS - static) // cell // page * page for total, static, cell in rows)
    limit = "memory" if given >= wanted else ("engine rule" if fixed is None else "mem-fraction")
    return Budget(steps / FRACTION_STEPS, max(min(given, wanted), 0), limit)


_ledgers: dict[tuple[int, Split], WeightLedger] = {}
_cells: dict[tuple[int, str], list[KvCell]] = {}
_targets: dict[int, Target] = {}


def _keep(target: Target) -> int:
    """A cache key for a target; the reference kept makes its id unique for the life of the process."""
    _targets[id(target)] = target
    return id(target)


def weight_ledger(target: Target, split: Split) -> WeightLedger:
    """The weight ledger of a target for one split, made once."""
    key = (_keep(target), split)
    if key not in _ledgers:
        _ledgers[key] = WeightLedger(target.config, target.engine, target.weights, split)
    return _ledgers[key]


def layer_cells(target: Target, kv_format: str) -> list[KvCell]:
    """KV cells of every layer, the MTP layer last, made once."""
    key = (_keep(target), kv_format)
    if key not in _cells:
        kv = target.engine.kv_format(kv_format)
        layers = range(target.config.num_hidden_layers + 1)
        _cells[key] = [layer_cell(target.config, target.engine, kv, layer) for layer in layers]
    return _cells[key]
