"""How OpenSSH would reach a host: the user's configuration, resolved.

`ssh -G` answers where the ssh program exists, so Host, Include, Match and defaults mean what they mean to ssh (OpenSSH
9.2). Without it paramiko's parser reads the files; it follows no Include, and `limitation` says so. Strictness of host keys
is not configurable here: StrictHostKeyChecking is not read.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import pwd
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from glmplan.errors import UsageError
from glmplan.transport.host_keys import DEFAULT_PORT

DEFAULT_IDENTITIES = ("~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519")
DEFAULT_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
DEFAULT_GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
RESOLVE_TIMEOUT_S = 10.0
"""`Match exec` runs the user's own commands; they get this long."""


@dataclass(frozen=True)
class Settings:
    """Everything the connection needs to know. `jumps` are `[user@]host[:port]`, nearest to this machine first."""

    name: str
    host: str
    tcp_port: int = DEFAULT_PORT
    user: str = ""
    identities: tuple[Path, ...] = ()
    identities_only: bool = False
    agent_socket: str | None = None
    user_known_hosts: tuple[Path, ...] = ()
    global_known_hosts: tuple[Path, ...] = ()
    known_hosts_name: str = ""
    hash_known_hosts: bool = False
    jumps: tuple[str, ...] = ()
    proxy_command: str | None = None
    connect_timeout_s: float | None = None
    alive_interval_s: int = 0
    alive_count: int = 3
    limitation: str = ""


@dataclass(frozen=True)
class Spelled:
    """`[user@]host[:port]`, taken apart."""

    host: str
    user: str | None = None
    tcp_port: int | None = None
    text: str = field(default="", compare=False)


def spelled(text: str) -> Spelled:
    """The parts of a name as typed; an IPv6 address with a port stands in brackets."""
    user, _, place = text.rpartition("@")
    if part := re.fullmatch(r"\[([^\]]+)\](?::([0-9]+))?", place):
        host, port = part[1], part[2]
    elif place.count(":") == 1:
        host, port = place.split(":")
    else:
        host, port = place, None
    if port is not None and not 0 < int(port) < 65536:
        raise UsageError(f"{text} names port {port}; ports go from 1 to 65535.", "Write host:22.")
    return Spelled(host, user or None, int(port) if port else None, text)


def resolve(text: str, config: str | None = None, user: str | None = None, identity: str | None = None) -> Settings:
    """The settings for a name. `config` replaces ~/.ssh/config and /etc/ssh/ssh_config, as `ssh -F` does."""
    name = spelled(text)
    config = config or os.environ.get("GLMPLAN_SSH_CONFIG") or None
    user = name.user or user
    if shutil.which("ssh"):
        options, limitation = _ask_ssh(name, config, user), ""
    else:
        options, limitation = _read_files(name, config, user)
    return _settings(name, options, identity, limitation)


def _ask_ssh(name: Spelled, config: str | None, user: str | None) -> dict[str, list[str]]:
    argv = ["ssh", "-G"]
    argv += ["-F", config] if config else []
    argv += ["-l", user] if user else []
    argv += ["-p", str(name.tcp_port)] if name.tcp_port else []
    try:
        done = subprocess.run(
            [*argv, "--", name.host], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=RESOLVE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"`ssh -G {name.host}` did not end within {RESOLVE_TIMEOUT_S:g} s.", "Look at Match exec lines in ~/.ssh/config."
        ) from None
    if done.returncode:
        words = "; ".join(done.stderr.strip().splitlines()[:2]) or f"exit status {done.returncode}"
        raise UsageError(f"ssh cannot read its configuration for {name.host}: {words}.", f"Try `ssh -G {name.host}`.")
    options: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        options.setdefault(key.lower(), []).append(value)
    return options


