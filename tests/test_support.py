"""What is proven, what is only expected, and the page and packaged summary that say so."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import support as page
from glmplan.cli._output import console, print_plan
from glmplan.facts.host import Inventory
from glmplan.facts.profiles import engine_profile
from glmplan.facts.support import ProofProfile, ProofRun, support_of
from glmplan.planning.build import Context, build_plan
from glmplan.planning.request import Pins, Request
from glmplan.planning.search import search
from tests.samples import NEW, host, target

ON = "ran on one H200, 2026-11-20 (agreement)"
AS_89 = "ran compiled for sm_89 on one H200, 2026-11-20 (agreement)"


def run(compiled_for: int = 90, holds: bool = True, kv_format: str = "fp8_packed", **changes: Any) -> ProofRun:
    """A run on one H200."""
    found = {
        "engine": "sglang", "engine_version": "0.5.23", "glmplan_version": "0.1.0", "gpu": "H200", "sm": 90,
        "compiled_for": compiled_for, "kv_format": kv_format, "scheme": "fp8", "date": "2026-11-20",
        "record": "docs/proof/agreement-0.5.23.json", "checks": [{"id": "agreement", "holds": holds}],
    }  # fmt: skip
    return ProofRun.model_validate({**found, **changes})


@pytest.mark.parametrize(
    ("runs", "sms", "evidence", "words"),
    [
        ([], [90], "expected", ""),
        ([run()], [90], "proven", ON),
        ([run(89)], [89], "expected", AS_89),
        ([run(89)], [90], "expected", ""),
        ([run(80), run(89)], [86], "expected", ""),
        ([run(), run(89)], [90, 89], "expected", f"{ON}; {AS_89}"),
        ([run()], [90, 90], "proven", ON),
        ([run(kv_format="bf16")], [90], "expected", ""),
        ([run(holds=False)], [90], "expected", "ran on one H200, 2026-11-20, where agreement DID NOT HOLD"),
        ([run()], [None], "expected", ""),
        ([run()], [], "expected", ""),
    ],
)
def test_proven_needs_a_run_on_that_very_sm_with_those_rows(runs, sms, evidence, words):
    found = support_of(runs, "fp8_packed", True, "expected", sms)
    assert found == (evidence, words)


def test_one_run_that_does_not_hold_undoes_those_that_do_and_is_told_first():
    found = support_of([run(), run(holds=False)], "fp8_packed", True, "expected", [90])
    assert found.evidence == "expected"
    assert "DID NOT HOLD" in found.words.split(";")[0]
    assert ON in found.words


def test_a_record_says_nothing_of_the_engine_s_own_kernels():
    assert support_of([run()], "fp8_packed", False, "reported", [90]) == ("reported", "")


def record(**changes: Any) -> dict[str, Any]:
    """A record as benchmarks/proof/harness.py writes it."""
    line = "glmplan port: glmplan=0.1.0 sglang=0.5.23 sm=90 compiled_for={} mode=force prefill=triton kv={} replaced=a.b"
    part = {"holds": True, "noise": {}, "ports": {"fp8-port": {}, "fp8-sm89": {}}, "controls": {"fp8-control": {}}}
    servers = {
        "fp8-stock": {"port_lines": []},
        "fp8-port": {"port_lines": [line.format(90, "packed")]},
        "fp8-sm89": {"port_lines": [f"[TP0] {line.format(89, 'packed')}"]},
        "fp8-control": {"port_lines": [line.format(90, "packed")]},
        "bf16-port": {"port_lines": [line.format(90, "bf16")]},
        "bf16-sm89": {"port_lines": []},
    }
    other = {**part, "holds": False, "ports": {"bf16-port": {}, "bf16-sm89": {}}}
    return {
        "proof": "agreement-0.5.23", "date": "2026-11-20", "setting": {"gpu": "1x NVIDIA H200, 580.95.05"},
        "verdict": {"holds": False, "prompts": 21, "parts": {"fp8": part, "bf16": other}}, "servers": servers, **changes,
    }  # fmt: skip


def test_a_record_gives_the_servers_whose_answers_were_compared():
    """Not the control, which is wrong on purpose, nor a server that did not say that it has the port."""
    found = list(page.runs_of(record(), "agreement-0.5.23.json"))
    assert [(one.sm, one.compiled_for, one.kv_format, one.holds) for one in found] == [
        (90, 90, "bf16", False),
        (90, 90, "fp8_packed", True),
        (90, 89, "fp8_packed", True),
    ]
    assert found[1] == run()


def test_a_record_without_comparisons_gives_no_run_and_is_named(tmp_path: Path, capsys):
    speed = {"fp8": {"holds": True, "stock": {}, "port": {}, "lines": []}}
    (tmp_path / "speed.json").write_text(json.dumps(record(verdict={"holds": True, "parts": speed})))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "real.json").write_text(json.dumps(record()))
    assert len(page.proof_runs(tmp_path)) == 3
    said = capsys.readouterr().err
    assert "speed.json" in said
    assert "other.json" in said
    assert "real.json" not in said


def test_the_summary_is_read_back_equal():
    runs = list(page.runs_of(record(), "agreement-0.5.23.json"))
    ((name, text),) = page.summaries(runs).items()
    assert name == "sglang-0.5.23.toml"
    assert ProofProfile.model_validate(tomllib.loads(text)).runs == tuple(runs)


def test_the_page_is_what_the_script_prints():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "python benchmarks/support.py --write"


def test_the_packaged_summary_is_that_of_the_records():
    packaged = {path.name: path.read_text(encoding="utf-8") for path in page.SUMMARY.glob("*.toml")}
    assert packaged == page.summaries(page.proof_runs()), "python benchmarks/support.py --write"


def rows(text: str) -> dict[tuple[str, str], list[str]]:
    """(SM, kernel port) -> the scheme cells of the first matrix."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0].startswith("sm_"):
            found.setdefault((cells[0], cells[1]), cells[2:])
    return found


def test_a_cell_is_proven_only_where_a_run_of_that_scheme_was():
    engine = engine_profile(NEW).model_copy(update={"proof": (run(), run(89))})
    found = rows(page.page([engine], []))
    assert found["sm_90", "force"][:2] == ["proven: port-fp8, fp8-b", "expected: port-fp8, bf16-a"]
    assert found["sm_90", "auto"][0] == "expected: flashmla-fp8, fp8-b"
    assert found["sm_89", "auto"][0] == "expected: port-fp8, fp8-a"
    assert found["sm_100", "auto"][4] == "refused: no weight kernel"
    assert f"sm_89 expected: {AS_89}; sm_90 proven: {ON}" in page.page([engine], [])


def test_the_plan_quotes_the_records(capsys):
    engine = engine_profile(NEW).model_copy(update={"proof": (run(), run(89))})
    forced = Request(8192, pins=Pins(tp=8, pp=1), kernel_port="force")
    for gpu, request, evidence, words in (
        ("h200", forced, "proven", ON),
        ("h200", Request(8192, pins=Pins(tp=8, pp=1)), "expected", ""),
        ("rtx-4090-48g", Request(8192), "expected", AS_89),
    ):
        hosts = Inventory(hosts=tuple(host(name, gpu) for name in "abc"))
        found = search(hosts, replace(target(), engine=engine), request)
        plan = build_plan(found, Context("declared", None, with_changes=False))
        attention, indexer, weights = plan.ports
        assert (attention.evidence, attention.proof) == (indexer.evidence, indexer.proof) == (evidence, words)
        assert (weights.evidence, weights.proof) == ("expected", "")
        print_plan(console(), plan)
        assert (words or "expected").split(" ")[0] in capsys.readouterr().out
