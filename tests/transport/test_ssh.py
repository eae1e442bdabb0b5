"""SSH to real sshd: trust, logins, jump hosts, broken links. Every refusal carries the line that repairs it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from paramiko.common import MSG_CHANNEL_DATA

from glmplan.errors import UnreachableError, UsageError
from glmplan.transport import ssh_connect
from glmplan.transport.base import HostName, parse_hosts
from glmplan.transport.errors import (
    ConnectionFailedError,
    ConnectionLostError,
    HostKeyChangedError,
    HostKeyUnknownError,
    LoginRefusedError,
    TimedOutError,
)
from glmplan.transport.fanout import Outcome, each
from glmplan.transport.node import call
from glmplan.transport.open import SshOptions, open_transport
from glmplan.transport.ssh import SshTransport
from tests.netns import Network
from tests.netns_wire import wait_for
from tests.transport.conftest import Opener


def line_to_run(error: HostKeyUnknownError | HostKeyChangedError) -> str:
    """The command of an error's next step."""
    found = re.search(r"(?:then|session): (.*?)(?:   \(|$)", error.next_step)
    assert found, error.next_step
    return found[1]


def config_with(hosts: Network, *blocks: str) -> Path:
    """The hosts' client configuration with blocks before it."""
    path = hosts.folder / f"config-{time.monotonic_ns()}"
    path.write_text("\n".join(blocks) + "\n" + hosts.ssh_config.read_text())
    return path


def answers(found: Sequence[Outcome[str]]) -> list[str | None]:
    """What came of each host: its result, or its error's words."""
    return [str(one.error) if one.error else one.result for one in found]


def logins(hosts: Network, name: str) -> int:
    """How many logins a host has accepted."""
    return (hosts[name].folder / "sshd.log").read_text().count("Accepted publickey")


# ---------------------------------------------------------------- host keys


def test_an_unknown_key_is_refused_with_the_line_that_records_it(one_host: Network, opened: Opener) -> None:
    """Run as printed, that line repairs it; the fingerprint is the host's."""
    one_host.known_hosts.unlink()
    transport = opened("h1", one_host)
    with pytest.raises(HostKeyUnknownError) as caught:
        transport.run(["true"])
    public = one_host["h1"].folder / "host_key_ed25519.pub"
    fingerprint = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout.split()[1]
    assert fingerprint in caught.value.message
    assert "--accept-new-host-key" in caught.value.next_step
    assert not one_host.known_hosts.exists()
    subprocess.run(["/bin/sh", "-c", line_to_run(caught.value)], check=True, capture_output=True)
    assert transport.run(["true"]).exit_status == 0


@pytest.mark.parametrize("hashed", [False, True])
def test_accept_new_records_it_as_ssh_would(one_host: Network, opened: Opener, hashed: bool) -> None:
    """Afterwards strict logins work, ours and ssh's own."""
    one_host.known_hosts.unlink()
    config = config_with(one_host, "HashKnownHosts yes") if hashed else one_host.ssh_config
    assert opened("h1", one_host, config, accept_new_host_key=True).run(["true"]).exit_status == 0
    assert (one_host["h1"].address in one_host.known_hosts.read_text()) != hashed
    assert opened("h1", one_host, config).run(["true"]).exit_status == 0
    subprocess.run(["ssh", "-F", config, "h1", "true"], check=True, capture_output=True)


@pytest.mark.parametrize("accept", [False, True])
def test_a_changed_key_is_refused_always(one_host: Network, opened: Opener, accept: bool) -> None:
    """Also with --accept-new-host-key; the line removes the old one, and then the key is a new one."""
    before = one_host.known_hosts.read_bytes()
    one_host.change_host_key("h1")
    with pytest.raises(HostKeyChangedError) as caught:
        opened("h1", one_host, accept_new_host_key=accept).run(["true"])
    assert caught.value.exit_code == 5
    assert f"{one_host.known_hosts}:1" in caught.value.message
    assert one_host.known_hosts.read_bytes() == before
    subprocess.run(["/bin/sh", "-c", line_to_run(caught.value)], check=True, capture_output=True)
    with pytest.raises(HostKeyUnknownError):
        opened("h1", one_host).run(["true"])
    assert opened("h1", one_host, accept_new_host_key=True).run(["true"]).exit_status == 0


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_the_known_type_of_key_is_asked_for(one_host: Network, opened: Opener, kind: str) -> None:
    """A host with several keys is known by any of them."""
    line = one_host.add_host_key("h1", kind)
    one_host.known_hosts.write_text(f"{one_host['h1'].address} {line}\n")
    assert opened("h1", one_host).run(["true"]).exit_status == 0


