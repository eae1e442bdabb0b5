"""A planted API key and token: in no command line, environment, log or state but the 0600 files made for them."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fleet.control import Controller
from tests.netns import Network, three_hosts

__all__ = ["three_hosts"]

KEY, TOKEN = "sk-planted-7f3c91d2a8", "hf_planted_0b9e44c1f7"
NOBODY = 65534


def _proc_texts(hosts: Network, kind: str) -> dict[str, str]:
    """/proc/*/cmdline or environ of every process on every host, as root sees them."""
    found = {}
    for name in hosts.hosts:
        for pid in hosts.pids(name):
            try:
                found[f"{name}:{pid}"] = (
                    Path(f"/proc/{pid}/{kind}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
    return found


def _files_with(folder: Path, secret: str) -> list[Path]:
    """Files with it; one that is replaced while it is looked at is not among them."""
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file() and secret.encode() in path.read_bytes():
                found.append(path)
    return found


@pytest.fixture(scope="module")
def launched(three_hosts: Network, tmp_path_factory: pytest.TempPathFactory):
    """A rehearsal with both secrets that this module's tests only look at, stopped at the end."""
    controller = Controller(three_hosts, tmp_path_factory.mktemp("state"), {"PLANTED_KEY": KEY, "PLANTED_TOKEN": TOKEN})
    ran = controller.launch("--name", "secret", "--api-key-env", "PLANTED_KEY", "--hf-token-env", "PLANTED_TOKEN")
    assert ran.code == 0, ran.err
    yield controller, ran
    controller.run("stop", "secret")


def test_secrets_are_in_no_command_line_log_or_readable_environment(launched):
    controller, ran = launched
    hosts = controller.hosts
    for secret in (KEY, TOKEN):
        assert secret not in ran.out + ran.err
        for kind in ("cmdline", "environ"):
            assert [place for place, text in _proc_texts(hosts, kind).items() if secret in text] == []
        for name, host in hosts.hosts.items():
            found = _files_with(host.folder, secret)
            assert {path.parent.name for path in found} <= {"files"}, f"{name}: {found}"
            for path in found:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert _files_with(controller.folder, secret) == []
    logs = controller.run("logs", "secret", "-n", "1000")
    assert KEY not in logs.out
    assert TOKEN not in logs.out


def test_another_user_reads_neither_state_nor_environment(launched):
    controller, _ = launched
    hosts = controller.hosts
    state = hosts["h1"].state / "secret"
    code = (
        "import os, sys\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "bad = []\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try:\n"
        "        text = open(f'/proc/{pid}/environ', 'rb').read() + open(f'/proc/{pid}/cmdline', 'rb').read()\n"
        "    except OSError:\n"
        "        continue\n"
        f"    bad += [pid] if {KEY.encode()!r} in text or {TOKEN.encode()!r} in text else []\n"
        f"for path in ({str(state)!r}, {str(state / 'log')!r}, {str(state / 'files')!r}):\n"
        "    if os.access(path, os.R_OK):\n"
        "        bad.append(path)\n"
        "print(bad)\n"
    )
    assert hosts.run("h1", ["/usr/bin/python3", "-c", code]).stdout.strip() == "[]"


def test_the_server_asks_for_the_key(launched):
    controller, _ = launched
    asked = (
        "import urllib.request as u, urllib.error as e\n"
        "try:\n    print(u.urlopen('http://127.0.0.1:30000/v1/models').status)\n"
        "except e.HTTPError as error:\n    print(error.code)\n"
    )
    assert controller.hosts.run("h1", ["/usr/bin/python3", "-c", asked]).stdout.strip() == "401"


def test_serving_a_network_needs_a_key(three_hosts: Network, tmp_path: Path):
    ran = Controller(three_hosts, tmp_path).launch("--http-host", "0.0.0.0")
    assert ran.code == 2
    assert "--api-key-env" in ran.err


def test_an_unset_variable_is_named(three_hosts: Network, tmp_path: Path):
    ran = Controller(three_hosts, tmp_path).launch("--api-key-env", "NOT_SET_ANYWHERE")
    assert ran.code == 2
    assert "NOT_SET_ANYWHERE" in ran.err
    assert "NOT_SET_ANYWHERE" not in os.environ
