"""Python environments found by their folders: nothing is imported, nothing is run."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from glmplan.node import software


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own; no environment of the tests' own process shows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def environment(prefix: Path, packages: dict[str, str], version: str = "3.12.3", config: bool = True) -> Path:
    """The folders of an environment that holds these wheels."""
    site = prefix / "lib" / f"python{'.'.join(version.split('.')[:2])}" / "site-packages"
    site.mkdir(parents=True)
    (prefix / "bin").mkdir()
    python = prefix / "bin" / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    if config:
        (prefix / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")
    for name, number in packages.items():
        (site / f"{name}-{number}.dist-info").mkdir()
    return site


def only(prefix: Path) -> list[dict[str, object]]:
    return [one for one in software.environments() if one["python"] == str(prefix / "bin" / "python3")]


def test_an_environment_in_the_home_folder_is_found_with_its_versions(home: Path) -> None:
    packages = {"sglang": "0.5.23", "torch": "2.11.0", "nvidia_nccl_cu13": "2.28.9", "triton": "3.6.0", "glmplan": "0.1.0"}
    site = environment(home / "venv-sglang", packages)
    (site / "torch").mkdir()
    (site / "torch" / "version.py").write_text("__version__ = '2.11.0'\ncuda: Optional[str] = '13.0'\n")
    assert only(home / "venv-sglang") == [
        {
            "python": str(home / "venv-sglang" / "bin" / "python3"),
            "python_version": "3.12.3",
            "engine": "sglang",
            "engine_version": "0.5.23",
            "torch_version": "2.11.0",
            "cuda_version": "13.0",
            "nccl_version": "2.28.9",
            "triton_version": "3.6.0",
            "glmplan_version": "0.1.0",
        }
    ]


def test_two_engines_in_one_environment_are_two_entries(home: Path) -> None:
    environment(home / ".venv", {"sglang": "0.5.23", "vllm": "0.33.0"})
    assert [one["engine"] for one in only(home / ".venv")] == ["sglang", "vllm"]


def test_the_cuda_version_may_be_in_torchs_own_version(home: Path) -> None:
    environment(home / "venv", {"vllm": "0.33.0", "torch": "2.9.1+cu128"})
    assert only(home / "venv")[0]["cuda_version"] == "12.8"


def test_torch_without_cuda_has_none(home: Path) -> None:
    site = environment(home / "venv", {"torch": "2.13.0+cpu"})
    (site / "torch").mkdir()
    (site / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    found = only(home / "venv")[0]
    assert (found["engine"], found["torch_version"], found["cuda_version"]) == (None, "2.13.0+cpu", None)


def test_conda_environments_are_found_without_a_pyvenv_file(home: Path) -> None:
    prefix = home / "elsewhere" / "engine"
    environment(prefix, {"vllm": "0.33.0"}, config=False)
    (home / ".conda").mkdir()
    (home / ".conda" / "environments.txt").write_text(f"{prefix}\n/gone\n")
    found = only(prefix)
    assert (found[0]["engine_version"], found[0]["python_version"]) == ("0.33.0", "3.12")


def test_an_environment_without_engine_or_torch_is_told_only_if_named(home: Path) -> None:
    environment(home / "venv", {"requests": "2.0"})
    assert only(home / "venv") == []
    named = software.environments([str(home / "venv")])
    assert [one["engine"] for one in named if one["python"].startswith(str(home / "venv"))] == [None]


def test_folders_of_a_python_path_come_first_for_the_named_python(home: Path) -> None:
    environment(home / "venv", {"torch": "2.11.0", "sglang": "0.5.13.post1"})
    environment(home / "venv-other", {"torch": "2.11.0"})
    (home / "site" / "sglang-0.5.23.dist-info").mkdir(parents=True)
    found = software.environments([str(home / "venv")], ["~/site", "/no/such/folder"])
    versions = {one["python"]: one["engine_version"] for one in found if one["python"].startswith(str(home))}
    assert versions == {str(home / "venv/bin/python3"): "0.5.23", str(home / "venv-other/bin/python3"): None}


def test_folders_of_a_python_path_belong_to_the_first_python_where_none_is_named(home: Path) -> None:
    (home / "site" / "vllm-0.33.0.dist-info").mkdir(parents=True)
    found = software.environments((), [str(home / "site")])
    assert [one["python"] for one in found if one["engine"] == "vllm"] == software.pythons()[:1]


def test_a_named_python_that_is_not_there_is_left_out(home: Path) -> None:
    assert [one for one in software.pythons(["/no/such/python"]) if "such" in one] == []


def test_one_environment_under_two_names_is_one(home: Path) -> None:
    environment(home / "venv", {"vllm": "0.33.0"})
    paths = [str(home / "venv"), str(home / "venv" / "bin" / "python3")]
    assert len([one for one in software.environments(paths) if one["engine"] == "vllm"]) == 1


def test_a_real_environment_is_read_as_it_says_itself(home: Path) -> None:
    prefix = home / "venv"
    venv.create(prefix, with_pip=False, symlinks=True)
    say = "import site, sys; print(site.getsitepackages()[0], '.'.join(map(str, sys.version_info[:3])))"
    python = str(prefix / "bin" / "python3")
    folder, version = subprocess.run([python, "-c", say], capture_output=True, text=True, check=True).stdout.split()
    assert software.site_packages(python) == [folder]
    assert software._python_version(python, [folder]) == version


def test_this_pythons_own_packages_are_found() -> None:
    folders = software.site_packages(sys.executable)
    assert any((Path(folder) / "pytest").is_dir() for folder in folders)


def compiler(folder: Path, release: str) -> None:
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V{release}'\n")
    path.chmod(0o755)


def test_the_cuda_compiler_of_cuda_home_goes_before_paths(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(home / "bin", "13.0.48")
    assert software.nvcc() == (str(home / "bin" / "nvcc"), "13.0.48")
    compiler(home / "cuda" / "bin", "13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(home / "cuda"))
    assert software.nvcc() == (str(home / "cuda" / "bin" / "nvcc"), "13.0.88")


def test_a_compiler_that_does_not_run_has_no_version(home: Path) -> None:
    (home / "bin").mkdir()
    (home / "bin" / "nvcc").write_text("#!/nowhere\n")
    (home / "bin" / "nvcc").chmod(0o755)
    assert software.nvcc() == (str(home / "bin" / "nvcc"), None)


def test_without_a_compiler_there_is_none(home: Path) -> None:
    if os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("this machine has a CUDA compiler")
    assert software.nvcc() == (None, None)
