"""The part of glmplan that runs inside the engine's Python, packed to travel: its kernels and their checks."""

from __future__ import annotations

import base64
import io
import zipfile
from functools import cache
from pathlib import Path

import glmplan

PARTS = ("__init__.py", "errors.py", "kernels/**/*")
"""What `python -m glmplan.kernels.verify` imports; the kernels stand alone by contract."""


@cache
def kernels_package() -> str:
    """A zip of these files below `glmplan/`, in base64 for a JSON request."""
    root, out = Path(glmplan.__file__).parent, io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in PARTS:
            for path in sorted(root.glob(part)):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, f"glmplan/{path.relative_to(root)}")
    return base64.b64encode(out.getvalue()).decode()
