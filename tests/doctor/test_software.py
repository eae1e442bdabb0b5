"""Checks of drivers, engines, compilers and variables; and of model files and disks."""

from __future__ import annotations

from typing import Any

import pytest

from glmplan.facts.system import Disk
from glmplan.units import GIB, MIB
from tests.doctor.hosts import VENV, engine, host, model, plan, seen, verdict


def test_a_driver_older_than_torchs_cuda_fails() -> None:
    old = host().model_copy(update={"driver_version": "570.133.20", "cuda_version": "12.8"})
    found = verdict("driver", seen(old))
    assert found.status == "fail"
    assert "built for CUDA 13.0" in found.evidence
    minor = host(engines=(engine(cuda_version="12.9"),)).model_copy(update={"cuda_version": "12.4"})
    assert verdict("driver", seen(minor)).status == "ok"


def test_the_engine_must_be_the_planned_one() -> None:
    trio = (host(2), host(3))
    assert verdict("engine", seen(plan=plan())).status == "ok"
    older = verdict("engine", seen(host(engines=(engine(engine_version="0.5.13.post1"),)), *trio, plan=plan()))
    assert older.status == "fail"
    assert older.repair == f"on h1: {VENV} -m pip install sglang==0.5.23"
    other = verdict("engine", seen(host(engines=(engine(engine="vllm", engine_version="0.33.0"),)), *trio, plan=plan()))
    assert other.status == "fail"
    assert "there is vllm 0.33.0" in other.evidence
    assert verdict("engine", seen(host(engines=(engine(engine=None, engine_version=None),)))).status == "warn"


def test_of_several_environments_the_planned_version_is_taken() -> None:
    both = (engine(engine_version="0.5.13.post1", python="/old/bin/python3"), engine())
    assert VENV in verdict("engine", seen(host(engines=both), host(2), host(3), plan=plan())).evidence


def test_a_build_tag_is_no_other_version() -> None:
    tagged = host(engines=(engine(engine_version="0.5.13.post1"), engine(engine_version="0.5.23+cu129")))
    found = verdict("engine", seen(tagged, host(2), host(3), plan=plan()))
    assert (found.status, "0.5.23+cu129" in found.evidence) == ("ok", True)


def test_versions_that_differ_fail_and_are_named() -> None:
    what = seen(host(1), host(2, engines=(engine(nccl_version="2.27.3"),)), host(3))
    found = verdict("versions", what)
    assert (found.status, found.evidence) == ("fail", "NCCL: h1 2.28.9, h2 2.27.3, h3 2.28.9")
    driver = seen(host(1), host(2).model_copy(update={"driver_version": "575.57.08"}))
    assert verdict("versions", driver).status == "warn"
    assert verdict("versions", seen()).evidence.startswith("engine sglang 0.5.23, torch 2.14.1")


@pytest.mark.parametrize(
    ("gpu", "facts", "status", "words"),
    [
        ("rtx-4090-48g", {"nvcc": None}, "fail", "SGLang compiles"),
        ("rtx-4090-48g", {"nvcc": None, "engines": (engine(engine="vllm"),)}, "warn", "vLLM needs it"),
        ("rtx-5090", {"nvcc_version": "12.4.131"}, "fail", "does not know sm_120"),
        ("rtx-5090", {"nvcc_version": "12.8.93"}, "ok", "12.8.93"),
        ("rtx-4090-48g", {"engines": ()}, "skip", "no engine"),
    ],
)
def test_the_compiler(gpu: str, facts: dict[str, Any], status: str, words: str) -> None:
    found = verdict("nvcc", seen(host(gpu=gpu, **facts)))
    assert found.status == status
    assert words in found.evidence


def test_variables_of_the_login() -> None:
    def of(**variables: str) -> Any:
        return verdict("environment", seen(host(environment=variables), host(2), host(3), plan=plan()))

    assert of(HF_HOME="/models", NCCL_DEBUG="INFO").status == "ok"
    assert "hides GPUs" in of(CUDA_VISIBLE_DEVICES="0,1").evidence
    assert "holds NCCL back" in of(NCCL_P2P_DISABLE="1").evidence
    assert of(NCCL_P2P_DISABLE="0").status == "ok"
    found = of(MASTER_ADDR="10.9.9.9", RANK="3")
    assert found.status == "warn"
    assert "unset MASTER_ADDR RANK" in found.repair


def test_variables_against_the_plans_interface() -> None:
    nodes = tuple(node.model_copy(update={"network": {"NCCL_SOCKET_IFNAME": "=eth0"}}) for node in plan().nodes)
    what = seen(
        host(environment={"NCCL_SOCKET_IFNAME": "docker0"}),
        host(2),
        host(3),
        plan=plan().model_copy(update={"nodes": nodes}),
    )
    assert "NCCL_SOCKET_IFNAME=docker0, and the launch sets =eth0" in verdict("environment", what).evidence


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"exists": False}, "fail", "is not on the host"),
        ({"files_present": 140, "missing": ("model-00007.safetensors",)}, "fail", "140 of 141 files, without model-00007"),
        ({"wrong": ("model-00009.safetensors: 5 bytes, its header promises 9",)}, "fail", "header promises 9"),
        ({"config": False}, "fail", "config.json"),
        ({"tokenizer": False}, "warn", "no tokenizer"),
        ({"files_expected": None}, "warn", "no index"),
        ({"files_expected": None, "files_present": 1}, "ok", "1 file, 703.0 GiB"),
        ({}, "ok", "141 files, 703.0 GiB"),
    ],
)
def test_model_files(changes: dict[str, Any], status: str, words: str) -> None:
    found = verdict("model-files", seen(host(model=model(**changes))))
    assert found.status == status
    assert words in found.evidence


def test_checkpoints_that_differ_between_hosts_fail() -> None:
    assert verdict("model-equal", seen(host(1), host(2, model=model(config_digest="cc")))).status == "fail"
    assert verdict("model-equal", seen()).status == "ok"


def test_room_on_disk() -> None:
    full = Disk(path="/tmp", mount="/tmp", free_bytes=100 * MIB)
    found = verdict("disk-space", seen(host(disks=(*host().system.disks[:2], full))))
    assert (found.status, found.evidence) == ("fail", "100 MiB free in /tmp")
    lacking = host(model=model(exists=False, files_present=0, bytes_present=0), disks=(full, *host().system.disks[1:]))
    assert "of the checkpoint lack" in verdict("disk-space", seen(lacking, host(2), host(3), plan=plan())).evidence


def test_reading_speed_becomes_minutes_of_loading() -> None:
    def at(bytes_per_s: int) -> Any:
        disk = Disk(path="/models/glm", filesystem="nfs4", read_bytes_per_s=bytes_per_s, read_sample_bytes=GIB)
        return verdict("disk-read", seen(host(disks=(disk,)), host(2), host(3), plan=plan()))

    assert at(2_000_000_000).status == "ok"
    assert "min" in at(2_000_000_000).evidence
    assert at(100_000_000).status == "warn"
    assert verdict("disk-read", seen()).status == "skip"
