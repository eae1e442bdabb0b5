"""What a worker printed: kept without secrets, in two files of limited size, and read from any byte on.

Positions are bytes since the start of the worker and survive the rotation of `log` to `log.1`. A carriage return ends a line
as a newline does, so that progress bars become lines. A full disk loses output and says how much; it never stops the worker.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .state import read_json, write_json

LIMIT_BYTES = 64 << 20
"""Of each of the two files: days of an engine's normal output."""
LONGEST_LINE_BYTES = 64 << 10
LEAST_SECRET = 4
"""Characters. A shorter word would blank out ordinary text."""
MARK = b"***"


class Redactor:
    """Takes output in pieces and gives it back in lines, with every secret replaced."""

    def __init__(self, secrets: list[str]) -> None:
        forms = {form for secret in secrets for form in _forms(secret)}
        self._secrets = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, self._secrets))) if forms else None
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Whole lines that became complete with `data`."""
        text = self._rest + data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        cut = text.rfind(b"\n") + 1
        if len(text) - cut > LONGEST_LINE_BYTES:
            cut = len(text) - self._held_back(text)
        self._rest = text[cut:]
        return self.clean(text[:cut])

    def flush(self, final: bool = False) -> bytes:
        """The unfinished line so far, but for an end that may be the beginning of a secret."""
        held = 0 if final else self._held_back(self._rest)
        text, self._rest = self._rest[: len(self._rest) - held], self._rest[len(self._rest) - held :]
        return self.clean(text)

    def clean(self, text: bytes) -> bytes:
        """The text with every secret replaced."""
        return self._pattern.sub(MARK, text) if self._pattern else text

    def _held_back(self, text: bytes) -> int:
        most = 0
        for secret in self._secrets:
            for size in range(min(len(secret) - 1, len(text)), most, -1):
                if text.endswith(secret[:size]):
                    most = size
                    break
        return most


def _forms(secret: str) -> set[bytes]:
    """A secret as it is, inside JSON and inside a URL."""
    if len(secret) < LEAST_SECRET:
        return set()
    return {form.encode() for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""))}


class LogFile:
    """The writer's side; one per worker."""

    def __init__(self, place: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._place, self._limit_bytes = place, limit_bytes
        self._handle: int | None = None
        self._base = self._size = self._lost_bytes = 0

    def write(self, data: bytes) -> None:
        """Append; what cannot be written is counted and told when there is room again."""
        if not data:
            return
        if self._lost_bytes:
            note = f"[glmplan: {self._lost_bytes:,} bytes of output were lost: the disk was full]\n".encode()
            if self._append(note) < len(note):
                self._lost_bytes += len(data)
                return
            self._lost_bytes = 0
        self._lost_bytes += len(data) - self._append(data)

    def _append(self, data: bytes) -> int:
        """The bytes that were written."""
        done = 0
        with suppress(OSError):
            self._open()
            assert self._handle is not None
            while done < len(data):
                count = os.write(self._handle, data[done:])
                done += count
                self._size += count
        return done

    def _open(self) -> None:
        if self._handle is not None and self._size >= self._limit_bytes:
            os.close(self._handle)
            self._handle = None
            os.replace(self._place / "log", self._place / "log.1")
            previous, self._base, self._size = self._base, self._base + self._size, 0
            write_json(self._place / "log.json", {"base": self._base, "previous": previous})
        if self._handle is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._handle = os.open(self._place / "log", flags, 0o600)


def read_log(place: Path, offset: int, most_bytes: int) -> dict[str, Any]:
    """{"log", "log_offset" (of what comes next), "log_size", "log_age_s" (None before the first line)}.

    A negative offset counts from the end. What was rotated away is left out.
    """
    for _ in range(3):
        bases = read_json(place / "log.json")
        found = _read(place, bases, offset, most_bytes)
        if read_json(place / "log.json") == bases:
            break
    return found


def _read(place: Path, bases: dict[str, Any], offset: int, most_bytes: int) -> dict[str, Any]:
    base, previous = bases.get("base", 0), bases.get("previous", 0)
    try:
        told = os.stat(place / "log")
    except OSError:
        here = max(offset, base)  # no log yet, or one that is being rotated at this moment
        return {"log": "", "log_offset": here, "log_size": here, "log_age_s": None}
    size = base + told.st_size
    wanted = min(size, max(size + offset if offset < 0 else offset, 0))
    data = b""
    if wanted < base:
        wanted = max(wanted, previous)
        data = _slice(place / "log.1", wanted - previous, most_bytes)
    if len(data) < most_bytes and wanted + len(data) >= base:
        data += _slice(place / "log", wanted + len(data) - base, most_bytes - len(data))
    data = _whole_characters(data)
    return {
        "log": data.decode(errors="replace"),
        "log_offset": wanted + len(data),
        "log_size": size,
        "log_age_s": max(0.0, time.time() - told.st_mtime) if size else None,
    }


def _slice(path: Path, start: int, most_bytes: int) -> bytes:
    with suppress(OSError), path.open("rb") as handle:
        handle.seek(start)
        return handle.read(max(0, most_bytes))
    return b""


def _whole_characters(data: bytes) -> bytes:
    """Without a UTF-8 character at the end whose last bytes are still to come."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            need = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if need > back and len(data) > back else data
        if byte < 0x80:
            return data
    return data
