"""`glmplan bench` through its entry point, against real HTTP servers."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from statistics import median

import pytest

from tests.bench.streaming import Behaviour, Told, streaming
from tests.fleet.control import interruptible
from tests.netns_wire import wait_for

SMALL = (
    "--concurrency",
    "1,4",
    "--prompt-tokens",
    "64",
    "--output-tokens",
    "16",
    "--requests-per-level",
    "8",
    "--prefill",
    "none",
)

LATE_S = 0.15
"""A busy machine may let the client see so late what the server has sent; less than the delays that it must be told from."""


def of_the_server(told: Sequence[Told]) -> tuple[float, float, float, float]:
    """What the server's own clock says of a level: median TTFT, median gap, tokens a second of a stream and of all."""
    gaps = [gap for one in told for gap in one.gaps_s]
    streams = [len(one.gaps_s) / sum(one.gaps_s) for one in told]
    busy_s, open_until = 0.0, -math.inf
    for begin, end in sorted((one.sent_s[0], one.sent_s[-1]) for one in told):
        busy_s += max(0.0, end - max(begin, open_until))
        open_until = max(open_until, end)
    return median(one.ttft_s for one in told), median(gaps), median(streams), len(gaps) / busy_s


def test_known_delays_are_measured(glmplan):
    """Sleeping takes as long as asked or longer, on a busy machine much longer: the server's clock has the truth."""
    with streaming(Behaviour(prefill_s=0.25, token_s=0.03)) as (url, known):
        ran = glmplan("bench", "--url", url, *SMALL, "--prefill", "512", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    one, four = found["levels"]
    assert found["warmup_requests"] == 1 + 1 + 4 + 1
    assert len(known.bodies) == found["warmup_requests"] + 8 + 8 + 3
    for level, told in ((one, known.told[2:10]), (four, known.told[14:22])):
        ttft_s, itl_s, stream_per_s, decode_per_s = of_the_server(told)
        assert (ttft_s >= 0.25, itl_s >= 0.03) == (True, True), "as scripted"
        assert (level["requests"], level["completed"], level["failures"]) == (8, 8, [])
        assert (level["output_tokens"], level["prompt_tokens"]) == (8 * 16, 8 * 64)
        assert (level["counted_by"], level["itl_of_chunks"], level["cached_tokens"]) == ("usage", False, 0)
        assert ttft_s <= level["ttft"]["p50_s"] < ttft_s + LATE_S
        assert level["itl"]["p50_s"] == pytest.approx(itl_s, rel=0.4)
        assert level["itl"]["values"] == 8 * 15
        assert level["stream_tokens_per_s"] == pytest.approx(stream_per_s, rel=0.2)
        assert level["decode_tokens_per_s"] == pytest.approx(decode_per_s, rel=0.2)
        seconds = max(one.sent_s[-1] for one in told) - told[0].read_s
        assert level["output_tokens_per_s"] == pytest.approx(8 * 16 / seconds, rel=0.2)
    assert four["decode_tokens_per_s"] > 1.5 * one["decode_tokens_per_s"], "streams beside each other, not one by one"
    assert known.most_open == 4
    (prefill,) = found["prefill"]
    assert (prefill["prompt_tokens"], prefill["requests"]) == (512, 3)
    ttft_s = median(one.ttft_s for one in known.told[-3:])
    assert 512 / (ttft_s + LATE_S) < prefill["tokens_per_s"] <= 512 / ttft_s


def test_no_two_prompts_begin_alike(glmplan):
    with streaming() as (url, known):
        assert glmplan("bench", "--url", url, *SMALL).code == 0
        assert glmplan("bench", "--url", url, *SMALL, "--prefill", "128").code == 0
    begins = [prompt[0] for prompt in known.prompts[:22]]
    assert len(set(begins)) == len(begins), "the first token already differs within a run"
    heads = [tuple(prompt[:8]) for prompt in known.prompts]
    assert len(set(heads)) == len(heads) == 48
    assert all(len(prompt) == 64 and isinstance(prompt[0], int) for prompt in known.prompts[1:10])
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in known.bodies)


@pytest.mark.parametrize("usage", ["end", "none"])
def test_what_the_server_does_not_count_is_labelled(glmplan, usage):
    with streaming(Behaviour(usage=usage, tokens_per_chunk=4, token_s=0.002)) as (url, _):
        ran = glmplan("bench", "--url", url, *SMALL)
        level = json.loads(glmplan("bench", "--url", url, *SMALL, "--json").out)["levels"][0]
    assert ran.code == 0
    assert level["itl_of_chunks"] is True
    assert level["counted_by"] == ("usage" if usage == "end" else "chunks")
    assert level["output_tokens"] == 8 * (16 if usage == "end" else 4), "16 tokens come in 4 chunks"
    assert "between chunks" in ran.out
    assert ("32 chunks" in ran.out) == (usage == "none")


