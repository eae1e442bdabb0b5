"""known_hosts, judged as ssh-keygen reads it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from glmplan.transport.host_keys import HostKey, Verdict, judge, lines_for, record, written_name

KEY = HostKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIK0wmN/Cr3JXqmLW7u+g9pTh+wyqDHpSQEIQczXkVx9q")
OTHER = HostKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIO7uDbbtiyvETWXQ1YDdNJ8iHGQL7zbsbW4kiDGgdZZs")
RSA = HostKey("ssh-rsa", "AAAAB3NzaC1yc2EAAAADAQABAAAAgQDk")

needs_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="openssh-client is not installed")


def written(path: Path, *lines: str) -> Path:
    """A known_hosts file."""
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def verdict(path: Path, name: str, key: HostKey = KEY) -> Verdict:
    """What the file says."""
    return judge(lines_for(name, [path]), key)[0]


@pytest.mark.parametrize(
    ("names", "name", "matches"),
    [
        ("h1", "h1", True),
        ("h1", "h10", False),
        ("h0,h1", "h1", True),
        ("H1", "h1", True),
        ("*.example", "a.example", True),
        ("10.0.0.?", "10.0.0.7", True),
        ("*,!h1", "h1", False),
        ("!h2,h*", "h1", True),
        ("h1", "[h1]:2222", False),
        ("[h1]:2222", "[h1]:2222", True),
        ("[h1]:2222", "1:2222", False),
        ("[*]:2222", "[h1]:2222", True),
    ],
)
@needs_keygen
def test_names_match_as_in_ssh(tmp_path: Path, names: str, name: str, matches: bool) -> None:
    """Patterns, negation and ports; ssh-keygen -F is the oracle."""
    path = written(tmp_path / "known", f"{names} {KEY.key_type} {KEY.key} comment")
    assert (verdict(path, name) is Verdict.KNOWN) == matches
    oracle = subprocess.run(["ssh-keygen", "-F", name, "-f", path], capture_output=True, check=False)
    assert (oracle.returncode == 0) == matches


@needs_keygen
def test_hashed_names_both_ways(tmp_path: Path) -> None:
    """Names that ssh-keygen hashed are read, and names hashed here are found by ssh-keygen."""
    path = written(tmp_path / "known", f"h1 {KEY.key_type} {KEY.key}")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", path], check=True, capture_output=True)
    assert path.read_text().startswith("|1|")
    assert verdict(path, "h1") is Verdict.KNOWN
    assert verdict(path, "h2") is Verdict.UNKNOWN
    record(path, "[h2]:2222", KEY, hashed=True)
    assert "[h2]" not in path.read_text()
    subprocess.run(["ssh-keygen", "-F", "[h2]:2222", "-f", path], check=True, capture_output=True)


@needs_keygen
def test_the_fingerprint_is_that_of_ssh(tmp_path: Path) -> None:
    """So that a user can compare it."""
    path = written(tmp_path / "key.pub", f"{KEY.key_type} {KEY.key}")
    out = subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True).stdout
    assert KEY.fingerprint in out


def test_a_changed_key(tmp_path: Path) -> None:
    """Another key of the type, or only other types: both are changes. The line of the same type is named."""
    path = written(tmp_path / "known", f"h1 {RSA.key_type} {RSA.key}", f"h1 {OTHER.key_type} {OTHER.key}")
    found, line = judge(lines_for("h1", [path]), KEY)
    assert (found, line and line.number) == (Verdict.CHANGED, 2)
    path = written(path, f"h1 {RSA.key_type} {RSA.key}")
    assert verdict(path, "h1") is Verdict.CHANGED


def test_one_of_several_keys(tmp_path: Path) -> None:
    """Several lines for one host are alternatives."""
    path = written(tmp_path / "known", f"h1 {OTHER.key_type} {OTHER.key}", f"h1 {KEY.key_type} {KEY.key}")
    assert verdict(path, "h1") is Verdict.KNOWN


def test_a_revoked_key_wins(tmp_path: Path) -> None:
    """Wherever it stands."""
    line = f"h1 {KEY.key_type} {KEY.key}"
    path = written(tmp_path / "known", line, f"@revoked * {KEY.key_type} {KEY.key}")
    assert verdict(path, "h1") is Verdict.REVOKED
    assert verdict(written(path, f"@revoked * {OTHER.key_type} {OTHER.key}", line), "h1") is Verdict.KNOWN


def test_an_authority_is_no_host_key(tmp_path: Path) -> None:
    """Certificates are not read, so such a host is unknown."""
    path = written(tmp_path / "known", f"@cert-authority * {KEY.key_type} {KEY.key}")
    assert verdict(path, "h1") is Verdict.UNKNOWN


def test_odd_lines_are_passed_over(tmp_path: Path) -> None:
    """Comments, cut lines and broken hashes name nobody; a missing file is empty."""
    path = written(tmp_path / "known", "# h1 x y", "h1", "", "|1|x|y h1", "|1|?| a b", f"h1 {KEY.key_type} {KEY.key}")
    assert verdict(path, "h1") is Verdict.KNOWN
    assert lines_for("h1", [tmp_path / "absent"]) == ()


def test_recording(tmp_path: Path) -> None:
    """A new file is private; a line without an end is ended first; a key is written once, and never over another."""
    path = tmp_path / "new" / "known"
    record(path, "h1", KEY, hashed=False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.write_text(path.read_text().rstrip("\n"))
    record(path, "h2", KEY, hashed=False)
    record(path, "h2", KEY, hashed=False)
    record(path, "h2", OTHER, hashed=False)
    line = f"{KEY.key_type} {KEY.key}"
    assert path.read_text() == f"h1 {line}\nh2 {line}\n"


def test_many_at_once_record_whole_lines(tmp_path: Path) -> None:
    """Thirty-two threads, thirty-two lines."""
    path = tmp_path / "known"
    threads = [threading.Thread(target=record, args=(path, f"h{n}", KEY, False)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_text().splitlines()) == sorted(f"h{n} {KEY.key_type} {KEY.key}" for n in range(32))


def test_written_names() -> None:
    """Port 22 is not written."""
    assert written_name("Host", 22) == "host"
    assert written_name("10.0.0.1", 2222) == "[10.0.0.1]:2222"
