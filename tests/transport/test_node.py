"""The node program's answer, found among what a host's shell prints."""

from __future__ import annotations

import pytest

from glmplan.node.bundle import ANSWER_LINE
from glmplan.transport.base import Completed
from glmplan.transport.node import NodeFailedError, call
from tests.netns import Network
from tests.transport.conftest import Opener

NOISE = 'echo "Welcome to h1"\nprintf \'{"ok": true, "result": {}}\'\necho careful >&2\n'


class Shell:
    """A transport whose host prints this."""

    name = "h1"

    def __init__(self, stdout: str, stderr: str = "", exit_status: int = 0) -> None:
        self._done = Completed(exit_status, stdout.encode(), stderr.encode())

    def run(self, argv: object, stdin: bytes = b"", timeout_s: float = 30.0) -> Completed:
        return self._done

    def close(self) -> None:
        """Nothing is held."""


def test_what_a_shell_prints_before_and_after_is_not_the_answer():
    answer = f'{{"ok": false}}\nhello\n{ANSWER_LINE}\n{{"ok": true, "result": {{"x": "{ANSWER_LINE}"}}}}\nbye {{}}\n'
    assert call(Shell(answer), "hello") == {"x": ANSWER_LINE}


@pytest.mark.parametrize("stdout", ["", '{"ok": true, "result": {}}\n', f"\n{ANSWER_LINE}\n", f"\n{ANSWER_LINE}\n[1]\n"])
def test_without_a_whole_answer_the_program_did_not_run(stdout: str):
    with pytest.raises(NodeFailedError) as failed:
        call(Shell(stdout, "boom\n", 3), "hello")
    assert failed.value.kind == "not-run"
    assert "boom" in failed.value.message


def test_a_shell_that_ends_by_itself_is_named():
    with pytest.raises(NodeFailedError, match="login shell of h1 ended") as failed:
        call(Shell("hello\n"), "hello")
    assert "bashrc" in failed.value.next_step


def test_a_bashrc_that_prints_spoils_nothing(one_host: Network, opened: Opener):
    transport = opened("h1", one_host)
    (one_host["h1"].home / ".bashrc").write_text(NOISE)
    try:
        assert b"Welcome to h1" in transport.run(["true"]).stdout
        assert call(transport, "deployments")["deployments"] == []
    finally:
        (one_host["h1"].home / ".bashrc").unlink()