def test_chunks_of_several_tokens_are_split_by_the_servers_count(glmplan):
    with streaming(Behaviour(tokens_per_chunk=4, token_s=0.02)) as (url, known):
        level = json.loads(glmplan("bench", "--url", url, *SMALL, "--json").out)["levels"][0]
    assert level["output_tokens"] == 8 * 16
    assert level["itl"]["values"] == 8 * 12
    itl_s = of_the_server(known.told[2:10])[1] / 4
    assert level["itl"]["p50_s"] == pytest.approx(itl_s, rel=0.4)


def test_words_are_sent_where_ids_are_refused_and_their_length_is_measured(glmplan):
    with streaming(Behaviour(takes_ids=False)) as (url, known):
        found = json.loads(glmplan("bench", "--url", url, *SMALL, "--json").out)
    assert found["prompts"] == "random words"
    assert found["levels"][0]["prompt_tokens"] == pytest.approx(8 * 64, rel=0.06)
    words = [prompt for prompt in known.prompts if isinstance(prompt, str)]
    assert len({prompt.split()[0] for prompt in words}) == len(words)


def test_a_server_without_a_tokenizer_is_asked_with_ids_at_generate(glmplan):
    with streaming(Behaviour(family="sglang", tokenizer=False, token_s=0.002)) as (url, known):
        ran = glmplan("bench", "--url", url, *SMALL, "--json")
    found = json.loads(ran.out)
    assert (found["endpoint"], found["engine_family"], found["engine_version"]) == ("generate", "sglang", "0.5.23")
    assert found["levels"][1]["output_tokens"] == 8 * 16
    assert found["levels"][1]["itl_of_chunks"] is False
    assert all("input_ids" in body for body in known.bodies)


def test_generate_can_be_asked_for(glmplan):
    with streaming(Behaviour(family="sglang")) as (url, _):
        assert json.loads(glmplan("bench", "--url", url, *SMALL, "--json").out)["endpoint"] == "completions"
        ran = glmplan("bench", "--url", url, *SMALL, "--json", "--endpoint", "generate")
        assert json.loads(ran.out)["endpoint"] == "generate"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("status:503", "HTTP 503: the pool is full"),
        ("break", "the stream ended without its end mark in the middle of the answer"),
        ("no-end", "the stream ended without its end mark in the middle of the answer"),
        ("error-event", "error in the stream: CUDA out of memory"),
        ("abort", "aborted: the queue is full"),
        ("garbage", "a chunk is not of the engine's shape in the middle of the answer"),
        ("shape", "a chunk is not of the engine's shape in the middle of the answer"),
        ("empty", "the answer has no tokens"),
        ("silent", "nothing came for 2 s in the middle of the answer"),
    ],
)
def test_failed_requests_are_counted_and_named_and_the_exit_code_says_so(glmplan, fault, words):
    patience = ("--timeout", "2") if fault == "silent" else ()
    with streaming(Behaviour(fail={4: fault, 5: fault})) as (url, _):
        ran = glmplan("bench", "--url", url, *SMALL, "--concurrency", "1", *patience, "--json")
        found = json.loads(ran.out)
    (level,) = found["levels"]
    assert (level["requests"], level["completed"]) == (8, 6)
    assert level["failures"] == [{"words": words, "requests": 2}]
    assert level["output_tokens"] == 6 * 16
    assert ran.code == 1
    assert "2 of 8 requests failed" in ran.err
    assert "Traceback" not in ran.err


def test_failures_are_in_the_table(glmplan):
    with streaming(Behaviour(fail={4: "break"})) as (url, _):
        ran = glmplan("bench", "--url", url, *SMALL)
    assert ran.code == 1
    assert "failed concurrency 1: 1 x the stream ended without its end mark in the middle of the answer" in ran.out
    assert "7/8" in ran.out


def test_a_server_that_answers_nothing_more_ends_the_sweep(glmplan):
    faults = dict.fromkeys(range(3, 100), "status:500")
    with streaming(Behaviour(fail=faults)) as (url, known):
        ran = glmplan("bench", "--url", url, *SMALL, "--prefill", "512")
    assert ran.code == 6
    assert "At concurrency 1 none of 8 requests was answered: HTTP 500: the pool is full." in ran.err
    assert len(known.bodies) == 10, "neither the next level nor prefill was asked"


