"""The table, and rules that hold for every check."""

from __future__ import annotations

import pytest

from glmplan.doctor import checks
from glmplan.doctor.checks import CHECKS, chosen, judge
from glmplan.doctor.finding import Report
from glmplan.errors import UnreachableError, UsageError
from glmplan.facts.host import Host
from tests.doctor.hosts import host, plan, seen


def test_names_are_unique_and_every_check_judges() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    silent = [check.name for check in CHECKS if check.judge is None and check.judge_all is None]
    assert silent == [checks.REACHABLE]


def test_healthy_hosts_of_the_plan_fail_nowhere() -> None:
    findings = judge(seen(plan=plan()), chosen(None, with_deep=True))
    assert not [finding for finding in findings if finding.status in ("warn", "fail")]
    assert {finding.host for finding in findings} == {"h1", "h2", "h3", "all hosts"}
    assert sum(finding.status == "ok" for finding in findings) > 60


def test_a_host_of_which_nothing_is_known_is_never_a_traceback() -> None:
    for what in (seen(Host(name="bare")), seen(Host(name="bare"), host(2), plan=plan())):
        findings = judge(what, chosen(None, with_deep=True))
        assert {finding.host for finding in findings} >= {"bare"}
        assert all(finding.evidence for finding in findings)
        assert all(finding.repair for finding in findings if finding.status in ("warn", "fail"))


def test_an_unreachable_host_is_a_finding_and_the_others_are_judged() -> None:
    error = UnreachableError("h2 did not take a connection within 4 s.", "Try `ssh h2 true`.")
    what = seen(host(1), host(3), names=("h1", "h2", "h3"), unreachable={"h2": error})
    findings = judge(what, chosen(None, with_deep=False))
    lost = [finding for finding in findings if finding.host == "h2"]
    assert [(one.check, one.status, one.repair) for one in lost] == [("reachable", "fail", "Try `ssh h2 true`.")]
    assert [finding.host for finding in findings if finding.check == "gpus"] == ["h1", "h3"]
    report = Report(hosts=what.names, unreachable=("h2",), elapsed_s=1.0, findings=findings)
    assert report.exit_code == 5


def test_exit_code_is_one_only_for_failures() -> None:
    warned = judge(seen(host(swap_total_bytes=2**35, swap_used_bytes=2**34)), chosen("swap", with_deep=False))
    assert [finding.status for finding in warned] == ["warn"]
    assert Report(hosts=("h1",), elapsed_s=1.0, findings=warned).exit_code == 0
    failed = judge(seen(host(gpu_changes={"mig": True})), chosen("mig", with_deep=False))
    assert Report(hosts=("h1",), elapsed_s=1.0, findings=failed).exit_code == 1


def test_only_names_checks_and_refuses_others() -> None:
    assert [check.name for check in chosen("clock, ports", with_deep=False)] == ["clock", "ports"]
    assert all(check.level == "quick" for check in chosen(None, with_deep=False))
    with pytest.raises(UsageError, match="',' names no check"):
        chosen(",", with_deep=False)
    with pytest.raises(UsageError, match="no check 'prots'") as error:
        chosen("prots", with_deep=False)
    assert "ports" in error.value.next_step
    with pytest.raises(UsageError, match="deep check"):
        chosen("kernels", with_deep=False)
