"""Who we are to a host: agent keys and key files, tried in ssh's order until one is let in.

Passwords and second factors are not asked for. An encrypted key file is used through the agent, or with a passphrase where
`SshOptions.ask_passphrase` can ask for one.
"""

from __future__ import annotations

import binascii
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from glmplan.transport.errors import ConnectionLostError, LoginRefusedError
from glmplan.transport.options import SshOptions
from glmplan.transport.ssh_config import Settings

AGENT_TIMEOUT_S = 10.0
"""An agent may ask its owner to confirm; one that hangs must not hang the host."""

_asking = threading.Lock()
_passphrases: dict[Path, str | None] = {}


def log_in(transport: Any, settings: Settings, options: SshOptions) -> None:
    """Authenticate; raises LoginRefusedError that says what was tried."""
    tried: list[str] = []
    locked: list[Path] = []
    with _Agent(settings.agent_socket) as agent:
        for what, key in _keys(settings, options, agent, locked):
            tried.append(what)
            if _accepted(transport, settings, key, tried):
                return
    raise _refused(settings, tried, locked)


def _accepted(transport: Any, settings: Settings, key: Any, tried: list[str]) -> bool:
    import paramiko

    try:
        further = transport.auth_publickey(settings.user, key)
    except paramiko.BadAuthenticationType as error:
        raise LoginRefusedError(
            f"{settings.name} takes no key logins for {settings.user}, only {', '.join(error.allowed_types) or 'nothing'}.",
            f"Allow PubkeyAuthentication there, and put your key there: ssh-copy-id {settings.name}.",
        ) from None
    except paramiko.AuthenticationException as error:
        if not transport.is_active():
            raise _closed(settings, tried, str(error)) from None
        return False
    except (paramiko.SSHException, EOFError, OSError, ValueError) as error:
        if not transport.is_active():
            raise _closed(settings, tried, str(error) or type(error).__name__) from None
        return False  # an agent that will not sign, or a key type that neither side can use
    if further:
        raise LoginRefusedError(
            f"{settings.name} wants more than a key from {settings.user}: {', '.join(further)}.",
            "Allow logins with a key alone for this user; glmplan asks for no second factor.",
        )
    return True


def _closed(settings: Settings, tried: list[str], words: str) -> LoginRefusedError | ConnectionLostError:
    if len(tried) > 1:
        return LoginRefusedError(
            f"{settings.name} closed the connection after {len(tried)} keys: {', '.join(tried)}.",
            f"Name the right key for it in ~/.ssh/config: IdentityFile and IdentitiesOnly yes under Host {settings.name}.",
        )
    return ConnectionLostError(settings.name, f"while logging in ({words})")


def _refused(settings: Settings, tried: list[str], locked: list[Path]) -> LoginRefusedError:
    if locked:
        names = ", ".join(map(str, locked))
        return LoginRefusedError(
            f"{settings.name} let {settings.user} not in: the key {names} is encrypted and no passphrase opened it"
            + (f"; refused: {', '.join(tried)}." if tried else "."),
            f"Unlock it for this session: ssh-add {locked[0]}.",
        )
    if not tried:
        places = ", ".join(map(str, settings.identities)) or "none named"
        return LoginRefusedError(
            f"There is no key to log in to {settings.name} with: no agent key, and no key file of {places}.",
            f"Make one with `ssh-keygen -t ed25519` and put it there: ssh-copy-id {settings.name}.",
        )
    return LoginRefusedError(
        f"{settings.name} refused {settings.user} with {', '.join(tried)}.",
        f"Put the key there: ssh-copy-id {settings.name}; or name user and key in ~/.ssh/config.",
    )


class _Agent:
    """The keys of one agent, none where there is no agent."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._agent: Any = None
        self.keys: tuple[Any, ...] = ()

    def __enter__(self) -> _Agent:
        if self._path is None:
            return self
        import paramiko
        from paramiko.agent import AgentSSH

        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(AGENT_TIMEOUT_S)
            connection.connect(self._path)
            self._agent = AgentSSH()
            self._agent._connect(connection)
            self.keys = self._agent.get_keys()
        except (OSError, paramiko.SSHException):
            connection.close()
        return self

    def __exit__(self, *_: object) -> None:
        if self._agent is not None:
            self._agent._close()


def _keys(settings: Settings, options: SshOptions, agent: _Agent, locked: list[Path]) -> Iterator[tuple[str, Any]]:
    """Agent keys that the configuration names, other agent keys, key files, encrypted key files."""
    named = {blob: path for path in settings.identities if (blob := _public_blob(path)) is not None}
    offered: set[bytes] = set()
    for key in sorted(agent.keys, key=lambda key: key.asbytes() not in named):
        blob = key.asbytes()
        if blob in named or not settings.identities_only:
            offered.add(blob)
            yield f"agent key {named.get(blob) or key.comment or key.get_name()}", key
    for path in settings.identities:  # os.path.isfile: a folder that may not be read holds no key for us
        if _public_blob(path) in offered or not os.path.isfile(path) or path.suffix == ".pub":
            continue
        key, is_locked = _load(path, None)
        if is_locked:
            locked.append(path)
        elif key is not None and key.asbytes() not in offered:
            yield str(path), key
    for path in list(locked):
        passphrase = _ask(path, options.ask_passphrase)
        key = _load(path, passphrase)[0] if passphrase else None
        if key is not None:
            locked.remove(path)
            yield str(path), key


def _public_blob(path: Path) -> bytes | None:
    """The public key beside a private one (or the file itself), as it goes over the wire."""
    public = path if path.suffix == ".pub" else path.with_name(f"{path.name}.pub")
    try:
        return binascii.a2b_base64(public.read_text(errors="replace").split()[1])
    except (OSError, IndexError, binascii.Error):
        return None


def _load(path: Path, passphrase: str | None) -> tuple[Any, bool]:
    """The key, and whether it needs a passphrase; (None, False) for a file that holds no usable key."""
    import paramiko

    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            with closing(path.open()) as file:
                key = kind.from_private_key(file, password=passphrase)
        except paramiko.PasswordRequiredException:
            return None, True
        except (paramiko.SSHException, OSError, ValueError, IndexError, UnicodeDecodeError):
            continue
        certificate = path.with_name(f"{path.name}-cert.pub")
        if os.path.isfile(certificate):
            key.load_certificate(str(certificate))
        return key, False
    return None, False


def _ask(path: Path, ask: Callable[[Path], str | None] | None) -> str | None:
    if ask is None:
        return None
    with _asking:
        if path not in _passphrases:
            _passphrases[path] = ask(path)
        return _passphrases[path]
