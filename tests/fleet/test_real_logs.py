"""Logs that real engines wrote: every phase and figure that a launch shows is read from them."""

from __future__ import annotations

from pathlib import Path

from glmplan.fleet.log_lines import Phase
from glmplan.fleet.phases import NodeProgress
from glmplan.kernels.engines import parse_port_line
from glmplan.units import GIB

LOGS = Path(__file__).resolve().parents[1] / "recorded" / "engine-logs"


def test_sglang_0_5_23_on_one_h200_is_followed_to_the_end():
    text = (LOGS / "sglang-0.5.23-one-h200.log").read_text()
    progress, seen = NodeProgress("sglang", [(0, 0)], tp_size=1), []
    for number, line in enumerate(text.splitlines(keepends=True)):
        progress.feed(line, float(number))
        seen.append(progress.phase)
    assert progress.ready
    assert {Phase.JOINING, Phase.LOADING, Phase.LOADED, Phase.CAPTURING, Phase.CAPTURED, Phase.READY} <= set(seen)
    memory = progress.ranks[0, 0].memory
    assert memory.tokens == 14_371_648
    assert memory.weights_bytes == round(0.90 * GIB)
    assert memory.kv_bytes == round(68.53 * GIB)
    assert memory.graph_bytes == round(0.07 * GIB)


def test_the_plugin_s_line_is_found_in_a_real_log():
    lines = (LOGS / "sglang-0.5.23-one-h200.log").read_text().splitlines()
    found = [told for told in map(parse_port_line, lines) if told is not None]
    assert len(found) == 1
    assert (found[0].engine_version, found[0].sm, found[0].settings["kv"]) == ("0.5.23", 90, "packed")
    assert len(found[0].replaced) == 10
