"""One rank of the rehearsal: joins the others, tests the links, and prints an engine's phases without loading anything.

Lines are SGLang's (0.5.13.post1, paths under srt/: model_executor/model_runner.py:1088-1434 and 2895,
managers/scheduler.py:877, mem_cache/memory_pool.py:825). Their memory numbers are nominal: a rehearsal tests connections.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from . import standin_torch
from .collective import Member
from .hub import Hub, LostError
from .ring import Links
from .standin_options import Options

NOMINAL_GIB = 24.0
LOAD_S = 0.4
"""Of a rehearsal without a slow disk."""
SHARDS = 8
PEER_EXIT_S = 1.5
"""An engine takes a moment to notice that another host's rank died; so the death shows before what it causes."""
_OUT = threading.Lock()


def say(prefix: str, text: str) -> None:
    """One line in SGLang's format."""
    line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}{prefix}] {text}\n".encode()
    with _OUT:
        os.write(1, line)


def plain(text: str, end: str = "\n") -> None:
    """A line without prefix, as libraries print."""
    with _OUT:
        os.write(1, (text + end).encode())


class Rank:
    """A rank's life up to serving, and then until it is ended."""

    def __init__(self, options: Options, rank: int, torch: bool = False) -> None:
        self.options, self.rank, self.torch = options, rank, torch
        self.local_gpu = options.base_gpu + options.ranks().index(rank)
        self.reduced: standin_torch.Reduced | None = None
        self.prefix = options.prefix(rank)
        self.hub: Hub | None = None
        self.member = Member(rank, options.world_size, options.timeout_s, options.peer_silent_s)

    def run(self, ready: Callable[[], None]) -> None:
        """All phases; `ready` is called when every rank has come to the end of them."""
        try:
            self._join()
            self._load()
            self._allocate()
            self.member.arrive("ready")
        except LostError as error:
            self.fail(str(error))
        self.member.when_lost(self.fail)
        ready()
        threading.Event().wait()

    def fail(self, reason: str) -> None:
        """Print as an engine's rank does, and end."""
        say(self.prefix, f"Scheduler hit an exception: Traceback (most recent call last):\nRuntimeError: {reason}\n")
        time.sleep(PEER_EXIT_S if "closed by peer" in reason else 0.0)
        os._exit(1)

    def _join(self) -> None:
        options = self.options
        say(self.prefix, "Init torch distributed begin.")
        begin = time.perf_counter()
        if self.rank == 0:
            self.hub = Hub(options.address, options.port, options.world_size, options.peer_silent_s)
        hub = self.hub
        joined = (lambda: hub.count) if hub is not None else None
        entry = {"node": options.node_rank, **standin_torch.offer(self.torch, self.local_gpu)}
        self.member.join(options.address, options.port, entry, joined)
        self._test_links()
        say(self.prefix, f"Init torch distributed ends. elapsed={time.perf_counter() - begin:.2f} s, mem usage=0.50 GB")

    def _test_links(self) -> None:
        """Between every pair of nodes, around all ranks, and through torch where all ranks have it."""
        options = self.options
        links = Links(self.member)
        reached = links.test_pairs()
        self.member.arrive("links")
        took_s = links.all_reduce()
        if reached:
            say(self.prefix, f"Rehearsal: node {options.node_rank} reaches {reached} other nodes on ephemeral ports.")
        if self.rank == 0:
            say(self.prefix, f"Rehearsal: sum over {options.world_size} ranks is right ({took_s * 1000:.1f} ms, sockets).")
        name = standin_torch.backend(self.member.table)
        if name is not None:
            self.reduced = standin_torch.Reduced(self.member, name, self.local_gpu, options.timeout_s)
            if self.rank == 0:
                say(self.prefix, f"Rehearsal: {self.reduced.text}.")

    def _load(self) -> None:
        """Weights that are not there, in the time that GLMPLAN_REHEARSE_FAULT=slow-load:SECONDS gives."""
        slow = self.options.fault("slow-load")
        total_s = slow.seconds if slow else LOAD_S
        say(self.prefix, f"Load weight begin. avail mem={NOMINAL_GIB - 0.5:.2f} GB")
        begin = time.perf_counter()
        for shard in range(SHARDS + 1):
            if self.rank == 0:
                spent = max(time.perf_counter() - begin, 0.001)
                plain(_bar(shard, spent), "\r" if shard < SHARDS else "\n")
            if shard == SHARDS // 2:
                self._faults()
            if shard < SHARDS:
                time.sleep(total_s / SHARDS)
        elapsed = time.perf_counter() - begin
        say(self.prefix, f"Load weight end. elapsed={elapsed:.2f} s, type=Rehearsal, avail mem=7.50 GB, mem usage=16.00 GB.")
        self.member.arrive("weights")

    def _faults(self) -> None:
        options = self.options
        if options.fault("die-at-load", self.rank):
            os.kill(os.getpid(), signal.SIGKILL)
        if options.fault("stall", self.rank):
            threading.Event().wait()
        if options.fault("oom", self.rank):
            self._out_of_memory()

    def _out_of_memory(self) -> None:
        say(
            self.prefix,
            "Scheduler hit an exception: Traceback (most recent call last):\n"
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of "
            f"{NOMINAL_GIB:.2f} GiB of which 0.25 GiB is free. Including non-PyTorch memory, this process has "
            f"{NOMINAL_GIB - 0.25:.2f} GiB memory in use.\n",
        )
        os._exit(1)

    def _allocate(self) -> None:
        tokens, context = self.options.pool_tokens, self.options.context_tokens
        say(self.prefix, f"KV Cache is allocated. dtype: torch.float8_e4m3fn, #tokens: {tokens}, KV size: 4.00 GB")
        say(self.prefix, "Memory pool end. avail mem=3.50 GB")
        self.member.arrive("pools")
        say(self.prefix, "Capture cuda graph begin. This can take up to several minutes. avail mem=3.50 GB")
        self.member.arrive("graphs")
        say(self.prefix, "Capture cuda graph end. Time elapsed: 0.05 s. mem usage=0.50 GB. avail mem=3.00 GB.")
        if self.rank % self.options.tp_size == 0:
            say(
                self.prefix,
                f"max_total_num_tokens={tokens}, chunked_prefill_size=4096, max_prefill_tokens=16384, "
                f"max_running_requests=8, context_len={context}, available_gpu_mem=3.00 GB",
            )


def _bar(done: int, spent_s: float) -> str:
    """tqdm's line, in SGLang's format."""
    rate = done / spent_s
    return (
        f"Loading safetensors checkpoint shards: {done * 100 // SHARDS:3d}% Completed | {done}/{SHARDS} "
        f"[00:{int(spent_s):02d}<00:{int((SHARDS - done) / rate) if rate else 0:02d}, {rate:5.2f}it/s]"
    )


def main(options: Options, rank: int, report: int, torch: bool) -> None:
    """A forked rank's whole life; `report` is the pipe on which it says that it is ready."""

    def ready() -> None:
        os.write(report, b"r")

    try:
        Rank(options, rank, torch).run(ready)
    except BaseException as error:
        plain(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
    os._exit(1)