def test_an_arrival_rate(glmplan):
    with streaming(Behaviour(token_s=0.03)) as (url, known):
        words = ("--rate", "40", "--prompt-tokens", "32", "--output-tokens", "16", "--requests-per-level", "60")
        ran = glmplan("bench", "--url", url, *words, "--prefill", "none", "--json")
    (level,) = json.loads(ran.out)["levels"]
    assert (level["rate_per_s"], level["concurrency"], level["completed"]) == (40.0, None, 60)
    assert 1.0 < level["seconds"] < 9.0, "60 arrive in 1.5 s; one after the other they take 27 s"
    assert known.most_open > 2, "requests do not wait for each other"


def test_short_answers_and_cached_prompts_are_said(glmplan):
    with streaming(Behaviour(most_tokens=5, cached=32)) as (url, _):
        ran = glmplan("bench", "--url", url, *SMALL)
    assert ran.code == 0
    assert "8 of 8 answers are shorter than 16 tokens (down to 5)" in ran.out
    assert "256 of 512 prompt tokens came from the prefix cache" in ran.out


def test_what_the_context_does_not_hold_is_not_asked(glmplan):
    with streaming(Behaviour(context=600)) as (url, known):
        ran = glmplan("bench", "--url", url, "--prompt-tokens", "590", "--output-tokens", "20")
        assert ran.code == 2
        assert "610" in ran.err
        assert known.bodies == []
        ran = glmplan("bench", "--url", url, *SMALL, "--prefill", "500,1k")
    assert ran.code == 0
    assert "Prefill of 1,024 tokens is left out: the context is 600." in ran.out
    assert max(len(prompt) for prompt in known.prompts) == 500


def test_the_files_hold_the_report_and_a_drawing_and_are_not_overwritten(glmplan, tmp_path):
    folder = tmp_path / "new" / "results"
    with streaming(Behaviour(token_s=0.002)) as (url, _):
        ran = glmplan("bench", "--url", url, *SMALL, "--prefill", "64,128", "--out", str(folder))
        assert ran.code == 0, ran.err
        again = glmplan("bench", "--url", url, *SMALL, "--out", str(folder))
        assert again.code == 2
        assert "--force" in again.err
        assert glmplan("bench", "--url", url, *SMALL, "--out", str(folder), "--force").code == 0
    assert json.loads((folder / "bench.json").read_text())["levels"][0]["completed"] == 8
    drawing = ElementTree.parse(folder / "bench.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert glmplan("bench", "--url", "http://x", "--out", str(folder / "bench.json")).code == 2


def test_the_key_comes_from_the_environment_alone(glmplan, monkeypatch, tmp_path):
    monkeypatch.setenv("GLM_KEY", "sesame-open")
    with streaming(Behaviour(key="sesame-open")) as (url, _):
        ran = glmplan("bench", "--url", url, *SMALL, "--api-key-env", "GLM_KEY", "--out", str(tmp_path))
        without = glmplan("bench", "--url", url, *SMALL)
        named = glmplan("bench", "--url", url, *SMALL, "--model", "glm")
    assert ran.code == 0
    assert "sesame" not in ran.out + ran.err + (tmp_path / "bench.json").read_text() + (tmp_path / "bench.svg").read_text()
    for one in (without, named):
        assert one.code == 1
        assert "401" in one.err
    assert "--api-key-env" in named.err


def test_no_server_exits_6(glmplan):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for words in ((), ("--model", "glm")):
            ran = glmplan("bench", "--url", url, *SMALL, *words)
            assert ran.code == 6, ran.err
            assert "does not answer" in ran.err
            assert "Traceback" not in ran.err


def test_a_server_that_is_no_engine_is_refused(glmplan):
    with streaming(Behaviour(family="other", takes_ids=False, fail={"*": "status:404"})) as (url, _):
        ran = glmplan("bench", "--url", url, *SMALL)
    assert ran.code == 4
    assert "neither token ids nor words" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("--url", "10.0.0.1:30000"),
        ("--url", "http://"),
        ("--url", "http://x:notaport"),
        ("--url", "http://x", "--concurrency", "1,1"),
        ("--url", "http://x", "--concurrency", "0"),
        ("--url", "http://x", "--concurrency", "10000000"),
        ("--url", "http://x", "--concurrency", "1,"),
        ("--url", "http://x", "--concurrency", "4", "--rate", "1"),
        ("--url", "http://x", "--rate", "-1"),
        ("--url", "http://x", "--rate", "nan"),
        ("--url", "http://x", "--prompt-tokens", "many"),
        ("--url", "http://x", "--output-tokens", "0"),
        ("--url", "http://x", "--requests-per-level", "0"),
        ("--url", "http://x", "--endpoint", "chat"),
        ("--url", "http://x", "--with", "vllm"),
        ("--url", "http://x", "--plan", "/does/not/exist"),
        ("--url", "http://x", "--api-key-env", "NOT_SET_HERE"),
    ],
)
def test_contradictions_are_refused_before_anything_is_asked(glmplan, words):
    ran = glmplan("bench", *words)
    assert ran.code == 2, ran.err
    assert "Traceback" not in ran.err


