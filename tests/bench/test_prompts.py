"""Prompts that no prefix cache knows."""

from __future__ import annotations

import pytest

from glmplan.bench.prompts import Prompts
from glmplan.bench.run import Settings
from glmplan.errors import UsageError
from glmplan.fleet.reference import FIRST_ID, LAST_ID


def test_prompts_of_one_run_differ_in_their_first_token():
    run = Prompts()
    first = [run.ids(100)[0] for _ in range(LAST_ID - FIRST_ID + 1)]
    assert len(set(first)) == len(first)


def test_prompts_of_two_runs_share_no_more_than_one_token():
    one, two = Prompts(seed=1), Prompts(seed=2)
    for _ in range(5):
        mine, other = one.ids(50), two.ids(50)
        assert mine[:2] != other[:2]


def test_lengths_are_exact_and_ids_exist_in_every_vocabulary():
    run = Prompts()
    for length in (1, 7, 8, 9, 4096):
        ids = run.ids(length)
        assert len(ids) == length
        assert all(FIRST_ID <= one <= LAST_ID for one in ids)


def test_a_seed_repeats_a_run():
    assert Prompts(seed=5).ids(64) == Prompts(seed=5).ids(64)
    assert Prompts(seed=5).words(64) == Prompts(seed=5).words(64)
    assert len(Prompts().words(64).split()) == 65


@pytest.mark.parametrize(
    "settings",
    [Settings(requests_per_level=10**9), Settings(rate_per_s=1e8), Settings(concurrency=(1, 4096), prompt_tokens=200_000)],
)
def test_more_requests_than_memory_holds_are_refused_before_they_are_made(settings: Settings) -> None:
    with pytest.raises(UsageError, match="too many for one level"):
        settings.check(None)
