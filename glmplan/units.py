"""How bytes are written and read: integers inside, KiB/MiB/GiB only where people look."""

from __future__ import annotations

import re
from difflib import get_close_matches

from glmplan.errors import UsageError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": KIB, "m": MIB, "g": GIB, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4}


def format_bytes(count: int) -> str:
    """`47517728768` -> `44.25 GiB`; below one MiB the exact number of bytes."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size >= 100 * GIB:
        return f"{sign}{size / GIB:,.1f} GiB"
    if size >= GIB:
        return f"{sign}{size / GIB:.2f} GiB"
    if size >= MIB:
        return f"{sign}{size / MIB:.0f} MiB"
    return f"{sign}{size:,} bytes"


def parse_bytes(text: str, what: str = "size") -> int:
    """Read `48GiB`, `48 GB`, `49140 MiB` or a plain number of bytes; raise UsageError on anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        raise UsageError(f"The {what} {text!r} is not a size.", "Write it like 48GiB, 49140MiB or 51527024640.")
    return round(float(found[1]) * _UNITS[found[2].lower()])


def parse_tokens(text: str, what: str = "token count") -> int:
    """Read `131072`, `131,072`, `128k` (times 1024) or `1M` (times 1024 twice)."""
    found = re.fullmatch(r"\s*([0-9][0-9,_]*)\s*([kKmM]?)\s*", text)
    if not found:
        raise UsageError(f"The {what} {text!r} is not a number of tokens.", "Write it like 131072, 128k or 1M.")
    scale = {"": 1, "k": 1024, "m": 1024 * 1024}[found[2].lower()]
    return int(re.sub(r"[,_]", "", found[1])) * scale


def nearest(word: str, known: list[str]) -> str:
    """A 'did you mean' sentence for a mistyped name; names a few known ones when nothing is near."""
    near = get_close_matches(word.lower(), known, n=4, cutoff=0.5)
    if near:
        return f"Did you mean {', '.join(near)}?"
    return f"Known names: {', '.join(sorted(known))}."
