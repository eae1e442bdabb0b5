"""Canaries over real HTTP: right servers pass, and each way of being wrong is named."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from glmplan.cli._wanted import read_reference
from glmplan.errors import GlmplanError, NotHealthyError, UsageError, WrongAnswersError
from glmplan.fleet import questions
from glmplan.fleet.canary import CanarySettings, chosen, require_right, run_canaries
from glmplan.fleet.reference import NOISE_LIMIT, Reference, detect_family, greedy, prompts, record
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


def test_a_server_that_hangs_is_not_asked_everything():
    found, _ = judged(settings=CanarySettings(skip=("reference",), timeout_s=0.2, model="glm"), sleeps_s=1.0)
    assert [found[name].status for name in ("fact", "arithmetic", "needle", "repeat")] == ["fail", "fail", "skip", "skip"]
    assert found["needle"].note == "not asked: the 2 before got no answer within 0.2 s each"
    with pytest.raises(WrongAnswersError, match="canary fact expected 'an answer'"):
        require_right(tuple(found.values()))


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


def recorded(url, context=131_072, **allowed):
    served = Served(http_ask(url), 60.0)
    family, version = detect_family(served.request)
    return record(served.request, served.model, family, version, context, **allowed)


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
    assert found.note == "144 of 144 tokens compared, at most 0.000 nats apart on average (8 tokens)"
    assert trusted.noise_nats == 0
    assert [entry.noise_nats for entry in trusted.entries] == [0] * 6
    assert trusted.tie_nats == 0.2


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


def test_a_server_exact_on_short_and_off_on_long_prompts_is_refused(trusted):
    found = compared(trusted, drift=-0.2, drift_after=2_048)
    assert found.status == "fail"
    assert re.fullmatch(
        r"a mean difference of 0\.2000 nats after the prompt of (2600|5000|17500) tokens, 0\.1 are allowed; "
        "3 prompts exceed their limit",
        found.got,
    )
    found = compared(trusted, drift=0.2, drift_after=6_000)
    assert found.got == "a mean difference of 0.2000 nats after the prompt of 17500 tokens, 0.1 are allowed", "0.03 over all"
    assert found.expected == "the recorded tokens, log-probabilities within 0.1 nats on average after every prompt"


@pytest.mark.parametrize("drift", [0.06, -0.08])
def test_another_right_kernel_is_right(trusted, drift):
    found = compared(trusted, drift=drift, drift_after=2_048)
    assert found.status == "pass", found
    assert found.note.startswith(f"144 of 144 tokens compared, at most {abs(drift):.3f} nats apart on average (")


def of_noise(reference, noise, beyond):
    """The record of a server that differed from itself after longer prompts than `beyond`."""
    entries = (
        one.model_copy(update={"noise_nats": noise if len(one.prompt_ids) > beyond else 0.0}) for one in reference.entries
    )
    return reference.model_copy(update={"entries": tuple(entries)})


def test_a_prompt_may_differ_twice_as_much_as_the_trusted_server_does_there(trusted):
    noisy = of_noise(trusted, 0.07, beyond=2_048)
    assert compared(noisy, drift=0.13, drift_after=2_048).status == "pass"
    found = compared(noisy, drift=0.13, drift_after=600)
    assert found.status == "fail"
    assert found.got == "a mean difference of 0.1300 nats after the prompt of 700 tokens, 0.1 are allowed"
    assert "within 0.1 to 0.14 nats" in found.expected


def test_the_mean_of_the_whole_is_judged_too(trusted):
    found = compared(of_noise(trusted, 0.1, beyond=0), drift=0.14)
    assert found.status == "fail"
    assert found.got == "a mean difference of 0.1400 nats over 144 tokens, 0.1 are allowed"
    assert found.expected == (
        "the recorded tokens, log-probabilities within 0.15 nats on average after every prompt and within 0.1 over all"
    )
    assert "reference expected 'the recorded tokens" in found.difference


def test_fewer_tokens_than_asked_are_no_answer(trusted):
    found = compared(trusted, short_after=6_000)
    assert found.status == "fail"
    assert found.got == "3 of 24 tokens came after the prompt of 17500 tokens, though a text's end was to be ignored"
    assert "reference expected 'the recorded tokens" in found.difference


@pytest.mark.parametrize("family", ["sglang", "vllm"])
@pytest.mark.parametrize("count", [3, 0])
def test_fewer_tokens_than_asked_are_not_recorded(family, count):
    words = rf"no reference: {count} of 24 tokens came after the prompt of 17500 tokens, though"
    short = Behaviour(family=family, short_after=6_000, short_tokens=count)
    with serving(short) as (url, _), pytest.raises(GlmplanError, match=words) as failure:
        recorded(url)
    assert "17,524 tokens" in failure.value.next_step
    assert "--context" in failure.value.next_step
    with serving(short) as (url, _):
        assert len(recorded(url, context=6_000).entries) == 5


def test_records_of_too_few_tokens_are_refused(trusted, tmp_path):
    def of_length(count):
        return [
            {**one.model_dump(), "tokens": [token.model_dump() for token in one.tokens[:count]]} for one in trusted.entries
        ]

    found = kept(tmp_path, {**trusted.model_dump(), "entries": of_length(12)})
    assert found.entries[0].tokens == trusted.entries[0].tokens[:12]
    assert compared(found).note.startswith("72 of 72 tokens compared")
    with pytest.raises(UsageError, match=r"is no record of answers: entries\.0\.tokens: .* at least 12 items"):
        kept(tmp_path, {**trusted.model_dump(), "entries": of_length(11)})


@pytest.mark.parametrize("drift", [0, 0.2])
def test_every_request_compares_a_token_whatever_ties(drift):
    """Nothing but ties: 12 requests compare 12 of 24 tokens, which is a verdict."""
    with serving(Behaviour(only_ties=True)) as (url, _):
        reference = recorded(url, context=1_000)
    with serving(Behaviour(only_ties=True, swaps_ties=True, drift=drift)) as (url, behaviour):
        found = run_canaries(http_ask(url), CanarySettings(only=("reference",), reference=reference))[0]
    assert sum(path == "/generate" for path, _, _ in behaviour.asked) == 3 * 12
    assert found.note.startswith("36 of 72 tokens compared")
    assert found.status == ("fail" if drift else "pass")


def test_a_server_that_agrees_is_asked_every_prompt_once(trusted):
    with serving() as (url, behaviour):
        run_canaries(http_ask(url), CanarySettings(only=("reference",), reference=trusted))
    assert sum(path == "/generate" for path, _, _ in behaviour.asked) == 6


def test_a_longer_record_is_judged_by_what_is_compared(trusted):
    """Hand-made: 40 tokens a prompt."""
    reference = trusted.model_copy(update={"entries": tuple(longer(one, 40) for one in trusted.entries[:3])})
    found = compared(reference)
    assert (found.status, found.note[:27]) == ("pass", "120 of 120 tokens compared,")
    assert compared(reference, drift=0.2, drift_after=600).status == "fail"


def longer(entry, count):
    """The entry with this many tokens of a right server."""
    with serving() as (url, _):
        found = greedy(Served(http_ask(url), 60.0).request, "sglang", "glm", entry.prompt_ids, count)
    return entry.model_copy(update={"tokens": tuple(found)})


# JSON has no NaN: SGLang writes null, Python's own json NaN, and vLLM -9999 for -inf.
ODD = [math.nan, math.inf, -math.inf, "null", -9999.0]


@pytest.mark.parametrize("family", ["sglang", "vllm"])
@pytest.mark.parametrize("odd", ODD)
def test_a_log_probability_that_is_no_number_is_said(trusted, family, odd):
    found = compared(trusted, family=family, odd=odd, odd_after=2_048)
    assert found.status == "fail"
    words = (
        r"a log-probability that is no number after the prompt of 2600 tokens \((nan|-?inf|null|-9999) for token [0-9]+\)"
    )
    assert re.fullmatch(words, found.got)
    assert "reference expected 'the recorded tokens" in found.difference
    strange = Behaviour(family=family, odd=odd, odd_after=2_048)
    with serving(strange) as (url, _), pytest.raises(GlmplanError, match=f"are no reference: {words}") as failure:
        recorded(url)
    assert failure.value.next_step.startswith("Look at its log")


@pytest.mark.parametrize("family", ["sglang", "vllm"])
@pytest.mark.parametrize("odd", ODD)
def test_an_alternative_without_a_chance_is_left_out(family, odd):
    with serving(Behaviour(family=family, odd_runner_up=odd)) as (url, _):
        if odd in (math.nan, math.inf):
            with pytest.raises(GlmplanError, match="that is no number"):
                recorded(url, context=100)
        else:
            entry = recorded(url, context=100).entries[0]
            assert {len(token.alternatives) for token in entry.tokens} == {1}


def kept(folder, content):
    """A record as `--reference` reads it."""
    (folder / "answers.json").write_text(json.dumps(content))
    return read_reference(folder / "answers.json")


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("where", ["logprob", "alternatives"])
def test_a_record_with_a_log_probability_that_is_no_number_is_refused(trusted, tmp_path, where, odd):
    content = trusted.model_dump()
    token = content["entries"][1]["tokens"][2]
    token[where] = odd if where == "logprob" else [[3, odd]]
    with pytest.raises(UsageError, match=rf"is no record of answers: entries\.1\.tokens\.2\.{where}.*: input should be"):
        kept(tmp_path, content)


def test_a_record_that_makes_its_own_limit_is_refused(trusted, tmp_path):
    content = trusted.model_dump()
    kept(tmp_path, {**content, "noise_nats": 0.1})
    words = r"answers: noise_nats: a trusted server may differ from itself by 0\.1 nats here \(it is '(0\.11|1000\.0)'\)"
    for noise in (0.11, 1000.0):
        with pytest.raises(UsageError, match=words):
            kept(tmp_path, {**content, "noise_nats": noise})
    content["entries"][2]["noise_nats"] = 0.15
    assert kept(tmp_path, content).limits_nats[2] == pytest.approx(0.15), "noise widens a limit by half, no more"
    content["entries"][2]["noise_nats"] = 0.16
    words = r"entries\.2\.noise_nats: a trusted server may differ from itself by 0\.15 nats here \(it is '0\.16'\)"
    with pytest.raises(UsageError, match=words):
        kept(tmp_path, content)


@pytest.mark.parametrize(("name", "most"), [("tolerance_nats", 2), ("tie_nats", 10)])
def test_a_record_of_limits_without_sense_is_refused(trusted, tmp_path, name, most):
    assert kept(tmp_path, {**trusted.model_dump(), name: most}) == trusted.model_copy(update={name: most})
    with pytest.raises(UsageError, match=rf"{name}: input should be less than or equal to {most} \(it is '{most}\.1'\)"):
        kept(tmp_path, {**trusted.model_dump(), name: most + 0.1})


@pytest.fixture(scope="module")
def wide() -> dict[float, Reference]:
    """Records of a server whose ties lie 0.28 nats apart, by their window."""
    with serving(Behaviour(tie_gap=0.28)) as (url, _):
        return {ties: recorded(url, context=1_000, tie_nats=ties) for ties in (0.2, 1.0)}


def test_the_window_for_ties_is_a_number_of_its_own(wide):
    assert compared(wide[1.0], tie_gap=0.28, swaps_ties=True).status == "pass"
    found = compared(wide[0.2], tie_gap=0.28, swaps_ties=True)
    assert found.status == "fail"
    assert "; 0.280 nats lay between them, 0.2 are a tie" in found.got
    assert compared(wide[1.0], drift=0.2).status == "fail", "the tolerance stays"


def old(reference, **changes):
    """A record as it was written before each prompt had its noise and ties a window."""
    found = reference.model_dump()
    del found["tie_nats"]
    for entry in found["entries"]:
        del entry["noise_nats"]
    return Reference.model_validate({**found, **changes})


def test_records_made_before_are_read(trusted, wide):
    assert old(trusted).tie_window_nats == 0.2
    assert old(trusted, tolerance_nats=0.5).tie_window_nats == 1.0
    assert {one.noise_nats for one in old(trusted).entries} == {None}
    assert set(old(trusted, noise_nats=0.07).limits_nats) == {0.14}
    assert compared(old(trusted)).status == "pass"
    assert compared(old(trusted), drift=0.2, drift_after=2_048).status == "fail"
    assert compared(old(wide[0.2]), tie_gap=0.28, swaps_ties=True).status == "fail"
    assert compared(old(wide[0.2], tolerance_nats=0.5), tie_gap=0.28, swaps_ties=True).status == "pass"


@pytest.mark.parametrize("name", ["tolerance_nats", "tie_nats", "noise_nats"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_record_of_impossible_numbers_is_refused(trusted, name, value):
    with pytest.raises(ValidationError):
        Reference.model_validate({**trusted.model_dump(), name: value})


def test_swapped_ties_are_no_fault_and_hide_nothing_after_them(trusted):
    found = compared(trusted, swaps_ties=True)
    assert found.status == "pass", found
    assert "ties" in found.got
    assert compared(trusted, swaps_ties=True, broken_after=2_048).status == "fail"


def test_prompts_are_the_same_every_time_and_fit_the_context():
    assert prompts(None) == prompts(None)
    assert max(len(ids) for ids in prompts(3_000).values()) == 2_600
    assert all(5 <= one <= 999 for ids in prompts(None).values() for one in ids)


class Restless(Behaviour):
    """Every answer to a long prompt differs from the one before."""

    def __init__(self, step):
        super().__init__(drift_after=600)
        self.step = step

    def __getattr__(self, name):
        if name == "drift":
            return self.step * (sum(path == "/generate" for path, _, _ in self.asked) > 6)
        return super().__getattr__(name)


def test_a_right_server_s_noise_is_recorded_prompt_by_prompt():
    with serving(Restless(0.09)) as (url, _):
        found = recorded(url)
    assert [entry.noise_nats for entry in found.entries] == [0, 0, 0.09, 0.09, 0.09, 0.09]
    assert found.noise_nats == 0.06
    assert found.limits_nats == pytest.approx((0.1, 0.1, 0.15, 0.15, 0.15, 0.15))
    assert Reference.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("step", "allowed"), [(0.17, 0.1), (0.5, 0.3)])
def test_a_server_that_disagrees_with_itself_is_not_recorded(step, allowed):
    words = (
        rf"disagrees with itself: a mean difference of {step:.4f} nats after the prompt of 700 tokens, {1.5 * allowed:g} are"
    )
    with serving(Restless(step)) as (url, _), pytest.raises(GlmplanError, match=words) as failure:
        recorded(url, tolerance_nats=allowed)
    assert failure.value.next_step == "Record on an idle server, or allow more with --tolerance."


class Parting(Behaviour):
    """From its fifth request on it has one more fault: of three prompts, all were asked once."""

    def __init__(self, fault="swaps_ties", value=True, **faults):
        super().__init__(**faults)
        self.fault, self.value = fault, value

    def __getattr__(self, name):
        if name == self.fault and len(self.asked) > 5:
            return self.value
        return super().__getattr__(name)


NO_LIMIT_HELPS = "Record on an idle server. If it still disagrees, look at its log: no limit makes it a reference."


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (Parting("broken_after", 0), "token [0-9]+ .* at place 1 after the prompt of 8 tokens"),
        (Parting("short_after", 0), "3 of 24 tokens came"),
        (Parting("odd", "null"), "a log-probability that is no number"),
        (Parting(tie_gap=10.5), r"10\.500 nats lay between them"),
        (Parting("drift", -3.5), r"3\.5000 nats after the prompt of 8 tokens"),
    ],
)
def test_a_server_that_no_limit_makes_a_reference_is_told_of_none(behaviour, words):
    with serving(behaviour) as (url, _), pytest.raises(GlmplanError, match=f"disagrees with itself: .*{words}") as failure:
        recorded(url, context=1_000)
    assert failure.value.next_step == NO_LIMIT_HELPS


def test_a_record_s_own_noise_is_read_again():
    """Rounded to 4 digits, 0.12347 lies above what a record of this tolerance may have."""
    with serving(Restless(0.12347)) as (url, _):
        found = recorded(url, tolerance_nats=0.08232)
    assert max(entry.noise_nats for entry in found.entries) == NOISE_LIMIT * 0.08232 < 0.1235
    assert Reference.model_validate_json(found.model_dump_json()) == found


def test_a_server_whose_own_tokens_part_is_told_of_the_window_for_ties():
    with serving(Parting(tie_gap=0.28)) as (url, _), pytest.raises(GlmplanError, match=r"0\.2 are a tie") as failure:
        recorded(url, context=1_000)
    assert failure.value.next_step == "Record on an idle server, or allow more with --ties."
    with serving(Parting(tie_gap=0.28)) as (url, _):
        assert recorded(url, context=1_000, tie_nats=1.0).tie_nats == 1.0


def test_answers_without_log_probabilities_are_a_sentence():
    with serving(Behaviour(no_logprobs=True)) as (url, _), pytest.raises(GlmplanError, match="no log-probabilities"):
        recorded(url, context=100)


@pytest.mark.parametrize("odd", [10**400, -(10**400), "much", [1.0]])
def test_values_that_are_no_floats_are_a_sentence(odd):
    with serving(Behaviour(odd=odd)) as (url, _), pytest.raises(GlmplanError, match="no log-probabilities"):
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
