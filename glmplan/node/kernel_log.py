"""What the kernel said lately of GPUs, memory and disks: lines with NVRM, Xid, oom-kill and the like, the newest last.

`dmesg` needs root where kernel.dmesg_restrict is 1; `journalctl -k` needs the group adm or systemd-journal. Where neither
answers, `readable` is false and `lines` empty. Times: dmesg counts seconds since the boot, which /proc/uptime tells.
"""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

WANTED = re.compile(
    r"NVRM|Xid|oom-kill|oom_reaper|Out of memory|Killed process|nvidia|I/O error|No space left", re.IGNORECASE
)
_STAMP = re.compile(r"^\[\s*([0-9]+\.[0-9]+)\]")


def kernel_log(request: dict[str, Any]) -> dict[str, Any]:
    """The last `most` (40) such lines of the last `seconds` (an hour)."""
    most, seconds = int(request.get("most", 40)), float(request.get("seconds", 3600))
    oldest = _uptime_s() - seconds
    lines = _output(["dmesg"])
    if lines is not None:
        lines = [line for line in lines if _stamp(line) >= oldest]
    else:
        since = f"--since=@{int(time.time() - seconds)}"
        lines = _output(["journalctl", "-k", since, "--no-pager", "-o", "short-iso"])
    found = [line for line in lines or () if WANTED.search(line)]
    return {"readable": lines is not None, "lines": found[-most:]}


def _output(command: list[str]) -> list[str] | None:
    try:
        ran = subprocess.run(command, capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.decode(errors="replace").splitlines() if ran.returncode == 0 else None


def _stamp(line: str) -> float:
    found = _STAMP.match(line)
    return float(found[1]) if found else 0.0


def _uptime_s() -> float:
    try:
        return float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
