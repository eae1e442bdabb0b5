"""The drawing of a report: well-formed, scaled from zero, readable in both colour schemes, and made of nothing unknown."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from glmplan.bench.plot import plot, ticks
from glmplan.bench.result import Level, Prefill, Report, Spread

SVG = "{http://www.w3.org/2000/svg}"


def level(concurrency: int, rate: float | None, decode: float | None = 1.0) -> Level:
    return Level(
        concurrency=None if rate else concurrency, rate_per_s=rate, requests=8, completed=8, seconds=1.0, prompt_tokens=8,
        output_tokens=8, counted_by="usage", output_tokens_per_s=decode,
        decode_tokens_per_s=decode, stream_tokens_per_s=decode,
        ttft=Spread(p50_s=0.1, p99_s=0.2, values=8), itl=Spread(p50_s=0.01, p99_s=0.02, values=8),
    )  # fmt: skip


def report(*levels: Level, prefill: tuple[Prefill, ...] = (), model: str = "glm") -> Report:
    return Report(
        glmplan_version="0", url="http://x", model=model, engine_family="sglang", engine_version="0.5.23",
        measured_with="glmplan", endpoint="completions", prompts="random token ids", started="2026-11-21T10:00:00Z",
        prompt_tokens=8, output_tokens=8, warmup_requests=1, levels=levels, prefill=prefill,
    )  # fmt: skip


def texts(drawing: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("most", "marks"),
    [
        (4.0, [0, 1, 2, 3, 4]), (7.0, [0, 2, 4, 6, 8]), (0.0, [0, 1]),
        (95.0, [0, 25, 50, 75, 100]), (0.037, [0, 0.01, 0.02, 0.03, 0.04]),
    ],
)  # fmt: skip
def test_ticks_are_round_begin_at_zero_and_reach_the_largest(most, marks):
    assert ticks(most) == pytest.approx(marks)


def test_every_load_and_every_quantity_is_there():
    found = plot(
        report(level(1, None), level(16, None), prefill=(Prefill(prompt_tokens=8192, requests=3, tokens_per_s=2e4),))
    )
    words = texts(found)
    for text in (
        "Throughput, tokens/s",
        "Time to first token, ms",
        "Time between tokens, ms",
        "Prefill, tokens/s",
        "1",
        "16",
    ):
        assert text in words
    assert "8,192" in words


def test_heights_are_in_proportion():
    found = ElementTree.fromstring(plot(report(level(1, None, 25.0), level(4, None, 100.0))))
    dots = [float(one.get("cy", "")) for one in found.iter(f"{SVG}circle") if one.get("class") == "dot a"][:2]
    zero = next(float(one.get("y1", "")) for one in found.iter(f"{SVG}line") if one.get("class") == "grid")
    assert (zero - dots[1]) / (zero - dots[0]) == pytest.approx(4.0, rel=0.01)


def test_unknown_values_leave_gaps_and_empty_panels_are_left_out():
    found = plot(report(level(1, None, None), level(4, None, 3.0)))
    assert "NaN" not in found
    assert "None" not in found
    assert "Prefill, tokens/s" not in texts(found)
    assert "svg" in plot(report())


def test_both_colour_schemes_define_every_colour_that_is_used():
    found = plot(report(level(1, None)))
    used = set(re.findall(r"var\(--(\w+)\)", found))
    light, dark = found.split("prefers-color-scheme: dark")
    assert used <= set(re.findall(r"--(\w+): #", light))
    assert used <= set(re.findall(r"--(\w+): #", dark))


def test_names_from_outside_cannot_break_the_drawing():
    found = plot(report(level(1, 2.5), model='<b>&"glm"'))
    assert any('<b>&"glm"' in text for text in texts(found))
    assert "requests per second" in texts(found)
