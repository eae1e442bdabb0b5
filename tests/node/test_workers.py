"""start, poll, stop, deployments and forget on real processes."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glmplan.fleet.stop import MOST_S
from glmplan.node import launcher, nvidia_smi, state, workers
from glmplan.node.errors import NodeError
from glmplan.node.processes import boot_id, record_of
from glmplan.transport.node import NodeFailedError
from tests.node.host import OWNER, Host, alive, free_port, kill, until

SECRET = "planted-s3cret/token"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.end()


def test_a_worker_outlives_its_start_and_is_polled(host: Host) -> None:
    started = host.shell("echo begun; sleep 300")
    assert started["state"] == "started"
    assert started["log"] == str(host.state / "d" / "log")
    found = until(lambda: (told := host.poll())["log"] and told)
    assert (found["state"], found["log"], found["pid"]) == ("running", "begun\n", started["pid"])
    assert found["exit_status"] is None
    assert found["started_s"] == started["started_s"]
    assert abs(found["time_s"] - time.time()) < 30
    assert [event["event"] for event in found["events"]] == ["started"]


def test_what_compiles_for_a_worker_is_named(host: Host, tmp_path: Path) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    for name in ("cicc", "ptxas-blackwell", "nothing"):
        (tmp_path / name).symlink_to(sleep)
    host.shell(f"cd {tmp_path}; ./cicc 300 & ./cicc 301 & ./ptxas-blackwell 302 & ./nothing 303 & wait")
    until(lambda: host.poll()["compilers"] == ["cicc", "ptxas-blackwell"])
    host.shell("sleep 300", deployment="other")
    assert until(lambda: (told := host.poll("other"))["processes"] and told)["compilers"] == []


def test_the_log_is_read_from_any_offset(host: Host) -> None:
    host.shell("printf 'one\\rtwo\\nthree\\n'; sleep 300")
    until(lambda: host.poll()["log_size"] == 14)
    first = host.poll(log_offset=0, max_bytes=6)
    assert (first["log"], first["log_offset"], first["log_size"]) == ("one\ntw", 6, 14)
    assert host.poll(log_offset=first["log_offset"])["log"] == "o\nthree\n"
    assert host.poll(log_offset=-6)["log"] == "three\n"
    assert host.poll(log_offset=14)["log"] == ""
    assert host.poll(log_offset=99)["log_offset"] == 14


def test_the_same_plan_is_adopted_and_another_refused(host: Host) -> None:
    first = host.shell("sleep 300")
    second = host.shell("sleep 300")
    assert (second["state"], second["pid"]) == ("adopted", first["pid"])
    with pytest.raises(NodeFailedError, match=rf"d of {OWNER} runs with another plan \(pid {first['pid']}") as caught:
        host.shell("sleep 300", digest="two")
    assert caught.value.kind == "busy"
    assert caught.value.next_step == "Stop it: glmplan stop d."


def test_of_many_starts_at_once_exactly_one_starts(host: Host) -> None:
    with ThreadPoolExecutor(5) as pool:
        found = [future.result() for future in [pool.submit(host.shell, "sleep 300") for _ in range(5)]]
    assert sorted(one["state"] for one in found) == ["adopted"] * 4 + ["started"]
    assert len({one["pid"] for one in found}) == 1
    assert host.poll()["processes"] == 1


def test_gpus_of_another_deployment_are_refused_by_name(host: Host, tmp_path: Path) -> None:
    pid = host.shell("sleep 300", gpu_indexes=[0, 1])["pid"]
    neighbour = Host(tmp_path, "local#1")
    with pytest.raises(NodeFailedError, match=rf"GPU 1 works for d of {OWNER} \(pid {pid}, started 2") as caught:
        neighbour.shell("sleep 300", deployment="other", gpu_indexes=[1])
    assert caught.value.kind == "busy"
    assert neighbour.ask("deployments")["deployments"] == []
    host.stop()
    assert neighbour.shell("sleep 300", deployment="other", gpu_indexes=[1])["state"] == "started"
    neighbour.end()


def test_a_dead_deployment_is_replaced(host: Host) -> None:
    host.shell("echo old; exit 3")
    told = until(lambda: (found := host.poll())["state"] == "exited" and found)
    assert (told["exit_status"], told["signal"], told["processes"]) == (3, None, 0)
    assert host.shell("echo new; sleep 300", digest="two")["state"] == "started"
    assert until(lambda: host.poll()["log"]) == "new\n"


def test_a_signal_is_recorded(host: Host) -> None:
    kill(host.shell("sleep 300")["pid"])
    told = until(lambda: (found := host.poll())["state"] == "exited" and found)
    assert (told["exit_status"], told["signal"]) == (None, 9)
    assert [event["event"] for event in told["events"]] == ["started", "exited"]


def test_a_taken_port_names_its_owner(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(NodeFailedError, match=rf"TCP port {port} is taken by pid {os.getpid()} \(") as caught:
            host.shell("sleep 300", tcp_ports=[port])
        assert caught.value.kind == "port-taken"
        with pytest.raises(NodeFailedError, match="is taken"):
            host.shell("sleep 300", tcp_ports=[f"127.0.0.1:{port}"])
        assert host.shell("sleep 300", tcp_ports=[f"127.0.0.2:{port}", free_port()])["state"] == "started"


def test_a_foreign_address_cannot_be_listened_on(host: Host) -> None:
    with pytest.raises(NodeFailedError, match=r"TCP port 192.0.2.1:20000 is not to be had"):
        host.shell("sleep 300", tcp_ports=["192.0.2.1:20000"])


def test_a_missing_program_is_a_sentence_and_leaves_no_state(host: Host) -> None:
    with pytest.raises(NodeFailedError, match="has no program 'sglang-not-here' on PATH=") as caught:
        host.start("sglang-not-here", "--tp", "8")
    assert caught.value.kind == "no-program"
    assert host.poll()["state"] == "absent"


def test_a_program_that_cannot_be_run_is_a_sentence(host: Host, tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o700)
    with pytest.raises(NodeFailedError, match="did not start: No such file") as caught:
        host.start(str(program))
    assert caught.value.kind == "no-program"
    assert host.poll()["state"] == "absent"


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65, 7])
def test_a_name_that_is_no_folder_is_refused(host: Host, name: object) -> None:
    for operation in ("poll", "stop", "forget"):
        with pytest.raises(NodeFailedError, match="is no name of a deployment"):
            host.ask(operation, deployment=name)


def test_files_are_private_and_named_in_the_command(host: Host) -> None:
    host.shell(
        "cat @FILES@/engine.yaml; echo $WHERE; sleep 300",
        files=[{"name": "engine.yaml", "content": "port: 1\n"}],
        environment={"WHERE": "@FILES@/x"},
    )
    place = host.state / "d"
    assert until(lambda: (log := host.poll()["log"]).count("\n") == 2 and log) == f"port: 1\n{place}/files/x\n"
    assert {path.stat().st_mode & 0o777 for path in (host.state, place, place / "files")} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in place.rglob("*") if path.is_file()} == {0o600}


def packed(**files: str) -> str:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return base64.b64encode(zipped.getvalue()).decode()


def test_packages_travel_and_are_named_in_the_environment(host: Host) -> None:
    site = packed(**{"brought/__init__.py": "print('brought along')"})
    host.start("python3", "-c", "import brought", environment={"PYTHONPATH": "@SITE@"}, site=site)
    assert until(lambda: host.poll()["log"]) == "brought along\n"


def test_packages_that_lead_out_of_the_state_are_refused(host: Host) -> None:
    with pytest.raises(NodeFailedError, match=r"The site names '../../out'"):
        host.shell("sleep 300", site=packed(**{"../../out": ""}))
    assert host.poll()["state"] == "absent"


def test_a_planted_secret_is_in_no_command_line_log_or_record(host: Host) -> None:
    pid = host.shell(
        f"echo key {SECRET}; cat @FILES@/key; sleep 300",
        files=[{"name": "key", "content": SECRET}],
        environment={"GIVEN": SECRET},
        redact=[SECRET],
    )["pid"]
    # the second line has no end, and is written after a second
    assert until(lambda: (log := host.poll()["log"]).partition("\n")[2] and log) == "key ***\n***"
    for path in (host.state / "d").rglob("*"):
        assert not path.is_file() or path.parent.name == "files" or SECRET.encode() not in path.read_bytes()
    told = json.loads((host.state / "d" / "worker.json").read_text())
    assert SECRET not in Path(f"/proc/{told['supervisor']['pid']}/environ").read_text()
    assert SECRET not in Path(f"/proc/{told['supervisor']['pid']}/cmdline").read_text()
    assert alive(pid)


def test_a_secret_too_short_to_redact_is_refused(host: Host) -> None:
    with pytest.raises(NodeFailedError, match="A secret of 3 characters cannot be kept out of the log; 4 is the least"):
        host.shell("sleep 300", redact=["abc"])


def test_the_controllers_shell_does_not_reach_the_worker(host: Host) -> None:
    host.transport._environment |= {"NCCL_DEBUG": "INFO", "HF_TOKEN": SECRET, "CUDA_VISIBLE_DEVICES": "7", "LANG": "C.UTF-8"}
    host.shell("env; echo all=told; sleep 300", environment={"NCCL_SOCKET_IFNAME": "eth0"})
    log = until(lambda: "\nall=told\n" in (text := host.poll()["log"]) and text)
    words = dict(line.split("=", 1) for line in log.splitlines())
    assert words["NCCL_SOCKET_IFNAME"] == "eth0"
    assert not {"NCCL_DEBUG", "HF_TOKEN", "CUDA_VISIBLE_DEVICES"} & set(words)
    assert words["LANG"] == "C.UTF-8"
    assert words["GLMPLAN_DEPLOYMENT"] == "d"
    assert "PATH" in words
    assert "HOME" in words


STUBBORN = "trap '' TERM; echo on; while true; do sleep 0.2; done"


def test_stop_ends_what_ignores_it_and_what_left_its_session(host: Host, tmp_path: Path) -> None:
    unmarked = f"echo \\$\\$ > {tmp_path}/pid; exec sleep 302"
    host.shell(f'setsid bash -c "{STUBBORN}" & (setsid sleep 301 &) ; env -i setsid bash -c "{unmarked}" & {STUBBORN}')
    until(lambda: host.poll()["processes"] >= 5)
    pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert alive(pid)
    begun = time.monotonic()
    told = host.stop(grace_s=0.5)
    assert not alive(pid)
    assert (told["stopped"], told["survivors"], told["was"]) == (True, [], "running")
    assert told["killed"] >= 5
    assert time.monotonic() - begun < 60
    found = host.poll()
    assert (found["state"], found["processes"]) == ("exited", 0)
    assert [event["event"] for event in found["events"]] == ["started", "stopping", "exited", "stopped"]


def test_stop_works_without_the_supervisor(host: Host) -> None:
    pid = host.shell("(setsid sleep 301 &); trap '' PIPE; echo on; sleep 302; sleep 303")["pid"]
    until(lambda: host.poll()["log"] == "on\n")
    until(lambda: host.poll()["processes"] == 3)
    kill(json.loads((host.state / "d" / "worker.json").read_text())["supervisor"]["pid"])
    told = host.poll()
    assert (told["state"], told["supervised"], told["processes"]) == ("running", False, 3)
    assert host.stop()["killed"] == 3
    assert not alive(pid)
    assert host.poll()["state"] == "gone"
    assert host.ask("forget", deployment="d") == {"forgotten": True}


def test_stop_works_when_the_state_was_removed(host: Host) -> None:
    pid = host.shell("sleep 300")["pid"]
    subprocess.run(["rm", "-rf", str(host.state)], check=True)
    told = host.stop()
    assert (told["stopped"], told["was"], told["killed"]) == (True, "absent", 1)
    assert not alive(pid)


def test_stop_while_starting(host: Host) -> None:
    with ThreadPoolExecutor(2) as pool:
        begun = pool.submit(host.shell, "trap '' TERM; sleep 300")
        until(lambda: (host.state / "d" / "start.json").exists() or begun.done())
        told = host.stop(grace_s=0.2)
        begun.result()
    assert told["stopped"]
    assert host.poll()["processes"] == 0


def test_a_stop_waits_longer_than_a_start_can_last_and_its_caller_longer_than_that() -> None:
    assert workers.STOP_LOCK_S > launcher.START_S
    most_s = workers.STOP_LOCK_S + workers.KILL_S + workers.RECORD_S + workers.GPU_FREE_S + nvidia_smi.TIMEOUT_S
    assert most_s < MOST_S


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State of a node in this process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("GLMPLAN_NODE", raising=False)
    state.make_folder(state.home())
    return state.home()


def test_a_stop_that_cannot_wait_for_a_start_any_longer_does_not_claim_success(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "STOP_LOCK_S", 0.1)
    ask = {"deployment": "d", "grace_s": 0.1}
    with state.lock(1.0) as held:
        assert held is not None
        with pytest.raises(NodeError, match="may come up after this stop"):
            workers.stop(ask)
        place = state.folder("d")
        state.make_folder(place)
        state.write_json(place / "start.json", {"deployment": "d"})
        state.write_json(place / "worker.json", {"pid": None, "boot_id": boot_id(), "starter": record_of(os.getpid())})
        with pytest.raises(NodeError, match="may come up after this stop"):
            workers.stop(ask)
        state.write_json(place / "worker.json", {"pid": None, "boot_id": boot_id()})
        assert workers.stop(ask)["stopped"], "the start is another deployment's"
    state.remove(place)
    assert workers.stop(ask)["was"] == "absent"


def test_stops_do_not_wait_for_each_other(here: Path) -> None:
    with state.lock(1.0, shared=True) as one, state.lock(1.0, shared=True) as other:
        assert one is not None
        assert other is not None
        with state.lock(0.1) as start:
            assert start is None
    with state.lock(0.1) as start:
        assert start is not None


def test_a_supervisor_that_does_not_answer_is_given_up_and_ended(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the pipe open, as one does whose program lies on a dead disk."""
    place = state.folder("d")
    state.make_folder(place)
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\nsys.path.insert(0, {os.getcwd()!r})\n"
        "from glmplan.node.processes import record_of\n"
        "json.load(sys.stdin)\n"
        "if os.fork():\n    os._exit(0)\n"
        f"open({str(place / 'worker.json')!r}, 'w').write(json.dumps({{'supervisor': record_of(os.getpid())}}))\n"
        "time.sleep(600)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(launcher, "START_S", 5.0)
    monkeypatch.setattr(sys, "executable", str(program))
    with state.lock(1.0) as lock:
        assert lock is not None
        with pytest.raises(NodeError, match="did not start"):
            launcher.supervise(launcher.Order("d", "x", ["true"]), ["true"], {}, lock)
    pid = state.read_json(place / "worker.json")["supervisor"]["pid"]
    until(lambda: not alive(pid))
    with state.lock(30.0) as lock:
        assert lock is not None


