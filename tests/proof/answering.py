"""What the proofs' stand-in servers share: the beginning of the program that each writes into its site."""

from __future__ import annotations

import contextlib
import random
import socket
import textwrap

_BEGINNING = """
    import http.server, json, os, sys, time
    argument = lambda name: sys.argv[sys.argv.index(name) + 1]

    class Answering(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def asked(self):
            return json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        def answer(self, body):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    def serve(handler):
        http.server.ThreadingHTTPServer(("127.0.0.1", int(argument("--port"))), handler).serve_forever()
"""


def program(server: str) -> str:
    """The whole text; `server` uses argument, serve and Answering."""
    return textwrap.dedent(_BEGINNING) + textwrap.dedent(server)


def first_of_free_ports(count: int, step: int) -> int:
    """A port below those that the kernel gives to outgoing connections (from 32,768), with as many behind it that nothing
    has now."""
    for _ in range(100):
        first = random.randrange(11_000, 32_000 - count * step)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for number in range(count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", first + number * step))
            return first
    raise RuntimeError(f"no {count} free ports, {step} apart, were found")
