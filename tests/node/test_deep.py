"""The deep parts on this machine's CPUs: ranks of gloo with real PyTorch, and what goes wrong without one."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from glmplan.kernels.packed import packed_text
from glmplan.node import deep as node_deep
from glmplan.node.errors import NodeError
from glmplan.transport.base import parse_hosts
from glmplan.transport.local import LocalTransport
from glmplan.transport.node import call
from tests.doctor.torch_python import needs_torch, torch_python
from tests.node.host import free_port

HERE = "127.0.0.1"


def deep(part: str, timeout_s: float = 240.0, **request: Any) -> dict[str, Any]:
    """One part in a process of its own."""
    body = {"part": part, "pythons": [torch_python()], "environment": {}, "gpu_indexes": [], **request}
    return call(LocalTransport(parse_hosts("local")[0]), "deep", {**body, "timeout_s": timeout_s}, timeout_s=timeout_s + 60)


def ranks(first: int, count: int, port: int, **request: Any) -> dict[str, Any]:
    """One host's ranks of a world of three."""
    wanted = {
        "first_rank": first, "local_ranks": count, "world_size": 3, "backend": "gloo", "address": HERE, "tcp_port": port,
        "sizes_bytes": [8, 1 << 20], "link_bytes": 1 << 20, "join_s": 120.0, "rounds": [[[0, 1]], [[0, 2]], [[1, 2]]],
    }  # fmt: skip
    return deep("ranks", **{**wanted, **request})


@needs_torch
def test_ranks_of_two_hosts_add_up_and_measure_every_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    port = free_port()
    with ThreadPoolExecutor() as pool:
        other = pool.submit(ranks, 1, 2, port)
        found = ranks(0, 1, port)["ranks"] + other.result()["ranks"]
    assert [rank["rank"] for rank in found] == [0, 1, 2]
    for rank in found:
        assert "error" not in rank
        assert [(size["bytes"], size["wrong_elements"]) for size in rank["all_reduce"]] == [(8, 0), (1 << 20, 0)]
        assert sorted(link["peer"] for link in rank["links"]) == sorted({0, 1, 2} - {rank["rank"]})
        assert all(link["wrong_elements"] == 0 and link["bytes_per_s"] > 0 for link in rank["links"])
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_a_rank_that_nobody_joins_ends_in_time_with_torchs_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = ranks(0, 1, free_port(), join_s=3.0)["ranks"]
    assert "1/3 clients joined" in found[0]["error"] or "Timed out" in found[0]["error"]
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_kernels_run_from_the_package_that_was_sent() -> None:
    found = deep("kernels", gpu_indexes=[0], package=packed_text())["gpus"][0]
    assert found["exit_status"] == 4  # no GPU, or no Triton: said by the package itself
    assert found["err"].startswith("glmplan: ")


@needs_torch
def test_copies_without_gpus_are_no_pairs() -> None:
    found = deep("copies", copy_bytes=1024)
    assert (found["pairs"], found["overran"], found["stuck_at"]) == ([], False, None)


def test_no_torch_anywhere_is_a_failure_that_names_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(NodeError, match="No Python here can import torch") as error:
        node_deep.deep({"part": "copies", "pythons": ["/no/such/python3"], "timeout_s": 5})
    assert error.value.kind == "no-torch"
    assert "/no/such/python3, python3" in error.value.message
    assert "--engine-python" in error.value.next_step


def test_the_pair_of_a_copy_that_hangs_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, hangs = tmp_path / "tmp", tmp_path / "python3"
    temporary.mkdir()
    pid_file = tmp_path / "pid"
    hangs.write_text(
        "#!/bin/sh\n"
        'case "$1" in -c) exit 0;; esac\n'
        f"echo $$ > {pid_file}\n"
        """echo '{"gpus": 2}'; echo '{"trying": [0, 1]}'\n"""
        """echo '{"source": 0, "target": 1, "direct": true, "wrong_elements": 0, "bytes_per_s": 1.0}'\n"""
        """echo '{"trying": [1, 0]}'\n"""
        "exec sleep 600\n"
    )
    hangs.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(temporary))
    body = {"part": "copies", "pythons": [str(hangs)], "gpu_indexes": [2, 5], "copy_bytes": 64, "timeout_s": 4}
    found = call(LocalTransport(parse_hosts("local")[0]), "deep", body, timeout_s=120)
    assert (found["overran"], found["stuck_at"]) == (True, [5, 2])
    assert [(pair["source"], pair["target"]) for pair in found["pairs"]] == [(2, 5)]
    assert not Path(f"/proc/{int(pid_file.read_text())}").exists()
    assert list(temporary.iterdir()) == []