def test_a_key_of_another_type_is_a_change(one_host: Network, opened: Opener) -> None:
    """Known by an RSA key only, and the host has none any more."""
    line = one_host.add_host_key("h1", "rsa")
    one_host.known_hosts.write_text(f"{one_host['h1'].address} {line}\n")
    one_host.change_host_key("h1", "ed25519")
    with pytest.raises(HostKeyChangedError):
        opened("h1", one_host, accept_new_host_key=True).run(["true"])


def test_a_revoked_key(three_hosts: Network, opened: Opener) -> None:
    """Although it is known."""
    known = three_hosts.known_hosts.read_text()
    revoked = three_hosts.folder / "revoked"
    revoked.write_text(known + "@revoked * " + known.split(" ", 1)[1].splitlines()[0] + "\n")
    config = config_with(three_hosts, f"UserKnownHostsFile {revoked}")
    with pytest.raises(HostKeyChangedError, match="revoked"):
        opened("h1", three_hosts, config).run(["true"])


def test_a_key_known_under_an_alias(three_hosts: Network, opened: Opener) -> None:
    """HostKeyAlias; an unknown alias is repaired through ssh, since ssh-keyscan would write another name."""
    key = three_hosts.known_hosts.read_text().splitlines()[0].split(" ", 1)[1]
    known = three_hosts.folder / "alias"
    known.write_text(f"fleet {key}\n")
    config = config_with(three_hosts, f"Host h1\nHostKeyAlias fleet\nUserKnownHostsFile {known}\nHost *")
    assert opened("h1", three_hosts, config).run(["true"]).exit_status == 0
    known.write_text("")
    with pytest.raises(HostKeyUnknownError) as caught:
        opened("h1", three_hosts, config).run(["true"])
    assert line_to_run(caught.value) == "ssh h1 true"


# ---------------------------------------------------------------- logins


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """A real agent's socket."""
    path = tmp_path / "agent.sock"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    with socket.socket(socket.AF_UNIX) as attempt:
        wait_for("the agent", lambda: attempt.connect_ex(str(path)) == 0)
    yield str(path)
    process.terminate()
    process.wait()


def new_key(path: Path, passphrase: str = "") -> Path:
    """A key that no host knows."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True, capture_output=True)
    return path


def locked_copy(hosts: Network, path: Path) -> Path:
    """The hosts' key, encrypted."""
    path.write_bytes(hosts.key.read_bytes())
    path.chmod(0o600)
    path.with_name(path.name + ".pub").write_bytes(hosts.key.with_name(hosts.key.name + ".pub").read_bytes())
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", path], check=True, capture_output=True)
    return path


def only(hosts: Network, key: Path, *more: str) -> Path:
    """A configuration with this key alone."""
    path = hosts.folder / f"config-{time.monotonic_ns()}"
    text = hosts.ssh_config.read_text().replace(f"IdentityFile {hosts.key}\n", f"IdentityFile {key}\n")
    path.write_text("\n".join(more) + "\n" + text)
    return path


def test_a_refused_key(three_hosts: Network, opened: Opener, tmp_path: Path) -> None:
    """The sentence names user and key, the next step installs it."""
    key = new_key(tmp_path / "stranger")
    with pytest.raises(LoginRefusedError) as caught:
        opened("h1", three_hosts, only(three_hosts, key)).run(["true"])
    assert "refused root" in caught.value.message
    assert str(key) in caught.value.message
    assert "ssh-copy-id h1" in caught.value.next_step
    assert caught.value.exit_code == 5


