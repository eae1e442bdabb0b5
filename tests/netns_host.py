"""One host of the test network: namespaces with a PID 1, a boot id, a home, and sshd."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.netns_wire import command, wait_for

SSHD = "/usr/sbin/sshd"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

INIT = """
import os, select, signal, sys
wake, told = os.pipe()
os.set_blocking(told, False)
signal.signal(signal.SIGCHLD, lambda *_: None)
signal.set_wakeup_fd(told, warn_on_full_buffer=False)
open(sys.argv[1], "w").close()
while 0 not in select.select([0, wake], [], [])[0]:
    os.read(wake, 4096)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""
"""PID 1 of a host: reaps what loses its parent, and ends (with all that runs there) when the test process does."""

MUTE = """
import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", int(sys.argv[1])))
s.listen(64)
open(sys.argv[2], "w").close()
held = []
while True:
    held.append(s.accept())
"""
"""A service that accepts and never says a word."""

BOOT = 'hostname "$1"; mount --bind "$2" /proc/sys/kernel/random/boot_id; exec "$3" -c "$4" "$5"'


@dataclass
class NetHost:
    """One host; `folder` holds its keys, configuration, home and logs, `authorized` is the public key it lets in."""

    name: str
    namespace: str
    folder: Path
    authorized: Path
    address: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    init: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """HOME of the user there."""
        return self.folder / "home"

    @property
    def state(self) -> Path:
        """The state folder of glmplan there."""
        return self.home / ".local" / "state" / "glmplan"

    @property
    def init_pid(self) -> int:
        """PID 1 of the host, as this machine counts."""
        assert self.init is not None, f"{self.name} is down"
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()
        return int(children[0])

    @property
    def enter(self) -> list[str]:
        """Words before a command that runs there."""
        return ["nsenter", "-t", str(self.init_pid), "--net", "--mount", "--uts", "--ipc", "--pid", "--"]

    @property
    def session_environment(self) -> dict[str, str]:
        """What a session there finds."""
        return {"HOME": str(self.home), "PATH": PATH, "USER": "root", "LOGNAME": "root", **self.environment}

    def boot(self) -> None:
        """Start PID 1 with a new boot id, and sshd."""
        boot_id, ready = self.folder / "boot_id", self.folder / "init.ready"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        ready.unlink(missing_ok=True)
        spaces = ["unshare", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = ["/bin/sh", "-ec", BOOT, "init", self.name, boot_id, sys.executable, INIT, ready]
        self.init = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *spaces, *script], stdin=subprocess.PIPE, start_new_session=True
        )
        wait_for(f"{self.name} to boot", ready.exists)
        self.start_sshd()

    def off(self) -> None:
        """Kill every process there at once."""
        if self.init is not None:
            with suppress(ProcessLookupError, IndexError, FileNotFoundError):
                os.kill(self.init_pid, signal.SIGKILL)
            self.init.kill()
            self.init.communicate()
            self.init = None

    def processes(self) -> dict[int, str]:
        """All but PID 1: pid as this machine counts -> command line."""
        inside = os.readlink(f"/proc/{self.init_pid}/ns/pid")
        found: dict[int, str] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(folder / "ns/pid") == inside and int(folder.name) != self.init_pid:
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if words:
                        found[int(folder.name)] = words
        return found

    def new_host_key(self, kind: str) -> str:
        """Make a host key; returns its `TYPE BASE64`."""
        path = self.folder / f"host_key_{kind}"
        command("ssh-keygen", "-q", "-t", kind, "-N", "", "-C", self.name, "-f", path)
        return " ".join(path.with_suffix(".pub").read_text().split()[:2])

    def start_sshd(self) -> None:
        """Start the SSH service; returns when it listens."""
        self.unmute()
        pid_file = self.folder / "sshd.pid"
        pid_file.unlink(missing_ok=True)
        self._write_sshd_config(pid_file)
        command(*self.enter, SSHD, "-f", self.folder / "sshd_config", "-E", self.folder / "sshd.log")
        wait_for(f"sshd of {self.name}", pid_file.exists)

    def stop_sshd(self, sessions: bool) -> None:
        """End the SSH service, and its open sessions if wanted."""
        self.unmute()
        for pid, words in self.processes().items():
            if words.startswith(("sshd: " + SSHD, SSHD)) or (sessions and words.startswith("sshd")):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_for("sshd to end", lambda: not self._listens())

    def mute(self, tcp_port: int) -> None:
        """Start the service that never says a word."""
        ready = self.folder / "mute.ready"
        ready.unlink(missing_ok=True)
        script = ["/bin/sh", "-c", 'exec "$0" -c "$@" &', sys.executable, MUTE, str(tcp_port), ready]
        subprocess.run([*self.enter, *script], check=True, timeout=120)
        wait_for("the mute service", ready.exists)

    def unmute(self) -> None:
        """End it."""
        for pid, words in self.processes().items():
            if "held.append(s.accept())" in words:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                wait_for("the mute service to end", lambda pid=pid: not Path(f"/proc/{pid}").exists())

    def _listens(self) -> bool:
        with socket.socket() as attempt:
            attempt.settimeout(1)
            return attempt.connect_ex((self.address, 22)) == 0

    def _write_sshd_config(self, pid_file: Path) -> None:
        environment = {"HOME": str(self.home), **self.environment}
        lines = [
            "Port 22",
            f"PidFile {pid_file}",
            f"AuthorizedKeysFile {self.authorized}",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "StrictModes no",
            "UsePAM no",
            "UseDNS no",
            "PrintMotd no",
            "MaxStartups 200",
            "SetEnv " + " ".join(f'"{key}={value}"' for key, value in environment.items()),
            *(f"HostKey {path}" for path in sorted(self.folder.glob("host_key_*")) if path.suffix != ".pub"),
        ]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
