"""The golden command lines are those the engines' own argument code accepted and resolved as planned.

tests/recorded/resolved/sglang.json keeps argv, environment and resolved values (made by benchmarks/resolve_golden.py).
A changed command line fails here until it has been resolved again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.cases import CASES, node_command

RECORD = json.loads((Path(__file__).resolve().parents[1] / "recorded" / "resolved" / "sglang.json").read_text())


def flag(argv: list[str], name: str) -> str | None:
    """The value after a flag."""
    return argv[argv.index(name) + 1] if name in argv else None


@pytest.mark.parametrize("name", CASES)
def test_today_s_command_is_the_recorded_one(name):
    command, recorded = node_command(CASES[name]), RECORD["cases"][name]
    assert list(command.argv) == recorded["argv"]
    assert command.environment == recorded["environment"]


@pytest.mark.parametrize("name", CASES)
def test_the_engine_resolved_it_as_planned(name):
    recorded = RECORD["cases"][name]
    assert recorded["exit_code"] == 0
    resolved = dict(line.split(" = ", 1) for line in recorded["resolved"])
    argv = recorded["argv"]
    assert resolved["attention_backend"] == "dsa"
    assert resolved["dsa_prefill_backend"] == flag(argv, "--dsa-prefill-backend")
    assert resolved["dsa_decode_backend"] == flag(argv, "--dsa-decode-backend")
    assert resolved["kv_cache_dtype"] == flag(argv, "--kv-cache-dtype")
    assert float(resolved["mem_fraction_static"]) == float(flag(argv, "--mem-fraction-static") or 0)
    attention_groups = int(flag(argv, "--attn-dp-size") or flag(argv, "--dp-size") or 1)
    assert int(resolved["chunked_prefill_size"]) * attention_groups == int(flag(argv, "--chunked-prefill-size") or 0)
    graphs = resolved.get("cuda_graph_config") or resolved["cuda_graph_max_bs"]
    batch = flag(argv, "--cuda-graph-max-bs-decode") or flag(argv, "--cuda-graph-max-bs")
    assert str(batch) in graphs
    assert ("--disable-shared-experts-fusion" in argv) <= (resolved["disable_shared_experts_fusion"] == "True")
