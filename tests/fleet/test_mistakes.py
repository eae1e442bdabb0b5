"""What users do by mistake, on three hosts with a real sshd each: what they are told, and that nothing is lost or left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glmplan.cli._telling import tunnel
from tests.fleet.control import Controller, controller, wait_until, workers
from tests.netns import three_hosts

__all__ = ["controller", "three_hosts"]


def test_another_launch_of_the_same_name_does_not_replace_the_record(controller: Controller):
    assert controller.launch("--name", "mine").code == 0
    record = controller.folder / "glmplan" / "launches" / "mine.json"
    before = record.read_bytes()
    other = controller.launch("--name", "mine", hosts="h3,h1,h2")
    assert other.code == 1
    assert "runs on h1, h2, h3" in other.err
    assert "glmplan stop mine" in other.err
    assert record.read_bytes() == before
    stopped = controller.run("stop", "mine")
    assert stopped.out.count("stopped, ") == 3
    assert controller.launch("--name", "mine", hosts="h3,h1,h2").code == 0
    assert controller.run("stop", "mine").code == 0


def test_a_name_whose_hosts_are_silent_is_kept(controller: Controller):
    assert controller.launch("--name", "mine").code == 0
    controller.hosts.stop_sshd("h3", sessions=True)
    other = controller.run(
        "launch", "--rehearse", "--name", "mine", "--hosts", "h1,h2", "--gpus", "4x b300", "--nodes", "2", "--context", "32k"
    )
    controller.hosts.start_sshd("h3")
    assert other.code == 1
    assert "Nothing was started" in other.err
    assert controller.run("stop", "mine").code == 0


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
    with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-load:6") as first:
        wait_until("the workers", lambda: all(workers(controller.hosts, name) for name in controller.hosts.hosts))
        with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-load:6") as second:
            assert second.stderr is not None
            for line in second.stderr:
                if "adopted, pid" in line:
                    break
            time.sleep(0.2)
            second.send_signal(signal.SIGINT)
            _, err = second.communicate(timeout=60)
            assert second.returncode == 130
            assert "ran before and goes on" in err
        _, err = first.communicate(timeout=60)
        assert first.returncode == 0, err
    assert controller.run("stop").code == 0


def test_an_interrupted_launch_says_what_it_stopped(controller: Controller):
    with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-load:60") as process:
        wait_until("the workers", lambda: all(workers(controller.hosts, name) for name in controller.hosts.hosts))
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("process(es) ended") == 3


def test_with_a_key_and_without_one_are_two_plans(controller: Controller):
    assert controller.launch("--name", "keyed").code == 0
    again = controller.launch("--name", "keyed", "--api-key-env", "KEY", KEY="planted-secret")
    assert again.code == 1
    assert "Another launch of the name keyed" in again.err
    assert json.loads(controller.run("status", "keyed", "--json").out)["word"] == "serving"
    assert controller.run("stop", "keyed").code == 0


def test_stop_tells_a_stopped_worker_from_one_that_had_ended(controller: Controller):
    assert controller.launch("--name", "short").code == 0
    os.kill(max(workers(controller.hosts, "h2")), signal.SIGKILL)
    wait_until("the node's end", lambda: not workers(controller.hosts, "h2"))
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
    assert controller.launch("--name", "quiet").code == 0
    words = f"{sys.executable} -m glmplan status quiet --json"
    environment = controller._environment({})
    for closed in ("<&-", "2>&-", "<&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{words} {closed}"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["word"] == "serving"
    assert controller.run("logs", "quiet", "--node", "0", "--rank", "5").code == 2
    line = controller.run("logs", "quiet", "--node", "1", "-n", "1", "--json").out
    assert json.loads(line)["host"] == "h2"
    assert controller.run("stop", "quiet").code == 0


def test_an_interrupted_examination_does_not_fail_the_next(controller: Controller):
    with controller.launching() as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Examining" in line:
                break
        wait_until("a listener", lambda: workers(controller.hosts, "h2", ("listen",)))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    ran = controller.launch()
    assert ran.code == 0, ran.err
    assert controller.run("stop").code == 0


@pytest.mark.parametrize(("host", "words"), [
    ("h1", "F h1"), ("me@h1:2222", "F -p 2222 me@h1"), ("[fd00::1]:2222", "F -p 2222 fd00::1"),
    ("me@[fd00::1]", "F me@fd00::1"),
])  # fmt: skip
def test_the_tunnel_is_a_command_for_ssh(host: str, words: str):
    assert tunnel(host, "F") == f"ssh -N -L {words}"
