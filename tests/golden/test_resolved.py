"""The golden command lines are those the engines' own argument code accepted and resolved as planned.

tests/recorded/resolved/sglang.json keeps argv, environment and resolved values (made by benchmarks/resolve_golden.py).
A changed command line fails here until it has been resolved again. Plans with glmplan's kernels were resolved with the
plugin that the engine's load_plugins found, and without it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.cases import CASES, node_command, plan_of, uses_port

RECORD = json.loads((Path(__file__).resolve().parents[1] / "recorded" / "resolved" / "sglang.json").read_text())


def flag(argv: list[str], name: str) -> str | None:
    """The value after a flag."""
    return argv[argv.index(name) + 1] if name in argv else None


@pytest.mark.parametrize("name", CASES)
def test_today_s_command_is_the_recorded_one(name):
    command, recorded = node_command(name), RECORD["cases"][name]
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


def test_every_case_is_recorded_and_no_other():
    assert RECORD["cases"].keys() == CASES.keys()
    assert {name for name, case in RECORD["cases"].items() if case["port"]} == {name for name in CASES if uses_port(name)}


@pytest.mark.parametrize("name", [name for name in CASES if uses_port(name)])
def test_without_the_plugin_the_engine_refuses_or_knows_no_better(name):
    """0.5.23 refuses triton on CUDA, whatever the GPU; 0.5.13.post1 takes tilelang and would fail in its kernels."""
    without = RECORD["cases"][name]["without_port"]
    if plan_of(name).engine == "sglang-0.5.23":
        assert without["exit_code"] == 1
        assert without["said"].startswith("ValueError: The triton DSA backend is only supported on ROCm/HIP.")
    else:
        assert without == {"exit_code": 0}


@pytest.mark.parametrize("name", CASES)
def test_the_plugin_is_told_what_the_plan_needs(name):
    """By itself it leaves alone a GPU that the engine serves: there, and beside such a GPU, it must be forced."""
    told = RECORD["cases"][name]["environment"].get("GLMPLAN_PORT")
    asked = CASES[name].options.get("kernel_port")
    served = {node.sm for node in plan_of(name).nodes} & ({90, 120} if plan_of(name).engine == "sglang-0.5.23" else {90})
    assert told == (asked or ("force" if uses_port(name) and served else None))
