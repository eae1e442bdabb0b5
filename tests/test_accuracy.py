"""The accuracy page is what its generator prints, and its aims hold as the page says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    """benchmarks/accuracy.py, whose folder is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("accuracy")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def records(accuracy: ModuleType) -> ModuleType:
    """benchmarks/accuracy_records.py."""
    return sys.modules["accuracy_records"]


def test_the_page_is_what_the_generator_prints(accuracy: ModuleType) -> None:
    assert accuracy.PAGE.read_text(encoding="utf-8") == accuracy.page(), "python benchmarks/accuracy.py --write"


@pytest.mark.parametrize("quantity", ["weights", "pool", "total"])
def test_an_aim_that_is_met_stays_met(accuracy: ModuleType, quantity: str) -> None:
    found = accuracy.comparisons(quantity)
    assert accuracy.typical(found) <= accuracy.AIMS[quantity]


def test_no_pool_is_read_with_wrong_bytes_per_token(accuracy: ModuleType) -> None:
    assert max(abs(one.error) for one in accuracy.comparisons("pool")) < 0.005


def test_the_page_says_whether_tokens_end_to_end_meet_their_aim(accuracy: ModuleType) -> None:
    median = accuracy.typical(accuracy.comparisons("end to end"))
    row = next(line for line in accuracy.page().splitlines() if line.startswith("| KV tokens end to end"))
    assert row.endswith("| met |" if median <= accuracy.AIMS["end to end"] else "| missed |")
    assert median < 0.11, "the documented miss has grown"


def test_every_miss_is_named_with_a_reason(accuracy: ModuleType, records: ModuleType) -> None:
    page = accuracy.page()
    for one in accuracy.missed():
        assert records.MISSES[(one.reading.id, one.quantity)] in page
        assert f"ecord {one.reading.id} {one.quantity} {accuracy.percent(one.error, 1)}" in page


def test_every_record_is_compared_or_left_out_with_a_reason(accuracy: ModuleType, records: ModuleType) -> None:
    assert len(accuracy.readings()) == 92
    for quantity in records.QUANTITIES:
        compared = {one.reading.id for one in accuracy.comparisons(quantity)}
        left_out = {r.id for r in accuracy.readings() if records.missing(r, quantity)}
        assert not compared & left_out
        assert len(compared | left_out) == 92


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("55.67 GiB", 55.67),
        ("52.62 GB target + 2.74 GB NextN draft", 55.36),
        ("75.92 GB (one rank 75.46)", 75.92),
        ("6.96-6.97 GiB", 6.965),
        ("49.6-50.0 GB after pools", 49.8),
        ("107.83 GiB model + non-torch", 107.83),
        ("~57 GiB", 57.0),
    ],
)
def test_a_printed_amount_is_read_in_gib(records: ModuleType, text: str, gib: float) -> None:
    assert records.amount(text) == round(gib * records.GIB)


def test_a_decimal_amount_stays_decimal_and_an_absent_one_is_none(records: ModuleType) -> None:
    assert records.amount("79.1 GB", decimal=True) == 79_100_000_000
    assert records.amount(None) is None
    assert records.amount("not stated") is None


@pytest.mark.parametrize(("value", "tokens"), [(319_232, 319_232), ("~560k (DCP4 ~2.1M)", 560_000), ("~1.16M", 1_160_000)])
def test_a_printed_token_count_is_read(records: ModuleType, value: object, tokens: int) -> None:
    assert records.token_count(value) == tokens
