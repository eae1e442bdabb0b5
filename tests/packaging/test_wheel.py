"""The wheel carries the profiles and runs outside the checkout; starting loads nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=600,
    )
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_profile(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "profiles").rglob("*.toml"):
        assert f"glmplan/profiles/{path.relative_to(ROOT / 'profiles')}" in names


def test_wheel_sizes_outside_the_checkout(wheel: Path, tmp_path: Path):
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "import glmplan; assert 'site' in glmplan.__file__; from glmplan.cli.app import main; main()"
    ran = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(unpacked)!r}); {code}", "size", "--gpu", "h200"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "GPUs are the fewest" in ran.stdout


def test_starting_loads_no_torch_triton_pynvml_or_paramiko():
    code = (
        "import glmplan.cli.app, sys; "
        "print([m for m in ('torch', 'triton', 'pynvml', 'paramiko', 'pydantic', 'rich') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
