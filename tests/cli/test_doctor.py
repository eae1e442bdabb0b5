"""The command line of doctor: options, lists, JSON and exit codes, against this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment or state of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_the_list_names_every_check(glmplan: Run) -> None:
    listed = json.loads(glmplan("doctor", "--list", "--json").out)
    assert {"paths", "kernels", "all-reduce"} <= {check["name"] for check in listed}
    plain = glmplan("doctor", "--list")
    assert plain.code == 0
    assert len(plain.out.splitlines()) == len(listed)


def test_this_machine_is_judged_without_hosts(glmplan: Run) -> None:
    ran = glmplan("doctor", "--only", "reachable,memory,swap")
    assert ran.code == 0
    assert ran.out.startswith("local\n")
    assert "1 host in " in ran.out


def test_two_nodes_on_this_machine_reach_each_other(glmplan: Run) -> None:
    ran = glmplan(
        "doctor", "--hosts", "local#0-1,local#2-3", "--only", "paths,interface", "--json", "--rendezvous-port", "21987"
    )
    report = json.loads(ran.out)
    assert ran.code == 0, ran.out
    assert [finding["status"] for finding in report["findings"]] == ["ok"] * 4
    assert "127.0.0.2" in report["findings"][2]["evidence"]


def test_a_plan_without_its_gpus_fails(glmplan: Run, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    assert glmplan("size", "--save", str(saved)).code == 0
    ran = glmplan(
        "doctor", "--hosts", "local#0-7,local#8-15,local#16-23", "--plan", str(saved), "--only", "gpus,engine", "--json"
    )
    assert ran.code == 1
    report = json.loads(ran.out)
    assert report["plan"] == str(saved)
    assert {finding["status"] for finding in report["findings"]} == {"fail"}


def test_a_plan_for_other_hosts_is_refused(glmplan: Run, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    assert glmplan("size", "--save", str(saved)).code == 0
    ran = glmplan("doctor", "--plan", str(saved))
    assert ran.code == 2
    assert "The plan is for 3 hosts; 1 is named." in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "nope"), "no check 'nope'"),
        (("--only", "kernels"), "is a deep check"),
        (("--hosts", "a,,b"), "empty name"),
        (("--plan", "/nonexistent.json"), "/nonexistent.json"),
        (("--rendezvous-port", "0"), "not between 1 and 65535"),
    ],
)
def test_wrong_options_are_usage_errors(glmplan: Run, arguments: tuple[str, ...], words: str) -> None:
    ran = glmplan("doctor", *arguments)
    assert ran.code == 2
    assert words in ran.err
