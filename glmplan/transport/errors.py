"""Why a host could not be reached, one class per repair. All of them exit with 5."""

from __future__ import annotations

from glmplan.errors import UnreachableError


class TimedOutError(UnreachableError):
    """The host accepted and did not answer in time."""

    def __init__(self, host: str, timeout_s: float) -> None:
        super().__init__(
            f"{host} did not answer within {timeout_s:g} s.", f"Try `ssh {host} true`; look at the host's load."
        )


class ConnectionFailedError(UnreachableError):
    """No connection came about: no such name, no route, refused, or no SSH service behind the port."""


class ConnectionLostError(UnreachableError):
    """The connection broke while a command ran; what the command did is not known."""

    def __init__(self, host: str, words: str) -> None:
        super().__init__(
            f"The connection to {host} broke: {words}.",
            f"Look at `ssh {host} true` and run the command again; workers on the host go on without a connection.",
        )


class HostKeyUnknownError(UnreachableError):
    """known_hosts has no key for the host."""


class HostKeyChangedError(UnreachableError):
    """known_hosts has another key for the host, or says that this one is revoked."""


class LoginRefusedError(UnreachableError):
    """The host answered and let nobody in."""
