"""Every number of a level against values worked out by hand."""

from __future__ import annotations

import pytest

from glmplan.bench.statistics import Answer, covered_s, level, percentile, prefill, token_gaps


def answer(began: float, marks: list[tuple[float, int]], prompt: int = 100, **more: object) -> Answer:
    """A complete answer whose tokens the server counted."""
    found = Answer(began_s=began, ended_s=marks[-1][0] if marks else began, marks=marks, prompt_tokens=prompt)
    found.tokens, found.counted_by, found.steps_known = (marks[-1][1] if marks else 0), "usage", True
    for name, value in more.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5.0], 0.99, 5.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.01),
        ([0.0, 10.0], 0.99, 9.9),
    ],
)
def test_percentiles_interpolate_between_neighbours(values, share, expected):
    assert percentile(values, share) == pytest.approx(expected)


def test_overlapping_streams_count_their_time_once():
    assert covered_s([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.4)]) == pytest.approx(4.0)
    assert covered_s([]) == 0.0


def test_a_chunk_of_three_tokens_is_three_equal_steps():
    assert token_gaps(answer(0.0, [(1.0, 1), (1.3, 4), (1.5, 5)])) == pytest.approx([0.1, 0.1, 0.1, 0.2])


def test_one_stream():
    one = answer(10.0, [(10.5, 1), (10.6, 2), (10.7, 3), (10.9, 4)])
    found = level([one], 1, None)
    assert found.output_tokens_per_s == pytest.approx(4 / 0.9)
    assert found.decode_tokens_per_s == pytest.approx(3 / 0.4)
    assert found.stream_tokens_per_s == pytest.approx(3 / 0.4)
    assert found.ttft is not None
    assert (found.ttft.p50_s, found.ttft.p99_s, found.ttft.values) == pytest.approx((0.5, 0.5, 1))
    assert found.itl is not None
    assert found.itl.p50_s == pytest.approx(0.1)
    assert found.itl.p99_s == pytest.approx(0.1 + 0.98 * 0.1)
    assert (found.seconds, found.prompt_tokens, found.output_tokens) == (pytest.approx(0.9), 100, 4)
    assert found.counted_by == "usage"


def test_two_streams_side_by_side_add_up_while_either_decodes():
    answers = [answer(0.0, [(1.0, 1), (3.0, 21)]), answer(0.0, [(2.0, 1), (4.0, 11)])]
    found = level(answers, 2, None)
    assert found.decode_tokens_per_s == pytest.approx((20 + 10) / 3.0)
    assert found.stream_tokens_per_s == pytest.approx((10 + 5) / 2)
    assert found.output_tokens_per_s == pytest.approx(32 / 4.0)


def test_failed_and_cut_answers_are_in_no_rate():
    good = answer(0.0, [(1.0, 1), (2.0, 11)])
    failed = answer(0.0, [(0.1, 1), (0.2, 500)], failure="HTTP 503: full")
    again = answer(0.0, [], failure="HTTP 503: full")
    other = answer(0.0, [], failure="connection refused")
    cut = answer(0.0, [(0.1, 1), (9.0, 900)], failure="the connection broke", cut=True)
    found = level([good, failed, again, other, cut], 4, None, interrupted=True)
    assert (found.requests, found.completed, found.failed) == (4, 1, 3)
    assert [(one.words, one.requests) for one in found.failures] == [("HTTP 503: full", 2), ("connection refused", 1)]
    assert found.output_tokens == 11
    assert found.seconds == pytest.approx(2.0)
    assert found.interrupted


def test_an_answer_in_one_chunk_has_no_decode_rate():
    found = level([answer(0.0, [(1.0, 20)])], 1, None)
    assert (found.decode_tokens_per_s, found.stream_tokens_per_s, found.itl) == (None, None, None)
    assert found.output_tokens_per_s == pytest.approx(20.0)


def test_one_answer_that_nobody_counted_makes_the_level_one_of_chunks():
    plain = answer(0.0, [(1.0, 1), (2.0, 2)], counted_by="chunks", steps_known=False)
    found = level([answer(0.0, [(1.0, 1), (2.0, 2)]), plain], 2, None)
    assert (found.counted_by, found.itl_of_chunks) == ("chunks", True)


def test_nothing_answered_gives_no_numbers_and_no_division():
    found = level([answer(0.0, [], failure="connection refused")], 1, None)
    assert (found.completed, found.output_tokens_per_s, found.ttft, found.itl) == (0, None, None, None)
    assert level([], 1, None).requests == 0


def test_cached_tokens_are_unknown_unless_told():
    assert level([answer(0.0, [(1.0, 1)])], 1, None).cached_tokens is None
    assert level([answer(0.0, [(1.0, 1)], cached_tokens=0)], 1, None).cached_tokens == 0


def test_prefill_is_the_length_over_the_median_first_token():
    found = prefill(1000, [answer(0.0, [(t, 1)], prompt=1000) for t in (0.5, 0.4, 9.0)])
    assert found.tokens_per_s == pytest.approx(2000.0)
    assert prefill(1000, [answer(0.0, [(0.5, 1)], prompt=900)]).tokens_per_s == pytest.approx(1800.0)
    assert prefill(1000, [answer(0.0, [], failure="x")]).tokens_per_s is None
