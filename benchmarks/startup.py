"""How long the commands take from a cold start: wall seconds of whole processes, and of one search over 64 mixed nodes.

Run:  python benchmarks/startup.py [runs]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
MIXED = "128x rtx-4090-48g + 128x rtx-5090 + 64x rtx-4090-24g + 64x l40s + 128x rtx-pro-6000"
COMMANDS = {
    "glmplan --help": (["--help"], 0.25),
    "glmplan size (embedded default)": (["size", "--gpus", "24x rtx-4090-48g", "--nodes", "3"], 0.4),
    "glmplan size, 64 mixed nodes": (
        ["size", "--context", "128k", "--gpus", MIXED],
        2.0,
    ),
    "glmplan size, 64 mixed nodes that do not fit": (
        ["size", "--context", "1M", "--concurrency", "64", "--gpus", "256x rtx-4090-24g + 256x rtx-5090"],
        2.0,
    ),
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "glmplan", *arguments], capture_output=True, check=False)
    return time.perf_counter() - begin


def main() -> None:
    """Print one line per command."""
    print(f"{'command':<48} {'median':>8} {'best':>8} {'aim':>6}   ({RUNS} runs each)")
    for name, (arguments, aim) in COMMANDS.items():
        times = [seconds(arguments) for _ in range(RUNS)]
        print(f"{name:<48} {statistics.median(times):>7.3f}s {min(times):>7.3f}s {aim:>5}s")


if __name__ == "__main__":
    main()