def _read_files(name: Spelled, config: str | None, user: str | None) -> tuple[dict[str, list[str]], str]:
    import paramiko

    parser = paramiko.SSHConfig()
    typed = {"User": user, "Port": name.tcp_port}
    parser.parse(["Host *\n", *(f"  {key} {value}\n" for key, value in typed.items() if value)])  # the first value wins
    paths = [Path(config)] if config else [_home() / ".ssh" / "config", Path("/etc/ssh/ssh_config")]
    limitation = ""
    for path in paths:
        if not path.is_file() and not config:
            continue
        try:
            text = path.read_text(errors="replace")
            parser.parse(text.splitlines(keepends=True))
        except (OSError, paramiko.ConfigParseError) as error:
            raise UsageError(f"{path} cannot be read: {error}.", "Correct it or name another with --ssh-config.") from None
        if re.search(r"^\s*include\b", text, re.IGNORECASE | re.MULTILINE):
            limitation = f"Include lines of {path} are not followed without the ssh program; install openssh-client."
    try:
        found = parser.lookup(name.host)
    except (paramiko.SSHException, ImportError) as error:
        raise UsageError(f"Match lines of {paths[0]} cannot be followed: {error}.", "Install openssh-client.") from None
    options = {key: list(value) if isinstance(value, list) else [str(value)] for key, value in found.items()}
    options.setdefault("identityfile", list(DEFAULT_IDENTITIES))
    options.setdefault("globalknownhostsfile", [DEFAULT_GLOBAL_KNOWN_HOSTS])
    options.setdefault("userknownhostsfile", [DEFAULT_KNOWN_HOSTS])
    return options, limitation


def _settings(name: Spelled, options: dict[str, list[str]], identity: str | None, limitation: str) -> Settings:
    def one(key: str, default: str = "") -> str:
        return options.get(key, [default])[0]

    host, user = one("hostname", name.host), one("user") or getpass.getuser()
    tcp_port = int(one("port", "22"))
    alias = one("hostkeyalias")
    tokens = _tokens(name.host, host, tcp_port, user, alias)
    jump, command, timeout = one("proxyjump"), one("proxycommand"), one("connecttimeout")
    identities = [identity] if identity else []
    identities += [value for value in options.get("identityfile", []) if value != "none"]
    return Settings(
        name=name.text,
        host=host,
        tcp_port=tcp_port,
        user=user,
        identities=tuple(dict.fromkeys(_path(value, tokens) for value in identities)),
        identities_only=one("identitiesonly") == "yes",
        agent_socket=_agent(one("identityagent"), tokens),
        user_known_hosts=_paths(one("userknownhostsfile"), tokens),
        global_known_hosts=_paths(one("globalknownhostsfile"), tokens),
        known_hosts_name=alias,
        hash_known_hosts=one("hashknownhosts") == "yes",
        jumps=tuple(jump.split(",")) if jump and jump != "none" else (),
        proxy_command=_expand(command, tokens) if command and command != "none" else None,
        connect_timeout_s=float(timeout) if timeout.isdigit() else None,
        alive_interval_s=_seconds(one("serveraliveinterval")),
        alive_count=_seconds(one("serveralivecountmax", "3")),
        limitation=limitation,
    )


def _seconds(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _home() -> Path:
    """The home that ssh takes: the password database's, not $HOME."""
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path.home()


def _tokens(typed: str, host: str, tcp_port: int, user: str, alias: str) -> dict[str, str]:
    here = os.uname().nodename
    me = getpass.getuser()
    digest = hashlib.sha1(f"{here}{host}{tcp_port}{user}".encode()).hexdigest()
    return {
        "%%": "%", "%h": host, "%n": typed, "%p": str(tcp_port), "%r": user, "%u": me, "%d": str(_home()), "%C": digest,
        "%i": str(os.getuid()), "%l": here, "%L": here.split(".")[0], "%k": alias or typed,
    }  # fmt: skip


def _expand(text: str, tokens: dict[str, str]) -> str:
    return re.sub(r"%.", lambda found: tokens.get(found[0], found[0]), text)


def _path(text: str, tokens: dict[str, str]) -> Path:
    text = re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], ""), _expand(text.strip('"'), tokens))
    if text == "~" or text.startswith("~/"):
        return _home() / text[2:]
    return Path(text).expanduser()


def _paths(text: str, tokens: dict[str, str]) -> tuple[Path, ...]:
    """ssh -G prints several paths on one line, unquoted: a word that begins no path goes on with the path before it."""
    words: list[str] = []
    for word in text.split():
        if words and not word.startswith(("/", "~", '"', "%", "$")):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return tuple(_path(word, tokens) for word in words if word != "none")


def _agent(text: str, tokens: dict[str, str]) -> str | None:
    """The agent's socket: IdentityAgent, else $SSH_AUTH_SOCK; None for no agent."""
    if text == "none":
        return None
    if not text or text == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    if text.startswith("$") and not text.startswith("${"):
        return os.environ.get(text[1:]) or None
    return str(_path(text, tokens))
