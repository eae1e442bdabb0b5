"""Why a host could not be reached, one class per repair."""

from __future__ import annotations

from glmplan.errors import UnreachableError


class TimedOutError(UnreachableError):
    """The host accepted and did not answer in time."""

    def __init__(self, host: str, timeout_s: float) -> None:
        super().__init__(f"{host} did not answer within {timeout_s:g} s.", f"Try `ssh {host} true`; look at the host's load.")