def test_the_plans_numbers_stand_beside_the_servers_and_speed_is_not_predicted(glmplan, tmp_path):
    plan = tmp_path / "plan.json"
    assert glmplan("size", "--gpus", "8x h200", "--save", str(plan)).code == 0
    planned = json.loads(plan.read_text())
    info = {"max_total_num_tokens": 123_456, "internal_states": [{"effective_max_running_requests_per_dp": 7}]}
    with streaming(Behaviour(family="sglang", info=info, context=4096)) as (url, _):
        ran = glmplan("bench", "--url", url, *SMALL, "--plan", str(plan))
        found = json.loads(glmplan("bench", "--url", url, *SMALL, "--plan", str(plan), "--json").out)
    assert ran.code == 0, ran.err
    assert [(row["name"], row["predicted"], row["measured"]) for row in found["plan"]] == [
        ("KV cache tokens", planned["kv_cache_tokens"], 123_456),
        ("context tokens", planned["settings"]["context_tokens"], 4096),
        ("running requests", planned["settings"]["max_running_requests"], 7),
    ]
    assert "Speed is not predicted" in ran.out
    assert "123,456" in ran.out


def test_vllm_tells_its_kv_tokens_as_a_metric(glmplan, tmp_path):
    plan = tmp_path / "plan.json"
    assert glmplan("size", "--gpus", "8x h200", "--engine", "vllm", "--save", str(plan)).code == 0
    line = 'vllm:cache_config_info{{block_size="64",engine="{}",num_gpu_blocks="1000"}} 1.0\n'
    with streaming(Behaviour(metrics="# TYPE x\n" + line.format(0) + line.format(1))) as (url, _):
        found = json.loads(glmplan("bench", "--url", url, *SMALL, "--plan", str(plan), "--json").out)
    assert [(row["measured"], row["source"]) for row in found["plan"]] == [
        (128_000, "/metrics"), (131_072, "/v1/models"), (None, "not told"),
    ]  # fmt: skip


def test_ctrl_c_prints_what_was_measured_and_exits_130(tmp_path):
    """While two of the second level's requests are in the middle of answers that never end."""
    with streaming(Behaviour(token_s=0.02, fail={12: "silent", 13: "silent"})) as (url, known):
        command = [sys.executable, "-m", "glmplan", "bench", "--url", url, "--concurrency", "1,2", "--prompt-tokens", "32"]
        words = ["--output-tokens", "16", "--requests-per-level", "5", "--prefill", "none", "--out", str(tmp_path)]
        with interruptible():
            process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for("the second level", lambda: len(known.bodies) == 1 + 1 + 5 + 2 + 4)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=40)
    assert time.monotonic() - began < 20
    assert process.returncode == 130, err
    assert "concurrency 1" in out
    assert "5/5" in out
    assert "concurrency 2 (cut)" in out
    assert "interrupted" in out
    assert "failed" not in out
    assert "Traceback" not in err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["interrupted"] is True
    assert (tmp_path / "bench.svg").exists()


def stand_in() -> tuple[subprocess.Popen[str], int]:
    """The stand-in, ready, and its port. A free port may be taken before it is bound: then other ones are tried."""
    for _ in range(5):
        with socket.socket() as free, socket.socket() as other:
            free.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            http_port, port = free.getsockname()[1], other.getsockname()[1]
        words = ["-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(http_port)]
        command = [sys.executable, "-m", "glmplan.node", "standin", "python3", *words]
        command += ["--dist-init-addr", f"127.0.0.1:{port}"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "fired up" in line:
                return process, http_port
        process.communicate()
    raise AssertionError(said)


def test_the_stand_in_is_measured_too(glmplan):
    process, http_port = stand_in()
    try:
        ran = glmplan("bench", "--url", f"http://127.0.0.1:{http_port}", *SMALL, "--json")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert ran.code == 0, ran.err
    level = json.loads(ran.out)["levels"][0]
    assert (level["completed"], level["output_tokens"], level["counted_by"]) == (8, 8 * 16, "usage")
    assert level["decode_tokens_per_s"] is None, "the stand-in sends every answer in one piece"
