"""Room and reading speed of real files; what cannot be asked is unknown."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from glmplan.node import disk

MIB = 1024**2


def test_the_file_system_of_a_folder_is_told(tmp_path: Path) -> None:
    found = disk.disk(str(tmp_path))
    room = os.statvfs(tmp_path)
    assert found["path"] == str(tmp_path)
    assert found["total_bytes"] == room.f_blocks * room.f_frsize
    assert 0 < found["free_bytes"] <= found["total_bytes"]
    assert found["mount"] == "/" or str(tmp_path.resolve()).startswith(found["mount"])
    assert found["filesystem"]


def test_a_folder_that_will_be_made_has_its_parents_room(tmp_path: Path) -> None:
    there, not_yet = disk.disk(str(tmp_path)), disk.disk(str(tmp_path / "a" / "b" / "c"))
    assert not_yet["total_bytes"] == there["total_bytes"]
    assert not_yet["mount"] == there["mount"]


def test_the_longest_mount_point_wins_and_octal_escapes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        "2 1 8:2 / /data rw shared:1 - xfs /dev/b rw\n"
        r"3 2 8:3 / /data/my\040models rw - nfs4 server:/x rw" + "\n"
        "4 1 8:4 / /data2 rw - tmpfs none rw\n"
    )
    monkeypatch.setattr(disk.procfs, "read_text", lambda path: lines)
    assert disk._mount("/data/my models/glm") == ("/data/my models", "nfs4")
    assert disk._mount("/data/x") == ("/data", "xfs")
    assert disk._mount("/data22") == ("/", "ext4")


def test_reading_a_folder_takes_weights_first_and_counts_what_it_read(tmp_path: Path) -> None:
    weights = tmp_path / "model-00001.safetensors"
    weights.write_bytes(os.urandom(48 * MIB))
    (tmp_path / "other.bin").write_bytes(bytes(64 * MIB))
    (tmp_path / "config.json").write_text("{}")
    assert [Path(path).name for path, _ in disk._largest(str(tmp_path))] == ["model-00001.safetensors", "other.bin"]
    speed, sample = disk.read_speed(str(tmp_path), 120.0)
    assert sample == 112 * MIB
    assert speed is not None
    assert speed > MIB


def test_reading_ends_when_the_time_is_over(tmp_path: Path) -> None:
    with (tmp_path / "hole.safetensors").open("wb") as stream:
        stream.truncate(1 << 40)  # no data behind it, and far too much of it
    begin = time.monotonic()
    speed, sample = disk.read_speed(str(tmp_path), 0.3)
    assert time.monotonic() - begin < 30  # the whole of it takes minutes on the fastest machine
    assert speed is not None
    assert 0 < sample < 1 << 40


def test_a_file_system_without_direct_reads_is_read_all_the_same() -> None:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no writable /dev/shm")
    path = folder / f"glmplan-test-{os.getpid()}.safetensors"
    path.write_bytes(bytes(32 * MIB))
    try:
        assert disk.read_speed(str(path), 120.0)[1] == 32 * MIB
    finally:
        path.unlink()


def test_nothing_worth_reading_has_no_speed(tmp_path: Path) -> None:
    (tmp_path / "small.safetensors").write_bytes(bytes(1000))
    assert disk.read_speed(str(tmp_path), 1.0) == (None, 0)
    assert disk.read_speed(str(tmp_path / "nothing"), 1.0) == (None, 0)


def test_files_that_vanish_while_read_have_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_largest", lambda folder: [(str(tmp_path / "gone"), 64 * MIB)])
    assert disk.read_speed(str(tmp_path), 0.2) == (None, 0)


def test_a_file_system_that_hangs_does_not_hold_up_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = threading.Event()

    def hang(path: str) -> None:
        release.wait(120)
        raise OSError("stale handle")

    monkeypatch.setattr(disk.os, "statvfs", hang)
    monkeypatch.setattr(disk, "SLOWEST_ANSWER_S", 0.05)
    assert disk.disk(str(tmp_path))["total_bytes"] is None
    release.set()
