"""Whether a host's key is the one that known_hosts names, and how a new one is written down.

Format: sshd(8), SSH_KNOWN_HOSTS FILE FORMAT (OpenSSH 9.2): hashed names, patterns, `!` negation, `[host]:port`, `@revoked`.
`@cert-authority` lines are seen and not used: host certificates are not verified here. Stricter than ssh in one point: a
key of a type that known_hosts lacks counts as changed when it has keys of other types for that name.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

DEFAULT_PORT = 22


class Verdict(Enum):
    """What known_hosts says about an offered key."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True)
class Line:
    """One line of a known_hosts file that names the host."""

    path: Path
    number: int
    marker: str
    key_type: str
    key: str


@dataclass(frozen=True)
class HostKey:
    """A host key as known_hosts writes it: `key_type` and base64."""

    key_type: str
    key: str

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it."""
        digest = hashlib.sha256(base64.b64decode(self.key)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def written_name(host: str, tcp_port: int) -> str:
    """The host as known_hosts names it."""
    host = host.lower()
    return host if tcp_port == DEFAULT_PORT else f"[{host}]:{tcp_port}"


def lines_for(name: str, files: Sequence[Path]) -> tuple[Line, ...]:
    """All lines that name the host, file by file. Files that are missing or unreadable have none."""
    return tuple(line for path in files for line in _matching(name, path))


def judge(lines: Iterable[Line], offered: HostKey) -> tuple[Verdict, Line | None]:
    """The verdict, and the line that it rests on."""
    keys = [line for line in lines if line.marker != "@cert-authority"]
    same = [line for line in keys if (line.key_type, line.key) == (offered.key_type, offered.key)]
    if revoked := next((line for line in same if line.marker == "@revoked"), None):
        return Verdict.REVOKED, revoked
    if same:
        return Verdict.KNOWN, same[0]
    others = sorted((line for line in keys if not line.marker), key=lambda line: line.key_type != offered.key_type)
    return (Verdict.CHANGED, others[0]) if others else (Verdict.UNKNOWN, None)


def record(path: Path, name: str, offered: HostKey, hashed: bool) -> None:
    """Append the key; another process may do the same at the same time. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "rb+") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        if judge(_matching(name, path), offered)[0] is not Verdict.UNKNOWN:
            return
        before = out.read()
        line = f"{_hash(name, os.urandom(20)) if hashed else name} {offered.key_type} {offered.key}\n"
        out.write((b"\n" if before and not before.endswith(b"\n") else b"") + line.encode())


def _matching(name: str, path: Path) -> Iterator[Line]:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) >= 3 and not words[0].startswith("#") and _names(words[0], name):
            yield Line(path, number, marker, words[1], words[2])


def _names(patterns: str, name: str) -> bool:
    if patterns.startswith("|1|"):
        parts = patterns.split("|")
        try:
            return len(parts) == 4 and hmac.compare_digest(_hash(name, base64.b64decode(parts[2])), patterns)
        except ValueError:
            return False
    found = False
    for pattern in patterns.lower().split(","):
        if fnmatchcase(name, pattern.removeprefix("!").replace("[", "[[]")):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _hash(name: str, salt: bytes) -> str:
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
