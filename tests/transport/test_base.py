"""Host names as typed, and this machine as several nodes."""

from __future__ import annotations

import sys

import pytest

from glmplan.errors import UsageError
from glmplan.transport.base import MOST_HOSTS, HostName, parse_hosts
from glmplan.transport.local import LocalTransport


def test_names() -> None:
    """SSH names, this machine, and parts of its GPUs."""
    assert parse_hosts(" a , bob@b.example:2222,[fe80::1]:22") == (
        HostName("a"),
        HostName("bob@b.example:2222"),
        HostName("[fe80::1]:22"),
    )
    assert parse_hosts("local") == (HostName("local", is_local=True),)
    assert parse_hosts("local#0-1,local#3") == (
        HostName("local#0-1", is_local=True, gpu_indexes=(0, 1)),
        HostName("local#3", is_local=True, gpu_indexes=(3,)),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,,b", "empty name"),
        ("", "empty name"),
        ("a,b,a", "names a twice"),
        ("-oProxyCommand=x", "no host name"),
        ("a b", "no host name"),
        ("a;reboot", "no host name"),
        ("local#3-1", "no range of GPUs"),
        ("local#0-2,local#2", "both use GPU 2"),
        (",".join(f"h{n}" for n in range(MOST_HOSTS + 1)), "1,024 is the limit"),
    ],
)
def test_names_that_are_refused(text: str, words: str) -> None:
    """With the reason; nothing that ssh would read as an option gets through."""
    with pytest.raises(UsageError, match=words):
        parse_hosts(text)


def test_nodes_on_this_machine_have_names_of_their_own() -> None:
    """GLMPLAN_NODE keeps their state folders apart."""
    script = "import os; print(os.environ.get('GLMPLAN_NODE', '-'), end='')"
    names = [
        LocalTransport(host).run([sys.executable, "-c", script]).stdout for host in parse_hosts("local,local#0-1,local#2")
    ]
    assert names == [b"-", b"local-0-1", b"local-2"]


def test_a_program_that_may_not_run(tmp_path: object) -> None:
    """Ends with 126, as in a shell."""
    done = LocalTransport(parse_hosts("local")[0]).run([str(tmp_path)])
    assert (done.exit_status, done.stderr) == (126, f"{tmp_path}: not permitted\n".encode())
