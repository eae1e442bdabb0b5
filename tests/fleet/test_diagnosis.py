"""One cause out of many lines: every known failure is told by its id, its moment and its host."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from glmplan.facts import profiles
from glmplan.facts.failure_profile import FailureProfile
from glmplan.fleet.diagnosis import GpuMemory, NodeEvidence, diagnose, new_kernel_lines
from glmplan.fleet.log_lines import Phase
from glmplan.fleet.phases import LogLine, NodeProgress
from glmplan.units import GIB
from tests.fleet.failure_lines import COMMON, KERNEL, OOM, SGLANG, VLLM
from tests.node.host import free_port

CASES = [
    *(("sglang", name, *case) for name, case in (COMMON | SGLANG).items()),
    *(("vllm", name, *case) for name, case in (COMMON | VLLM).items()),
]


def line(text, phase="loading", rank=(0, 3), time_s=1.0):
    return LogLine(text, rank, Phase[phase.upper()], time_s)


def node(*lines, rank=0, **more):
    return NodeEvidence(rank, f"h{rank + 1}", lines, **{"state": "exited", "exit_status": 1, **more})


@pytest.mark.parametrize(("family", "name", "phase", "text"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_every_known_failure_is_told(family, name, phase, text):
    found = diagnose([node(line(text, phase))], family)
    assert found.id == name
    assert found.when == ("run" if phase == "ready" else "start")
    assert (found.host, found.rank) == ("h1", (0, 3))
    assert found.lines == (text,)
    assert "{" not in found.cause + found.repair


def test_every_signature_has_a_line_in_the_table():
    for family, own in (("sglang", SGLANG), ("vllm", VLLM)):
        known = {signature.id for signature in profiles.failure_signatures(family)}
        assert known == set(COMMON) | set(own) | set(KERNEL)


def test_phases_of_signatures_are_phases_of_ranks():
    words = {word for family in ("sglang", "vllm") for one in profiles.failure_signatures(family) for word in one.during}
    assert words <= {phase.label for phase in Phase} | {"run"}


def test_the_table_s_ids_are_unique_and_its_words_end_as_sentences():
    for family in ("sglang", "vllm"):
        signatures = profiles.failure_signatures(family)
        assert len({one.id for one in signatures}) == len(signatures)
        assert all(one.cause.rstrip("}").endswith((".", "{why", "{what", "{rest}")) for one in signatures), family


@pytest.mark.parametrize(("name", "text"), KERNEL.items())
def test_the_kernel_s_log_tells_as_well(name, text):
    found = diagnose([node(line("a"), kernel_log=("x", text), exit_status=None, signal=9)], "sglang")
    if name != "xid-fault":  # a program's fault never outweighs a kill
        assert found.id == name
        assert found.lines == ("x", text)


def test_an_old_kill_explains_no_exit_by_itself():
    found = diagnose([node(line(COMMON["no-gpu"][1]), kernel_log=(KERNEL["host-memory"],))], "sglang")
    assert found.id == "no-gpu"
    assert new_kernel_lines(["a", "b"], ["b", "c"]) == ("c",)


def test_out_of_memory_at_start_and_at_run_time_are_told_apart_and_advised_oppositely():
    loading, pool, run = (diagnose([node(line(OOM, phase))], "sglang") for phase in ("loading", "capturing", "ready"))
    assert "at start" in loading.cause
    assert "fewer weights" in loading.repair
    assert "lower memory fraction does not help" in loading.repair
    assert "at start" in pool.cause
    assert "Lower the memory fraction" in pool.repair
    assert "at run time" in run.cause
    assert "Lower the memory fraction" in run.repair
    assert "2.00 GiB" in run.cause
    empty = diagnose([node(line(SGLANG["kv-budget-empty"][1], "loaded"))], "sglang")
    assert "Raise the fraction above 0.812" in empty.repair
    assert "opposite" in empty.repair
    assert "opposite" in run.repair


def test_a_start_that_succeeded_explains_no_failure_at_run_time():
    early, late = line(COMMON["port-taken"][1], "joining"), line(OOM, "ready", time_s=9.0)
    assert diagnose([node(early, late, was_ready=True)], "sglang").id == "oom-run"
    assert diagnose([node(early, line("x", "ready"), was_ready=True)], "sglang").id == "exit"


def test_the_tail_of_a_served_log_is_of_run_time():
    found = diagnose([node(line(OOM, "starting"), was_ready=True)], "sglang")
    assert (found.id, found.when) == ("oom-run", "run")


def test_a_cause_on_another_node_outweighs_its_effects_here():
    nodes = [
        node(line(COMMON["peer-closed"][1]), line(SGLANG["scheduler-died"][1], rank=None)),
        node(line(OOM, rank=(1, 2), time_s=2.0), rank=1),
    ]
    found = diagnose(nodes, "sglang")
    assert (found.id, found.host, found.rank) == ("oom-loading", "h2", (1, 2))


def test_a_killed_rank_outweighs_the_nodes_that_then_wait_for_it():
    nodes = [
        node(line(COMMON["gloo-connect"][1], "joining")),
        node(line(SGLANG["rank-killed"][1], rank=None), rank=1),
    ]
    found = diagnose(nodes, "sglang")
    assert (found.id, found.host) == ("rank-killed", "h2")
    assert "(3)" in found.cause


def test_a_killed_worker_is_told_without_any_line():
    found = diagnose(
        [node(line("a"), state="running", exit_status=None), node(rank=1, exit_status=None, signal=9)], "sglang"
    )
    assert (found.id, found.host, found.certain) == ("killed", "h2", False)
    assert "dmesg" in found.repair


ITS_OWN_END = "[2026-11-21 14:44:34] kill_process_tree called: parent_pid=14521, include_parent=True, pid=14521"


def test_an_engine_that_kills_its_own_processes_was_not_killed_by_the_kernel():
    """As SGLang ended on two nodes when a pipeline began on a layer without an indexer."""
    peer = line("RuntimeError: [/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:36737")
    odd = line("AttributeError: 'NoneType' object has no attribute 'shape'", "capturing", (1, 0))
    died = {"exit_status": None, "signal": 9}
    nodes = [node(peer, line(ITS_OWN_END), **died), node(odd, line(ITS_OWN_END), rank=1, **died)]
    found = diagnose(nodes, "sglang")
    assert (found.id, found.host) == ("exception", "h2")
    assert "no attribute 'shape'" in found.cause
    alone = diagnose([node(line("a"), line(ITS_OWN_END), **died)], "sglang")
    assert (alone.id, "dmesg" in alone.repair) == ("ended-itself", False)


def test_a_call_for_another_process_s_end_is_not_the_engine_s_own():
    other = ITS_OWN_END.replace("pid=14521", "pid=99", 1)
    assert diagnose([node(line(other), exit_status=None, signal=9)], "sglang").id == "killed"


def test_of_equal_causes_the_earlier_one_counts():
    late, early = node(line(OOM, time_s=5.0)), node(line(OOM, time_s=2.0), rank=1)
    assert diagnose([late, early], "sglang").host == "h2"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"state": "rebooted", "exit_status": None}, "rebooted"),
        ({"state": "unreachable", "exit_status": None}, "unreachable"),
        ({"state": "gone", "exit_status": None}, "gone"),
        ({"exit_status": None, "signal": 11}, "signal"),
        ({"exit_status": 3}, "exit"),
        ({"state": "running", "exit_status": None}, "not-ready"),
        ({"state": "absent", "exit_status": None}, "absent"),
    ],
)
def test_the_end_of_a_process_is_told_where_no_line_is_known(more, name):
    found = diagnose([node(line("nothing known"), **more)], "sglang")
    assert found.id == name
    assert found.lines == ("nothing known",)


def test_a_stopped_node_is_not_blamed():
    nodes = [node(line("a"), exit_status=None, signal=9, stopped_by_us=True), node(line("b"), rank=1, exit_status=1)]
    assert diagnose(nodes, "sglang").host == "h2"


def test_an_unknown_exception_is_shown_as_it_is():
    lines = [line(f"  frame {number}") for number in range(20)]
    found = diagnose([node(*lines, line("pkg.mod.OddError: the moon is full"), line("after"))], "sglang")
    assert found.id == "exception"
    assert "OddError: the moon is full" in found.cause
    assert not found.certain


def test_a_warning_about_an_import_is_no_cause():
    text = "[2026-11-21 10:00:00 TP3] Ignore import error when loading sglang.srt.models.x: ModuleNotFoundError: y"
    assert diagnose([node(line(text), exit_status=4)], "sglang").id == "exit"


def test_ten_lines_of_the_rank_that_failed_are_shown():
    lines = []
    for number in range(40):
        lines += [line(f"mine {number}"), line(f"other {number}", rank=(0, 1))]
    lines += [line(OOM), *(line(f"after {number}") for number in range(3))]
    shown = diagnose([node(*lines)], "sglang").lines
    assert len(shown) == 10
    assert OOM in shown
    assert "after 2" in shown
    assert not [text for text in shown if text.startswith("other")]


def test_memory_facts_name_full_gpus_and_strangers():
    gpus = (GpuMemory(0, 40 * GIB, 47 * GIB, 48 * GIB), GpuMemory(1, None, 10 * GIB, 48 * GIB), GpuMemory(2))
    facts = diagnose([node(line(OOM), gpus=gpus)], "sglang").facts
    assert "GPU 0 is full: 47.00 GiB of 48.00 GiB in use." in facts
    assert "Other processes hold 7.00 GiB on GPU 0." in facts
    assert not [fact for fact in facts if "GPU 1" in fact]


def test_a_log_as_it_arrives_becomes_the_diagnosis():
    progress = NodeProgress("sglang", [(0, rank) for rank in range(8)], 8, True, 0.0)
    progress.feed(
        "[2026-11-21 10:00:00 TP5] Load weight begin. avail mem=22.00 GB\n"
        "[2026-11-21 10:00:09 TP5] Scheduler hit an exception: Traceback (most recent call last):\n"
        f"{OOM}\n"
        "[2026-11-21 10:00:10] Rank 5 scheduler died during initialization (exit code: 1). If exit code is -9\n",
        1.0,
    )
    found = diagnose([node(*progress.lines)], "sglang")
    assert (found.id, found.rank, found.phase) == ("oom-loading", (0, 5), "loading")


def test_a_user_s_table_wins(tmp_path, monkeypatch):
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "common.toml").write_text(
        'schema_version = 1\nfamily = "common"\nsource = "ours"\n[[signatures]]\nid = "moon"\nliteral = "the moon"\n'
        'cause = "The moon is full."\nrepair = "Wait two weeks."\nsource = "ours"\n'
    )
    monkeypatch.setenv("GLMPLAN_PROFILES", str(tmp_path))
    assert diagnose([node(line("OddError: the moon is full"))], "sglang").id == "moon"


@pytest.mark.parametrize(
    "change",
    [{"literal": None}, {"pattern": "x"}, {"pattern": "(", "literal": None}, {"during": ["lunch"]}, {"weight": 101}],
)
def test_a_wrong_signature_is_refused(change):
    good = {"id": "a", "literal": "b", "cause": "It is broken.", "repair": "Repair it now.", "source": "here"}
    table = {"schema_version": 1, "family": "common", "source": "here", "signatures": [good | change]}
    with pytest.raises(ValueError, match=r"signature|validation|position"):
        FailureProfile.model_validate(table)


@pytest.mark.parametrize(("fault", "name"), [("oom:1", "oom-loading"), ("die-at-load:1", "rank-killed")])
def test_a_rehearsed_fault_is_told_from_the_stand_in_s_own_log(fault, name):
    http_port, port = free_port(), free_port()
    words = f"--model-path glm --tp-size 2 --nnodes 1 --node-rank 0 --dist-init-addr 127.0.0.1:{port} --port {http_port}"
    command = [sys.executable, "-m", "glmplan.node", "standin", "python3", "-m", "sglang.launch_server", *words.split()]
    environment = {**os.environ, "GLMPLAN_REHEARSE_FAULT": fault}
    ran = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False
    )
    progress = NodeProgress("sglang", [(0, 0), (0, 1)], 2, True, 0.0)
    progress.feed(ran.stdout, 1.0)
    progress.finish(2.0)
    found = diagnose([node(*progress.lines, exit_status=ran.returncode)], "sglang")
    assert found.id == name, ran.stdout
    assert found.when == "start"
