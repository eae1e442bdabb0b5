"""What launch says while it waits."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

from glmplan.cli._follow import _left
from glmplan.fleet.deadline import LoadWork, Pulse
from glmplan.fleet.follow import NodeView
from glmplan.fleet.phases import NodeProgress
from tests.fleet.engine_logs import CAPTURING


def left(seconds_ago: float) -> str:
    began = time.monotonic() - seconds_ago
    progress = NodeProgress("sglang", [(0, 0)], 1, True, began)
    progress.feed(CAPTURING, began)
    node = NodeView("a", 0, progress, LoadWork(10**9, graphs=6), Pulse(began))
    return _left(cast(Any, SimpleNamespace(gpu_indexes=((0,),))), node)


def test_an_estimate_that_is_used_up_is_no_longer_told():
    estimate = "the 27 s estimated for 6 CUDA graphs and a first request where no kernel is compiled"
    assert left(0.0) == f", 100 % loaded, about 27 s left (by {estimate})"
    assert left(5.0) == f", 100 % loaded, about 22 s left (by {estimate})"
    assert left(60.0) == f", 100 % loaded, time left unknown (longer than {estimate})"
