"""The node program as one zip file, the same bytes for the same sources."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path

PACKAGE = "glmplan_node"
"""The package's name inside the zip: a host may have another glmplan installed."""

ANSWER_LINE = "glmplan-node-answer"
"""The line before an operation's answer: what a login shell prints on stdout is told apart by it."""

ENTRY = f"import sys\nfrom {PACKAGE}.__main__ import main\nsys.exit(main())\n"


def bundle() -> bytes:
    """The zip that this process was started from, or one packed from this folder."""
    carried = getattr(sys, "glmplan_bundle", None)
    return carried if carried is not None else _pack(Path(__file__).parent)


def digest(data: bytes) -> str:
    """A short name of a bundle's content."""
    return hashlib.sha256(data).hexdigest()[:12]


def _pack(folder: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, "__main__.py", ENTRY.encode())
        for path in sorted(folder.glob("*.py")):
            _add(archive, f"{PACKAGE}/{path.name}", path.read_bytes())
    return out.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o600 << 16
    archive.writestr(entry, content)
