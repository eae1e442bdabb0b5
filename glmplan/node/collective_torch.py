"""One rank of `doctor --deep`'s all-reduce: right values, latency, and the bandwidth of the links between nodes.

A script for the engine's Python: a JSON object on stdin says `rank`, `world_size`, `local_rank`, `backend` (nccl or gloo),
`address`, `tcp_port`, `join_s` (the limit of joining and of each collective), `sizes_bytes`, `link_bytes` and `rounds`
(lists of pairs of ranks that talk at the same time); one JSON object on stdout says what came out. Values are small
integers in float32, so that every sum is exact in any order of adding. Bus bandwidth, worked out by the reader, is
2 (n - 1) / n x bytes / seconds, as nccl-tests defines it (PERFORMANCE.md).
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import time
from typing import Any

REPEATS = 20
BIG_REPEATS = 5
SMALL_BYTES = 65536
PATTERN = 8
"""Values repeat every PATTERN elements; rank r adds (r + 1) x (index % PATTERN)."""


class Rank:
    """A joined rank: tensors on its device, and time that waits for the device."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch: Any = importlib.import_module("torch")
        self.torch, self.dist = torch, importlib.import_module("torch.distributed")
        self.rank, self.world_size = int(spec["rank"]), int(spec["world_size"])
        self.cuda = spec["backend"] == "nccl"
        self.device = torch.device("cuda", int(spec["local_rank"])) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        host = f"[{spec['address']}]" if ":" in spec["address"] else spec["address"]
        self.dist.init_process_group(
            spec["backend"],
            init_method=f"tcp://{host}:{spec['tcp_port']}",
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=float(spec["join_s"])),
        )

    def pattern(self, count: int, factor: int) -> Any:
        """[count] float32: factor x (index % PATTERN)."""
        return self.torch.arange(count, device=self.device).remainder(PATTERN).to(self.torch.float32) * factor

    def all_reduce(self, count_bytes: int) -> dict[str, Any]:
        """One size: whether every element is the exact sum, and the median seconds of one all-reduce."""
        count = max(count_bytes // 4, 1)
        tensor = self.pattern(count, self.rank + 1)
        self.dist.all_reduce(tensor)
        want = self.pattern(count, self.world_size * (self.world_size + 1) // 2)
        wrong = int((tensor != want).sum().item())
        repeats = REPEATS if count_bytes <= SMALL_BYTES else BIG_REPEATS
        tensor.zero_()
        seconds = self.median([lambda: self.dist.all_reduce(tensor)] * repeats)
        return {"bytes": count * 4, "wrong_elements": wrong, "seconds": seconds}

    def link(self, first: int, second: int, count_bytes: int) -> dict[str, Any]:
        """Ping-pong with one other rank: half a round trip of 8 bytes, bytes/s of a large message, right values."""
        peer = second if self.rank == first else first
        leads = self.rank == first
        small = self.torch.zeros(2, device=self.device)
        self.ping_pong(small, small, peer, leads)
        latency = self.median([lambda: self.ping_pong(small, small, peer, leads)] * REPEATS) / 2
        count = max(count_bytes // 4, 1)
        sent, received = self.pattern(count, self.rank + 1), self.torch.full((count,), -1.0, device=self.device)
        self.ping_pong(sent, received, peer, leads)
        wrong = int((received != self.pattern(count, peer + 1)).sum().item())
        seconds = self.median([lambda: self.ping_pong(sent, received, peer, leads)] * BIG_REPEATS) / 2
        return {"peer": peer, "latency_s": latency, "bytes_per_s": count * 4 / seconds, "wrong_elements": wrong}

    def ping_pong(self, sent: Any, received: Any, peer: int, leads: bool) -> None:
        """Send and wait for the answer, or the other way round."""
        if leads:
            self.dist.send(sent, peer)
            self.dist.recv(received, peer)
        else:
            self.dist.recv(received, peer)
            self.dist.send(sent, peer)

    def median(self, actions: list[Any]) -> float:
        """Seconds of the action in the middle, each waited for."""
        times = []
        for action in actions:
            self.wait()
            began = time.perf_counter()
            action()
            self.wait()
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            self.torch.cuda.synchronize(self.device)

    def meet(self) -> None:
        """All ranks pass here together."""
        self.dist.all_reduce(self.torch.zeros(1, device=self.device))
        self.wait()


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Join, reduce, talk to the peers of each round, leave."""
    began = time.perf_counter()
    rank = Rank(spec)
    rank.meet()
    found: dict[str, Any] = {"rank": rank.rank, "join_s": time.perf_counter() - began, "backend": spec["backend"]}
    found["all_reduce"] = [rank.all_reduce(int(size)) for size in spec["sizes_bytes"]]
    found["links"] = []
    for pairs in spec["rounds"]:
        mine = next((pair for pair in pairs if rank.rank in pair), None)
        if mine:
            found["links"].append(rank.link(mine[0], mine[1], int(spec["link_bytes"])))
        rank.meet()
    if rank.cuda:
        found["device"] = rank.torch.cuda.get_device_name(rank.device)
        found["nccl_version"] = ".".join(map(str, rank.torch.cuda.nccl.version()))
    found["torch_version"] = rank.torch.__version__
    rank.dist.destroy_process_group()
    return found


def main() -> int:
    """Measure; a failure is an answer with the last line of what torch said."""
    spec = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        found = measure(spec)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        found = {"rank": int(spec["rank"]), "error": f"{type(error).__name__}: {words[0][:400]}"}
    json.dump(found, out)
    out.write("\n")
    out.flush()
    # a peer that is gone makes torch's own clean-up wait for it
    os._exit(1 if "error" in found else 0)


if __name__ == "__main__":
    sys.exit(main())
