"""Where to cut the layers into pipeline stages so that the fullest rank is as empty as possible.

Dynamic programming over (stage, first layer): `best[s][j]` is the smallest worst fill of stages 0..s holding layers
0..j-1. Fill is bytes needed over bytes there, at a given number of cached tokens. Stages may differ in capacity, and
may be made to begin on layers that compute their own top-k, where an engine does not send it between stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Bytes per rank. `weights` and `cells` are prefix sums over layers (length layers + 1); `fixed` and `capacity`
    are per stage; `fixed_cells` are bytes per token that do not depend on the cut (the MTP layer's)."""

    weights: tuple[Sequence[int], ...]
    cells: Sequence[int]
    fixed: tuple[int, ...]
    fixed_cells: tuple[int, ...]
    capacity: tuple[int, ...]

    def need(self, stage: int, first: int, last: int, tokens: int) -> int:
        """Bytes a rank of the stage needs for layers `first <= l < last` and that many cached tokens."""
        weights = self.weights[stage]
        cell = self.cells[last] - self.cells[first] + self.fixed_cells[stage]
        return self.fixed[stage] + weights[last] - weights[first] + cell * tokens

    def cell(self, stage: int, first: int, last: int) -> int:
        """KV bytes per token of a rank of the stage."""
        return self.cells[last] - self.cells[first] + self.fixed_cells[stage]


Cuts = tuple[int, ...]
"""Layer numbers 0 = c[0] < c[1] < ... < c[pp] = layers; stage s holds layers c[s] to c[s+1] - 1."""


def cut_layers(costs: StageCosts, layers: int, legal_start: Sequence[bool], tokens: int) -> Cuts | None:
    """The cut with the smallest worst fill (ties: the most even one); None where no legal cut exists."""
    stages = len(costs.capacity)
    infinite = (float("inf"), 0.0)
    best: list[tuple[float, float]] = [infinite] * (layers + 1)
    choice: list[list[int]] = []
    for end in range(1, layers - stages + 2):
        fill = costs.need(0, 0, end, tokens) / costs.capacity[0]
        best[end] = (fill, fill * fill)
    for stage in range(1, stages):
        row, picked = [infinite] * (layers + 1), [0] * (layers + 1)
        lowest, highest = (stage + 1, layers - (stages - 1 - stage)) if stage < stages - 1 else (layers, layers)
        for end in range(lowest, highest + 1):
            row[end], picked[end] = _best_start(costs, stage, end, tokens, legal_start, best)
        best = row
        choice.append(picked)
    if best[layers] == infinite:
        return None
    cuts = [layers]
    for picked in reversed(choice):
        cuts.append(picked[cuts[-1]])
    return (0, *reversed(cuts)) if stages > 1 else (0, layers)


def _best_start(
    costs: StageCosts,
    stage: int,
    end: int,
    tokens: int,
    legal_start: Sequence[bool],
    before: Sequence[tuple[float, float]],
) -> tuple[tuple[float, float], int]:
    """The best first layer of a stage that ends before `end`; fills only grow as it starts earlier."""
    weights, cells, capacity = costs.weights[stage], costs.cells, costs.capacity[stage]
    base = costs.fixed[stage] + weights[end] + (cells[end] + costs.fixed_cells[stage]) * tokens
    found, start = (float("inf"), 0.0), 0
    for first in range(end - 1, stage - 1, -1):
        fill = (base - weights[first] - cells[first] * tokens) / capacity
        if fill > found[0]:
            break
        if not legal_start[first]:
            continue
        worst, squares = before[first]
        value = (max(worst, fill), squares + fill * fill)
        if value < found:
            found, start = value, first
    return found, start


def pool_tokens(costs: StageCosts, cuts: Cuts, slack: int, page: int) -> int:
    """Tokens every rank can cache in what its weights and reserves leave; negative when even none fit."""
    smallest: int | None = None
    for stage in range(len(costs.capacity)):
        first, last = cuts[stage], cuts[stage + 1]
        left = costs.capacity[stage] - costs.need(stage, first, last, 0)
        tokens = left // costs.cell(stage, first, last) - slack
        smallest = tokens if smallest is None else min(smallest, tokens)
    assert smallest is not None
    return smallest // page * page


def best_cuts(
    costs: StageCosts, layers: int, legal_start: Sequence[bool], tokens: int, slack: int, page: int
) -> Cuts | None:
    """Cut for the asked tokens, then for as many as the GPUs hold: the pool takes what is left, so that decides."""
    cuts = cut_layers(costs, layers, legal_start, tokens)
    if cuts is None:
        return None
    held = pool_tokens(costs, cuts, slack, page)
    for _ in range(4):
        if held < tokens:
            return cuts
        again = cut_layers(costs, layers, legal_start, held + slack)
        assert again is not None
        more = pool_tokens(costs, again, slack, page)
        if more <= held:
            return cuts
        cuts, held = again, more
    return cuts
