"""Proof (d): which nodes, which forced cuts, who is said to have noticed, and that nothing is left when the time is over."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.proof import harness, pipeline
from tests.fleet.failure_lines import COMMON

RECORD = Path(__file__).resolve().parents[2] / "docs/proof/launch-cuts.json"


def test_a_launch_that_was_ready_did_not_fail_at_its_start():
    legal = pipeline.texts(RECORD)["0.5.13, legal cut: launch"]
    assert pipeline.caught_by(0, legal) is None
    assert pipeline.caught_by(6, legal) is None


def ready_and(message: str) -> str:
    return f"[  39.3 s] local#2-3 PP1 TP0-1: ready (weights 604 MiB)\nglmplan: {message}\n"


def test_who_is_said_to_have_stopped_a_launch():
    """In the words that launch's own parts print."""
    from glmplan.fleet.canary import AN_ANSWER, CanaryResult
    from glmplan.fleet.diagnosis import NodeEvidence, diagnose
    from glmplan.fleet.launch import AnswersWrong
    from glmplan.fleet.log_lines import Phase
    from glmplan.fleet.phases import LogLine

    sentence = COMMON["kernel-port-failed"][1]
    refused = NodeEvidence(1, "h2", (LogLine(sentence, None, Phase.JOINING, 0.0),), exit_status=1)
    assert pipeline.caught_by(6, f"glmplan: {diagnose([refused], 'sglang').cause}") == pipeline.PLUGIN
    apart = (
        "a mean difference of 0.2641 nats after the prompt of 17500 tokens, 0.12 are allowed; 3 prompts exceed their limit"
    )
    wrong = CanaryResult(name="reference", status="fail", expected="the recorded tokens, log-probabilities ...", got=apart)
    assert pipeline.caught_by(7, ready_and(AnswersWrong((wrong,), ()).message)) == pipeline.CANARY_WRONG
    for got in ("token 9 instead of 7", "a log-probability that is no number", "3 of 24 tokens came"):
        other = wrong.model_copy(update={"got": got})
        assert pipeline.caught_by(7, ready_and(AnswersWrong((other,), ()).message)) is None, (
            "it says nothing about the limit"
        )
    silent = wrong.model_copy(update={"expected": AN_ANSWER, "got": "does not answer"})
    assert pipeline.caught_by(7, ready_and(AnswersWrong((silent,), ()).message)) is None


UNSENT = """\
[2026-11-21 23:06:05 PP1] Scheduler hit an exception: Traceback (most recent call last):
  File "sglang/srt/managers/scheduler.py", line 4062, in run_scheduler_process
    scheduler.run_event_loop()
  File "sglang/srt/layers/attention/dsa_backend.py", line 1867, in _forward_flashmla_kv
    indices = page_table_1.unsqueeze(1)
AttributeError: 'NoneType' object has no attribute 'unsqueeze'

[2026-11-21 23:06:05] SIGQUIT received. signum=None, frame=None. It usually means one child failed."""
PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.2]:1"


def test_a_stage_that_a_question_ended_is_told_in_words_that_the_proof_reads(capsys: pytest.CaptureFixture[str]):
    from glmplan.cli import _telling
    from glmplan.fleet.diagnosis import NodeEvidence, diagnose
    from glmplan.fleet.log_lines import Phase
    from glmplan.fleet.phases import LogLine

    def node(rank: int, text: str) -> NodeEvidence:
        lines = (LogLine(line, (rank, 0), Phase.READY, 0.0) for line in text.splitlines())
        return NodeEvidence(rank, f"local#{rank}", tuple(lines), exit_status=-9, was_ready=True)

    failed: Any = SimpleNamespace(diagnosis=diagnose([node(0, PEER), node(1, UNSENT)], "sglang"), stops=())
    _telling.tell_failure(failed)
    said = capsys.readouterr().err
    assert "local#1, PP1 TP0, while serving:" in said
    assert pipeline.caught_by(
        6, f"{said}{ready_and('The reference canary got no answer. The worker on local#1 ended.')}"
    ) == (pipeline.CANARY_ENDED)


def test_after_its_time_a_run_stops_what_it_started_and_starts_nothing(tmp_path: Path):
    setting = harness.Setting("0.5.23", tmp_path, tmp_path, {}, tmp_path, tmp_path, (0, 1))
    run = pipeline.Run(setting, 0.0)
    launched = run.glmplan("launch", "launch", "--hosts", "no.such.host")
    assert (launched.code, launched.text, launched.holds) == (None, "no time was left", False)
    stopped = run.glmplan("stop", "stop", "none", "--hosts", "local")
    assert (stopped.code, "nothing to stop" in stopped.text) == (0, True), stopped.text


