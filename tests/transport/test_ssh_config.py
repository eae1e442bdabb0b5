"""The user's ssh configuration: through `ssh -G`, and without the ssh program."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

import pytest

from glmplan.errors import UsageError
from glmplan.transport import ssh_config
from glmplan.transport.ssh_config import Settings, resolve, spelled

HOME = Path(pwd.getpwuid(os.getuid()).pw_dir)

TEXT = """\
Host a b
  HostName 10.9.8.%h
  User alice
  Port 2200
  IdentityFile ~/.ssh/%r@%n
  IdentitiesOnly yes
  ProxyJump bob@j1:2222,j2
  ConnectTimeout 9
  UserKnownHostsFile /k/one "/k/with space/two"
  HashKnownHosts yes
  ServerAliveInterval 7
Host c
  ProxyCommand relay %h %p %r %%
  IdentityAgent none
  HostKeyAlias fleet
Host d
  IdentityAgent /run/agent-%r.sock
  User dora
Match host e
  User matched
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration file."""
    path = tmp_path / "config"
    path.write_text(TEXT)
    return path


@pytest.fixture(params=["ssh -G", "paramiko"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both readers answer alike."""
    if request.param == "paramiko":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif shutil.which("ssh") is None:
        pytest.skip("openssh-client is not installed")
    return str(request.param)


def read(name: str, config: Path, **choices: str) -> Settings:
    """The settings of a name."""
    return resolve(name, str(config), **choices)


def test_a_host_block(config: Path, reader: str) -> None:
    """Every word of it, with its tokens."""
    found = read("a", config)
    assert (found.host, found.tcp_port, found.user) == ("10.9.8.a", 2200, "alice")
    assert found.identities == (HOME / ".ssh/alice@a",)
    assert found.identities_only
    assert found.jumps == ("bob@j1:2222", "j2")
    assert found.connect_timeout_s == 9
    assert found.user_known_hosts[0] == Path("/k/one")
    assert found.hash_known_hosts
    assert found.alive_interval_s == 7


def test_a_path_with_a_space(config: Path) -> None:
    """ssh -G prints it unquoted."""
    if shutil.which("ssh") is None:
        pytest.skip("openssh-client is not installed")
    assert read("a", config).user_known_hosts == (Path("/k/one"), Path("/k/with space/two"))


def test_a_proxy_command(config: Path, reader: str) -> None:
    """Its tokens are filled in; an agent may be forbidden; known_hosts may use an alias."""
    found = read("zoe@c:23", config)
    assert found.proxy_command == "relay c 23 zoe %"
    assert found.agent_socket is None
    assert found.known_hosts_name == "fleet"


def test_agents(config: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """IdentityAgent, else SSH_AUTH_SOCK."""
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/mine")
    assert read("d", config).agent_socket == "/run/agent-dora.sock"
    assert read("other", config).agent_socket == "/run/mine"
    assert read("c", config).agent_socket is None


def test_match_blocks(config: Path, reader: str) -> None:
    """Match host."""
    assert read("e", config).user == "matched"


def test_what_was_typed_wins(config: Path, reader: str) -> None:
    """user@ and :port over the file; the name's user over the option's."""
    found = read("carol@a:22", config, user="dave", identity="/k/id")
    assert (found.user, found.tcp_port, found.identities[0]) == ("carol", 22, Path("/k/id"))
    assert read("a", config, user="dave").user == "dave"


def test_defaults(tmp_path: Path, reader: str) -> None:
    """With nothing said."""
    empty = tmp_path / "empty"
    empty.write_text("")
    found = read("h", empty)
    assert (found.host, found.tcp_port, found.jumps, found.proxy_command) == ("h", 22, (), None)
    assert HOME / ".ssh/id_ed25519" in found.identities
    assert found.user_known_hosts[0] == HOME / ".ssh/known_hosts"
    assert found.global_known_hosts[0] == Path("/etc/ssh/ssh_known_hosts")
    assert found.connect_timeout_s is None


def test_the_environment_names_a_configuration(config: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLMPLAN_SSH_CONFIG."""
    monkeypatch.setenv("GLMPLAN_SSH_CONFIG", str(config))
    assert resolve("a").user == "alice"


def test_include(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh follows it; without ssh the settings say that it was not followed."""
    (tmp_path / "more").write_text("Host inner\n  User included\n")
    config.write_text(f"Include {tmp_path}/more\n" + TEXT)
    if shutil.which("ssh"):
        found = read("inner", config)
        assert (found.user, found.limitation) == ("included", "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = read("inner", config)
    assert found.user != "included"
    assert f"Include lines of {config} are not followed" in found.limitation


def test_a_broken_file_is_a_sentence(config: Path, reader: str) -> None:
    """With the file's name."""
    config.write_text("Host 'a\n")
    with pytest.raises(UsageError, match="config"):
        read("a", config)
    with pytest.raises(UsageError, match="absent"):
        read("a", config.with_name("absent"))


def test_a_match_exec_that_hangs(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up."""
    if shutil.which("ssh") is None:
        pytest.skip("openssh-client is not installed")
    config.write_text('Match exec "sleep 3"\n  User x\n')
    monkeypatch.setattr(ssh_config, "RESOLVE_TIMEOUT_S", 0.3)
    with pytest.raises(UsageError, match=r"did not end within 0\.3 s"):
        read("a", config)


def test_names_as_typed() -> None:
    """Users, ports and IPv6."""
    assert spelled("h") == ssh_config.Spelled("h")
    assert spelled("u@h:22") == ssh_config.Spelled("h", "u", 22)
    assert spelled("u@[fe80::1%eth0]:2222") == ssh_config.Spelled("fe80::1%eth0", "u", 2222)
    assert spelled("fe80::1") == ssh_config.Spelled("fe80::1")
    with pytest.raises(UsageError, match="port 70000"):
        spelled("h:70000")
