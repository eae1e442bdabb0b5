"""Copies between every two GPUs of this host, checked by value: one JSON line before and one after each pair.

A script for the engine's Python. stdin: `{"copy_bytes"}`; it uses every GPU that CUDA_VISIBLE_DEVICES shows, by position.
Direct copies are known to deliver wrong bytes, or never to return, behind an IOMMU that translates or PCIe bridges with ACS
on: hence values, and the line before, which names the pair that hangs. Random int32 from a seed of the pair; the target
starts as -1.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

REPEATS = 5


def check_pair(torch: Any, source: int, target: int, count_bytes: int) -> dict[str, Any]:
    """Wrong elements and bytes/s of copies from one GPU to another."""
    count = count_bytes // 4
    generator = torch.Generator(device=f"cuda:{source}").manual_seed(1000 * source + target)
    sent = torch.randint(0, 2**31 - 1, (count,), dtype=torch.int32, device=f"cuda:{source}", generator=generator)
    received = torch.full((count,), -1, dtype=torch.int32, device=f"cuda:{target}")
    synchronize(torch, source, target)
    received.copy_(sent)
    synchronize(torch, source, target)
    wrong = int((received.cpu() != sent.cpu()).sum().item())
    began = time.perf_counter()
    for _ in range(REPEATS):
        received.copy_(sent, non_blocking=True)
    synchronize(torch, source, target)
    seconds = (time.perf_counter() - began) / REPEATS
    return {
        "source": source,
        "target": target,
        "direct": bool(torch.cuda.can_device_access_peer(source, target)),
        "wrong_elements": wrong,
        "bytes_per_s": count * 4 / seconds,
    }


def synchronize(torch: Any, *devices: int) -> None:
    """Until these GPUs have done what they were given."""
    for device in devices:
        torch.cuda.synchronize(device)


def main() -> int:
    """Every ordered pair; the first that torch refuses ends the run with an `error` line."""
    spec = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    torch: Any = importlib.import_module("torch")
    count = torch.cuda.device_count()
    print(json.dumps({"gpus": count}), file=out)
    for source in range(count):
        for target in (index for index in range(count) if index != source):
            print(json.dumps({"trying": [source, target]}), file=out)
            try:
                found = check_pair(torch, source, target, int(spec["copy_bytes"]))
            except RuntimeError as error:
                words = str(error).strip().splitlines() or [""]
                print(json.dumps({"source": source, "target": target, "error": words[0][:300]}), file=out)
                return 1
            print(json.dumps(found), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
