"""What every command has: JSON for programs, a help with examples, completion."""

from __future__ import annotations

import os
import signal
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


def test_an_interrupt_while_the_program_loads_ends_it_without_a_traceback():
    command = [sys.executable, "-X", "importtime", "-m", "glmplan", "--help"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [line for line in iter(process.stderr.readline, "") if _interrupt_at(process, line)]
    assert process.returncode == -signal.SIGINT, said
    assert not any("Traceback" in line for line in said)


def _interrupt_at(process: subprocess.Popen[str], line: str) -> bool:
    """Sends SIGINT once the first module of the command line is read; every line is kept."""
    if "glmplan.errors" in line:
        process.send_signal(signal.SIGINT)
    return True
