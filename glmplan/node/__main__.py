"""One operation: `node.pyz OPERATION` reads a JSON request on stdin and prints one JSON answer on stdout, after ANSWER_LINE.

The answer is `{"ok": true, "result": ...}`, or `{"ok": false, "error": {"kind", "message", "next_step"}}`; everything
else that a library prints goes to stderr. PROGRAMS keep the process for themselves.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from .bundle import ANSWER_LINE

OPERATIONS = {
    "hello": ("hello", "hello"),
    "facts": ("facts", "facts"),
    "start": ("workers", "start"),
    "poll": ("workers", "poll"),
    "stop": ("workers", "stop"),
    "deployments": ("workers", "deployments"),
    "forget": ("workers", "forget"),
    "kernel_log": ("kernel_log", "kernel_log"),
    "http": ("web", "http"),
    "ports": ("sockets", "ports"),
    "listen": ("sockets", "listen"),
    "connect": ("sockets", "connect"),
    "deep": ("deep", "deep"),
}
"""Operation -> module and function here. A function takes the request (a dict) and returns the result (a dict)."""

PROGRAMS = {
    "supervise": ("supervisor", "main"),
    "standin": ("standin", "main"),
}
"""Programs that take the remaining words of the command line and return an exit status."""


def _function(place: tuple[str, str]) -> Any:
    module, name = place
    return getattr(importlib.import_module(f".{module}", __package__), name)


def answer(operation: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run one operation; every failure becomes an answer."""
    try:
        return {"ok": True, "result": _function(OPERATIONS[operation])(request)}
    except Exception as error:  # the border of the program: nothing may leave as a traceback
        kind = getattr(error, "kind", type(error).__name__)
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        return {"ok": False, "error": {"kind": kind, "message": message, "next_step": getattr(error, "next_step", "")}}


def main() -> int:
    """The entry point."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in PROGRAMS:
        return int(_function(PROGRAMS[name])(sys.argv[2:]) or 0)
    if name not in OPERATIONS:
        print(f"glmplan node: no operation {name!r}", file=sys.stderr)
        return 2
    request = json.loads(sys.stdin.buffer.read() or b"{}")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not spoil the answer
    found = answer(name, request)
    out.write(f"\n{ANSWER_LINE}\n")
    json.dump(found, out)
    out.write("\n")
    out.close()
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
