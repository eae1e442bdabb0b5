"""The node program: what glmplan runs on a host, with nothing installed there but Python 3.9 or newer.

Standard library only (pynvml and torch are used where the host has them), and no import of other rooms: `transport.node`
packs this folder into one zip file and sends it through the connection. A request and its answer are JSON objects.
"""
