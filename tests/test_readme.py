"""What the README shows is what the program prints, and every example runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```console\n\$ (glmplan [^\n]+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SHOWN = [(command, output) for command, output in BLOCKS if command != "glmplan probe"]
ENVIRONMENT = {**os.environ, "COLUMNS": "120", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_readme_shows_every_command():
    text = (ROOT / "README.md").read_text()
    for name in ("size", "launch", "probe", "doctor", "stop"):
        assert f"$ glmplan {name}" in text
    for name in ("verify", "bench", "tune", "status", "logs", "restart", "watch"):
        assert f"`{name}" in text or f"**{name}**" in text


def test_blocks_from_a_gpu_are_recorded_output():
    """Text blocks cannot be run here; every line of them stands in a record of a real run."""
    records = [*(ROOT / "tests" / "recorded" / "h200").glob("*.txt"), *(ROOT / "docs" / "proof").glob("*.txt")]
    known = {line.rstrip() for path in records for line in path.read_text().splitlines()}
    for block in re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for line in block.splitlines():
            if not line.startswith("$ "):
                start = line.removesuffix(" ...")
                assert any(one == line or (line != start and one.startswith(start)) for one in known), line


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_shown_output_is_the_real_one(command, output):
    words = shlex.split(command)[1:]
    ran = subprocess.run(
        [sys.executable, "-m", "glmplan", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    real = [line.rstrip() for line in ran.stdout.rstrip().splitlines()]
    shown = output.rstrip().splitlines()
    if shown[-1] == "...":
        shown, real = shown[:-1], real[: len(shown) - 1]
    assert real == shown


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.sh")), ids=lambda path: path.name)
def test_every_example_script_runs(path):
    ran = subprocess.run(
        ["bash", str(path)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_every_example_inventory_is_sized(path):
    command = [sys.executable, "-m", "glmplan", "size", "--inventory", str(path), "--context", "64k"]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
