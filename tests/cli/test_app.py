"""What every command has: JSON for programs, a help with examples, completion."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from glmplan.cli.app import app

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
