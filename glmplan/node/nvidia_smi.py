"""Which GPUs this host has, as nvidia-smi prints it: the way where no Python here has pynvml.

The same fields and units as `nvml`. nvidia-smi counts in MiB, so memory is exact to one MiB only; reading takes about a
second. Five of its answers are asked for at once: GPUs and compute processes as CSV, the `topo` matrices, `nvlink -s`.

Sources: nvidia-smi of the drivers 470 to 580; a field that a driver does not know is left out and asked again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import procfs
from .driver import NO_GPUS, NO_LIBRARY, NO_MODULE, THROTTLE_WORDS, lost, memory_fields, mismatch, unified_memory
from .errors import NodeError

MIB = 1024**2
TIMEOUT_S = 20.0
FIELDS = (
    *("index", "uuid", "name", "compute_cap", "memory.total", "memory.reserved", "memory.free", "mig.mode.current"),
    *("ecc.mode.current", "pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max"),
    *("enforced.power.limit", "clocks_event_reasons.active", "driver_version"),
)
OLD_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
P2P_WORDS = {"OK": True, "X": True, "U": None}
"""`topo -p2p` in words; every other word (NS, CNS, GNS, TNS, DR) says why not."""


def read(indexes: Sequence[int] | None, peers: bool) -> dict[str, Any]:
    """As `nvml.read`; NodeError `no-driver` where there is no nvidia-smi either."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/bin:/usr/local/bin:/usr/lib/wsl/lib")
    if program is None:
        raise NodeError("no-driver", *NO_LIBRARY)
    with ThreadPoolExecutor(max_workers=6) as pool:
        version = pool.submit(_run, program, "--version")
        applications = pool.submit(
            _run, program, "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"
        )
        links = pool.submit(_run, program, "nvlink", "-s")
        topology = [pool.submit(_run, program, "topo", *words) for words in (["-m"], ["-p2p", "r"], ["-p2p", "w"])]
        rows = query(program)
        texts = [one.result()[1] for one in topology] if peers and len(rows) > 1 else []
        cuda = cuda_version(version.result()[1]) or cuda_version(_run(program)[1])
        gpus, problems = _gpus(rows, indexes, processes(applications.result()[1]), nvlinks(links.result()[1]))
    return {
        "driver_version": rows[0].get("driver_version"),
        "nvml_version": None,
        "cuda_version": cuda,
        "count": len(rows),
        "gpus": gpus,
        "peers": [pair for pair in peer_links(*texts) if _both(pair, gpus)] if texts else [],
        "problems": problems,
    }


def _run(program: str, *arguments: str) -> tuple[int, str]:
    """Exit status and everything printed."""
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return 124, f"nvidia-smi did not answer within {TIMEOUT_S:g} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.decode(errors="replace")


