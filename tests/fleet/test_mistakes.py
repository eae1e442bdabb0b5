"""What users do by mistake, on three hosts with a real sshd each: what they are told, and that nothing is lost or left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glmplan.cli._telling import tunnel
from tests.fleet.control import (
    Controller,
    Program,
    a_rank,
    all_stopped,
    controller,
    wait_for_end,
    wait_for_loading,
    wait_for_workers,
    workers,
)
from tests.netns import three_hosts

__all__ = ["controller", "three_hosts"]


def test_another_launch_of_the_same_name_does_not_replace_the_record(controller: Controller):
    controller.launch("--name", "mine").ok()
    record = controller.folder / "glmplan" / "launches" / "mine.json"
    before = record.read_bytes()
    other = controller.launch("--name", "mine", hosts="h3,h1,h2")
    assert other.code == 1
    assert "runs on h1, h2, h3" in other.err
    assert "glmplan stop mine" in other.err
    assert record.read_bytes() == before
    assert all_stopped(controller.run("stop", "mine").out)
    controller.launch("--name", "mine", hosts="h3,h1,h2").ok()
    controller.run("stop", "mine").ok()


def test_a_name_whose_hosts_are_silent_is_kept(controller: Controller):
    controller.launch("--name", "mine").ok()
    controller.hosts.stop_sshd("h3", sessions=True)
    other = controller.run(
        "launch", "--rehearse", "--name", "mine", "--hosts", "h1,h2", "--gpus", "4x b300", "--nodes", "2", "--context", "32k"
    )
    controller.hosts.start_sshd("h3")
    assert other.code == 1
    assert "Nothing was started" in other.err
    controller.run("stop", "mine").ok()


def test_one_machine_by_two_names_is_refused(controller: Controller):
    ran = controller.launch(hosts="h1,h2,root@h1")
    assert ran.code == 2
    assert "h1 and root@h1 are one machine" in ran.err


def test_a_plan_that_does_not_fit_is_not_rehearsed(controller: Controller):
    ran = controller.run("launch", "--rehearse", "--hosts", "h1,h2,h3", "--gpus", "6x l40s", "--nodes", "3")
    assert ran.code == 3
    assert "does not fit" in ran.err


def test_wrong_words_are_refused_before_a_host_is_asked(controller: Controller, tmp_path: Path):
    broken = tmp_path / "reference.json"
    broken.write_text("{")
    for words in (
        ("--canaries", "nonsense"), ("--canaries", "fact,"), ("--canary-reference", str(broken)), ("--deadline", "nan"),
        ("--stall", "inf"), ("--lost-after", "nan"),
    ):  # fmt: skip
        ran = controller.launch(*words)
        assert ran.code == 2, words
        assert "Probing" not in ran.err
        assert "next:" in ran.err


def test_interrupting_an_adopting_launch_leaves_what_ran(controller: Controller):
    practice = {"GLMPLAN_REHEARSE_FAULT": "slow-load:8", "GLMPLAN_REHEARSE_PEER_S": "600"}
    with controller.launching(**practice) as first:
        wait_for_loading(controller.hosts, "h2")
        held = a_rank(controller.hosts, "h2")
        os.kill(held, signal.SIGSTOP)  # all wait for this one, for as long as the second launch needs
        with controller.launching(**practice) as second:
            second.says("h3: adopted, pid")
            second.interrupt()
            assert second.end() == 130, second.err
            assert "ran before and goes on" in second.err
        os.kill(held, signal.SIGCONT)
        assert first.end() == 0, first.err
    controller.run("stop").ok()


def test_an_interrupted_launch_says_what_it_stopped(controller: Controller):
    with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-load:60") as launch:
        wait_for_workers(controller.hosts)
        launch.interrupt()
        assert launch.end() == 130, launch.err
    assert all_stopped(launch.err)


def test_with_a_key_and_without_one_are_two_plans(controller: Controller):
    controller.launch("--name", "keyed").ok()
    again = controller.launch("--name", "keyed", "--api-key-env", "KEY", KEY="planted-secret")
    assert again.code == 1
    assert "Another launch of the name keyed" in again.err
    assert json.loads(controller.run("status", "keyed", "--json").out)["word"] == "serving"
    controller.run("stop", "keyed").ok()


def test_stop_tells_a_stopped_worker_from_one_that_had_ended(controller: Controller):
    controller.launch("--name", "short").ok()
    os.kill(a_rank(controller.hosts, "h2"), signal.SIGKILL)
    wait_for_end(controller.hosts, "h2")
    stopped = controller.run("stop", "short")
    assert "h2: nothing to stop, its worker had ended before" in stopped.out
    unknown = controller.run("stop", "nobody", "--hosts", "h1")
    assert "knows no deployment of this name" in unknown.out


def test_a_host_that_does_not_answer_is_not_said_to_be_empty(controller: Controller):
    controller.hosts.stop_sshd("h3")
    ran = controller.run("status", "--hosts", "h2,h3")
    only = controller.run("status", "--hosts", "h3")
    controller.hosts.start_sshd("h3")
    assert ran.code == only.code == 5
    assert only.out == ""


def test_closed_streams_are_no_defect(controller: Controller):
    controller.launch("--name", "quiet").ok()
    words = f"{sys.executable} -m glmplan status quiet --json"
    environment = controller._environment({})
    for closed in ("<&-", "2>&-", "<&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{words} {closed}"], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["word"] == "serving"
    assert controller.run("logs", "quiet", "--node", "0", "--rank", "5").code == 2
    line = controller.run("logs", "quiet", "--node", "1", "-n", "1", "--json").out
    assert json.loads(line)["host"] == "h2"
    controller.run("stop", "quiet").ok()


def listens(controller: Controller, launch: Program) -> bool:
    """Whether a listener of this launch's visit was seen while it lived, which may be half a second."""
    launch.says("Examining")
    while "are allowed from here" not in launch.err and launch.process.poll() is None:
        if workers(controller.hosts, "h2", ("listen",)):
            return True
    return False


def test_an_interrupted_examination_does_not_fail_the_next(controller: Controller):
    for _ in range(10):
        with controller.launching() as launch:
            seen = listens(controller, launch)
            launch.interrupt()
            launch.end()
        if seen:
            break
    assert seen
    controller.launch().ok()
    controller.run("stop").ok()


@pytest.mark.parametrize(("host", "words"), [
    ("h1", "F h1"), ("me@h1:2222", "F -p 2222 me@h1"), ("[fd00::1]:2222", "F -p 2222 fd00::1"),
    ("me@[fd00::1]", "F me@fd00::1"),
])  # fmt: skip
def test_the_tunnel_is_a_command_for_ssh(host: str, words: str):
    assert tunnel(host, "F") == f"ssh -N -L {words}"
