"""What the proofs' stand-in servers share: the beginning of the program that each writes into its site."""

from __future__ import annotations

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
