"""How do the kernels get into a released engine, and how can another process tell that they are in?

One plugin per engine, loaded through its entry-point group inside every engine process. A plugin that is in prints one line
on stderr that begins with MARKER; one that cannot serve prints one that begins with FAILURE and ends its process.
This module imports nothing, so that a launcher may read the constants and lines without torch.
"""

from __future__ import annotations

from typing import NamedTuple

MARKER = "glmplan port:"
FAILURE = "glmplan port failed:"
ENTRY_POINT = "glmplan"
SGLANG_GROUP = "sglang.srt.plugins"
VLLM_GROUP = "vllm.general_plugins"

PORT = "GLMPLAN_PORT"
PORT_MODES = ("auto", "force", "off")
TUNED_DIR = "GLMPLAN_TUNED_DIR"
MOE_DIR = "SGLANG_MOE_CONFIG_DIR"


class PortLine(NamedTuple):
    """What one engine process said about its kernels."""

    glmplan: str
    engine: str
    engine_version: str
    sm: int
    compiled_for: int
    settings: dict[str, str]
    replaced: tuple[str, ...]

    def render(self) -> str:
        """One line, space-separated `name=value`; symbols are joined by commas."""
        fixed = {
            "glmplan": self.glmplan,
            self.engine: self.engine_version,
            "sm": str(self.sm),
            "compiled_for": str(self.compiled_for),
        }
        pairs = [f"{name}={value}" for name, value in (fixed | self.settings).items()]
        return " ".join([MARKER, *pairs, f"replaced={','.join(self.replaced)}"])


def parse_port_line(line: str) -> PortLine | None:
    """The PortLine in a log line, whatever stands before the marker; None where there is none, or half of one."""
    _, marker, rest = line.partition(MARKER)
    values = dict(part.partition("=")[::2] for part in rest.split())
    engine = next((name for name in ("sglang", "vllm") if name in values), "")
    if not marker or not engine or not {"glmplan", "sm", "compiled_for", "replaced"} <= values.keys():
        return None
    if not (values["sm"].isdecimal() and values["compiled_for"].isdecimal()):
        return None
    known = {"glmplan", engine, "sm", "compiled_for", "replaced"}
    return PortLine(
        values["glmplan"],
        engine,
        values[engine],
        int(values["sm"]),
        int(values["compiled_for"]),
        {name: value for name, value in values.items() if name not in known},
        tuple(symbol for symbol in values["replaced"].split(",") if symbol),
    )