def test_no_key_at_all(three_hosts: Network, opened: Opener, tmp_path: Path) -> None:
    """Nothing to try is another sentence; a file that is no key is nothing."""
    (tmp_path / "junk").write_text("not a key\n")
    for path in (tmp_path / "absent", tmp_path / "junk"):
        with pytest.raises(LoginRefusedError, match="no key to log in to h1"):
            opened("h1", three_hosts, only(three_hosts, path)).run(["true"])


def test_a_second_key_is_tried(three_hosts: Network, opened: Opener, tmp_path: Path) -> None:
    """After one that is refused."""
    key = new_key(tmp_path / "stranger")
    assert opened("h1", three_hosts, identity=str(key)).run(["true"]).exit_status == 0


def test_too_many_keys(three_hosts: Network, opened: Opener, tmp_path: Path) -> None:
    """sshd hangs up after MaxAuthTries (6)."""
    keys = [new_key(tmp_path / f"k{n}") for n in range(8)]
    config = only(three_hosts, keys[0], "Host *", *(f"IdentityFile {key}" for key in keys[1:]))
    with pytest.raises(LoginRefusedError) as caught:
        opened("h1", three_hosts, config).run(["true"])
    assert "IdentitiesOnly" in caught.value.next_step or "refused" in caught.value.message


def test_an_encrypted_key_without_anyone_to_ask(three_hosts: Network, opened: Opener, tmp_path: Path) -> None:
    """The next step is the line that unlocks it."""
    key = locked_copy(three_hosts, tmp_path / "locked")
    with pytest.raises(LoginRefusedError) as caught:
        opened("h1", three_hosts, only(three_hosts, key)).run(["true"])
    assert "is encrypted" in caught.value.message
    assert caught.value.next_step.endswith(f"ssh-add {key}.")


def test_a_passphrase_is_asked_for_once(three_hosts: Network, tmp_path: Path) -> None:
    """Three hosts at once, one question."""
    key = locked_copy(three_hosts, tmp_path / "locked")
    asked: list[Path] = []

    def answer(path: Path) -> str:
        asked.append(path)
        return "open sesame"

    options = SshOptions(config=str(only(three_hosts, key)), ask_passphrase=answer)
    assert [one.error for one in each(parse_hosts(three_hosts.names), hello_with(options))] == [None] * 3
    assert asked == [key]


def test_a_key_from_an_agent(three_hosts: Network, opened: Opener, tmp_path: Path, agent: str) -> None:
    """With the public file alone, and with the encrypted file; IdentitiesOnly keeps other agent keys away."""
    environment = {**os.environ, "SSH_AUTH_SOCK": agent}
    strangers = [new_key(tmp_path / f"stranger{n}") for n in range(7)]
    for key in (*strangers, three_hosts.key):
        subprocess.run(["ssh-add", "-q", key], env=environment, check=True, capture_output=True)
    locked = locked_copy(three_hosts, tmp_path / "locked")
    for identity in (locked, locked.with_name("locked.pub")):
        config = only(three_hosts, identity, "Host *", f"IdentityAgent {agent}")
        assert opened("h1", three_hosts, config).run(["true"]).exit_status == 0


