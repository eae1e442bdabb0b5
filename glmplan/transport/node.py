"""One operation of the node program on one host: sent, run and answered through any transport.

The program travels on stdin, is kept in memory there (memfd) and leaves no file. Anything but a good answer raises:
UnreachableError from the transport, NodeFailedError with the host's own words.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from glmplan.errors import GlmplanError
from glmplan.node.bundle import ANSWER_LINE, bundle
from glmplan.transport.base import Transport

BOOTSTRAP = (
    "import os,runpy,sys;"
    "sys.version_info>=(3,9) or sys.exit('python '+sys.version.split()[0]+' is older than 3.9');"
    "b=sys.glmplan_bundle=sys.stdin.buffer.read(int(sys.stdin.buffer.readline()));"
    "f=os.memfd_create('glmplan');os.write(f,b);"
    "runpy.run_path('/proc/self/fd/%d'%f,run_name='__main__')"
)


class NodeFailedError(GlmplanError):
    """The node program answered with a failure, or did not run. `kind` tells programs which."""

    def __init__(self, kind: str, message: str, next_step: str = "") -> None:
        super().__init__(message, next_step)
        self.kind = kind


@cache
def _packed() -> bytes:
    data = bundle()
    return f"{len(data)}\n".encode() + data


def call(
    transport: Transport,
    operation: str,
    request: dict[str, Any] | None = None,
    timeout_s: float = 30.0,
    python: str = "python3",
) -> dict[str, Any]:
    """The result of one operation on the host; `python` is the interpreter there."""
    body = _packed() + json.dumps(request or {}).encode()
    done = transport.run([python, "-c", BOOTSTRAP, operation], stdin=body, timeout_s=timeout_s)
    found = _answer(done.stdout)
    if found is None:
        raise _not_run(transport.name, python, done.exit_status, done.stderr)
    if not found.get("ok"):
        error = found.get("error", {})
        raise NodeFailedError(error.get("kind", ""), error.get("message", "no reason given"), error.get("next_step", ""))
    result = found["result"]
    assert isinstance(result, dict)
    return result


def _answer(stdout: bytes) -> dict[str, Any] | None:
    """The answer among what shell start-up and logout files print before and after it; None where there is none."""
    _, line, rest = stdout.rpartition(f"\n{ANSWER_LINE}\n".encode())
    try:
        found = json.loads(rest.partition(b"\n")[0]) if line else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _not_run(host: str, python: str, exit_status: int, stderr: bytes) -> NodeFailedError:
    words = stderr.decode(errors="replace").strip().splitlines()
    last = words[-1][:300] if words else "no output"
    if exit_status == 127 or "not found" in last:
        return NodeFailedError("no-python", f"{host} has no {python}: {last}.", "Install Python 3.9 or newer there.")
    if "is older than 3.9" in last:
        return NodeFailedError(
            "old-python", f"{host} has an old {python}: {last}.", "Put Python 3.9 or newer first on PATH there."
        )
    if exit_status == 0 and not words:
        problem = f"The login shell of {host} ended before the node program ran."
        return NodeFailedError(
            "not-run", problem, f"Look for exit or exec in ~/.bashrc there: `ssh {host} echo ok` must answer."
        )
    problem = f"The node program did not run on {host} (exit status {exit_status}): {last}."
    return NodeFailedError("not-run", problem, f"Try `{python} -V` there.")
