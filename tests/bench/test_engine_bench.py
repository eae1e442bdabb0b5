"""The engines' own benchmarks as another way to measure: real processes, their results in our words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glmplan.bench.engine_bench import level_of
from tests.bench.fake_engines import packages
from tests.bench.streaming import Behaviour, streaming
from tests.fleet.control import interruptible
from tests.netns_wire import wait_for

WORDS = (
    "--with",
    "engine",
    "--concurrency",
    "2",
    "--prompt-tokens",
    "64",
    "--output-tokens",
    "16",
    "--requests-per-level",
    "5",
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(packages(tmp_path / "engines")),
        "COLUMNS": "150",
        "OPENAI_API_KEY": "another-key",
    }


def bench(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glmplan", "bench", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_sglangs_benchmark_is_run_and_read(environment):
    with streaming(Behaviour(family="sglang", key="sesame-open")) as (url, known):
        environment["GLM_KEY"] = "sesame-open"
        ran = bench(environment, "--url", url, *WORDS, "--prefill", "128", "--api-key-env", "GLM_KEY", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    (level,) = found["levels"]
    assert found["measured_with"] == "sglang.bench_serving"
    assert (level["completed"], level["output_tokens"], level["prompt_tokens"]) == (5, 80, 320)
    assert level["output_tokens_per_s"] == pytest.approx(80 / 2.0)
    assert level["stream_tokens_per_s"] == pytest.approx(10.0)
    assert (level["ttft"]["p50_s"], level["itl"]["p99_s"]) == pytest.approx((0.5, 0.1))
    assert level["decode_tokens_per_s"] is None
    assert found["prefill"][0]["requests"] == 3, "prefill is measured with our own requests"
    assert len([body for body in known.bodies if body.get("input_ids", [])[:2] == [9, 9]]) == 5
    assert "sesame" not in ran.stdout + ran.stderr


def test_a_key_for_another_server_is_not_passed_on(environment):
    with streaming(Behaviour(family="sglang")) as (url, known):
        ran = bench(environment, "--url", url, *WORDS, "--prefill", "none")
    assert ran.returncode == 0, ran.stderr
    assert len(known.keys) == 1 + 5
    assert set(known.keys) == {None}


def test_failures_of_sglangs_benchmark_are_named(environment):
    with streaming(Behaviour(family="sglang", fail={3: "status:503"})) as (url, _):
        ran = bench(environment, "--url", url, *WORDS, "--prefill", "none")
    assert ran.returncode == 1
    assert "failed concurrency 2: 1 x HTTP Error 503: Service Unavailable" in ran.stdout


def test_vllms_benchmark_is_run_and_read(environment):
    with streaming() as (url, _):
        ran = bench(environment, "--url", url, *WORDS, "--prefill", "none", "--tokenizer", "/models/glm", "--json")
    assert ran.returncode == 0, ran.stderr
    (level,) = json.loads(ran.stdout)["levels"]
    assert (level["completed"], level["itl_of_chunks"]) == (5, True), "16 tokens came in 4 chunks"
    assert level["output_tokens_per_s"] == pytest.approx(20.0)
    assert level["stream_tokens_per_s"] == pytest.approx(15 / 0.6)


def test_one_without_a_result_is_a_sentence(environment):
    with streaming(Behaviour(family="sglang")) as (url, _):
        ran = bench(environment, "--url", url, *WORDS, "--tokenizer", "broken")
    assert ran.returncode == 1
    assert "broken is not a local folder" in ran.stderr
    assert "--with own needs none" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_an_engine_that_is_not_here_is_a_sentence(environment):
    del environment["PYTHONPATH"]
    with streaming() as (url, _):
        ran = bench(environment, "--url", url, *WORDS)
    assert ran.returncode == 4
    assert "has no vllm, so vllm bench serve cannot be run" in ran.stderr


def test_ctrl_c_ends_the_engines_benchmark(environment, tmp_path):
    told = tmp_path / "pid"
    environment["FAKE_ENGINE_PID"] = str(told)
    with streaming(Behaviour(family="sglang")) as (url, _):
        command = [sys.executable, "-m", "glmplan", "bench", "--url", url, *WORDS, "--tokenizer", "slow"]
        with interruptible():
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for("the benchmark", lambda: told.exists() and told.read_text())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=50)
    assert process.returncode == 130, err
    assert not Path(f"/proc/{told.read_text()}").exists()


def test_errors_without_words_are_counted_too():
    raw = {"duration": 1.0, "total_input_tokens": 8, "output_lens": [4, 0], "ttfts": [0.1, 0.0], "itls": [[0.1] * 3, []],
           "errors": ["", None]}  # fmt: skip
    found = level_of(raw, 1, None)
    assert (found.requests, found.completed) == (2, 1)
    assert found.failures[0].words == "the answer has no tokens"
