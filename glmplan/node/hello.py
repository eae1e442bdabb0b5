"""Whether the node program runs here, and as whom."""

from __future__ import annotations

import getpass
import os
import platform
import sys
import time
from typing import Any


def hello(request: dict[str, Any]) -> dict[str, Any]:
    """The user, the Python and the time of this host."""
    return {
        "user": getpass.getuser(),
        "hostname": platform.node(),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "time_s": time.time(),
        "pid": os.getpid(),
    }
