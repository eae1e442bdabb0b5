"""Cuts against brute force: no legal cut has an emptier fullest rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmplan.planning.stages import Cuts, StageCosts, best_cuts, cut_layers, pool_tokens


@dataclass(frozen=True)
class Problem:
    """Everything a cut is chosen by."""

    costs: StageCosts
    layers: int
    legal: tuple[bool, ...]
    tokens: int

    @property
    def stages(self) -> int:
        return len(self.costs.capacity)

    def worst(self, cuts: Cuts, tokens: int | None = None) -> float:
        """The fill of the fullest rank."""
        asked = self.tokens if tokens is None else tokens
        return max(
            self.costs.need(stage, cuts[stage], cuts[stage + 1], asked) / self.costs.capacity[stage]
            for stage in range(self.stages)
        )

    def legal_cuts(self) -> list[Cuts]:
        """Every cut whose later stages begin where they may."""
        starts = [layer for layer in range(1, self.layers) if self.legal[layer]]
        return [(0, *inner, self.layers) for inner in combinations(starts, self.stages - 1)]


def prefix(values: list[int]) -> list[int]:
    return [sum(values[:count]) for count in range(len(values) + 1)]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layers, stages = draw(st.integers(1, 10)), draw(st.integers(1, 4))
    bytes_of = st.integers(0, 1000)

    def per(count: int, values: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(values, min_size=count, max_size=count))

    alike = draw(st.booleans())
    shared = per(layers, bytes_of)
    costs = StageCosts(
        weights=tuple(prefix(shared if alike else per(layers, bytes_of)) for _ in range(stages)),
        cells=prefix(per(layers, st.integers(1, 9))),
        fixed=tuple(per(stages, bytes_of)),
        fixed_cells=tuple(per(stages, st.integers(0, 3))),
        capacity=tuple(per(stages, st.integers(1, 5000))),
    )
    legal = (True, *per(layers - 1, st.booleans()))
    return Problem(costs, layers, tuple(map(bool, legal)), draw(st.integers(0, 300)))


@settings(max_examples=400)
@given(problem=problems())
def test_no_legal_cut_has_an_emptier_fullest_rank(problem):
    cuts = cut_layers(problem.costs, problem.layers, problem.legal, problem.tokens)
    every = problem.legal_cuts()
    if not every:
        assert cuts is None
        return
    assert cuts in every
    assert problem.worst(cuts) == min(problem.worst(other) for other in every)


@settings(max_examples=200)
@given(problem=problems())
def test_every_layer_has_one_stage_and_every_stage_a_layer(problem):
    cuts = cut_layers(problem.costs, problem.layers, problem.legal, problem.tokens)
    if cuts is None:
        return
    sizes = [last - first for first, last in pairwise(cuts)]
    assert len(sizes) == problem.stages
    assert sum(sizes) == problem.layers
    assert min(sizes) >= 1
    assert all(problem.legal[start] for start in cuts[:-1])


@settings(max_examples=200)
@given(problem=problems(), slack=st.integers(0, 5), page=st.sampled_from([1, 4, 64]))
def test_the_pool_is_the_most_whole_pages_that_every_rank_holds(problem, slack, page):
    for cuts in problem.legal_cuts()[:3]:
        held = pool_tokens(problem.costs, cuts, slack, page)
        assert held % page == 0
        assert held + slack < 0 or problem.worst(cuts, held + slack) <= 1
        assert problem.worst(cuts, max(held + page + slack, 0)) > 1


@settings(max_examples=200)
@given(problem=problems(), slack=st.integers(0, 5), page=st.sampled_from([1, 4]))
def test_cutting_for_the_pool_never_loses_what_fits(problem, slack, page):
    asked = problem.tokens
    plain = cut_layers(problem.costs, problem.layers, problem.legal, asked + slack)
    best = best_cuts(problem.costs, problem.layers, problem.legal, asked + slack, slack, page)
    if plain is None:
        assert best is None
        return
    assert best in problem.legal_cuts()
    before, after = (pool_tokens(problem.costs, cuts, slack, page) for cuts in (plain, best))
    assert after >= before
    if problem.worst(plain, asked + slack) <= 1:
        assert after >= asked // page * page


def test_unlike_stages_take_layers_by_their_memory():
    even = prefix([10] * 12)
    costs = StageCosts((even, even, even), prefix([0] * 12), (0, 0, 0), (0, 0, 0), (120, 60, 60))
    assert cut_layers(costs, 12, [True] * 12, 0) == (0, 6, 9, 12)


def test_more_stages_than_layers_have_no_cut():
    even = prefix([10, 10])
    costs = StageCosts((even,) * 3, prefix([1, 1]), (0,) * 3, (0,) * 3, (100,) * 3)
    assert cut_layers(costs, 2, [True] * 2, 0) is None


def test_fixed_bytes_push_layers_away():
    even = prefix([10] * 10)
    costs = StageCosts((even, even), prefix([0] * 10), (0, 40), (0, 0), (200, 200))
    assert cut_layers(costs, 10, [True] * 10, 0) == (0, 7, 10)


@pytest.mark.parametrize(("tokens", "expected"), [(0, (0, 2, 4)), (1000, (0, 3, 4))])
def test_cached_tokens_count_as_much_as_weights(tokens, expected):
    costs = StageCosts((prefix([10] * 4),) * 2, prefix([0, 0, 0, 1]), (0, 0), (0, 0), (5000, 5000))
    assert cut_layers(costs, 4, [True] * 4, tokens) == expected