def query(program: str) -> list[dict[str, str]]:
    """One row per GPU; fields that this driver does not know are renamed or dropped, one refusal at a time."""
    fields = list(FIELDS)
    while True:
        status, text = _run(program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        unknown = re.search(r'Field "([^"]+)" is not a valid field', text)
        if not unknown or unknown[1] not in fields:
            break
        place = fields.index(unknown[1])
        fields[place : place + 1] = [OLD_NAMES[unknown[1]]] if unknown[1] in OLD_NAMES else []
    rows = table(fields, text)
    if status and not rows:
        raise start_error(text)
    if not rows:
        raise NodeError("no-driver", *NO_GPUS)
    return rows


def table(fields: Sequence[str], text: str) -> list[dict[str, str]]:
    """CSV without a header as rows; lines of another shape (warnings) are left out."""
    lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    whole = [cells for cells in lines if len(cells) == len(fields) and cells[0].isdecimal()]
    return [dict(zip(fields, cells)) for cells in whole]


def start_error(text: str) -> NodeError:
    """Say why nvidia-smi gave no GPU."""
    words = text.strip().splitlines()[0][:200] if text.strip() else "it printed nothing"
    if "version mismatch" in text:
        found = re.search(r"library version: (\S+)", text)
        return mismatch(found[1] if found else "unknown version")
    if "No devices were found" in text:
        return NodeError("no-driver", *NO_GPUS)
    if "couldn't communicate" in text or "Driver Not Loaded" in text:
        return NodeError("no-driver", *NO_MODULE)
    if "GPU is lost" in text:
        return NodeError("gpu-lost", f"A GPU does not answer: {words}.", "Reboot; `dmesg | grep -i xid` says what happened.")
    return NodeError("nvml", f"nvidia-smi failed: {words}.", "Run `nvidia-smi` there.")


def _gpus(
    rows: list[dict[str, str]],
    indexes: Sequence[int] | None,
    held: dict[str, list[tuple[int, int | None]]],
    links: dict[int, int],
) -> tuple[list[dict[str, Any]], list[NodeError]]:
    gpus: list[dict[str, Any]] = []
    problems: list[NodeError] = []
    for row in rows:
        index = int(row["index"])
        if indexes is None or index in indexes:
            try:
                gpus.append(gpu(row, len(rows), held.get(row.get("uuid", ""), []), links.get(index)))
            except NodeError as problem:
                problems.append(problem)
    return gpus, problems


def gpu(row: dict[str, str], count: int, held: list[tuple[int, int | None]], links: int | None) -> dict[str, Any]:
    """One GPU from its CSV row."""
    index, capability = int(row["index"]), re.fullmatch(r"(\d+)\.(\d+)", row.get("compute_cap", ""))
    power = _number(row.get("enforced.power.limit"))
    reasons = row.get("clocks_event_reasons.active", row.get("clocks_throttle_reasons.active", ""))
    bits = int(reasons, 16) if re.fullmatch(r"0x[0-9A-Fa-f]+", reasons) else 0
    return {
        "index": index,
        "name": row["name"],
        "uuid": row["uuid"] if row.get("uuid", "").startswith("GPU-") else None,
        "sm": int(capability[1]) * 10 + int(capability[2]) if capability else None,
        **_memory(row, index, count),
        "mig": row.get("mig.mode.current") == "Enabled",
        "ecc": {"Enabled": True, "Disabled": False}.get(row.get("ecc.mode.current", "")),
        "pcie_generation": _whole(row.get("pcie.link.gen.current")) or None,
        "pcie_generation_max": _whole(row.get("pcie.link.gen.max")) or None,
        "pcie_width": _whole(row.get("pcie.link.width.current")) or None,
        "pcie_width_max": _whole(row.get("pcie.link.width.max")) or None,
        "nvlink_active": links,
        "power_limit_w": None if power is None else round(power),
        "throttle_reasons": [word for bit, word in THROTTLE_WORDS.items() if bits & bit],
        "processes": [procfs.process(pid, used) for pid, used in held],
    }


def _memory(row: dict[str, str], index: int, count: int) -> dict[str, Any]:
    total, reserved, free = (_whole(row.get(f"memory.{name}")) for name in ("total", "reserved", "free"))
    if total and free is not None:
        return memory_fields(total * MIB, None if reserved is None else reserved * MIB, free * MIB)
    said = row.get("memory.total", "nothing")
    if "lost" in said.lower():
        raise lost(index, said.strip("[]"))
    if count == 1 and ("N/A" in said or "Not Supported" in said):
        return unified_memory(row["name"])
    raise NodeError(
        "gpu-unreadable",
        f"GPU {index} could not be read: nvidia-smi says {said!r} for its memory.",
        "Compare with `nvidia-smi`; a GPU in MIG mode tells its memory to root only.",
    )


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d+(\.\d+)?", text) else None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def processes(text: str) -> dict[str, list[tuple[int, int | None]]]:
    """Compute processes by GPU UUID, with the bytes they hold where nvidia-smi may tell."""
    found: dict[str, list[tuple[int, int | None]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[0].startswith("GPU-") and cells[1].isdecimal():
            used = _whole(cells[2])
            found.setdefault(cells[0], []).append((int(cells[1]), None if used is None else used * MIB))
    return found


def nvlinks(text: str) -> dict[int, int]:
    """Active links by GPU index; a GPU without NVLink is not in it."""
    found: dict[int, int] = {}
    index = None
    for line in text.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            index = int(head[1])
        elif index is not None and (link := re.match(r"\s+Link \d+: (.*)", line)):
            found[index] = found.get(index, 0) + ("GB/s" in link[1])
    return found


def cuda_version(text: str) -> str | None:
    """The driver's newest CUDA, from `--version` or from the head of the plain table."""
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", text)
    return found[1] if found else None


def peer_links(matrix: str, readable: str, writable: str) -> list[dict[str, Any]]:
    """Every pair of GPUs once: the path of `topo -m`, and P2P where both reading and writing are OK."""
    paths, reads, writes = square(matrix), square(readable), square(writable)
    found = []
    for (first, second), path in paths.items():
        if first < second:
            states = [P2P_WORDS.get(found_in.get((first, second), "U"), False) for found_in in (reads, writes)]
            p2p = None if None in states else all(states)
            found.append({"gpu_index": first, "peer_index": second, "path": path, "p2p": p2p})
    return found


def square(text: str) -> dict[tuple[int, int], str]:
    """The GPU part of a `topo` matrix: (row, column) -> word."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    found: dict[tuple[int, int], str] = {}
    columns: list[int] = []
    for line in plain.splitlines():
        words = line.split()
        if not columns and len(words) > 0 and all(re.fullmatch(r"GPU\d+", word) for word in words[:1]):
            columns = [int(word[3:]) for word in words if re.fullmatch(r"GPU\d+", word)]
            continue
        if columns and words and re.fullmatch(r"GPU\d+", words[0]):
            row = int(words[0][3:])
            found.update(((row, column), word) for column, word in zip(columns, words[1:]))
    return found


def _both(pair: dict[str, Any], gpus: list[dict[str, Any]]) -> bool:
    indexes = {one["index"] for one in gpus}
    return pair["gpu_index"] in indexes and pair["peer_index"] in indexes
