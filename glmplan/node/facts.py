"""Everything that is known about this host, as one JSON object with the field names of `glmplan.facts`.

GPUs carry `memory_reserved_bytes` and `memory_free_bytes` as read; what is usable is worked out where profiles are. A
host whose GPUs cannot be read still tells the rest, with the reason as `gpu_problem`.
"""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import disk, gpus, model_files, network, procfs, software, system
from .errors import NodeError


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """The host's facts.

    `gpu_indexes` limits the GPUs; `model_path` is judged and, with `disk_read`, read for `disk_seconds`;
    `engine_pythons` are looked at beside the usual places, with `engine_folders` ahead of their own packages.
    """
    started_s = time.time()
    extra = [str(one) for one in request.get("engine_pythons") or ()]
    folders = [str(one) for one in request.get("engine_folders") or ()]
    with ThreadPoolExecutor(max_workers=8) as pool:
        names = pool.submit(system.hostname_addresses)
        compiler = pool.submit(software.nvcc)
        engines = pool.submit(software.environments, extra, folders)
        disks = pool.submit(_disks, request)
        model = pool.submit(_model, request)
        driver = _gpus(request, extra)
        left = system.leftovers(driver["gpus"])
        nvcc, nvcc_version = compiler.result()
        surroundings = {
            **system.identity(),
            **system.memory_and_limits(),
            **system.pcie(),
            "hostname_addresses": names.result(),
            "nics": network.nics(),
            "rdma": network.rdma_ports(),
            "peers": driver.pop("peers"),
            "disks": disks.result(),
            "nvcc": nvcc,
            "nvcc_version": nvcc_version,
            "environment": system.variables(),
            "engines": engines.result(),
            "model": model.result(),
            "leftovers": left,
        }
    surroundings["node_time_s"] = time.time()
    return {
        "hostname": platform.node(),
        "memory_total_bytes": procfs.memory().get("MemTotal"),
        **driver,
        "system": surroundings,
        "started_s": started_s,
    }


def _gpus(request: dict[str, Any], extra: list[str]) -> dict[str, Any]:
    """The driver's part; a failure becomes `gpu_problem`."""
    folders = (folder for python in software.pythons(extra) for folder in software.site_packages(python))
    try:
        found = gpus.read_readable(request.get("gpu_indexes"), peers=True, site_packages=folders)
    except NodeError as error:
        return {"gpus": [], "peers": [], "gpu_problem": _problem(error)}
    problems = found.pop("problems")
    found.pop("count")
    return {**found, "gpu_problem": _problem(problems[0]) if problems else None}


def _problem(error: NodeError) -> dict[str, str]:
    return {"kind": error.kind, "message": error.message, "next_step": error.next_step}


def _model(request: dict[str, Any]) -> dict[str, Any] | None:
    path = request.get("model_path")
    return model_files.model_files(str(path)) if path else None


def _disks(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The model folder's file system, measured if asked, then those of the state folder and of /tmp."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    found = []
    if path := request.get("model_path"):
        folder = model_files.find_folder(str(path)) or str(path)
        speed, sample = None, 0
        if request.get("disk_read"):
            speed, sample = disk.read_speed(folder, float(request.get("disk_seconds") or 2.0))
        found.append({**disk.disk(folder), "read_bytes_per_s": speed, "read_sample_bytes": sample})
    return found + [disk.disk(place) for place in (state, "/tmp")]
