"""Which variants of the kernels are there? What launching and compiling ahead of time must agree on."""

from __future__ import annotations

FP8_SM = 89
FILL_BLOCK = 2048


def request_block(requests: int) -> int:
    """Lanes of the scan over requests: few sizes, so few compilations."""
    return next(size for size in (1, 16, 128, 1024) if requests <= size)
