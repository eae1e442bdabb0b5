"""What a plan predicts beside what the server says of itself: KV cache tokens, context, running requests.

A plan has no model of speed, so no rate of a benchmark has a prediction. SGLang tells at /server_info (0.5.23: the fields
`max_total_num_tokens`, `context_length` and `internal_states[].effective_max_running_requests_per_dp`), vLLM 0.33.0 in the
metric `vllm:cache_config_info` (`num_gpu_blocks` x `block_size`, per data-parallel engine).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from glmplan.bench.result import Beside, Level
from glmplan.errors import GlmplanError
from glmplan.fleet.served import Served
from glmplan.planning.plan import Plan

SPEED = "Speed is not predicted: the plan has no model of it, only of memory."
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def server_told(served: Served) -> dict[str, Any]:
    """The server's own account of itself at /server_info; empty where it gives none."""
    for path in ("/server_info", "/get_server_info"):
        try:
            found = served.request("GET", path, None)
        except GlmplanError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def beside(plan: Plan, served: Served, told: dict[str, Any]) -> tuple[Beside, ...]:
    """The plan's numbers with the server's."""
    kv_tokens, kv_source = _number(told.get("max_total_num_tokens")), "/server_info"
    if kv_tokens is None:
        kv_tokens, kv_source = _vllm_kv_tokens(served), "/metrics"
    try:
        context = served.context_tokens
    except GlmplanError:
        context = None
    running = _running(told)
    return (
        _row("KV cache tokens", plan.kv_cache_tokens, kv_tokens, kv_source),
        _row("context tokens", plan.settings.context_tokens, context, "/v1/models"),
        _row("running requests", plan.settings.max_running_requests, running, "/server_info"),
    )


def _row(name: str, predicted: int, measured: int | None, source: str) -> Beside:
    return Beside(name=name, predicted=predicted, measured=measured, source=source if measured is not None else "not told")


def plan_notes(plan: Plan, levels: Sequence[Level], prompt_tokens: int, output_tokens: int) -> tuple[str, ...]:
    """What the plan says about the loads that were asked."""
    found = [SPEED]
    for level in levels:
        need = (level.concurrency or 0) * (prompt_tokens + output_tokens)
        if need > plan.kv_cache_tokens:
            found.append(
                f"At {level.label} all requests together hold {need:,} tokens, the plan's KV cache "
                f"{plan.kv_cache_tokens:,}: some wait for others."
            )
        if level.concurrency and level.concurrency > plan.settings.max_running_requests:
            most = plan.settings.max_running_requests
            found.append(f"{level.label} is more than the {most} requests that the plan lets run at once.")
    return tuple(found)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _running(told: dict[str, Any]) -> int | None:
    """Over all data-parallel schedulers; before 0.5.13 only what was asked for."""
    states = told.get("internal_states")
    if isinstance(states, list) and states:
        found = [_number(one.get("effective_max_running_requests_per_dp")) for one in states if isinstance(one, dict)]
        known = [one for one in found if one is not None]
        if known and len(known) == len(states):
            return sum(known)
    return _number(told.get("max_running_requests"))


def _vllm_kv_tokens(served: Served) -> int | None:
    try:
        text = served.request("GET", "/metrics", None)
    except GlmplanError:
        return None
    total = 0
    for line in str(text).splitlines():
        if line.startswith("vllm:cache_config_info{"):
            labels = dict(_LABEL.findall(line))
            blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            total += int(blocks) * int(size) if blocks.isdecimal() and size.isdecimal() else 0
    return total or None
