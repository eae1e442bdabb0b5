"""Every recipe plans to the layout that its author ran."""

from __future__ import annotations

import pytest

from glmplan.cli._options import PlanningOptions
from glmplan.cli._plan import make_plan
from glmplan.errors import UsageError
from glmplan.facts.profiles import recipe, recipe_names


def test_the_seeds_are_recipes():
    assert len(recipe_names()) == 5


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_comes_to_the_layout_that_was_run(name):
    expected = recipe(name).layout
    plan = make_plan(PlanningOptions(recipe=name), with_changes=False)
    assert plan.fits
    assert (plan.layout.tp_size, plan.layout.pp_size) == (expected.tp_size, expected.pp_size)
    assert expected.stages in (None, plan.layout.stages)


def test_the_user_s_options_win_over_the_recipe_s():
    plan = make_plan(PlanningOptions(recipe="8x-h200", gpus="16x h200", context="128k"), with_changes=False)
    assert plan.settings.context_tokens == 131_072
    assert plan.checkpoint == "w4afp8"


def test_an_unknown_recipe_suggests_near_ones():
    with pytest.raises(UsageError) as raised:
        make_plan(PlanningOptions(recipe="8x-h20"))
    assert "8x-h200" in raised.value.next_step