def test_stopping_what_is_not_there_is_done(host: Host) -> None:
    told = host.stop("never")
    assert (told["stopped"], told["killed"], told["was"], told["survivors"]) == (True, 0, "absent", [])


def test_processes_left_by_a_dead_worker_are_told_and_stopped(host: Host) -> None:
    host.shell("(setsid sleep 301 &) ; exit 1")
    told = until(lambda: (found := host.poll())["state"] == "exited" and found)
    assert told["processes"] == 1
    with pytest.raises(NodeFailedError, match="has ended but left processes"):
        host.shell("sleep 300")
    with pytest.raises(NodeFailedError, match="d runs"):
        host.ask("forget", deployment="d")
    assert host.stop()["killed"] == 1
    assert host.shell("sleep 300")["state"] == "started"


def test_two_nodes_of_one_machine_do_not_stop_each_other(host: Host, tmp_path: Path) -> None:
    other = Host(tmp_path, "local#1")
    host.shell("sleep 300")
    pid = other.shell("sleep 300")["pid"]
    assert host.stop()["killed"] == 1
    assert alive(pid)
    assert [one["pid"] for one in other.ask("deployments")["deployments"]] == [pid]
    assert other.stop()["killed"] == 1


def rewrite(host: Host, **changes: object) -> None:
    path = host.state / "d" / "worker.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_boot_and_a_reused_pid_are_told_from_a_running_worker(host: Host) -> None:
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        host.shell("sleep 300")
        host.stop()
        told = json.loads((host.state / "d" / "worker.json").read_text())
        place = host.state / "d" / "worker.json"
        place.write_text(json.dumps({name: told[name] for name in ("pid", "start_ticks", "boot_id", "supervisor")}))
        rewrite(host, pid=worker.pid, start_ticks=told["start_ticks"])
        assert host.poll()["state"] == "gone"
        assert host.stop()["killed"] == 0
        assert worker.poll() is None
        rewrite(host, boot_id="another")
        assert host.poll()["state"] == "rebooted"
        assert host.stop()["was"] == "rebooted"
        assert worker.poll() is None
        assert host.shell("sleep 300", digest="two")["state"] == "started"
    finally:
        worker.kill()
        worker.wait()


