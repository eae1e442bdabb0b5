"""What launch says while it waits."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

from glmplan.cli._follow import _left, _table
from glmplan.fleet.deadline import LoadWork, Pulse
from glmplan.fleet.follow import NodeView, Snapshot
from glmplan.fleet.phases import NodeProgress
from tests.fleet.engine_logs import CAPTURING

DEPLOYMENT = cast(Any, SimpleNamespace(name="d", gpu_indexes=((0,),), rehearsal=False))


def capturing(seconds_ago: float, *compilers: str) -> NodeView:
    began = time.monotonic() - seconds_ago
    progress = NodeProgress("sglang", [(0, 0)], 1, True, began)
    progress.feed(CAPTURING, began)
    return NodeView("a", 0, progress, LoadWork(10**9, graphs=6), Pulse(began), compilers=compilers)


def left(seconds_ago: float, *compilers: str) -> str:
    return _left(DEPLOYMENT, capturing(seconds_ago, *compilers))


def left_in_table(node: NodeView) -> str:
    (cell,) = _table(DEPLOYMENT, Snapshot(60.0, (node,), ()), 400.0).columns[-1].cells
    return str(cell)


def test_an_estimate_that_is_used_up_is_no_longer_told():
    estimate = "the 27 s estimated for 6 CUDA graphs and a first request where no kernel is compiled"
    assert left(0.0) == f", 100 % loaded, about 27 s left (by {estimate})"
    assert left(5.0) == f", 100 % loaded, about 22 s left (by {estimate})"
    assert left(60.0) == f", 100 % loaded, time left unknown (longer than {estimate})"


def test_a_start_that_compiles_longer_than_estimated_says_so():
    assert "compiled by" not in left(5.0, "cicc", "ninja")
    assert left(60.0, "cicc", "ninja").startswith(
        ", 100 % loaded, kernels are compiled by cicc and ninja, time left unknown (longer than "
    )
    assert left_in_table(capturing(5.0, "cicc")) == "22 s"
    assert left_in_table(capturing(60.0, "cicc")) == "compiling"
    assert left_in_table(capturing(60.0)) == "unknown"
