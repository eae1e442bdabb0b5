"""How does a plugin learn what it is asked to do, and how does it end a process that must not serve?

Engines log an exception from a plugin and go on without it, which would leave a server with the wrong kernels. So a plugin
that cannot serve says one sentence on stderr and ends its process; the engine's parent process sees its child die.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from glmplan.errors import GlmplanError, UsageError
from glmplan.kernels import run_as
from glmplan.kernels.engines import FAILURE, PORT, PORT_MODES

Result = TypeVar("Result")
SHAPES = {
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
}  # fmt: skip
"""GLM-5.2's, as its config.json and both engines name them: what the kernels are for."""
OLDEST_SM = 80


def port_mode() -> str:
    """What GLMPLAN_PORT asks for: auto (unset, too), force or off."""
    asked = os.environ.get(PORT, "").strip() or "auto"
    if asked not in PORT_MODES:
        raise UsageError(f"{PORT} is {asked!r}; known are {', '.join(PORT_MODES)}.", f"Unset {PORT}, or set one of these.")
    return asked


def end_process(error: GlmplanError) -> NoReturn:
    """One sentence on stderr, then the end of this process, past every handler that would log and continue."""
    sentence = " ".join(f"{error.message} {error.next_step}".split())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.write(2, f"{FAILURE} {sentence}\n".encode())
    os._exit(error.exit_code)


@contextmanager
def fatal_errors(doing: str) -> Iterator[None]:
    """Whatever goes wrong inside ends the process; an unexpected error keeps its type and text."""
    try:
        yield
    except GlmplanError as error:
        end_process(error)
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        end_process(GlmplanError(f"{doing} stopped with {type(error).__name__}: {reason}."))


def say(line: str) -> None:
    """To stderr whatever the engine's log level, in one write so that ranks do not interleave."""
    sys.stderr.flush()
    os.write(2, f"{line}\n".encode())


def requested_sm() -> int | None:
    """The SM that GLMPLAN_RUN_AS names, or None."""
    text = os.environ.get(run_as.ENVIRONMENT, "").strip()
    return run_as.parse_sm(text) if text else None


def compiled_as_asked(call: Callable[..., Result]) -> Callable[..., Result]:
    """`call` with GLMPLAN_RUN_AS applied to the kernels it launches and to no others.

    The engine's own Triton kernels (block-FP8 GEMM, MoE) need FP8 types that sm_80 lacks, so they stay native.
    """
    sm = requested_sm()
    if sm is None:
        return call

    def as_other_sm(*arguments: Any, **keywords: Any) -> Result:
        if run_as.active_sm() is not None:
            return call(*arguments, **keywords)
        with run_as.as_sm(sm):
            return call(*arguments, **keywords)

    return as_other_sm
