"""Launches that go wrong, on three hosts with a real sshd each: what the user is told, and that nothing is left running.

Rehearsals, so the workers are the stand-in; controller, SSH, node program, supervisor, processes and sockets are real.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.fleet.control import (
    Controller,
    a_rank,
    all_stopped,
    controller,
    logs,
    wait_for_end,
    wait_for_loading,
    wait_for_workers,
    workers,
)
from tests.netns import three_hosts
from tests.netns_wire import wait_for

__all__ = ["controller", "three_hosts"]


def test_three_nodes_come_up_answer_and_stop(controller: Controller):
    ran = controller.launch("--json").ok()
    result = json.loads(ran.out)
    passed = {one["name"] for one in result["canaries"] if one["status"] == "pass"}
    assert {"fact", "arithmetic", "needle", "long-needle", "tool", "repeat"} <= passed
    status = controller.run("status", "--json")
    assert status.code == 0
    assert json.loads(status.out)["word"] == "serving"
    assert all_stopped(controller.run("stop").ok().out)
    after = controller.run("status", "--json")
    assert after.code == 6
    assert json.loads(after.out)["word"] == "stopped"


def test_the_same_plan_is_adopted_not_started_twice(controller: Controller):
    controller.launch().ok()
    before = {name: set(workers(controller.hosts, name)) for name in controller.hosts.hosts}
    again = controller.launch("--json").ok()
    assert json.loads(again.out)["adopted"] is True
    assert {name: set(workers(controller.hosts, name)) for name in controller.hosts.hosts} == before
    controller.run("stop")


def test_a_host_that_is_down_ends_the_launch_before_anything_starts(controller: Controller):
    controller.hosts.kill_all("h2")
    ran = controller.launch()
    controller.hosts.boot("h2")
    assert ran.code == 5
    assert "h2" in ran.err
    assert "Traceback" not in ran.err


def test_a_refused_key_is_named_with_its_host(controller: Controller, tmp_path: Path):
    other = tmp_path / "ssh_config"
    wrong = tmp_path / "wrong_key"
    os.system(f"ssh-keygen -q -t ed25519 -N '' -f {wrong}")
    text = controller.hosts.ssh_config.read_text().replace(str(controller.hosts.key), str(wrong))
    other.write_text(text)
    ran = controller.launch("--ssh-config", str(other))
    assert ran.code == 5
    assert all(name in ran.err for name in ("h1", "h2", "h3"))


def test_a_changed_host_key_is_refused(controller: Controller):
    known = controller.hosts.known_hosts.read_text()
    controller.hosts.change_host_key("h3")
    ran = controller.launch("--accept-new-host-key")
    assert ran.code == 5
    assert "h3" in ran.err
    assert "ssh-keygen" in ran.err
    key = (controller.hosts["h3"].folder / "host_key_ed25519.pub").read_text().split()
    lines = [line for line in known.splitlines() if not line.startswith(f"{controller.hosts['h3'].address} ")]
    controller.hosts.known_hosts.write_text(
        "\n".join([*lines, f"{controller.hosts['h3'].address} {key[0]} {key[1]}"]) + "\n"
    )


def test_a_host_that_accepts_and_never_answers_does_not_hang_the_launch(controller: Controller):
    controller.hosts.mute_sshd("h2")
    ran = controller.launch()
    controller.hosts.start_sshd("h2")
    assert ran.code == 5
    assert "h2" in ran.err
    assert ran.seconds < 120


def test_a_link_that_comes_back_costs_nothing(controller: Controller):
    with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-load:5") as launch:
        launch.says("are allowed from here")
        wait_for_loading(controller.hosts, "h3")
        controller.hosts.drop_link("h3")
        time.sleep(2.0)
        controller.hosts.restore_link("h3")
        assert launch.end() == 0, launch.err
    controller.run("stop").ok()


def test_a_link_of_the_head_that_breaks_while_canaries_are_asked_costs_nothing(controller: Controller):
    with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-answer:0.5") as launch:
        launch.says("canary fact")
        controller.hosts.stop_sshd("h1", sessions=True)
        time.sleep(2.0)
        assert "canary repeat" not in launch.err
        controller.hosts.start_sshd("h1")
        assert launch.end() == 0, launch.err
    assert "canary repeat" in launch.err
    controller.run("stop").ok()


def test_a_link_that_stays_down_ends_the_launch_and_stop_clears_the_host_later(controller: Controller):
    practice = {"GLMPLAN_REHEARSE_FAULT": "slow-load:90", "GLMPLAN_REHEARSE_PEER_S": "600"}  # no rank ends by itself
    with controller.launching("--lost-after", "4", **practice) as launch:
        launch.says("are allowed from here")
        wait_for_loading(controller.hosts, "h3")
        controller.hosts.drop_link("h3")
        assert launch.end() == 6, launch.err
    assert "h3 is lost" in launch.err
    assert "NOT STOPPED" in launch.err
    assert not workers(controller.hosts, "h1")
    controller.hosts.restore_link("h3")
    controller.run("stop").ok()


def test_a_rank_that_dies_while_loading_is_diagnosed(controller: Controller):
    ran = controller.launch(GLMPLAN_REHEARSE_FAULT="die-at-load:3")
    assert ran.code == 6
    assert "h2, PP1" in ran.err
    assert "killed with signal 9" in ran.err


def test_out_of_memory_at_start_says_start(controller: Controller):
    ran = controller.launch(GLMPLAN_REHEARSE_FAULT="oom:4")
    assert ran.code == 6
    assert "h3, PP2" in ran.err
    assert "while loading" in ran.err


def test_a_worker_killed_while_loading_ends_all(controller: Controller):
    with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-load:30") as launch:
        wait_for_loading(controller.hosts, "h2")
        os.kill(a_rank(controller.hosts, "h2"), signal.SIGKILL)
        assert launch.end() == 6, launch.err
    assert "h2" in launch.err


@pytest.mark.parametrize("victim", ["h1", "h2"], ids=["head", "other"])
def test_a_worker_killed_while_serving_is_seen_and_stop_leaves_nothing(controller: Controller, victim: str):
    controller.launch().ok()
    os.kill(a_rank(controller.hosts, victim), signal.SIGKILL)
    wait_for_end(controller.hosts, victim)
    status = controller.run("status", "--json")
    assert status.code == 6
    assert json.loads(status.out)["word"] in ("degraded", "stopped")
    controller.run("stop").ok()


def test_a_full_disk_is_a_sentence(controller: Controller):
    hosts = controller.hosts
    hosts.small_disk("h2", 65_536)
    ran = controller.launch()
    hosts.run("h2", ["umount", str(hosts["h2"].state)])
    assert ran.code == 1
    assert "h2" in ran.err
    assert "Nothing was started" in ran.err
    assert "Traceback" not in ran.err


def test_a_taken_port_names_its_holder(controller: Controller):
    hosts = controller.hosts
    hosts.mute("h1", 30000)
    ran = controller.launch()
    hosts.unmute("h1")
    assert ran.code == 1
    assert "30000 on 127.0.0.1: taken by pid" in ran.err


def test_a_log_that_stalls_ends_the_launch(controller: Controller):
    ran = controller.launch("--stall", "4", GLMPLAN_REHEARSE_FAULT="stall:2")
    assert ran.code == 6
    assert "stalled" in ran.err


def test_a_wrong_answer_is_exit_seven_and_stops_the_server(controller: Controller):
    ran = controller.launch(GLMPLAN_REHEARSE_FAULT="wrong-answer")
    assert ran.code == 7
    assert "arithmetic" in ran.err
    assert "408" in ran.err


def test_a_server_that_dies_while_it_is_asked_is_no_wrong_answer(controller: Controller):
    hosts = controller.hosts
    with controller.launching(GLMPLAN_REHEARSE_FAULT="no-answer") as launch:
        wait_for("a question", lambda: "gets no answer" in logs(hosts, "h1"), 240)
        os.kill(a_rank(hosts, "h3"), signal.SIGKILL)
        assert launch.end() == 6, launch.err
    assert "The fact canary got no answer. The worker on h3 (node 2) ended" in launch.err
    assert "canary arithmetic" not in launch.err, "the others are not asked of a dead server"
    assert "h3, while serving:" in launch.err
    assert "answers wrongly" not in launch.err


def test_no_canary_is_said(controller: Controller):
    ran = controller.launch("--no-canary", GLMPLAN_REHEARSE_FAULT="wrong-answer")
    assert ran.code == 0
    assert "NOT checked" in ran.out
    controller.run("stop").ok()


def test_a_killed_controller_is_taken_up_again(controller: Controller):
    with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-load:4") as launch:
        launch.says("are allowed from here")
        launch.process.kill()
        launch.end()
    assert all(workers(controller.hosts, name) for name in controller.hosts.hosts)
    again = controller.launch("--json", GLMPLAN_REHEARSE_FAULT="slow-load:4").ok()
    assert json.loads(again.out)["adopted"] is True
    controller.run("stop").ok()


def test_two_launches_at_once_share_one_deployment(controller: Controller):
    with controller.launching() as first, controller.launching() as second:
        assert [first.end(), second.end()] == [0, 0], first.err + second.err
    assert all(len(workers(controller.hosts, name, ("supervise",))) == 1 for name in controller.hosts.hosts)
    controller.run("stop").ok()


def test_another_plan_on_the_same_ports_is_refused(controller: Controller):
    controller.launch().ok()
    other = controller.launch("--name", "other")
    assert other.code == 1
    assert "Nothing was started" in other.err
    controller.run("status").ok()
    controller.run("stop").ok()


def test_stop_while_starting_leaves_nothing(controller: Controller):
    with controller.launching("--name", "early", GLMPLAN_REHEARSE_FAULT="slow-load:60") as launch:
        wait_for_workers(controller.hosts)
        controller.run("stop", "early").ok()
        assert launch.end() == 6, launch.err


def test_interrupting_a_launch_stops_what_it_started(controller: Controller):
    with controller.launching(GLMPLAN_REHEARSE_FAULT="slow-load:60") as launch:
        wait_for_workers(controller.hosts)
        launch.interrupt()
        assert launch.end() == 130, launch.err


def test_a_rebooted_node_is_named_and_launched_again(controller: Controller):
    controller.launch().ok()
    controller.hosts.reboot("h2")
    status = controller.run("status", "--json")
    assert status.code == 6
    states = {node["host"]: node["state"] for node in json.loads(status.out)["nodes"]}
    assert states["h2"] == "rebooted"
    controller.run("stop").ok()
    controller.launch().ok()
    controller.run("stop").ok()


def test_watch_restarts_all_ranks_and_then_gives_up(controller: Controller):
    controller.launch("--name", "kept").ok()
    before = {name: set(workers(controller.hosts, name)) for name in controller.hosts.hosts}
    with controller.program(
        "watch", "kept", "--max-restarts", "1", "--poll-every", "0.2", "--back-off", "0.1", "--check-every", "0"
    ) as watch:
        os.kill(a_rank(controller.hosts, "h2"), signal.SIGKILL)
        watch.says("healthy again")
        after = {name: set(workers(controller.hosts, name)) for name in controller.hosts.hosts}
        assert not any(before[name] & after[name] for name in before)
        os.kill(a_rank(controller.hosts, "h1"), signal.SIGKILL)
        assert watch.end() == 6, watch.err
    assert "1 restarts are allowed" in watch.err
