"""A report as an SVG drawing: throughput, time to first token and time between tokens by load, prefill rate by length.

Written by hand, without a plotting library; colours follow the reader's light or dark scheme, and lines differ in their
dashes as well. Axes begin at zero; loads stand at equal distances in the order asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from glmplan.bench.result import Report, Spread

PANEL_WIDTH, PANEL_HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 52, 42
HEAD = 54
STYLE = """
  svg { --back: #ffffff; --ink: #1c2430; --soft: #5b6675; --grid: #dfe4ea; --a: #1f5fbf; --b: #b4480f; --c: #1c7a4a; }
  @media (prefers-color-scheme: dark) {
    svg { --back: #14181e; --ink: #e7ebf0; --soft: #9aa5b3; --grid: #303844; --a: #7db2ff; --b: #ffa766; --c: #6fd39c; }
  }
  .back { fill: var(--back); } text { fill: var(--ink); font: 12px system-ui, sans-serif; }
  .title { font-weight: 600; font-size: 13px; } .head { font-weight: 600; font-size: 16px; } .soft { fill: var(--soft); }
  .grid { stroke: var(--grid); stroke-width: 1; } .line { fill: none; stroke-width: 2; }
  .a { stroke: var(--a); } .b { stroke: var(--b); stroke-dasharray: 6 3; } .c { stroke: var(--c); stroke-dasharray: 2 3; }
  .dot { stroke: none; } .dot.a { fill: var(--a); } .dot.b { fill: var(--b); } .dot.c { fill: var(--c); }
"""
CLASSES = ("a", "b", "c")


@dataclass(frozen=True)
class Line:
    """One line of a panel; None leaves a gap."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Panel:
    """One drawing: lines over the same places on the x axis."""

    title: str
    unit: str
    axis: str
    places: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def drawable(self) -> bool:
        """Whether there is anything to draw."""
        return any(value is not None for line in self.lines for value in line.values)


def plot(report: Report) -> str:
    """The drawing as the text of an SVG file."""
    panels = [panel for panel in _panels(report) if panel.drawable]
    columns = min(2, max(1, len(panels)))
    rows = math.ceil(len(panels) / columns)
    width, height = columns * PANEL_WIDTH, HEAD + rows * PANEL_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<title>{escape(_title(report))}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{width}" height="{height}"/>',
        f'<text class="head" x="16" y="26">{escape(_title(report))}</text>',
        f'<text class="soft" x="16" y="44">{escape(_subtitle(report))}</text>',
    ]
    for place, panel in enumerate(panels):
        x, y = place % columns * PANEL_WIDTH, HEAD + place // columns * PANEL_HEIGHT
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _draw(panel)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _title(report: Report) -> str:
    engine = f"{report.engine_family} {report.engine_version}".strip() if report.engine_family else "unknown engine"
    return f"{report.model} on {engine}" + (" (interrupted)" if report.interrupted else "")


def _subtitle(report: Report) -> str:
    return (
        f"{report.prompt_tokens:,} prompt and {report.output_tokens:,} output tokens, {report.prompts}, "
        f"measured with {report.measured_with}, {report.started}"
    )


def _panels(report: Report) -> list[Panel]:
    levels = report.levels
    by_rate = any(level.rate_per_s is not None for level in levels)
    places = tuple(f"{level.rate_per_s:g}" if level.rate_per_s is not None else str(level.concurrency) for level in levels)
    axis = "requests per second" if by_rate else "requests at once"
    lengths = tuple(f"{one.prompt_tokens:,}" for one in report.prefill)
    return [
        Panel(
            "Throughput", "tokens/s", axis, places,
            (
                Line("decode, all streams", tuple(level.decode_tokens_per_s for level in levels)),
                Line("output over all time", tuple(level.output_tokens_per_s for level in levels)),
                Line("one stream", tuple(level.stream_tokens_per_s for level in levels)),
            ),
        ),
        Panel("Time to first token", "ms", axis, places, _times([level.ttft for level in levels])),
        Panel("Time between tokens", "ms", axis, places, _times([level.itl for level in levels])),
        Panel(
            "Prefill", "tokens/s", "prompt tokens", lengths,
            (Line("one request", tuple(one.tokens_per_s for one in report.prefill)),),
        ),
    ]  # fmt: skip


def _times(spreads: Sequence[Spread | None]) -> tuple[Line, ...]:
    return (
        Line("median", tuple(None if one is None else one.p50_s * 1000 for one in spreads)),
        Line("99th percentile", tuple(None if one is None else one.p99_s * 1000 for one in spreads)),
    )


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to above `most`, four to six of them."""
    if most <= 0:
        return [0.0, 1.0]
    raw = most / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [step * place for place in range(math.ceil(most / step - 1e-9) + 1)]


def _draw(panel: Panel) -> list[str]:
    values = [value for line in panel.lines for value in line.values if value is not None]
    marks = ticks(max(values))
    inner_width, inner_height = PANEL_WIDTH - LEFT - RIGHT, PANEL_HEIGHT - TOP - BOTTOM
    step = inner_width / max(1, len(panel.places))

    def x(place: int) -> float:
        return LEFT + step * (place + 0.5)

    def y(value: float) -> float:
        return TOP + inner_height * (1 - value / marks[-1])

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(panel.title)}, {panel.unit}</text>', *_legend(panel)]
    for mark in marks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{PANEL_WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{_number(mark)}</text>')
    for place, name in enumerate(panel.places):
        parts.append(
            f'<text class="soft" x="{x(place):.1f}" y="{TOP + inner_height + 18}" text-anchor="middle">{escape(name)}</text>'
        )
    middle = LEFT + inner_width / 2
    parts.append(f'<text class="soft" x="{middle:.1f}" y="{PANEL_HEIGHT - 8}" text-anchor="middle">{panel.axis}</text>')
    for kind, line in zip(CLASSES, panel.lines, strict=False):
        points = [(x(place), y(value)) for place, value in enumerate(line.values) if value is not None]
        if not points:
            continue
        path = " ".join(f"{'M' if place == 0 else 'L'}{px:.1f} {py:.1f}" for place, (px, py) in enumerate(points))
        parts.append(f'<path class="line {kind}" d="{path}"/>')
        parts += [f'<circle class="dot {kind}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in points]
    return parts


def _legend(panel: Panel) -> list[str]:
    parts, at = [], float(LEFT)
    for kind, line in zip(CLASSES, panel.lines, strict=False):
        if all(value is None for value in line.values):
            continue
        parts.append(f'<line class="line {kind}" x1="{at:.0f}" x2="{at + 20:.0f}" y1="32" y2="32"/>')
        parts.append(f'<text class="soft" x="{at + 25:.0f}" y="36">{escape(line.name)}</text>')
        at += 42 + 6.3 * len(line.name)
    return parts


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
