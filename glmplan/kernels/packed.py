"""The kernels as one zip that travels: unpacked to a folder on PYTHONPATH it is an installed distribution with its plugins.

Inside are the package without its other rooms (the kernels stand alone by contract), tuned tables where there are any, and
a dist-info with the entry points of both engines, RECORD included: the plugins compare the folder they were loaded from with
it, so a half-copied one is refused by name. Standard library only.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import glmplan
from glmplan.errors import GlmplanError
from glmplan.kernels.engines import ENTRY_POINT, SGLANG_GROUP, VLLM_GROUP

PARTS = ("__init__.py", "errors.py", "kernels/**/*")
RUN_INSIDE = ("glmplan/__init__.py", "glmplan/errors.py", "glmplan/kernels/")
PLUGINS = {
    SGLANG_GROUP: "glmplan.kernels.engines.sglang_plugin:register",
    VLLM_GROUP: "glmplan.kernels.engines.vllm_plugin:register",
}
TUNED = "glmplan/profiles/tuned"
"""Where tuned tables lie inside the zip."""
INSTALLER = b"glmplan\n"


class HalfInstalledError(GlmplanError):
    """Files of the package are missing or cut short."""


def _files() -> dict[str, bytes]:
    """Path inside the zip -> content."""
    root = Path(glmplan.__file__).parent
    found = {}
    for part in PARTS:
        for path in sorted(root.glob(part)):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"glmplan/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    for tables in _table_folders(root):
        for path in sorted(tables.rglob("*.json")):
            found[f"{TUNED}/{path.relative_to(tables).as_posix()}"] = path.read_bytes()
    return found


def user_profiles() -> list[Path]:
    """Folders of the user that may hold tuned tables, the first wins: those of GLMPLAN_PROFILES, then the data folder."""
    data = os.environ.get("XDG_DATA_HOME", "")
    home = Path(data) if data.startswith("/") else Path.home() / ".local" / "share"
    named = [Path(part) for part in os.environ.get("GLMPLAN_PROFILES", "").split(os.pathsep) if part]
    return [*named, home / "glmplan" / "profiles"]


def _table_folders(root: Path) -> list[Path]:
    """Where tuned tables lie, the ones that win last: packaged, then the user's."""
    profiles = [root / "profiles", root.parent / "profiles", *reversed(user_profiles())]
    return [folder / "tuned" for folder in profiles if (folder / "tuned").is_dir()]


def _dist_info(files: dict[str, bytes]) -> dict[str, bytes]:
    folder = f"glmplan-{glmplan.__version__}.dist-info"
    points = "".join(f"[{group}]\n{ENTRY_POINT} = {place}\n\n" for group, place in PLUGINS.items())
    own = {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: glmplan\nVersion: {glmplan.__version__}\n".encode(),
        f"{folder}/entry_points.txt": points.encode(),
        f"{folder}/INSTALLER": INSTALLER,
    }
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    for name, content in {**files, **own}.items():
        code = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={code}", len(content)])
    rows.writerow([f"{folder}/RECORD", "", ""])
    return {**own, f"{folder}/RECORD": out.getvalue().encode()}


@cache
def packed() -> bytes:
    """The zip; the same bytes for the same sources."""
    files = _files()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, **_dist_info(files)}.items():
            entry = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return out.getvalue()


def tuned_kinds(engine_version: str, gpus: Iterable[str] | None = None) -> tuple[str, ...]:
    """Kinds of tuned tables (gemm, moe) that travel for an engine version; with `gpus`, those made on a GPU so named."""
    names = None if gpus is None else [f",device_name={gpu.replace(' ', '_')}," for gpu in gpus]
    start, found = f"{TUNED}/{engine_version}/", set()
    for name in _files():
        kind, _, rest = name.removeprefix(start).partition("/")
        table = name.startswith(start) and rest.startswith({"gemm": "N=", "moe": "configs/"}.get(kind, "/"))
        if table and (names is None or any(one in rest for one in names)):
            found.add(kind)
    return tuple(sorted(found))


def packed_text() -> str:
    """The zip in base64, for a JSON request."""
    return base64.b64encode(packed()).decode()


def missing_files(folder: Path) -> tuple[str, ...]:
    """Files that run inside an engine which RECORD lists and `folder` lacks or has with another size.

    An unpacked zip without RECORD lacks that; a checkout, an editable install and a package whose RECORD a distributor left
    out tell nothing, and lack nothing.
    """
    metadata = folder / f"glmplan-{glmplan.__version__}.dist-info"
    record = metadata / "RECORD"
    if not record.is_file():
        unpacked = (metadata / "INSTALLER").is_file() and (metadata / "INSTALLER").read_bytes() == INSTALLER
        return (f"{metadata.name}/RECORD",) if unpacked else ()
    found = []
    for row in csv.reader(io.StringIO(record.read_text(encoding="utf-8"))):
        name, size = (row[0], row[2]) if len(row) == 3 else ("", "")
        path = folder / name
        if name.startswith(RUN_INSIDE) and size and not (path.is_file() and path.stat().st_size == int(size)):
            found.append(name)
    return tuple(found)


def require_whole(folder: Path | None = None) -> None:
    """Raises where the installed package is half-copied: what is left of it could still load, and compute something else."""
    folder = folder or Path(glmplan.__file__).parent.parent
    lacking = missing_files(folder)
    if lacking:
        raise HalfInstalledError(
            f"glmplan is half-installed in {folder}: {len(lacking)} of its files are missing or cut short, "
            f"{lacking[0]} among them.",
            "Install it again, or launch again: glmplan launch brings it along whole.",
        )
