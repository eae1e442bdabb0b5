"""The command of one node, and the one place where commands are quoted.

Commands are data: argv lists and environment dicts. `render` makes shell text for people to read and paste.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from glmplan.errors import UsageError
from glmplan.facts.base import Frozen
from glmplan.planning.plan import Plan, PlanNode


class NodeCommand(Frozen):
    """What one node runs. `environment` holds only what glmplan sets; no secret is ever in it.

    `http_host` is the address that the node's HTTP server, or its health answer, listens on.
    """

    node_rank: int
    host: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    http_host: str = "127.0.0.1"


@dataclass(frozen=True)
class More:
    """What the user adds to the planned command: words after it, and variables over its own."""

    words: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Endpoints:
    """Where the server listens. The HTTP address is loopback unless the user names another."""

    http_host: str = "127.0.0.1"
    http_port: int = 30000
    rendezvous_port: int = 20000

    def __post_init__(self) -> None:
        for name in ("http_port", "rendezvous_port"):
            port = getattr(self, name)
            if not 1 <= port <= 65535:
                raise UsageError(f"The {name.replace('_', ' ')} {port} is not between 1 and 65535.", "Choose another.")
        if self.http_port == self.rendezvous_port:
            raise UsageError(f"HTTP and rendezvous both use port {self.http_port}.", "Give them different ports.")


def head_address(plan: Plan) -> str:
    """What other nodes connect to: loopback on one node, else the head's address or its host name."""
    if plan.layout.nodes == 1:
        return "127.0.0.1"
    return plan.nodes[0].address or plan.nodes[0].host


def listen_address(endpoints: Endpoints, node: PlanNode) -> str:
    """Where a node's HTTP listens: nodes that share one machine have loopback addresses of their own."""
    own = node.address or ""
    return own if own.startswith("127.") and endpoints.http_host == "127.0.0.1" else endpoints.http_host


def node_network(plan: Plan, node: PlanNode, address_variable: str) -> dict[str, str]:
    """The interface variables of a node, and its address in the engine's own; a plan on one node talks to nobody."""
    if plan.layout.nodes == 1:
        return {}
    return {**node.network, **({address_variable: node.address} if node.address else {})}


def port_environment(plan: Plan) -> dict[str, str]:
    """What the plugin is told; unset it acts where the engine has no kernels for the GPU."""
    chosen = plan.settings.kernel_port
    return {} if chosen == "auto" else {"GLMPLAN_PORT": chosen}


def joined(address: str, port: int) -> str:
    """`address:port`, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def visible_devices(node: PlanNode) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES where the plan uses part of a node's GPUs, or another order than the driver's."""
    indexes = list(node.gpu_indexes)
    if node.all_gpus_used and indexes == list(range(len(indexes))):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, indexes)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _pieces(command: NodeCommand) -> list[str]:
    """Quoted shell words, an option together with its values."""
    pieces = [f"{name}={shlex.quote(value)}" for name, value in sorted(command.environment.items())]
    program = len(pieces)
    for word in map(shlex.quote, command.argv):
        if word.startswith("--") or len(pieces) == program:
            pieces.append(word)
        else:
            pieces[-1] += f" {word}"
    return pieces


def render(command: NodeCommand) -> str:
    """Shell text of a command, one option a line."""
    return " \\\n  ".join(_pieces(command))


def wrapped(command: NodeCommand, width: int = 112) -> list[str]:
    """The command on as few lines as fit the width, broken between options."""
    lines = [""]
    for piece in _pieces(command):
        if lines[-1] and len(lines[-1]) + len(piece) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {piece}".strip()
    return lines
