"""What a command line may say about SSH."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SshOptions:
    """Choices for all hosts; the user's ssh configuration says the rest.

    `config` replaces the configuration files (None: $GLMPLAN_SSH_CONFIG, else the usual ones). A ConnectTimeout in the
    configuration wins over `connect_timeout_s`. `user@host` wins over `user`; `identity` is tried before configured keys.
    `ask_passphrase` is called at most once per encrypted key, from any thread, and returns None for no answer; leave it out
    where nobody can be asked.
    """

    accept_new_host_key: bool = False
    connect_timeout_s: float = 4.0
    user: str | None = None
    identity: str | None = None
    config: str | None = None
    ask_passphrase: Callable[[Path], str | None] | None = None
