"""Whether to trust the host that answered: strict, and every refusal carries the line that repairs it.

An unknown key is recorded only on `accept_new_host_key`; a changed or revoked one never.
"""

from __future__ import annotations

from typing import Any

from glmplan.transport import host_keys
from glmplan.transport.errors import HostKeyChangedError, HostKeyUnknownError
from glmplan.transport.host_keys import HostKey, Line, Verdict
from glmplan.transport.options import SshOptions
from glmplan.transport.ssh_config import Settings


class KnownHost:
    """What known_hosts says about one host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        alias, host, tcp_port = settings.known_hosts_name.lower(), settings.host.lower(), settings.tcp_port
        self.name = alias or host_keys.written_name(host, tcp_port)
        files = (*settings.user_known_hosts, *settings.global_known_hosts)
        self.lines = host_keys.lines_for(self.name, files)
        if not self.lines and not alias and tcp_port != host_keys.DEFAULT_PORT:
            self._port_22 = host_keys.lines_for(host, files)  # ssh accepts a key known for port 22, and only as a match
        else:
            self._port_22 = ()

    def prefer(self, transport: Any) -> None:
        """Ask for a key of a known type first, or a host with several keys would seem changed."""
        known = [line.key_type for line in (*self.lines, *self._port_22)]
        wanted = [name for kind in known for name in (("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,))]
        security = transport.get_security_options()
        can = list(security.key_types)
        first = dict.fromkeys(name for name in wanted if name in can)
        security.key_types = [*first, *(name for name in can if name not in first)]

    def check(self, offered: HostKey, options: SshOptions) -> None:
        """Return if the key is known (or has been recorded just now); raise with the repair otherwise."""
        verdict, line = host_keys.judge(self.lines, offered)
        if not self.lines and host_keys.judge(self._port_22, offered)[0] in (Verdict.KNOWN, Verdict.REVOKED):
            verdict, line = host_keys.judge(self._port_22, offered)
        if verdict is Verdict.UNKNOWN:
            if not options.accept_new_host_key:
                raise self._unknown(offered)
            self._record(offered)
        elif verdict is not Verdict.KNOWN:
            assert line is not None
            raise self._refused(verdict, line, offered)

    def _refused(self, verdict: Verdict, line: Line, offered: HostKey) -> HostKeyChangedError:
        name, what, place = self._settings.name, f"{offered.key_type} {offered.fingerprint}", f"{line.path}:{line.number}"
        if verdict is Verdict.REVOKED:
            return HostKeyChangedError(
                f"{name} offers the key {what}, which {place} says is revoked.",
                "Do not log in; ask whoever runs the host for its new key.",
            )
        return HostKeyChangedError(
            f"The host key of {name} is not the one in {place}: it offers {what}. "
            "Someone may be in between, or the host was installed anew.",
            f"Compare that fingerprint on the host itself; then: ssh-keygen -f {line.path} -R '{self.name}'",
        )

    def _unknown(self, offered: HostKey) -> HostKeyUnknownError:
        settings = self._settings
        authority = any(line.marker == "@cert-authority" for line in self.lines)
        return HostKeyUnknownError(
            f"The host key of {settings.name} is not known: {offered.key_type} {offered.fingerprint}."
            + (" Host certificates are not read." if authority else ""),
            f"Compare the fingerprint, then: {self._line_to_run(offered)}   (or add --accept-new-host-key)",
        )

    def _line_to_run(self, offered: HostKey) -> str:
        settings = self._settings
        if settings.jumps or settings.proxy_command or settings.known_hosts_name or not settings.user_known_hosts:
            return f"ssh {settings.name} true"  # ssh-keyscan knows no jump host and no alias
        kind = "ecdsa" if offered.key_type.startswith("ecdsa") else offered.key_type.removeprefix("ssh-")
        port = "" if settings.tcp_port == host_keys.DEFAULT_PORT else f"-p {settings.tcp_port} "
        hashed = "-H " if settings.hash_known_hosts else ""
        return f"ssh-keyscan {hashed}{port}-t {kind} {settings.host} >> {settings.user_known_hosts[0]}"

    def _record(self, offered: HostKey) -> None:
        settings = self._settings
        if not settings.user_known_hosts:
            return  # UserKnownHostsFile none: the user wants no record
        path = settings.user_known_hosts[0]
        try:
            host_keys.record(path, self.name, offered, settings.hash_known_hosts)
        except OSError as error:
            raise HostKeyUnknownError(
                f"The new host key of {settings.name} cannot be written to {path}: {error.strerror or error}.",
                "Make the file writable.",
            ) from None
