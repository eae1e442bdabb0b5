"""This machine as a host. A name such as `local#0-3` is a node of its own here, with its own state folder."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from glmplan.transport.base import Completed, HostName
from glmplan.transport.errors import TimedOutError


class LocalTransport:
    """Runs commands as child processes."""

    def __init__(self, host: HostName) -> None:
        self.name = host.text
        self._environment = dict(os.environ)
        if host.gpu_indexes is not None:
            self._environment["GLMPLAN_NODE"] = host.text.replace("#", "-")

    def run(self, argv: Sequence[str], stdin: bytes = b"", timeout_s: float = 30.0) -> Completed:
        """Run a command; on a time-out its whole process group is killed. A program that is not there ends with 127."""
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except (FileNotFoundError, PermissionError) as error:
            status, words = (127, "not found") if isinstance(error, FileNotFoundError) else (126, "not permitted")
            return Completed(status, b"", f"{argv[0]}: {words}\n".encode())
        with process:
            try:
                out, err = process.communicate(stdin, timeout=timeout_s)
            except BaseException as error:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise TimedOutError(self.name, timeout_s) from None
                raise
        return Completed(process.returncode, out, err)

    def close(self) -> None:
        """Nothing to let go of."""
