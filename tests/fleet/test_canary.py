"""Canaries over real HTTP: right servers pass, and each way of being wrong is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from glmplan.errors import GlmplanError, NotHealthyError, UsageError, WrongAnswersError
from glmplan.fleet import questions
from glmplan.fleet.canary import CanarySettings, chosen, require_right, run_canaries
from glmplan.fleet.reference import Reference, detect_family, prompts, record
from glmplan.fleet.served import Served, http_ask
from tests.fleet.served_by import Behaviour, serving
from tests.node.host import free_port

ALWAYS = ("fact", "arithmetic", "needle", "long-needle", "tool", "repeat")


def judged(only=(), settings=None, **faults):
    """The results by name of a server with these faults."""
    with serving(Behaviour(**faults)) as (url, behaviour):
        found = run_canaries(http_ask(url, faults.get("key")), settings or CanarySettings(only=tuple(only), timeout_s=60))
        return {result.name: result for result in found}, behaviour


def test_a_right_server_passes_all_and_the_rest_is_skipped_with_a_reason():
    found, _ = judged()
    assert {name: found[name].status for name in ALWAYS} == dict.fromkeys(ALWAYS, "pass")
    assert {found[name].status for name in ("mtp", "reference")} == {"skip"}
    assert all(found[name].note for name in ("mtp", "reference"))
    require_right(tuple(found.values()))


@pytest.mark.parametrize(
    ("name", "faults", "got"),
    [
        ("fact", {"wrong_fact": True}, "Lyon"),
        ("arithmetic", {"wrong_sum": True}, "409"),
        ("needle", {"sees_words": 1_000}, "I do not know."),
        ("long-needle", {"sees_words": 8_000}, "I do not know."),
        ("tool", {"no_tool_parser": True}, "no tool call"),
        ("tool", {"arguments": '{"city": "Rome"}'}, "Rome"),
        ("tool", {"arguments": "{city"}, "no JSON"),
        ("repeat", {"restless": True}, "seven"),
    ],
)
def test_each_wrong_answer_is_named_with_what_was_expected_and_got(name, faults, got):
    found, _ = judged([name], **faults)
    assert found[name].status == "fail"
    assert got in found[name].got
    with pytest.raises(WrongAnswersError, match=f"canary {name} expected") as failure:
        require_right(tuple(found.values()))
    assert failure.value.exit_code == 7


def test_a_server_that_sees_only_the_selected_tokens_fails_the_needles_alone():
    found, _ = judged(sees_words=1_500)
    assert [name for name in ALWAYS if found[name].status == "fail"] == ["needle", "long-needle"]


def test_the_needle_lies_as_deep_as_it_says_by_the_server_s_own_count():
    found, behaviour = judged(["needle"], words_per_token=1.4)
    assert found["needle"].status == "pass"
    counts = [len(body["messages"][0]["content"].split()) / 1.4 for path, _, body in behaviour.asked if "chat" in path]
    assert counts[0] < 4_608 <= counts[-1], "the first prompt was too short, the last was not"


def test_a_needle_has_enough_text_on_both_sides():
    question = questions.needle("needle", 2_304, 2_304)
    before, after = question.prompt.split("The access code of the lighthouse", 1)
    assert len(before) / 4 > 2_304
    assert len(after) / 4 > 2_304
    assert question.prompt == questions.needle("needle", 2_304, 2_304).prompt, "every run asks the same"


def test_a_needle_that_the_context_does_not_hold_is_skipped():
    found, _ = judged(["needle", "long-needle"], context=8_192)
    assert (found["needle"].status, found["long-needle"].status) == ("pass", "skip")
    assert "8,192" in found["long-needle"].note


def test_thinking_is_stripped_and_endless_thinking_is_said():
    found, _ = judged(["fact", "arithmetic"], thinks="It is 409, no")
    assert {result.status for result in found.values()} == {"pass"}
    found, _ = judged(["fact"], thinks="forever")
    assert (found["fact"].status, found["fact"].got) == ("fail", "")
    assert "thinking" in found["fact"].note


def test_a_server_without_the_thinking_switch_is_asked_without_it():
    found, behaviour = judged(["fact", "arithmetic"], no_switch=True)
    assert {result.status for result in found.values()} == {"pass"}
    sent = ["chat_template_kwargs" in body for path, _, body in behaviour.asked if "chat" in path]
    assert sent == [True, False, False]


def test_equal_runs_may_part_at_a_tie_but_not_elsewhere():
    assert judged(["repeat"], restless=True, tie=True)[0]["repeat"].status == "pass"
    assert "tie" in judged(["repeat"], restless=True, tie=True)[0]["repeat"].note


def test_the_text_with_mtp_must_be_the_text_without():
    settings = CanarySettings(only=("mtp",))
    with serving() as (with_mtp, _), serving() as (without, _), serving(Behaviour(restless=True)) as (other, _):
        same = run_canaries(http_ask(with_mtp), settings, without_mtp=http_ask(without))
        differing = run_canaries(http_ask(other), settings, without_mtp=http_ask(without))
    assert (same[0].status, differing[0].status) == ("pass", "fail")


def test_no_answer_in_time_fails_the_canary_and_no_server_ends_the_run():
    found, _ = judged(settings=CanarySettings(only=("fact",), timeout_s=0.2, model="glm"), sleeps_s=1.0)
    assert found["fact"].status == "fail"
    assert "no answer within 0.2 s" in found["fact"].got
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(NotHealthyError, match="does not answer"):
            run_canaries(http_ask(f"http://127.0.0.1:{free.getsockname()[1]}"), CanarySettings(only=("fact",)))


def test_an_http_error_is_shown_in_the_server_s_words():
    with serving(Behaviour(key="sesame")) as (url, _):
        found = run_canaries(http_ask(url), CanarySettings(only=("fact",), model="glm"))
    assert found[0].got == "HTTP 401: Unauthorized"


def test_the_key_goes_into_a_header_and_to_no_other_server():
    with serving(Behaviour(key="sesame")) as (url, behaviour):
        assert run_canaries(http_ask(url, "sesame"), CanarySettings(only=("fact",)))[0].status == "pass"
    assert all("sesame" not in f"{path}{body}" for path, _, body in behaviour.asked)
    with serving() as (other, stolen), serving(Behaviour(redirects=other)) as (url, _):
        found = run_canaries(http_ask(url, "sesame"), CanarySettings(only=("fact",), model="glm"))
    assert found[0].status == "fail"
    assert stolen.asked == []


def test_results_are_told_as_they_come_and_names_are_checked():
    told = []
    with serving() as (url, _):
        run_canaries(http_ask(url), CanarySettings(only=("arithmetic", "fact")), told.append)
    assert [result.name for result in told] == ["fact", "arithmetic"]
    with pytest.raises(UsageError, match="needel"):
        chosen(CanarySettings(only=("needel",)))
    assert chosen(CanarySettings(skip=("tool",))) == tuple(name for name in chosen(CanarySettings()) if name != "tool")


def test_nothing_asked_proves_nothing():
    found, _ = judged(["mtp", "reference"])
    with pytest.raises(WrongAnswersError, match="nothing is proven"):
        require_right(tuple(found.values()))


@pytest.mark.parametrize("url", ["10.0.0.1:30000", "file:///etc/passwd", "ftp://x"])
def test_only_http_addresses_are_asked(url):
    with pytest.raises(UsageError, match="not the address"):
        http_ask(url)


@pytest.mark.parametrize(
    "body", [None, [], {}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": None}]}, "text"]
)
def test_odd_answers_are_no_text_and_no_tool_call(body):
    assert questions.text_of(body) == ""
    assert questions.tool_problem(body)
    assert questions.prompt_tokens(body) is None


@pytest.mark.parametrize(
    ("text", "right"), [("408", True), ("It is **408**.", True), ("4081", False), ("17 x 24 = 408", True), ("40 8", False)]
)
def test_numbers_are_compared_whole(text, right):
    assert questions.ARITHMETIC.right(text) is right


def test_a_number_with_separators_is_the_number():
    question = questions.needle("needle", 100, 100)
    code = int(question.expected)
    assert question.right(f"The code is {code:,}.")
    assert not question.right(str(code + 1))


# --- recorded answers ---------------------------------------------------------------------------------------------------


def recorded(url, context=131_072, tolerance=0.1):
    served = Served(http_ask(url), 60.0)
    family, version = detect_family(served.request)
    return record(served.request, served.model, family, version, context, tolerance)


@pytest.fixture(scope="module")
def trusted() -> Reference:
    """What a right SGLang server says."""
    with serving() as (url, _):
        return recorded(url)


def compared(reference, **faults):
    with serving(Behaviour(**faults)) as (url, _):
        return run_canaries(http_ask(url), CanarySettings(only=("reference",), reference=reference))[0]


def test_a_server_agrees_with_its_own_record(trusted):
    found = compared(trusted)
    assert found.status == "pass", found
    assert "144 of 144 tokens" in found.note
    assert trusted.noise_nats == 0


def test_the_other_engine_is_asked_in_its_own_way_and_agrees(trusted):
    assert compared(trusted, family="vllm").status == "pass"
    with serving(Behaviour(family="vllm")) as (url, behaviour):
        own = recorded(url, context=1_000)
    assert (own.engine_family, own.engine_version) == ("vllm", "0.33.0")
    assert {path for path, _, _ in behaviour.asked if path.startswith(("/generate", "/v1/comp"))} == {"/v1/completions"}
    assert own.entries == trusted.entries[:3]


def test_wrong_tokens_past_2048_are_found_and_placed(trusted):
    found = compared(trusted, broken_after=2_048)
    assert found.status == "fail"
    assert "after the prompt of 2600 tokens" in found.got


def test_small_drift_passes_and_large_drift_fails(trusted):
    assert compared(trusted, drift=-0.05).status == "pass"
    found = compared(trusted, drift=-0.3)
    assert found.status == "fail"
    assert "0.3000 nats" in found.got


def test_swapped_ties_are_no_fault_and_hide_nothing_after_them(trusted):
    found = compared(trusted, swaps_ties=True)
    assert found.status == "pass", found
    assert "ties" in found.got
    assert compared(trusted, swaps_ties=True, broken_after=2_048).status == "fail"


def test_prompts_are_the_same_every_time_and_fit_the_context():
    assert prompts(None) == prompts(None)
    assert max(len(ids) for ids in prompts(3_000).values()) == 2_600
    assert all(5 <= one <= 999 for ids in prompts(None).values() for one in ids)


def test_a_server_that_disagrees_with_itself_is_not_recorded():
    class Restless(Behaviour):
        def __getattr__(self, name):
            return 0.3 * len(self.asked) if name == "drift" else super().__getattr__(name)

    with serving(Restless()) as (url, _), pytest.raises(GlmplanError, match="disagrees with itself"):
        recorded(url, context=100)


def test_answers_without_log_probabilities_are_a_sentence():
    with serving(Behaviour(no_logprobs=True)) as (url, _), pytest.raises(GlmplanError, match="no log-probabilities"):
        recorded(url, context=100)


def test_a_server_of_neither_engine_is_a_sentence():
    with serving(Behaviour(family="other")) as (url, _), pytest.raises(GlmplanError, match="neither SGLang nor vLLM"):
        recorded(url)


# --- the stand-in worker of rehearsals ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standin():
    """A rehearsal's own server: one rank, one node, a real process."""
    http_port, port = free_port(), free_port()
    words = f"--model-path glm --tp-size 1 --nnodes 1 --node-rank 0 --dist-init-addr 127.0.0.1:{port} --context-length 32768"
    command = [sys.executable, "-m", "glmplan.node", "standin", "python3", "-m", "sglang.launch_server", *words.split()]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(http_port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{http_port}"
        _wait(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url, process):
    ask, until = http_ask(url), time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if ask("GET", "/health", None, 10.0)[0] == 200:
                return
        except GlmplanError:
            time.sleep(0.1)
    pytest.fail("the stand-in did not come up")


def test_the_stand_in_passes_every_canary_by_reading_the_prompts(standin):
    found = run_canaries(http_ask(standin), CanarySettings(timeout_s=120))
    assert {result.name: result.status for result in found if result.status != "pass"} == {
        "mtp": "skip",
        "reference": "skip",
    }


def test_the_stand_in_agrees_with_its_own_record(standin):
    reference = recorded(standin, context=32_768)
    found = run_canaries(http_ask(standin), CanarySettings(only=("reference",), reference=reference))
    assert found[0].status == "pass"
