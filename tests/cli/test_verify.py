"""`glmplan verify` through its entry point, against real HTTP servers."""

from __future__ import annotations

import json
import socket

import pytest

from benchmarks.proof.pipeline import CANARY_WRONG, caught_by
from tests.fleet.served_by import Behaviour, serving


def test_a_right_server_is_said_to_be_right(glmplan):
    with serving() as (url, _):
        ran = glmplan("verify", "--url", url)
    assert ran.code == 0, ran.err
    assert "6 canaries passed, 0 skipped: glm at" in ran.out
    assert ran.out.count("pass ") == 6
    assert ran.err == ""


def test_a_wrong_answer_exits_7_and_shows_question_expected_and_got(glmplan):
    with serving(Behaviour(wrong_sum=True)) as (url, _):
        ran = glmplan("verify", "--url", url, "--only", "fact,arithmetic")
    assert ran.code == 7
    assert "canary arithmetic expected '408' and got '409'" in ran.err
    for words in ("pass  fact", "fail  arithmetic", "asked:", "17 x 24", "expected: 408", "got:      409"):
        assert words in ran.out


def test_json_holds_every_result_and_the_verdict(glmplan):
    with serving(Behaviour(wrong_fact=True)) as (url, _):
        ran = glmplan("verify", "--url", url + "/v1", "--only", "fact", "--only", "tool", "--json")
    found = json.loads(ran.out)
    assert ran.code == 7
    assert found["right"] is False
    assert found["model"] == "glm"
    assert [(one["name"], one["status"]) for one in found["results"]] == [("fact", "fail"), ("tool", "pass")]


def test_the_key_comes_from_the_environment_alone(glmplan, monkeypatch):
    monkeypatch.setenv("GLM_KEY", "sesame")
    with serving(Behaviour(key="sesame")) as (url, _):
        ran = glmplan("verify", "--url", url, "--only", "fact", "--api-key-env", "GLM_KEY")
        without = glmplan("verify", "--url", url, "--only", "fact")
    assert ran.code == 0
    assert "sesame" not in ran.out + ran.err + without.out + without.err
    assert without.code != 0
    assert "401" in without.err
    assert glmplan("verify", "--url", "http://x", "--api-key-env", "NOT_SET_HERE").code == 2