def test_all_deployments_are_listed(host: Host) -> None:
    host.shell("sleep 300", gpu_indexes=[0], node_rank=1)
    host.shell("exit 0", deployment="e", digest="two")
    until(lambda: host.poll("e")["state"] == "exited")
    first, second = host.ask("deployments")["deployments"]
    assert (first["deployment"], first["state"], first["digest"], first["owner"]) == ("d", "running", "one", OWNER)
    assert (first["node_rank"], first["gpu_indexes"], first["processes"]) == (1, [0], 1)
    assert (second["deployment"], second["state"]) == ("e", "exited")
    assert host.ask("forget", deployment="e") == {"forgotten": True}
    assert host.ask("forget", deployment="e") == {"forgotten": False}
    assert len(host.ask("deployments")["deployments"]) == 1


def test_a_state_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NodeFailedError, match="cannot be written: Not a directory") as caught:
        Host(tmp_path / "file").shell("sleep 300")
    assert caught.value.kind == "state-unwritable"


def test_two_names_of_one_machine_are_not_two_nodes(host: Host) -> None:
    host.shell("sleep 300", node_rank=0)
    with pytest.raises(NodeFailedError, match="two names mean one machine"):
        host.shell("sleep 300", node_rank=1)
    assert host.poll()["state"] == "running"


@pytest.mark.parametrize(("own", "others", "meet"), [
    ("127.0.0.1:{0}", "127.0.0.1:{0}", True), (":{0}", "127.0.0.1:{0}", True), ("127.0.0.2:{0}", "127.0.0.1:{0}", False),
    ("127.0.0.1:{0}", "127.0.0.1:{1}", False),
])  # fmt: skip
def test_a_port_of_a_worker_that_does_not_listen_yet_is_taken(host: Host, own: str, others: str, meet: bool) -> None:
    ports = free_port(), free_port()
    host.shell("sleep 300", tcp_ports=[others.format(*ports)])
    if meet:
        with pytest.raises(NodeFailedError, match="belongs to d of") as caught:
            host.shell("sleep 300", deployment="e", tcp_ports=[own.format(*ports)])
        assert caught.value.kind == "port-taken"
        assert "glmplan stop d" in caught.value.next_step
    else:
        assert host.shell("sleep 300", deployment="e", tcp_ports=[own.format(*ports)])["state"] == "started"