def test_an_agent_that_is_gone(three_hosts: Network, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSH_AUTH_SOCK of an old session does no harm."""
    monkeypatch.setenv("SSH_AUTH_SOCK", "/nowhere/agent")
    assert opened("h1", three_hosts).run(["true"]).exit_status == 0


# ---------------------------------------------------------------- configuration


def test_include_and_match(three_hosts: Network, opened: Opener) -> None:
    """An alias of an included file, its user from a Match block."""
    included = three_hosts.folder / "included"
    included.write_text(f"Host gpu-*\n  HostName {three_hosts['h2'].address}\nMatch originalhost gpu-two\n  User root\n")
    config = config_with(three_hosts, f"Include {included}")
    assert call(opened("gpu-two", three_hosts, config), "hello")["hostname"] == "h2"


def test_user_and_port_as_typed(three_hosts: Network, opened: Opener) -> None:
    """user@host:port."""
    address = three_hosts["h2"].address
    assert call(opened(f"root@{address}:22", three_hosts), "hello")["hostname"] == "h2"
    with pytest.raises(LoginRefusedError, match="nobody"):
        opened(f"nobody@{address}", three_hosts).run(["true"])
    with pytest.raises(ConnectionFailedError, match="port 2222"):
        opened(f"{address}:2222", three_hosts).run(["true"])


def test_a_transport_for_every_name(three_hosts: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """local and SSH side by side; the environment may name the configuration."""
    monkeypatch.setenv("GLMPLAN_SSH_CONFIG", str(three_hosts.ssh_config))

    def word(host: HostName) -> bytes:
        transport = open_transport(host)
        try:
            return transport.run(["echo", "x"]).stdout
        finally:
            transport.close()

    assert [one.result for one in each(parse_hosts("local,h1,local#0-1"), word)] == [b"x\n"] * 3


# ---------------------------------------------------------------- jump hosts


def seen_from(transport: object) -> str:
    """The address that the host sees us come from."""
    return transport.run(["printenv", "SSH_CONNECTION"]).stdout.decode().split()[0]  # type: ignore[attr-defined]


def test_a_jump_host(three_hosts: Network, opened: Opener) -> None:
    """The host sees the jump host's address."""
    config = config_with(three_hosts, "Host h2", "  ProxyJump h1")
    assert seen_from(opened("h2", three_hosts, config)) == three_hosts["h1"].address
    assert seen_from(opened("h2", three_hosts)) == three_hosts.controller_address


def test_a_chain_of_jump_hosts(three_hosts: Network, opened: Opener) -> None:
    """In one ProxyJump, and through each other's configuration."""
    for blocks in (("Host h3", "  ProxyJump h1,h2"), ("Host h3", "  ProxyJump h2", "Host h2", "  ProxyJump h1")):
        before = logins(three_hosts, "h1")
        assert seen_from(opened("h3", three_hosts, config_with(three_hosts, *blocks))) == three_hosts["h2"].address
        assert logins(three_hosts, "h1") == before + 1


def test_one_login_at_the_jump_host_for_all_behind_it(three_hosts: Network) -> None:
    """Twelve names behind it at once; it is let go of at the end."""
    names = [f"n{n}" for n in range(12)]
    blocks = [f"Host {name}\n  HostName {three_hosts['h2' if n % 2 else 'h3'].address}" for n, name in enumerate(names)]
    config = config_with(three_hosts, *blocks, "Host n*", "  ProxyJump h1")
    before = logins(three_hosts, "h1")
    gate = threading.Barrier(len(names))

    def work(host: HostName) -> str:
        transport = open_transport(host, SshOptions(config=str(config), connect_timeout_s=20))
        try:
            return str(call(transport, "hello")["hostname"])
        finally:
            gate.wait(100)
            transport.close()

    found = each(parse_hosts(",".join(names)), work)
    assert answers(found) == ["h3", "h2"] * 6
    assert logins(three_hosts, "h1") == before + 1
    assert not ssh_connect._jumps


def after_the_close(monkeypatch: pytest.MonkeyPatch, transport: Any, mark: Path) -> None:
    """Hold the next data on this connection until its channel is closed here; there is a file as soon as it is held."""
    send = transport._send_user_message

    def late(message: Any) -> None:
        kind, (number,) = message.asbytes()[0], struct.unpack(">I", message.asbytes()[1:5])
        if kind == MSG_CHANNEL_DATA and not mark.exists():
            channel = next(one for one in transport._channels.values() if one.remote_chanid == number)
            mark.touch()
            wait_for("its end", lambda: channel.closed)
            time.sleep(0.3)
        send(message)

    monkeypatch.setattr(transport, "_send_user_message", late)


def test_a_host_that_is_let_go_of_while_it_is_sent_to_does_not_end_the_jump_host(
    three_hosts: Network, opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Data after a channel's end would: with the connections of all hosts behind it."""
    config = config_with(three_hosts, "Host h2 h3", "  ProxyJump h1")
    staying, going = opened("h2", three_hosts, config), opened("h3", three_hosts, config)
    assert [one.run(["true"]).exit_status for one in (staying, going)] == [0, 0]
    before = logins(three_hosts, "h1"), logins(three_hosts, "h2")
    connection = going._connection
    assert connection is not None
    after_the_close(monkeypatch, jump_of(connection).transport, tmp_path / "held")

    def send() -> None:
        with suppress(EOFError):  # what is held may be an earlier message's; then this one is too late
            connection.transport.send_ignore()

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    wait_for("the data", (tmp_path / "held").exists)
    going.close()
    sender.join(60)
    assert staying.run(["true"]).exit_status == 0
    assert (logins(three_hosts, "h1"), logins(three_hosts, "h2")) == before, "nobody connected anew"


def jump_of(connection: ssh_connect.Connection) -> ssh_connect.Connection:
    """The connection to the jump host that it goes through."""
    assert connection._jump is not None
    return connection._jump.ready.result(0)


def test_a_jump_host_that_is_lost_is_let_go_of(
    three_hosts: Network, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saying goodbye through it fails; closing does not, and the next command connects anew."""
    config = config_with(three_hosts, "Host h2", "  ProxyJump h1")
    transport = opened("h2", three_hosts, config)
    transport.run(["true"])

    def broken(message: object) -> None:
        raise EOFError

    assert transport._connection is not None
    monkeypatch.setattr(jump_of(transport._connection).transport, "_send_user_message", broken)
    transport.close()
    assert not ssh_connect._jumps
    assert transport.run(["true"]).exit_status == 0


def test_a_jump_host_that_cannot_reach_the_host(three_hosts: Network, opened: Opener) -> None:
    """The sentence names both; other hosts behind it are reached."""
    config = config_with(
        three_hosts, "Host gone", f"  HostName {three_hosts['h2'].address}", "  Port 2222", "Host gone h2", "  ProxyJump h1"
    )
    with pytest.raises(ConnectionFailedError, match=r"gone: the jump host h1 cannot reach .* port 2222"):
        opened("gone", three_hosts, config).run(["true"])
    assert opened("h2", three_hosts, config).run(["true"]).exit_status == 0


def test_a_jump_host_that_is_down(three_hosts: Network, opened: Opener) -> None:
    """Its own error, for each host behind it; afterwards it is tried anew."""
    config = config_with(three_hosts, "Host h2 h3", "  ProxyJump h1")
    three_hosts.stop_sshd("h1")
    try:
        options = SshOptions(config=str(config))
        found = each(parse_hosts("h2,h3"), hello_with(options))
        assert [str(one.error).split()[0] for one in found] == ["h1", "h1"]
    finally:
        three_hosts.start_sshd("h1")
    assert opened("h2", three_hosts, config).run(["true"]).exit_status == 0


def test_jump_hosts_in_a_circle(three_hosts: Network, opened: Opener) -> None:
    """A usage error instead of an endless ride."""
    config = config_with(three_hosts, "Host h1", "  ProxyJump h2", "Host h2", "  ProxyJump h1")
    with pytest.raises(UsageError, match="more than 8"):
        opened("h1", three_hosts, config).run(["true"])


def test_a_proxy_command(three_hosts: Network, opened: Opener) -> None:
    """The user's own way in; its process ends with the connection."""
    command = f"ssh -F {shlex.quote(str(three_hosts.ssh_config))} -W %h:%p h1"
    config = config_with(three_hosts, "Host h2", f"  ProxyCommand {command}")
    transport = opened("h2", three_hosts, config)
    assert seen_from(transport) == three_hosts["h1"].address
    process = transport._connection._process  # type: ignore[union-attr]
    transport.close()
    assert process is not None
    assert process.poll() is not None
    broken = config_with(three_hosts, "Host h2", "  ProxyCommand false")
    with pytest.raises((ConnectionFailedError, ConnectionLostError)):
        opened("h2", three_hosts, broken).run(["true"])


# ---------------------------------------------------------------- broken links, limits, leftovers


def hello_with(options: SshOptions):  # type: ignore[no-untyped-def]
    """Work that says hello to one host."""

    def work(host: HostName) -> str:
        transport = open_transport(host, options)
        try:
            return str(call(transport, "hello", timeout_s=120)["hostname"])
        finally:
            transport.close()

    return work


def test_one_of_three_silent(three_hosts: Network) -> None:
    """It costs its own connect timeout and nobody else's."""
    three_hosts.mute_sshd("h2")
    try:
        began = time.monotonic()
        options = SshOptions(config=str(three_hosts.ssh_config), connect_timeout_s=4)
        found = each(parse_hosts(three_hosts.names), hello_with(options))
        assert time.monotonic() - began < 4 + 12, "not the 15 s of the key exchange as well"
    finally:
        three_hosts.start_sshd("h2")
    assert (answers(found)[0], answers(found)[2]) == ("h1", "h3")
    assert isinstance(found[1].error, TimedOutError)


def service(hosts: Network, name: str, tcp_port: int, words: str) -> None:
    """Start a service that says so to the first who comes (`c`) and ends when they hang up; returns when it listens."""
    ready = hosts[name].folder / f"service-{tcp_port}"
    script = f"import socket;s=socket.create_server(('',{tcp_port}));open({str(ready)!r},'w');c,_=s.accept();{words}"
    work = ["timeout", "100", "python3", "-c", f"{script}\nwhile c.fileno() >= 0 and c.recv(4096): pass"]
    threading.Thread(target=hosts.run, args=(name, work, False, "", 120), daemon=True).start()
    wait_for("the service", ready.exists)


def test_a_host_that_stalls_after_its_banner(three_hosts: Network, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key exchange has a limit too, and no thread stays behind to hold the process."""
    monkeypatch.setattr(ssh_connect, "HANDSHAKE_TIMEOUT_S", 1.0)
    service(three_hosts, "h2", 2300, "c.sendall(b'SSH-2.0-x\\r\\n')")
    began = time.monotonic()
    with pytest.raises((TimedOutError, ConnectionLostError)):
        opened(f"{three_hosts['h2'].address}:2300", three_hosts, connect_timeout_s=1).run(["true"])
    assert time.monotonic() - began < 12
    wait_for("its threads", lambda: all(one.daemon or one is threading.main_thread() for one in threading.enumerate()))


def test_something_else_than_ssh(three_hosts: Network, opened: Opener) -> None:
    """A service that hangs up, or speaks another language."""
    service(three_hosts, "h2", 2301, "c.sendall(b'HTTP/1.1 400\\r\\n\\r\\n');c.close()")
    with pytest.raises(ConnectionFailedError, match="no SSH service"):
        opened(f"{three_hosts['h2'].address}:2301", three_hosts).run(["true"])


def test_a_name_that_does_not_exist(three_hosts: Network, opened: Opener) -> None:
    """The sentence says which name."""
    with pytest.raises(ConnectionFailedError, match=r"the name nowhere\.invalid was not found"):
        opened("nowhere.invalid", three_hosts).run(["true"])


def test_a_link_that_is_down(three_hosts: Network, opened: Opener) -> None:
    """Within the connect timeout."""
    three_hosts.drop_link("h3")
    try:
        began = time.monotonic()
        with pytest.raises(ConnectionFailedError):
            opened("h3", three_hosts, connect_timeout_s=1).run(["true"])
        assert time.monotonic() - began < 10
    finally:
        three_hosts.restore_link("h3")
    wait_for("the link", lambda: answers_again(opened("h3", three_hosts, connect_timeout_s=3)))


def answers_again(transport: SshTransport) -> bool:
    """Whether the host is reached."""
    try:
        return transport.run(["true"], timeout_s=10).exit_status == 0
    except UnreachableError:
        return False


@pytest.mark.parametrize("stdin", [b"", b"x" * (4 << 20)])
def test_a_link_dropped_in_a_command(one_host: Network, opened: Opener, stdin: bytes) -> None:
    """It ends by its time limit, also while input is being sent; the transport works again after the link does."""
    transport = opened("h1", one_host, connect_timeout_s=3)
    wait_for("a first connection", lambda: answers_again(transport))
    one_host.later(0.3, one_host.drop_link, "h1")
    began = time.monotonic()
    with pytest.raises((TimedOutError, ConnectionLostError)):
        transport.run(["sh", "-c", "sleep 1; cat; sleep 60"], stdin=stdin, timeout_s=2)
    assert time.monotonic() - began < 12, "TCP itself gives up after 30 s"
    with pytest.raises((TimedOutError, ConnectionFailedError, ConnectionLostError)):
        transport.run(["true"], timeout_s=1)
    one_host.restore_link("h1")
    wait_for("the link", lambda: answers_again(transport))


def test_a_host_that_reboots(one_host: Network, opened: Opener) -> None:
    """The command is lost, the next one connects anew."""
    transport = opened("h1", one_host)
    transport.run(["true"])
    timer = one_host.once("h1", "sleep 60", one_host.reboot, "h1")
    with pytest.raises((ConnectionLostError, TimedOutError)):
        transport.run(["sleep", "60"], timeout_s=20)
    timer.join()
    assert transport.run(["hostname"]).stdout == b"h1\n"


def test_a_command_that_overruns_leaves_no_process(one_host: Network, opened: Opener) -> None:
    """Its whole group is killed there; a session of its own lives on, as a worker must."""
    transport = opened("h1", one_host)
    script = "setsid sleep 71 >/dev/null 2>&1 </dev/null & sleep 72 & sleep 73"
    with pytest.raises(TimedOutError):
        transport.run(["sh", "-c", script], timeout_s=3)
    wait_for("the group to end", lambda: list(one_host.pids("h1").values()) == ["sleep 71"])


def test_input_that_comes_after_the_commands_end_does_not_end_the_connection(
    three_hosts: Network, opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The host has forgotten the channel by then; the next command uses the same connection."""
    transport = opened("h1", three_hosts)
    transport.run(["true"])
    before = logins(three_hosts, "h1")
    assert transport._connection is not None
    held = tmp_path / "held"
    after_the_close(monkeypatch, transport._connection.transport, held)
    ends_then = f"until test -e {held}; do sleep 0.02; done"
    assert transport.run(["sh", "-c", ends_then], stdin=b"x").exit_status == 0
    assert held.exists()
    assert transport.run(["true"]).exit_status == 0
    assert logins(three_hosts, "h1") == before


def test_a_shell_that_talks_does_not_spoil_stderr(one_host: Network, opened: Opener) -> None:
    """A noisy .bashrc; the process group's line is taken out wherever it stands."""
    (one_host["h1"].home / ".bashrc").write_text("echo noise >&2\n")
    done = opened("h1", one_host).run(["sh", "-c", "echo mine >&2"])
    assert done.stderr.replace(b"noise\n", b"") == b"mine\n"


def test_thirty_at_once(three_hosts: Network) -> None:
    """Thirty connections to three hosts, each with the node program."""
    names = [f"x{n}" for n in range(30)]
    config = config_with(
        three_hosts, *(f"Host {name}\n  HostName {three_hosts[f'h{n % 3 + 1}'].address}" for n, name in enumerate(names))
    )
    options = SshOptions(config=str(config), connect_timeout_s=60)
    found = each(parse_hosts(",".join(names)), hello_with(options), timeout_s=300)
    assert answers(found) == ["h1", "h2", "h3"] * 10


def test_nothing_is_printed_and_nothing_stays(
    three_hosts: Network, opened: Opener, capfd: pytest.CaptureFixture[str]
) -> None:
    """paramiko's own log stays silent on failures; closing ends its threads."""
    transport = opened("h1", three_hosts)
    transport.run(["true"])
    with pytest.raises(ConnectionFailedError):
        opened(f"{three_hosts['h1'].address}:1", three_hosts).run(["true"])
    transport.close()
    wait_for("paramiko's threads", lambda: not [one for one in threading.enumerate() if "aramiko" in repr(one)])
    assert capfd.readouterr() == ("", "")
