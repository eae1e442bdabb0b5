"""One HTTP request from this host to itself, so that a server on loopback can be asked without a tunnel.

Only loopback and this host's own addresses; no proxy and no redirect. The API key is read here, from a file below the state
folder, and neither travels nor is printed.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import time
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import state
from .errors import NodeError

MOST_BYTES = 16 << 20


def http(request: dict[str, Any]) -> dict[str, Any]:
    """{"status", "body", "elapsed_s"} of {"method", "url", "headers", "body", "timeout_s", "api_key_file"}.

    A body, either way, is text or what JSON holds. `api_key_file` is relative to the node's state folder, or absolute below
    it; with "deployment" given, a bare name is one of its files, and @FILES@ is their folder.
    """
    url = str(request["url"])
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise NodeError("usage", f"{url} is no http:// address.", "Give http://ADDRESS:PORT/PATH.")
    timeout_s = float(request.get("timeout_s", 30.0))
    place = _own_address(parts.hostname, parts.port or 80)
    headers = {"Host": parts.netloc.rpartition("@")[2], **(request.get("headers") or {})}
    body = request.get("body")
    if body is not None and not isinstance(body, str):
        headers.setdefault("Content-Type", "application/json")
        body = json.dumps(body)
    if request.get("api_key_file"):
        headers["Authorization"] = f"Bearer {_api_key(request)}"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    begin = time.perf_counter()
    try:
        status, answer = _ask(place, str(request.get("method", "GET")), path, headers, body, timeout_s)
    except (OSError, HTTPException) as error:
        if isinstance(error, (TimeoutError, socket.timeout)):  # two classes before Python 3.10
            raise NodeError("timeout", f"{url} did not answer within {timeout_s:g} s.", "Look at the log.") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise NodeError("no-answer", f"{url} does not answer: {reason}.", "Look at the log.") from None
    return {"status": status, "body": answer, "elapsed_s": time.perf_counter() - begin}


def _ask(
    place: tuple[str, int], method: str, path: str, headers: dict[str, str], body: str | None, timeout_s: float
) -> tuple[int, Any]:
    """The exchange; `timeout_s` is for all of it."""
    deadline = time.monotonic() + timeout_s
    with closing(HTTPConnection(*place, timeout=timeout_s)) as connection:
        connection.request(method, path, None if body is None else body.encode(), headers)
        sock = connection.sock
        with connection.getresponse() as response:
            data = b""
            while len(data) < MOST_BYTES:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                sock.settimeout(left_s)
                piece = response.read1(1 << 16)
                if not piece:
                    break
                data += piece
            text = data.decode(errors="replace")
            if "json" in response.getheader("Content-Type", ""):
                with suppress(ValueError):
                    return response.status, json.loads(text)
            return response.status, text


def _own_address(host: str, port: int) -> tuple[str, int]:
    """The address to connect to, which must be this host's."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NodeError("no-answer", f"{host} has no address here: {error}.", "Name an address of this host.") from None
    for family, _, _, _, place in found:
        address = str(place[0])
        if ipaddress.ip_address(address.partition("%")[0]).is_loopback or _can_bind(family, address):
            return address, port
    raise NodeError("usage", f"{host} is not this host.", "Ask a server on loopback or on an address of this host.")


def _can_bind(family: int, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _api_key(request: dict[str, Any]) -> str:
    """The key in the file: its whole text, or the value of `api-key:` in an engine's YAML."""
    from .standin_options import api_key_of

    named = str(request["api_key_file"])
    if request.get("deployment"):
        files = str(state.folder(request["deployment"]) / "files")
        named = named.replace("@FILES@", files) if "/" in named else f"{files}/{named}"
    base = state.root().resolve()
    path = (base / named).resolve()
    if base not in path.parents:
        raise NodeError("usage", f"{named} is not below {base}.", "Name a file of a deployment.")
    try:
        return api_key_of(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NodeError("usage", f"{path} cannot be read: {error.strerror}.", "Start the deployment again.") from None
