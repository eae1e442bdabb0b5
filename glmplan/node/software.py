"""The Python environments of this host that hold an engine, with versions, read from folder names without importing.

A wheel's version is in the name of its `.dist-info` folder, so an environment costs one directory listing. torch's CUDA
version is in torch/version.py.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from . import procfs

ENGINES = ("sglang", "vllm")
VENV_PATTERNS = (
    *("~/venv*", "~/.venv*", "~/env", "~/*/venv", "~/*/.venv", "~/.virtualenvs/*", "~/sglang*", "~/vllm*"),
    *("/opt/*venv*", "/opt/*/venv", "/opt/*/.venv", "/opt/sglang*", "/opt/vllm*", "/venv", "/workspace/venv*"),
    *("~/.conda/envs/*", "~/miniconda3", "~/miniconda3/envs/*", "~/anaconda3", "~/anaconda3/envs/*", "~/miniforge3"),
    *("~/miniforge3/envs/*", "/opt/conda", "/opt/conda/envs/*", "/opt/miniconda3", "/opt/miniconda3/envs/*"),
)
MOST_ENVIRONMENTS = 64


def pythons(extra: Iterable[str] = ()) -> list[str]:
    """Interpreters worth a look: named ones first, then python3 of PATH, $VIRTUAL_ENV, $CONDA_PREFIX, usual places."""
    found = [_interpreter(one) for one in extra]
    found += [path for path in (shutil.which("python3"), shutil.which("python")) if path]
    prefixes = [os.environ.get(name, "") for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    prefixes += (procfs.read_text(os.path.expanduser("~/.conda/environments.txt")) or "").splitlines()
    for pattern in VENV_PATTERNS:
        prefixes += sorted(glob.glob(os.path.expanduser(pattern)))
    found += [os.path.join(prefix, "bin", "python3") for prefix in prefixes if prefix]
    found.append(sys.executable)
    places: dict[str, str] = {}
    for python in found:
        if python and os.access(python, os.X_OK):
            places.setdefault(_prefix(python), python)
    return list(places.values())[:MOST_ENVIRONMENTS]


def _interpreter(named: str) -> str:
    """What the user means by a folder, a path or a name such as python3.12."""
    path = os.path.expanduser(named)
    return os.path.join(path, "bin", "python3") if os.path.isdir(path) else shutil.which(path) or path


def _prefix(python: str) -> str:
    """The folder that an interpreter's packages belong to: a venv's own, else where the real interpreter lives."""
    prefix = os.path.dirname(os.path.dirname(os.path.abspath(python)))
    if os.path.exists(os.path.join(prefix, "pyvenv.cfg")):
        return prefix
    return os.path.dirname(os.path.dirname(os.path.realpath(python)))


def site_packages(python: str) -> list[str]:
    """The folders that this interpreter imports packages from, without running it."""
    if os.path.realpath(python) == os.path.realpath(sys.executable) and _prefix(python) == _prefix(sys.executable):
        with suppress(Exception):  # a stripped Python may lack the user's site
            return [folder for folder in [*site.getsitepackages(), site.getusersitepackages()] if os.path.isdir(folder)]
    prefix = _prefix(python)
    patterns = [f"{prefix}/lib*/python3*/site-packages", f"{prefix}/lib/python3*/dist-packages"]
    if prefix == "/usr":
        patterns += ["/usr/lib/python3/dist-packages", "/usr/local/lib/python3*/dist-packages"]
        patterns += [os.path.expanduser("~/.local/lib/python3*/site-packages")]
    found = [folder for pattern in patterns for folder in sorted(glob.glob(pattern)) if os.path.isdir(folder)]
    real: dict[str, str] = {}
    for folder in found:  # lib64 is often a link to lib
        real.setdefault(os.path.realpath(folder), folder)
    return list(real.values())


def environments(extra: Iterable[str] = (), more_folders: Iterable[str] = ()) -> list[dict[str, Any]]:
    """One entry per environment and engine; environments without an engine are told if they have torch or were named.

    `more_folders`: what PYTHONPATH will hold when the engine runs; they come first, for the named Pythons or, without
    any, for the first one found.
    """
    extra, known = list(extra), pythons(extra)
    named = {_prefix(_interpreter(one)) for one in extra}
    ahead = [os.path.expanduser(folder) for folder in more_folders]
    found = []
    for python in known:
        gains = _prefix(python) in named if named else python == known[0]
        folders = [*(ahead if gains else ()), *site_packages(python)]
        versions = _versions(folders)
        engines = [engine for engine in ENGINES if engine in versions]
        if engines or "torch" in versions or _prefix(python) in named:
            found += [_environment(python, folders, versions, engine) for engine in (engines or [""])]
    return found


def _versions(folders: Iterable[str]) -> dict[str, str]:
    """Package name (lower case, dashes) -> version."""
    found: dict[str, str] = {}
    for folder in folders:
        try:
            entries = os.listdir(folder)
        except OSError:
            continue
        for entry in entries:
            if name := re.fullmatch(r"(.+?)-([^-]+)(?:-py[\d.]+)?\.(?:dist-info|egg-info)", entry):
                found.setdefault(re.sub(r"[-_.]+", "-", name[1]).lower(), name[2])
    return found


def _environment(python: str, folders: list[str], versions: dict[str, str], engine: str) -> dict[str, Any]:
    nccl = next((versions[name] for name in sorted(versions) if re.fullmatch(r"nvidia-nccl-cu\d+", name)), None)
    return {
        "python": python,
        "python_version": _python_version(python, folders),
        "engine": engine or None,
        "engine_version": versions.get(engine),
        "torch_version": versions.get("torch"),
        "cuda_version": _torch_cuda(folders) or _wheel_cuda(versions),
        "nccl_version": nccl,
        "triton_version": versions.get("triton"),
        "glmplan_version": versions.get("glmplan"),
    }


def _python_version(python: str, folders: list[str]) -> str | None:
    if os.path.realpath(python) == os.path.realpath(sys.executable):
        return ".".join(map(str, sys.version_info[:3]))
    text = procfs.read_text(os.path.join(_prefix(python), "pyvenv.cfg")) or ""
    if found := re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+(?:\.\d+)?)", text, re.MULTILINE):
        return found[1]
    found = next(filter(None, (re.search(r"python(3\.\d+)", folder) for folder in folders)), None)
    return found[1] if found else None


def _torch_cuda(folders: Iterable[str]) -> str | None:
    for folder in folders:
        text = procfs.read_text(os.path.join(folder, "torch", "version.py"))
        if text is not None:
            found = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", text, re.MULTILINE)
            return found[1] if found else None
    return None


def _wheel_cuda(versions: dict[str, str]) -> str | None:
    found = re.search(r"\+cu(\d+)(\d)$", versions.get("torch", ""))
    return f"{found[1]}.{found[2]}" if found else None


def nvcc() -> tuple[str | None, str | None]:
    """The CUDA compiler that a JIT build would find, and its version."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.path.join(home, "bin", "nvcc") for home in [*homes, "/usr/local/cuda"] if home]
    path = next((one for one in places[: len(places) - 1] if os.access(one, os.X_OK)), None)
    path = path or shutil.which("nvcc") or next((one for one in places if os.access(one, os.X_OK)), None)
    if path is None:
        return None, None
    try:
        done = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return path, None
    found = re.search(r"release (\d+\.\d+)(?:, V([\d.]+))?", done.stdout.decode(errors="replace"))
    return path, (found[2] or found[1]) if found else None
