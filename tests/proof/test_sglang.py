"""The GPU proof's own logic: what is judged to hold, and a run in which servers answer, fail to start, and hang."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.proof import agreement, eagle, harness, judge, rejudge, speed
from tests.proof.answering import first_of_free_ports, program

RECORDS = sorted((Path(__file__).resolve().parents[2] / "docs/proof").glob("*.json"))
SERVER = """
    if os.environ.get("PRETEND") == "die":
        sys.exit("glmplan port failed: on purpose")
    if os.environ.get("GLMPLAN_PORT") == "force":
        print("glmplan port: glmplan=0 sglang=0.5.23 sm=90 compiled_for=90 replaced=a", file=sys.stderr, flush=True)

    class Handler(Answering):
        def do_GET(self):
            if os.environ.get("PRETEND") == "hang":
                time.sleep(60)
            self.answer({})
        def do_POST(self):
            asked = self.asked()
            shift = 3.0 if os.environ.get("PROOF_SABOTAGE") == "1" else 0.0
            count = asked["sampling_params"]["max_new_tokens"]
            rows = [[-1.0 - shift, 5, None] for _ in range(count)]
            told = {"output_token_logprobs": rows, "input_token_logprobs": [[None, 1, None], [-2.0 - shift, 2, None]],
                    "spec_verify_ct": max(count // 2, 1)}
            self.answer([{"output_ids": [5] * count, "meta_info": told} for _ in asked["input_ids"]])

    serve(Handler)
"""


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> harness.Setting:
    site = tmp_path / "site"
    (site / "sglang").mkdir(parents=True)
    (site / "sglang/__init__.py").write_text("")
    (site / "sglang/launch_server.py").write_text(program(SERVER))
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr(harness, "FIRST_PORT", first_of_free_ports(16, 60))
    monkeypatch.setattr(harness, "PORT_STEP", 60)
    monkeypatch.setattr(harness, "versions", lambda _: {"sglang": "0.5.23"})
    models = {"plain": tmp_path, "mtp": tmp_path}
    return harness.Setting("0.5.23", site, harness.install_beside(tmp_path / "plugin"), models, logs, tmp_path, (0, 1))


def test_a_whole_agreement_run(setting: harness.Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    jobs = agreement.jobs("0.5.23", ["fp8"], ["sm89", "sm80"])
    outcomes = harness.run(jobs, setting, 200, per_gpu=3, first_wave=2)
    assert [item.error for item in outcomes.values()] == [None] * len(jobs)
    found = agreement.verdict(["fp8"], ["sm89", "sm80"], outcomes)
    assert found["holds"], found["lines"]
    harness.write(tmp_path / "out", "agreement-0.5.23-fp8", setting, outcomes, found)
    record = json.loads((tmp_path / "out/agreement-0.5.23-fp8.json").read_text())
    assert record["servers"]["fp8-port"]["port_lines"]
    assert not record["servers"]["fp8-stock"]["port_lines"]
    with tarfile.open(tmp_path / "out/agreement-0.5.23-fp8-logs.tar.gz") as packed:
        assert "fp8-port.log" in packed.getnames()
        assert "fp8-port.answers.json" in packed.getnames()
    path = tmp_path / "out/agreement-0.5.23-fp8.json"
    text = path.with_suffix(".txt").read_text()
    assert rejudge.main([str(path)]) == 0
    record["verdict"]["parts"]["fp8"]["ports"]["fp8-port"]["prompt_mean"] = 0.123
    path.write_text(json.dumps(record))
    assert rejudge.main([str(path)]) == 1
    assert "which is not what was recorded" in capsys.readouterr().out
    assert rejudge.main([str(path), "--write"]) == 0
    assert rejudge.main([str(path)]) == 0
    assert path.with_suffix(".txt").read_text() == text
    for lost in ("fp8-control", "fp8-sm80", "fp8-stock"):
        kept = json.loads(path.read_text())
        del kept["servers"][lost]
        path.with_name("agreement-0.5.23-fp8.json").write_text(json.dumps(kept))
        assert rejudge.main([str(path), "--write"]) == 1, lost
        path.write_text(json.dumps({**kept, "servers": record["servers"]}))
    path.write_text(json.dumps({**record, "verdict": {"holds": True, "parts": {}}}))
    assert rejudge.main([str(path)]) == 1
    path.write_text(json.dumps({**record, "proof": "another", "verdict": {"holds": True}}))
    assert rejudge.main([str(path), "--write"]) == 1
    assert "cannot be judged" in capsys.readouterr().out


def test_a_server_that_fails_does_not_stop_the_others(setting: harness.Setting):
    def job(name: str, pretend: str) -> harness.Job:
        return harness.Job(name, (), speed.ask if pretend == "fine" else agreement.ask, {"PRETEND": pretend})

    outcomes = harness.run([job("dead", "die"), job("stuck", "hang"), job("fine", "fine")], setting, 30, first_wave=1)
    assert "ended with code" in str(outcomes["dead"].error)
    assert outcomes["dead"].port_lines == ["glmplan port failed: on purpose"]
    assert "not healthy in time" in str(outcomes["stuck"].error)
    assert outcomes["fine"].error is None
    assert set(outcomes["fine"].result or {}) >= {"prefill 3000", "decode 64 streams"}


def test_what_was_answered_before_a_failure_is_kept_and_the_log_s_errors_are_told(setting: harness.Setting):
    def task(client: harness.Client) -> dict[str, Any]:
        client.found["first"] = 1
        setting.logs.joinpath("half.log").write_text("all is well\ntorch.OutOfMemoryError: CUDA out of memory\n")
        raise RuntimeError("the rest is lost")

    (found,) = harness.run([harness.Job("half", (), task)], setting, 100).values()
    assert found.result == {"first": 1}
    assert found.error == "RuntimeError: the rest is lost"
    assert found.complaints == ["torch.OutOfMemoryError: CUDA out of memory"]


def test_others_do_not_wait_for_a_first_wave_that_hangs(setting: harness.Setting, monkeypatch: pytest.MonkeyPatch):
    """Seconds count from the start of the preparations; the first wave has its share of what is left."""
    monkeypatch.setattr(harness, "WAVE_SHARE", 0.1)
    jobs = [harness.Job("stuck", (), agreement.ask, {"PRETEND": "hang"}), harness.Job("fine", (), agreement.ask)]
    late = dataclasses.replace(setting, begun=time.monotonic() - 1000)
    outcomes = harness.run(jobs, late, 1020, per_gpu=2, first_wave=1)
    assert outcomes["fine"].result
    assert outcomes["stuck"].error


def test_a_run_that_is_told_to_end_keeps_what_it_has_and_leaves_no_server(setting: harness.Setting):
    def task(client: harness.Client) -> dict[str, Any]:
        client.found["first"] = 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(120)
        return {}

    begin = time.monotonic()
    (found,) = harness.run([harness.Job("long", (), task)], setting, 240).values()
    assert time.monotonic() - begin < 100
    assert found.error == "it was not done when the run ended"
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{found.command[found.command.index('--port') + 1]}/health")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_verdict_that_fails_is_written_as_one_that_does_not_hold():
    found = harness.judged(lambda: {}["nothing"])
    assert not found["holds"]
    assert found["lines"][0] == "not judged, KeyError: 'nothing'"


def test_a_missing_port_does_not_hold(setting: harness.Setting):
    jobs = agreement.jobs("0.5.23", ["bf16"], [])
    outcomes = {job.name: harness.Outcome(job.name, 0, [], {}) for job in jobs}
    assert not agreement.verdict(["bf16"], [], outcomes)["holds"]


def test_eagle_is_judged_by_answers_by_accepted_drafts_and_by_one_line_of_the_port(setting: harness.Setting):
    outcomes = harness.run(eagle.jobs("0.5.23"), setting, 200, per_gpu=5)
    found = eagle.verdict(outcomes)
    assert found["holds"], found["lines"]
    port = outcomes["fp8-port"]
    assert port.result is not None
    port.port_lines *= 2
    assert "fp8-port has 2 lines of the port" in eagle.verdict(outcomes)["lines"]
    assert not eagle.verdict(outcomes)["holds"]
    port.port_lines = port.port_lines[:1]
    kept = outcomes["fp8-other"].result
    outcomes["fp8-other"].result = None
    assert eagle.verdict(outcomes)["holds"]
    outcomes["fp8-other"].result = kept
    kept = outcomes["fp8-control"].result
    outcomes["fp8-control"].result = port.result
    assert any("wrong on purpose, NOT NOTICED" in line for line in eagle.verdict(outcomes)["lines"])
    assert not eagle.verdict(outcomes)["holds"]
    outcomes["fp8-control"].result = kept
    for item in port.result.values():
        item["per_verification"] *= 0.89
    assert not eagle.verdict(outcomes)["holds"]
    outcomes["fp8-stock"].result = None
    assert "no answers from fp8-stock" in eagle.verdict(outcomes)["lines"]


def answers(shift: float, tokens: int = 5) -> dict[str, Any]:
    return {"one": {"tokens": [tokens] * 8, "logprobs": [-1.0 + shift] * 8, "prompt": [-2.0 + shift] * 64}}


def test_distances():
    near = judge.distance(answers(0.0), answers(0.25))
    means = dict.fromkeys(["prompt_mean", "prompt_p99", "prompt_worst", "answer_mean", "answer_worst"], 0.25)
    assert near == {**means, "agreement": 1.0, "prompts": 1.0, "parting": 0.0, "differing": 0.0, "compared": 8.0}
    other = judge.distance(answers(0.0), answers(0.25, tokens=6))
    assert other == {
        **near,
        "answer_mean": 0.0,
        "answer_worst": 0.0,
        "agreement": 0.0,
        "parting": 0.25,
        "differing": 1.0,
        "compared": 1.0,
    }


def test_as_many_tokens_may_differ_as_chance_gives():
    def found(differing: int, compared: int) -> judge.Distance:
        return judge.distance(answers(0.0), answers(0.0)) | {"differing": differing, "compared": compared}

    usual = found(18, 760)
    assert judge.chance(found(19, 549), usual) == pytest.approx(0.160, abs=0.001)
    assert judge.chance(found(0, 0), found(0, 0)) == 1.0
    assert judge.chance(found(0, 900), usual) == pytest.approx(1.0)
    # of 3 that differ all fall into a third of the tokens
    assert judge.chance(found(3, 100), found(0, 200)) == pytest.approx(1 / 27)
    control = {"control": judge.distance(answers(0.0), answers(2.0))}
    for differing, holds in ((25, True), (40, False)):
        verdict = judge.judge_agreement(
            {"again": found(2, 900), "other": usual}, {"port": found(differing, 549)}, control, 1
        )
        assert verdict["holds"] is holds, verdict["lines"]


def test_where_tokens_differ_they_are_as_near_a_tie_as_among_right_kernels():
    noise = {"other": judge.distance(answers(0.0), answers(0.06, tokens=6))}
    control = {"control": judge.distance(answers(0.0), answers(2.0))}
    for gap, holds in ((0.12, True), (0.13, False)):
        found = judge.distance(answers(0.0), answers(gap, tokens=6))
        ports = {"port": found | dict.fromkeys(["prompt_mean", "prompt_p99", "prompt_worst"], 0.0)}
        assert judge.judge_agreement(noise, ports, control, 1)["holds"] is holds


def test_the_prompts_that_differ_most_are_judged_by_themselves():
    def servers(shifts: Sequence[float]) -> dict[str, Any]:
        return {f"{number}": answers(shift)["one"] for number, shift in enumerate(shifts)}

    stock = servers([0.0] * 6)
    noise = {"other": judge.distance(stock, servers([0.05] * 6))}
    control = {"control": judge.distance(stock, servers([2.0] * 6))}
    wrong = judge.distance(stock, servers([0.0] * 4 + [0.25, 0.25]))
    assert (wrong["prompt_worst"], wrong["answer_worst"]) == pytest.approx((1 / 6, 1 / 6))
    lines = judge.judge_agreement(noise, {"port": wrong}, control, 6)["lines"]
    assert any("beyond: prompt_p99, prompt_worst, answer_worst" in line for line in lines), lines
    assert "noticed by prompt_mean" in lines[-1]


def test_a_port_within_the_noise_holds_and_one_beyond_does_not():
    noise = {"again": judge.distance(answers(0.0), answers(0.1))}
    control = {"control": judge.distance(answers(0.0), answers(2.0))}
    for shift, holds in ((0.15, True), (0.21, False)):
        ports = {"port": judge.distance(answers(0.0), answers(shift))}
        assert judge.judge_agreement(noise, ports, control, 1)["holds"] is holds


def test_a_comparison_that_does_not_notice_a_wrong_answer_proves_nothing():
    same = judge.distance(answers(0.0), answers(0.0))
    wrong = {"control": judge.distance(answers(0.0), answers(2.0))}
    assert judge.judge_agreement({"again": same}, {"port": same}, wrong, 1)["holds"]
    assert not judge.judge_agreement({"again": same}, {"port": same}, {}, 1)["holds"]
    assert not judge.judge_agreement({"again": same}, {"port": same}, {"control": same}, 1)["holds"]
    assert not judge.judge_agreement({}, {"port": same}, wrong, 1)["holds"]
    assert not judge.judge_agreement({"again": same}, {"port": same}, wrong, 2)["holds"]


def test_servers_that_answered_in_part_or_with_no_numbers_are_no_measure():
    same, far = judge.distance(answers(0.0), answers(0.0)), judge.distance(answers(0.0), answers(2.0))
    nothing = judge.distance(answers(0.0), answers(float("nan")))
    for noise, ports, controls, said in (
        ({"again": same, "other": far | {"prompts": 0.0}}, {"port": far}, {"control": far}, "other did not answer all"),
        ({"again": same, "other": nothing}, {"port": far}, {"control": far}, "other did not answer all"),
        ({"again": same}, {"port": same}, {"control": far | {"prompts": 0.0}}, "control did not answer all"),
        ({"again": same}, {"port": same}, {"control": nothing}, "control did not answer all"),
        ({"again": same}, {"port": nothing}, {"control": far}, "prompts missing"),
    ):
        found = judge.judge_agreement(noise, ports, controls, 1)
        assert not found["holds"]
        assert any(said in line for line in found["lines"]), found["lines"]


RAW = {"reference": 0.0, "exact": 0.1, "stock": 0.3, "again": 0.3, "other": 0.25, "port": 0.2, "control": 1.0}


def raw_verdict(**shifts: float | None) -> dict[str, Any]:
    """Of servers whose log-probabilities are shifted as far; None gave no answers."""
    outcomes, prompts = {}, 0
    for job in agreement.jobs("0.5.23", ["raw"], []):
        lines = [f"{harness.MARKER} kv=raw"] if job.environment["GLMPLAN_PORT"] == "force" else []
        shift = {**RAW, **shifts}[job.name.removeprefix("raw-")]
        found = None if shift is None else answers(shift)
        prompts = max(prompts, len(found or {}))
        outcomes[job.name] = harness.Outcome(job.name, 0, [], {}, port_lines=lines, result=found)
    assert outcomes.keys() == {f"raw-{name}" for name in RAW}
    return agreement.verdict(["raw"], [], outcomes, prompts)


@pytest.mark.parametrize(("port", "holds"), [(0.2, True), (0.33, True), (0.34, False)])
def test_raw_rows_are_measured_from_bf16_rows_and_the_port_may_be_a_tenth_beyond_a_coarse_stock(port: float, holds: bool):
    assert raw_verdict(port=port)["holds"] is holds


@pytest.mark.parametrize(("port", "holds"), [(0.2, True), (0.21, False)])
def test_raw_rows_are_allowed_the_noise_of_bf16_kernels_where_stock_s_own_is_near_or_absent(port: float, holds: bool):
    assert raw_verdict(port=port, stock=0.05, again=0.05, other=0.05)["holds"] is holds
    found = raw_verdict(port=port, stock=None, again=None, other=None)
    assert found["holds"] is holds
    assert "no answers from raw-stock, not needed" in found["lines"]


@pytest.mark.parametrize("silent", ["reference", "port", "control"])
def test_raw_rows_need_what_they_are_measured_from_and_their_control(silent: str):
    assert not raw_verdict(**{silent: None})["holds"]
    assert not raw_verdict(**{silent: None}, exact=None)["holds"]


def test_raw_rows_need_stock_s_kernel_where_the_bf16_kernel_is_silent():
    assert raw_verdict(exact=None, port=0.3)["holds"] is False
    assert "no answers from raw-exact" in raw_verdict(exact=None)["lines"]


def test_raw_servers_capture_few_graphs_and_others_as_before():
    graphs = {job.name: job.flags.count("--cuda-graph-bs-decode") for job in agreement.jobs("0.5.23", ["raw", "fp8"], [])}
    assert {name for name, count in graphs.items() if count} == {
        "raw-stock",
        "raw-again",
        "raw-other",
        "raw-port",
        "raw-control",
    }


def test_speed_holds_when_both_were_measured_whole():
    stock = {"prefill 3000": 200.0, "decode 1 streams": 10.0}
    assert judge.judge_speed(stock, {name: value / 2 for name, value in stock.items()})["holds"]
    cut = judge.judge_speed(stock, {"prefill 3000": 100.0})
    assert not cut["holds"]
    assert cut["lines"][-1] == "not measured: decode 1 streams"
    assert not judge.judge_speed({}, {})["holds"]


@pytest.mark.parametrize("path", RECORDS, ids=[path.stem for path in RECORDS])
def test_recorded_verdicts_follow_from_the_recorded_answers(path: Path):
    record = json.loads(path.read_text())
    assert rejudge.rejudged(path, record) == record["verdict"]


def test_the_installed_package_has_the_entry_point(setting: harness.Setting):
    text = next(setting.plugin.glob("glmplan-*.dist-info/entry_points.txt")).read_text()
    assert "glmplan = glmplan.kernels.engines.sglang_plugin:register" in text
    assert (setting.plugin / "glmplan/kernels/engines/sglang_plugin.py").exists()
    assert sys.executable


def test_all_proofs_side_by_side_say_what_was_left_out_and_what_failed(tmp_path: Path):
    """An empty site: its script ends at once, and the end of its output is shown."""
    script = Path(harness.__file__).with_name("all.sh")
    (tmp_path / "site").mkdir()
    (tmp_path / "bin").mkdir()
    listing = tmp_path / "bin/nvidia-smi"
    listing.write_text('#!/bin/sh\ntest -n "$ONE" || echo "GPU 1: NVIDIA H200"\necho "GPU 0: NVIDIA H200"\n')
    listing.chmod(0o755)
    path = f"{listing.parent}{os.pathsep}{os.environ['PATH']}"
    sites = {"SITE": str(tmp_path / "site"), "SITE_OLD": "", "SITE_VLLM": "", "PYTHON": sys.executable}
    words = ["bash", str(script), str(tmp_path / "out"), "cuts", "speed", "other"]
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": path, **sites}
    ran = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert ran.returncode == 2
    assert "cuts: left out, its site is not set" in ran.stdout
    assert "speed: DOES NOT HOLD" in ran.stdout
    assert f"{tmp_path / 'site'} holds no sglang" in ran.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["speed.tar.gz"], "few files come back from some places"
    with tarfile.open(tmp_path / "out/speed.tar.gz") as packed:
        assert packed.getnames() == ["speed", "speed/speed.log"]
    assert "other is no step" in ran.stdout
    ran = subprocess.run(words[:-2], capture_output=True, text=True, env={**environment, "ONE": "1"})
    assert (ran.returncode, ran.stdout) == (0, "cuts: left out, it needs two GPUs\n")