@pytest.mark.parametrize(
    ("gpus", "hosts", "pin"),
    [
        ((0, 1, 2, 3), "local#0-1,local#2-3", "tp=2,pp=2,nodes=2,stages=2/5"),
        ((0, 1), "local#0,local#1", "tp=1,pp=2,nodes=2,stages=2/5"),
        ((2, 5, 7), "local#2,local#5", "tp=1,pp=2,nodes=2,stages=2/5"),
    ],
)
def test_two_nodes_have_half_of_the_gpus_each(gpus: tuple[int, ...], hosts: str, pin: str):
    nodes = pipeline.TwoNodes(gpus)
    assert nodes.hosts == ("--hosts", hosts)
    assert nodes.pin("2/5") == ("--pin", pin)
    with pytest.raises(SystemExit, match="need two GPUs and 1 is visible"):
        pipeline.TwoNodes((3,))
    with pytest.raises(SystemExit, match="Name neighbouring GPUs"):
        pipeline.TwoNodes((0, 2, 5, 7))


@pytest.mark.parametrize(
    ("gpus", "shared", "layouts"),
    [
        ((0, 1, 2, 3), False, ["tp=2,pp=2,nodes=2"]),
        ((0, 1), False, ["tp=1,pp=2,nodes=2", "tp=2,pp=1,nodes=1"]),
        ((0, 1, 2, 3), True, ["tp=2,pp=2,nodes=2"]),
    ],
)
def test_every_layout_is_compared_with_one_gpu_and_the_last_one_also_with_wrong_attention(
    gpus: tuple[int, ...], shared: bool, layouts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(pipeline.Run, "glmplan", lambda run, name, *words, **wanted: run.steps.append((name, words, wanted)))
    setting = harness.Setting("0.5.23", tmp_path / "site", tmp_path, {"spoken": tmp_path}, tmp_path, tmp_path, gpus)
    own = str(tmp_path / "engine-python") if shared else sys.executable
    run = pipeline.Run(setting, 0.0, python=own, shared=shared)
    pipeline.pipeline(run, ())
    steps: list[Any] = list(run.steps)

    def after(words: tuple[str, ...], option: str) -> list[str]:
        return [words[place + 1] for place, word in enumerate(words) if word == option]

    (record,) = [words for _, words, _ in steps if words[0] == "verify"]
    launches = [(words, wanted) for _, words, wanted in steps if words[0] == "launch"]
    assert [words[1] for _, words, _ in steps if words[0] == "stop"] == [after(words, "--name")[0] for words, _ in launches]
    assert [after(words, "--pin") for words, _ in launches] == [[], *([pin] for pin in layouts), [layouts[-1]]]
    assert [wanted.get("catcher") for _, wanted in launches] == [None, *(None for _ in layouts), pipeline.CANARY_WRONG]
    for words, _ in launches[1:]:
        assert after(words, "--canary-reference") == after(record, "--record")
    assert ["PROOF_SABOTAGE=1" in words for words, _ in launches] == [False, *(False for _ in layouts), True]
    folders = [after(words, "--engine-env")[0] for words, _ in launches]
    assert set(folders[:-1]) == {f"PYTHONPATH={tmp_path / 'site'}"}
    assert folders[-1] == f"PYTHONPATH={tmp_path / 'site'}:{tmp_path / 'control'}"
    assert (tmp_path / "control/proof_sabotage-1.dist-info/entry_points.txt").read_text().startswith("[sglang.srt.plugins]")
    assert {after(words, "--engine-python")[0] for words, _ in launches} == {own}


def of_main(gpus: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pipeline.Run:
    """What the part `shared` would run with these GPUs."""
    setting = harness.Setting("0.5.23", tmp_path, tmp_path, {}, tmp_path, tmp_path, gpus)
    monkeypatch.setattr(harness, "prepare", lambda models: setting)
    monkeypatch.setattr(pipeline, "memory_left", lambda: ["0, 0"])
    runs: list[pipeline.Run] = []
    monkeypatch.setattr(pipeline, "pipeline", lambda run, silent: runs.append(run))
    monkeypatch.setattr(pipeline, "write", lambda *_: True)
    monkeypatch.setattr(sys, "argv", ["pipeline", str(tmp_path), "--part", "shared"])
    assert pipeline.main() == 0
    return runs[0]


def test_two_gpus_that_are_shared_are_four_to_every_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = of_main((0, 1), monkeypatch, tmp_path)
    assert run.setting.gpus == (0, 1, 2, 3)
    assert run.python == str(tmp_path / "engine-python")
    assert Path(run.python).read_text().endswith(f'exec {sys.executable} "$@"\n')
    monkeypatch.setenv("PYTHONPATH", "/some/folder")
    told: dict[str, str] = {}

    def ran(words: list[str], *, env: dict[str, str], **_: Any) -> Any:
        told.update(env)
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(pipeline.subprocess, "run", ran)
    run.glmplan("status", "status")
    assert told["PYTHONPATH"] == f"{pipeline.SHARED}:/some/folder"
    pipeline.Run(run.setting, run.deadline).glmplan("status", "status")
    assert told["PYTHONPATH"] == "/some/folder"
    with pytest.raises(SystemExit, match=r"needs GPUs 0 and 1; \(2, 3\) are to be used"):
        of_main((2, 3), monkeypatch, tmp_path)


def test_a_record_says_that_gpus_were_shared_and_memory_that_nobody_read_is_not_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(harness, "versions", lambda setting: {"sglang": "0.5.23"})
    setting = harness.Setting("0.5.23", tmp_path, tmp_path, {}, tmp_path, tmp_path, (0, 1, 2, 3))
    run = pipeline.Run(setting, 0.0, shared=True, steps=[pipeline.Step("stop", ["stop"], (0,), code=0)])
    free = ["0, 0", "1, 0", ""]
    assert pipeline.write(tmp_path, "launch-shared", run, free, free)
    assert (
        json.loads((tmp_path / "launch-shared.json").read_text())["setting"]["told_gpus"] == "0, 1, and again 1, 0 as 2, 3"
    )
    assert not pipeline.write(tmp_path, "launch-shared", run, [""], [""])
    assert not pipeline.write(tmp_path, "launch-shared", run, free, ["0, 4", "1, 0", ""])


def test_memory_is_looked_at_until_it_is_as_before(monkeypatch: pytest.MonkeyPatch):
    seen = iter([["0, 4"], ["0, 4"], ["0, 0"]])
    monkeypatch.setattr(pipeline, "memory_left", lambda: next(seen))
    assert pipeline.memory_after(["0, 0"]) == ["0, 0"]
    monkeypatch.setattr(pipeline, "memory_left", lambda: ["0, 4"])
    assert pipeline.memory_after(["0, 0"], wait_s=0.0) == ["0, 4"]


def test_the_forced_cuts_are_the_planner_s_refused_one_and_hold_only_when_the_named_one_caught_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(pipeline.Run, "glmplan", lambda run, name, *words, **wanted: run.steps.append((name, words, wanted)))
    setting = harness.Setting("0.5.13.post1", tmp_path, tmp_path, {"spoken": tmp_path}, tmp_path, tmp_path, (0, 1, 2, 3))
    run = pipeline.Run(setting, 0.0)
    pipeline.cuts(run, ())
    steps: list[Any] = list(run.steps)
    failing = {name: wanted for name, _, wanted in steps if wanted}
    assert [(wanted["wanted"], wanted["catcher"]) for wanted in failing.values()] == [
        ((2,), pipeline.PLANNER),
        ((6,), pipeline.PLUGIN),
        ((6,), pipeline.CANARY_ENDED),
        ((7,), pipeline.CANARY_WRONG),
    ]
    launches = [words for _, words, _ in steps if words[0] == "launch"]
    stopped = [words[1] for _, words, _ in steps if words[0] == "stop"]
    assert stopped == [words[words.index("--name") + 1] for words in launches]
    assert [pipeline.FORCED[1] in words for words in launches] == [False, False, True, True, True]
    assert [words[len(words) - 1 - words[::-1].index("--kernel-port") + 1] for words in launches] == [
        "force", "force", "force", "off", "force",
    ]  # fmt: skip
    step = pipeline.Step("untried", [], (6,), pipeline.CANARY_ENDED, 6)
    step.text = ready_and("The reference canary got no answer. The worker on local#2-3 ended.")
    assert not step.holds, "which stage failed is not said"
    own = step.text
    step.text = f"local#2-3, PP1 TP0-1, while serving:\n  | AttributeError: 'NoneType' object has no attribute 'x'\n{own}"
    assert step.holds
    for another in (("PP1", "PP0"), ("NoneType", "flash_ops")):
        step.text = step.text.replace(*another)
        assert step.caught_by == "nobody known", "another failure came first"
        step.text = step.text.replace(*reversed(another))
    step.text = "The worker on local#2-3 ended."
    assert not step.holds
    assert step.caught_by == pipeline.ENGINE_START
