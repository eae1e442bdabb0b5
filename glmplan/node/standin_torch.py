"""The rehearsal's all-reduce through torch.distributed, where every rank's Python has torch: NCCL on GPUs, else gloo.

torch is imported once per node, before the ranks are forked; CUDA is touched in the ranks only.
"""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any

from .collective import Member
from .hub import LostError

SMALL_BYTES = 8 << 10
LARGE_BYTES = {"nccl": 64 << 20, "gloo": 1 << 20}


def load() -> str:
    """Import torch unless GLMPLAN_REHEARSE_TORCH=0; why it cannot be used, or nothing."""
    if os.environ.get("GLMPLAN_REHEARSE_TORCH") == "0":
        return "GLMPLAN_REHEARSE_TORCH=0"
    try:
        torch: Any = importlib.import_module("torch")
        importlib.import_module("torch.distributed")
    except Exception as error:  # a broken installation fails in many ways
        return f"{type(error).__name__}: {error}"
    return "" if torch.distributed.is_available() else "built without torch.distributed"


def offer(usable: bool, local_gpu: int) -> dict[str, Any]:
    """What this rank tells the others: whether torch and a GPU of its own are there, and a port for torch's store."""
    if not usable:
        return {"torch": False, "gpu": False}
    torch: Any = importlib.import_module("torch")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    gpu = bool(torch.cuda.is_available() and torch.cuda.device_count() > local_gpu)
    return {"torch": True, "gpu": gpu, "store_port": port}


def backend(table: list[dict[str, Any]]) -> str | None:
    """What all ranks can use; None without torch everywhere."""
    if not all(entry.get("torch") for entry in table):
        return None
    return "nccl" if all(entry.get("gpu") for entry in table) else "gloo"


class Reduced:
    """A joined process group, kept for the rank's life as an engine keeps it; `text` says what came out."""

    def __init__(self, member: Member, name: str, local_gpu: int, timeout_s: float) -> None:
        from .collective_torch import Rank

        spec = {
            "rank": member.rank, "world_size": member.world_size, "local_rank": local_gpu, "backend": name,
            "address": member.table[0]["address"], "tcp_port": member.table[0]["store_port"], "join_s": timeout_s,
        }  # fmt: skip
        try:
            self.rank = Rank(spec)
            small, large = (self.rank.all_reduce(size) for size in (SMALL_BYTES, LARGE_BYTES[name]))
        except Exception as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise LostError(f"The {name} all-reduce failed on rank {member.rank}: {words[0]}") from None
        wrong = small["wrong_elements"] + large["wrong_elements"]
        if wrong:
            raise LostError(f"The {name} all-reduce gave {wrong} wrong numbers on rank {member.rank}.")
        self.text = (
            f"all-reduce over {member.world_size} ranks with {name} is right ({small['seconds'] * 1000:.2f} ms for "
            f"{SMALL_BYTES >> 10} KiB, {large['seconds'] * 1000:.1f} ms for {large['bytes'] >> 20} MiB)"
        )