def test_no_server_exits_6(glmplan):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ran = glmplan("verify", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert ran.code == 6
    assert "does not answer" in ran.err
    assert "Traceback" not in ran.err


def test_recorded_answers_judge_another_server(glmplan, tmp_path):
    path = tmp_path / "answers.json"
    with serving() as (url, _):
        ran = glmplan("verify", "--url", url, "--record", str(path))
        assert ran.code == 0, ran.err
        assert "6 prompts and 144 tokens of glm (sglang 0.5.23)" in ran.out
        assert "differs from itself by 0 nats." in ran.out
        assert glmplan("verify", "--url", url, "--record", str(path)).code == 2, "no overwriting without --force"
        assert glmplan("verify", "--url", url, "--record", str(path), "--force", "--json").code == 0
        assert glmplan("verify", "--url", url, "--reference", str(path), "--only", "reference").code == 0
    with serving(Behaviour(broken_after=2_048)) as (url, _):
        ran = glmplan("verify", "--url", url, "--reference", str(path), "--only", "reference")
    assert ran.code == 7
    assert "2600 tokens" in ran.err
    with serving(Behaviour(drift=0.2, drift_after=2_048)) as (url, _):
        ran = glmplan("verify", "--url", url, "--reference", str(path), "--only", "reference")
    assert ran.code == 7
    assert caught_by(ran.code, ran.err) == CANARY_WRONG
    assert " tokens, 0.1 are allowed; 3 prompts exceed their limit" in ran.err


def test_a_record_keeps_tolerance_and_ties(glmplan, tmp_path):
    path = tmp_path / "answers.json"
    with serving(Behaviour(context=1_000)) as (url, _):
        assert glmplan("verify", "--url", url, "--record", str(path), "--tolerance", "0.05", "--ties", "1.0").code == 0
    found = json.loads(path.read_text())
    assert (found["tolerance_nats"], found["tie_nats"]) == (0.05, 1.0)
    with serving(Behaviour(context=1_000)) as (url, _):
        ran = glmplan("verify", "--url", url, "--reference", str(path), "--only", "reference")
    assert ran.code == 0
    assert "72 of 72 tokens compared, at most 0.000 nats apart on average (8 tokens)" in ran.out


def test_a_damaged_record_is_a_sentence(glmplan, tmp_path):
    (tmp_path / "a.json").write_text('{"model": 3}')
    with serving() as (url, _):
        ran = glmplan("verify", "--url", url, "--reference", str(tmp_path / "a.json"))
    assert ran.code == 2
    assert "--record" in ran.err


def test_the_text_with_mtp_is_compared_with_the_text_without(glmplan):
    with serving() as (url, _), serving(Behaviour(restless=True)) as (other, _):
        assert glmplan("verify", "--url", url, "--without-mtp-url", url, "--only", "mtp").code == 0
        assert glmplan("verify", "--url", url, "--without-mtp-url", other, "--only", "mtp").code == 7


@pytest.mark.parametrize(("option", "value", "most"), [("--tolerance", "2.1", "2"), ("--ties", "1e3", "10")])
def test_a_limit_without_sense_is_named_with_the_most_there_is(glmplan, option, value, most):
    ran = glmplan("verify", "--url", "http://x", "--record", "a", option, value)
    assert ran.code == 2
    assert f"{option} is {float(value):g} nats and may be {most} at most." in ran.err


def test_a_shortened_answer_is_not_recorded(glmplan, tmp_path):
    path = tmp_path / "answers.json"
    with serving(Behaviour(short_after=6_000)) as (url, _):
        ran = glmplan("verify", "--url", url, "--record", str(path))
        assert ran.code == 1
        assert "3 of 24 tokens came after the prompt of 17500 tokens" in ran.err
        assert not path.exists()
        assert glmplan("verify", "--url", url, "--record", str(path), "--context", "6000").code == 0


def test_a_record_cannot_make_its_own_limit(glmplan, tmp_path):
    path = tmp_path / "answers.json"
    with serving(Behaviour(context=1_000)) as (url, _):
        assert glmplan("verify", "--url", url, "--record", str(path)).code == 0
    path.write_text(path.read_text().replace('"noise_nats": 0.0', '"noise_nats": 50.0'))
    ran = glmplan("verify", "--url", "http://x", "--reference", str(path), "--only", "reference")
    assert ran.code == 2
    assert "noise_nats: a trusted server may differ from itself by 0.1 nats here (it is '50.0')" in ran.err
    assert "--record" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--url", "http://x", "--kernels"),
        ("--url", "10.0.0.1:30000"),
        ("--url", "http://x", "--only", "needel"),
        ("--url", "http://x", "--timeout", "0"),
        ("--url", "http://x", "--timeout", "nan"),
        ("--url", "http://x", "--record", "a", "--tolerance", "0"),
        ("--url", "http://x", "--record", "a", "--tolerance", "inf"),
        ("--url", "http://x", "--record", "a", "--ties", "0"),
        ("--url", "http://x", "--record", "a", "--ties", "-1"),
        ("--url", "http://x", "--record", "a", "--ties", "nan"),
        ("--url", "http://x", "--record", "a", "--ties", "inf"),
        ("--url", "http://x", "--record", "a", "--ties", "many"),
        ("--url", "http://x", "--record", "a", "--tolerance", "2.1"),
        ("--url", "http://x", "--record", "a", "--ties", "10.1"),
        ("--url", "http://x", "--reference", "b", "--ties", "1.0"),
        ("--url", "http://x", "--tolerance", "0.1"),
        ("--url", "http://x", "--context", "many"),
        ("--url", "http://x", "--record", "a", "--reference", "b"),
        ("--url", "http://x", "--reference", "/does/not/exist"),
    ],
)
def test_contradictions_are_refused_before_anything_is_asked(glmplan, arguments):
    ran = glmplan("verify", *arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_the_canaries_are_listed(glmplan):
    assert "long-needle" in glmplan("verify", "--list").out
    names = [one["name"] for one in json.loads(glmplan("verify", "--list", "--json").out)]
    assert names[:2] == ["fact", "arithmetic"]


def test_kernels_are_checked_in_a_process_of_their_own(glmplan, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ran = glmplan("verify", "--kernels", "--json")
    assert ran.code in (1, 4), "no GPU to check"
    assert json.loads(ran.out)["right"] is False
