"""What the supervisor keeps of a worker's output: redaction, rotation, unfinished lines, a full disk."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmplan.node.state import read_json
from glmplan.node.supervisor import READ_BYTES, WAIT_S, _Follower
from glmplan.node.worker_log import LogFile, Redactor, read_log
from glmplan.transport.node import NodeFailedError
from tests.node.host import Host, alive, until


def redacted(pieces: list[bytes], *secrets: str) -> bytes:
    redactor = Redactor(list(secrets))
    return b"".join(redactor.feed(piece) + redactor.flush() for piece in pieces) + redactor.flush(final=True)


@given(st.lists(st.integers(0, 40), max_size=6))
def test_a_secret_is_struck_wherever_the_output_is_cut(cuts: list[int]) -> None:
    text = b"a secret-12345 b secret-secret-12345\n"
    at = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[at[number] : at[number + 1]] for number in range(len(at) - 1)]
    assert redacted(pieces, "secret-12345") == b"a *** b secret-***\n"


def test_a_secret_is_struck_in_json_and_in_urls() -> None:
    assert redacted([b'{"key": "a\\"b/c d"} ?key=a%22b%2Fc%20d\n'], 'a"b/c d') == b'{"key": "***"} ?key=***\n'


def test_lines_wait_for_their_end_and_long_ones_do_not() -> None:
    redactor = Redactor(["secret-12345"])
    assert redactor.feed(b"one\rtwo\nthr") == b"one\ntwo\n"
    assert redactor.feed(b"ee\n") == b"three\n"
    long = redactor.feed(b"x" * 70_000 + b"secret-1")
    assert long == b"x" * 70_000
    assert redactor.feed(b"2345\n") == b"***\n"


def test_offsets_survive_rotation(tmp_path: Path) -> None:
    log = LogFile(tmp_path, limit_bytes=100)
    for number in range(60):
        log.write(b"line %02d\n" % number)
    told = read_log(tmp_path, 0, 10_000)
    assert told["log_size"] == 480
    assert told["log_offset"] == 480
    assert told["log"].startswith("line 39\n")  # files hold 13 lines: 52 to 59 in the last, 39 to 51 in the one before
    assert told["log"].endswith("line 59\n")
    assert sum(path.stat().st_size for path in tmp_path.glob("log*")) < 5_000
    assert read_log(tmp_path, 400, 8)["log"] == "line 50\n"
    across = read_log(tmp_path, 312, 208)
    assert across["log"] == "".join(f"line {number:02d}\n" for number in range(39, 60))


def test_a_character_is_never_cut_in_two(tmp_path: Path) -> None:
    LogFile(tmp_path).write("aé€😀z".encode())
    text, at = "", 0
    for _ in range(11):
        told = read_log(tmp_path, at, 4)
        text, at = text + told["log"], told["log_offset"]
    assert text == "aé€😀z"


def test_a_missing_log_is_empty_and_keeps_the_readers_place(tmp_path: Path) -> None:
    assert read_log(tmp_path, 7, 100) == {"log": "", "log_offset": 7, "log_size": 7, "log_age_s": None}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave no free byte."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as out:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    if out.write(b"x" * size) < size:
                        break
            except OSError:
                continue
    return path


def test_a_full_disk_refuses_a_start(small_disk: Path) -> None:
    host = Host(small_disk)
    fill(small_disk)
    with pytest.raises(NodeFailedError, match=r"The disk that holds .* is full") as caught:
        host.shell("sleep 300")
    assert caught.value.kind == "disk-full"
    assert "df -h" in caught.value.next_step
    assert host.poll()["state"] == "absent"


def test_a_disk_that_fills_up_neither_ends_nor_hangs_the_worker(small_disk: Path, tmp_path: Path) -> None:
    host, beat, line = Host(small_disk), tmp_path / "beat", "x" * 999
    try:
        pid = host.shell(f"while true; do for i in $(seq 50); do echo {line}; done; echo b >> {beat}; sleep 0.01; done")[
            "pid"
        ]
        until(lambda: beat.exists())
        filler = fill(small_disk)
        before = beat.stat().st_size
        until(lambda: beat.stat().st_size > before + 20)  # a million bytes later it still prints
        assert alive(pid)
        assert host.poll()["state"] == "running"
        filler.unlink()
        until(lambda: "bytes of output were lost: the disk was full]" in host.poll(max_bytes=1 << 24)["log"])
        fill(small_disk)
        told = host.stop(grace_s=60.0)
        assert told["stopped"]
        found = host.poll(max_bytes=0)
        assert (found["state"], found["signal"], found["processes"]) == ("exited", 15, 0)
    finally:
        host.end()


class HeldUp(_Follower):
    """A supervisor that a busy machine holds up wherever it hurts; `last` is the log's end when the worker's end is told."""

    last = ""

    def _copy(self) -> None:
        super()._copy()
        time.sleep(2 * WAIT_S)

    def _reap(self) -> None:
        super()._reap()
        time.sleep(2 * WAIT_S)

    def _note(self, status: int) -> None:
        self.last = read_log(self._place, -5, 5)["log"]
        os.killpg(self._worker.pid, signal.SIGKILL)
        super()._note(status)


def waiting_bytes(pipe: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"1234"))[0])


def test_a_supervisor_that_is_held_up_reads_all_before_it_tells_the_end(tmp_path: Path) -> None:
    """The last word fits into the pipe only once the supervisor reads; what the worker left holds the pipe open."""
    code = f"import os; os.system('sleep 300 &'); os.write(1, b'x' * {READ_BYTES}); os.write(1, b'last\\n'); os._exit(3)"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, bufsize=0)
    assert worker.stdout is not None
    with worker.stdout as pipe:
        until(lambda: waiting_bytes(pipe.fileno()) == READ_BYTES)
        follower = HeldUp(tmp_path, worker, LogFile(tmp_path), Redactor([]))
        follower.run()
    assert follower.last == "last\n"
    assert read_json(tmp_path / "worker.json")["exit_status"] == 3


def test_the_last_words_are_in_the_log_before_the_end_is_told(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        for number in range(3):
            host.shell(f"(sleep 30 &) ; seq 20000; printf 'last {number}'; exit {number}", digest=str(number))
            told = until(lambda: (found := host.poll(log_offset=-7))["state"] == "exited" and found)
            assert (told["log"], told["exit_status"]) == (f"\nlast {number}"[-7:], number)
            host.stop()
    finally:
        host.end()
