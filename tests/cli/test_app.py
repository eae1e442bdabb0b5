"""What every command has: JSON for programs, a help with examples, completion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from glmplan.cli.app import app
from tests.fleet.control import interruptible

COMMANDS = sorted(command.name for command in app.registered_commands if command.name)


def test_the_commands_are_these():
    assert (
        sorted(
            ["size", "launch", "probe", "doctor", "status", "logs", "stop", "restart", "watch", "verify", "bench", "tune"]
        )
        == COMMANDS
    )  # a new command belongs into the README and this list


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_examples(name, glmplan):
    ran = glmplan(name, "--help")
    assert ran.code == 0
    assert "--json" in ran.out
    assert "Examples:" in ran.out
    assert f"glmplan {name}" in ran.out


def test_completion_is_offered_for_the_usual_shells():
    for shell in ("bash", "zsh", "fish"):
        environment = {**os.environ, "_GLMPLAN_COMPLETE": f"source_{shell}"}
        code = "from glmplan.cli.app import main; import sys; sys.argv = ['glmplan']; main()"
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert "_GLMPLAN_COMPLETE" in ran.stdout, ran.stderr


INTERRUPTED = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "glmplan.errors":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""
"""Python's sitecustomize: Ctrl-C is pressed when the first module of the command line is looked for."""


def test_an_interrupt_while_the_program_loads_ends_it_without_a_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "glmplan", "--help"]
    with interruptible():
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGINT, ran.stderr
    assert "Traceback" not in ran.stderr
