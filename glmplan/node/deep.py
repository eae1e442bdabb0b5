"""The slow checks of `doctor --deep` on this host: kernels, copies between GPUs, one host's ranks of an all-reduce.

Everything that needs PyTorch runs as a child of the engine's Python in a folder under the temporary directory, which is
removed at the end; nothing else is written. Seconds are wall time; a child that overruns is killed with its process group.
A request is `{"part": "kernels" | "copies" | "ranks", "pythons": [...], "gpu_indexes": [...], "environment": {...},
"timeout_s", ...}`; `pythons` are tried in order, and the first that can import torch is used.
"""

from __future__ import annotations

import base64
import ctypes
import io
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from .errors import NodeError

FIND_TORCH = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('torch') else 3)"
KEPT_CHARACTERS = 2000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child:
    """A program of the engine's Python, in a process group of its own, its output in files; it dies with this process."""

    started: ClassVar[list[Child]] = []

    def __init__(self, argv: list[str], environment: dict[str, str], stdin: bytes, folder: Path, name: str) -> None:
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment, cwd=folder,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        Child.started.append(self)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(stdin)
            self.process.stdin.close()
        self.overran = False

    def wait(self, deadline: float) -> None:
        """Until it ends or the deadline passes."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self.overran = True
            self.kill()

    def kill(self) -> None:
        """End the whole group, if it still runs."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def out(self) -> str:
        """What it printed."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        """The end of what it complained."""
        return self._err.read_text(errors="replace")[-KEPT_CHARACTERS:]


def deep(request: dict[str, Any]) -> dict[str, Any]:
    """Run one part; `{"python", ...}` with the part's own results."""
    part = {"kernels": _kernels, "copies": _copies, "ranks": _ranks}[request["part"]]
    python = _python_with_torch(request.get("pythons") or [])
    for number in (signal.SIGTERM, signal.SIGHUP):
        with suppress(ValueError):  # outside the main thread the caller looks after signals
            signal.signal(number, lambda got, _: sys.exit(128 + got))
    folder = Path(tempfile.mkdtemp(prefix="glmplan-deep-"))
    try:
        return {"python": python, **part(request, python, folder)}
    finally:
        for child in Child.started:
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _die_with_parent() -> None:
    """prctl(PR_SET_PDEATHSIG, SIGKILL): a node program that is killed leaves nothing that runs."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _python_with_torch(given: list[str]) -> str:
    """The first Python that finds torch, the one that runs this program included."""
    tried = [*given, "python3", sys.executable]
    for python in tried:
        found = shutil.which(python)
        if not found:
            continue
        with suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([found, "-c", FIND_TORCH], capture_output=True, timeout=20).returncode == 0:
                return found
    raise NodeError(
        "no-torch",
        f"No Python here can import torch (tried {', '.join(dict.fromkeys(tried))}).",
        "Name the engine's: --engine-python /path/to/venv/bin/python.",
    )


def _script(name: str, folder: Path) -> str:
    """A module of this program as a file of its own."""
    source = pkgutil.get_data(__package__, f"{name}.py")
    assert source is not None
    path = folder / f"{name}.py"
    path.write_bytes(source)
    return str(path)


def _environment(request: dict[str, Any], gpu_indexes: list[int], **more: str) -> dict[str, str]:
    found = {**os.environ, **request.get("environment", {}), **more}
    if gpu_indexes:
        found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpu_indexes))
    return found


def _kernels(request: dict[str, Any], python: str, folder: Path) -> dict[str, Any]:
    """glmplan's own kernel checks on each GPU, all GPUs at once; the package comes with the request."""
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(request["package"]))) as archive:
        archive.extractall(folder / "package")
    deadline, children = time.monotonic() + float(request["timeout_s"]), {}
    for gpu in request["gpu_indexes"]:
        more = {"PYTHONPATH": str(folder / "package"), "TRITON_CACHE_DIR": str(folder / f"triton-{gpu}")}
        argv = [python, "-m", "glmplan.kernels.verify"]
        children[gpu] = (time.monotonic(), Child(argv, _environment(request, [gpu], **more), b"", folder, f"gpu{gpu}"))
    results = []
    for gpu, (began, child) in children.items():
        child.wait(deadline)
        lines = child.out.strip().splitlines()
        found = {"gpu_index": gpu, "exit_status": child.process.returncode, "overran": child.overran}
        found |= {"lines": lines, "err": child.err.strip(), "elapsed_s": time.monotonic() - began}
        results.append(found)
    return {"gpus": results}


def _copies(request: dict[str, Any], python: str, folder: Path) -> dict[str, Any]:
    """Copies between every two of these GPUs; positions become the driver's indexes."""
    indexes = list(request["gpu_indexes"])
    stdin = json.dumps({"copy_bytes": request["copy_bytes"]}).encode()
    child = Child([python, _script("copies_torch", folder)], _environment(request, indexes), stdin, folder, "copies")
    child.wait(time.monotonic() + float(request["timeout_s"]))
    pairs, trying = [], None
    for line in child.out.splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            if "trying" in found:
                trying = [indexes[position] for position in found["trying"]]
            elif "source" in found:
                pairs.append({**found, "source": indexes[found["source"]], "target": indexes[found["target"]]})
                trying = None
    return {
        "pairs": pairs, "overran": child.overran, "stuck_at": trying,
        "exit_status": child.process.returncode, "err": child.err.strip(),
    }  # fmt: skip


def _ranks(request: dict[str, Any], python: str, folder: Path) -> dict[str, Any]:
    """This host's ranks, `first_rank` and on, one for each GPU (gloo: `local_ranks`), until all of them have answered."""
    script, count = _script("collective_torch", folder), int(request["local_ranks"])
    children = []
    for local_rank in range(count):
        rank = int(request["first_rank"]) + local_rank
        log = str(folder / f"nccl-{rank}.log")
        more = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": log, "OMP_NUM_THREADS": "1"}
        spec = {name: request[name] for name in ("world_size", "backend", "address", "tcp_port", "sizes_bytes")}
        spec |= {name: request[name] for name in ("link_bytes", "rounds", "join_s")}
        spec |= {"rank": rank, "local_rank": local_rank}
        environment = _environment(request, list(request["gpu_indexes"]), **more)
        children.append(Child([python, script], environment, json.dumps(spec).encode(), folder, f"rank{rank}"))
    deadline = time.monotonic() + float(request["timeout_s"])
    for child in children:
        child.wait(deadline)
    first = int(request["first_rank"])
    ranks = [_rank(child, first + position, folder) for position, child in enumerate(children)]
    return {"ranks": ranks}


def _rank(child: Child, rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] | None = None
    with suppress(ValueError):
        found = json.loads(child.out)
    if found is None:
        words = [line for line in child.err.strip().splitlines() if not line.startswith(("frame #", "Exception raised"))]
        reason = "did not end in time" if child.overran else f"ended with status {child.process.returncode}"
        found = {"rank": rank, "error": f"{reason}: {words[-1][:300] if words else 'no output'}"}
    with suppress(OSError):
        found["paths"] = _nccl_paths((folder / f"nccl-{rank}.log").read_text(errors="replace"))
    return found


def _nccl_paths(log: str) -> list[str]:
    """How NCCL reaches peers, in its words: P2P/CUMEM, SHM/direct/direct, NET/IB/0, NET/Socket/1."""
    return sorted(set(re.findall(r"\bvia (\S+)", log)))
