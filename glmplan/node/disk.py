"""Room on the disks of this host, and how fast a model folder can be read.

Units: bytes, bytes/s. The read goes past the page cache: with O_DIRECT, and where the file system refuses that, after the
kernel was told to drop the file's pages. Several blocks are in flight, as engines read several shards at once.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from . import procfs

BLOCK_BYTES = 16 * 1024**2
READERS = 4
SLOWEST_ANSWER_S = 5.0
"""A dead network file system must not hold up the other facts."""


def disk(path: str) -> dict[str, Any]:
    """The file system that holds `path`, or would hold it: that of its nearest existing folder."""
    found: dict[str, Any] = {"path": path, "mount": None, "filesystem": None, "total_bytes": None, "free_bytes": None}

    def ask() -> None:
        folder = os.path.abspath(os.path.expanduser(path))
        while not os.path.exists(folder) and folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
        mount, filesystem = _mount(os.path.realpath(folder))
        with suppress(OSError):
            room = os.statvfs(folder)
            found.update(total_bytes=room.f_blocks * room.f_frsize, free_bytes=room.f_bavail * room.f_frsize)
        found.update(mount=mount, filesystem=filesystem)

    _within(SLOWEST_ANSWER_S, ask)
    return dict(found)


def _within(seconds: float, work: Any) -> None:
    """Run `work` on a thread of its own and stop waiting after `seconds`."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _mount(path: str) -> tuple[str | None, str | None]:
    """The mount point and the file system's name, from /proc/self/mountinfo."""
    best: tuple[str | None, str | None] = (None, None)
    for line in (procfs.read_text("/proc/self/mountinfo") or "").splitlines():
        words = line.split()
        if "-" not in words or len(words) < 10:
            continue
        point = words[4].encode().decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0] or ""):
            best = (point, words[words.index("-") + 1])
    return best


def read_speed(folder: str, seconds: float) -> tuple[int | None, int]:
    """Bytes/s and the bytes read for it; (None, 0) where the folder has no file worth reading."""
    files = _largest(folder)
    if not files:
        return None, 0
    work = _Reading(files, seconds)
    work.run()
    return (round(work.done_bytes / work.elapsed_s), work.done_bytes) if work.done_bytes and work.elapsed_s else (None, 0)


def _largest(folder: str) -> list[tuple[str, int]]:
    """The files of a model folder, weights first, largest first; or the one file that was named."""
    try:
        paths = [entry.path for entry in os.scandir(folder)] if os.path.isdir(folder) else [folder]
        sized = [(path, os.stat(path).st_size) for path in paths if os.path.isfile(path)]
    except OSError:
        return []
    sized = [one for one in sized if one[1] >= BLOCK_BYTES]
    return sorted(sized, key=lambda one: (not one[0].endswith(".safetensors"), -one[1], one[0]))


class _Reading:
    """Readers that take block after block of a list of files until the time is over."""

    def __init__(self, files: Iterable[tuple[str, int]], seconds: float) -> None:
        self._blocks = ((path, start) for path, size in files for start in range(0, size - BLOCK_BYTES + 1, BLOCK_BYTES))
        self._lock = threading.Lock()
        self._seconds = seconds
        self.done_bytes = 0
        self.elapsed_s = 0.0

    def run(self) -> None:
        """Read; a reader that hangs in the kernel is left behind after twice the time."""
        begin = time.monotonic()
        readers = [threading.Thread(target=self._read, args=(begin,), daemon=True) for _ in range(READERS)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(max(0.0, begin + 2 * self._seconds + 1 - time.monotonic()))

    def _read(self, begin: float) -> None:
        buffer = mmap.mmap(-1, BLOCK_BYTES)  # a page-aligned buffer, as O_DIRECT asks
        while time.monotonic() - begin < self._seconds:
            with self._lock:
                block = next(self._blocks, None)
            if block is None:
                return
            count = _read_block(block[0], block[1], buffer)
            with self._lock:
                self.done_bytes += count
                self.elapsed_s = max(self.elapsed_s, time.monotonic() - begin)


def _read_block(path: str, start: int, buffer: mmap.mmap) -> int:
    for flag in (getattr(os, "O_DIRECT", 0), 0):
        try:
            handle = os.open(path, os.O_RDONLY | flag)
        except OSError:
            continue
        try:
            if not flag:
                os.posix_fadvise(handle, start, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
            return os.preadv(handle, [buffer], start)
        except OSError:
            continue
        finally:
            os.close(handle)
    return 0
