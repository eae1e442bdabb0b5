"""The proof of tuning: what is asked of the tuner and the server, and when it holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.proof import harness, tune
from benchmarks.proof.harness import Outcome
from glmplan.kernels.engines.sglang_expert_tables import file_name
from glmplan.kernels.engines.sglang_tune_experts import parse_experts

EVENTS = [
    {"kind": kind, "experts": experts, "n": n, "k": 1024, "rows": 1, "default_us": 20.0, "tuned_us": 10.0}
    for experts, n in ((None, 1), (None, 2), (None, 3), (16, 512), (256, 256))
    for kind in ("shape", "rows", "done")
]


def loaded(*names: str) -> list[str]:
    return [f"glmplan tables: {Path.home()}/proof/tuned/{name}" for name in names]


PLACE = "configs/triton_3_8_0"
EXPERTS = [f"{PLACE}/{file_name(16, 512, 'NVIDIA H200', down)}" for down in (False, True)]
GEMMS = ["N=1024,K=16384,x.json", "N=16384,K=512,x.json"]


@pytest.mark.parametrize(
    ("events", "log", "holds"),
    [(EVENTS, GEMMS + EXPERTS, True), (EVENTS, GEMMS + EXPERTS[:1], False), (EVENTS[:-1], GEMMS + EXPERTS, False)],
)
def test_it_holds_when_all_are_made_and_those_of_the_small_experts_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[Any], log: list[str], holds: bool
):
    setting: Any = SimpleNamespace(version="0.5.23", logs=tmp_path, work=tmp_path, plugin="p", site="s", gpus=(0,))
    seen: dict[str, Any] = {}

    def run(jobs: Any, *_: Any) -> dict[str, Outcome]:
        (job,) = jobs
        seen.update(job.environment)
        (tmp_path / "tuned.log").write_text("\n".join(loaded(*log)))
        return {"tuned": Outcome("tuned", 0, [], {})}

    def ran(command: list[str], stdout: Any, **_: Any) -> Any:
        mine = [event for event in events if (event["experts"] is not None) == ("--experts" in command)]
        file = tmp_path / "tuned" / (f"{PLACE}/x.json" if "--experts" in command else "x.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
        stdout.write("a library says this\n" + "\n".join([*map(json.dumps, mine), '{"kind": "cut off']))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(harness, "prepare", lambda *_: setting)
    monkeypatch.setattr(harness, "run", run)
    monkeypatch.setattr(harness, "write", lambda out, name, setting, outcomes, verdict: seen.update(verdict))
    monkeypatch.setattr(tune.subprocess, "run", ran)
    monkeypatch.setattr(sys, "argv", ["tune", str(tmp_path)])
    assert tune.main() == (0 if holds else 1)
    assert seen["holds"] == holds
    assert seen["SGLANG_MOE_CONFIG_DIR"] == seen["GLMPLAN_TUNED_DIR"] == str(tmp_path / "tuned")
    assert "256x256x1024 rows 1: 20.0 -> 10.0 us, 2.00x" in seen["lines"]
    assert not any(str(Path.home()) in line for line in seen["lines"])


def test_the_experts_are_the_small_checkpoint_s_and_glm_s():
    small, glm = map(parse_experts, tune.EXPERTS)
    pytest.importorskip("torch")
    from benchmarks.proof import make_checkpoint

    sizes = make_checkpoint.SMALL
    assert small[1:5] == tuple(
        sizes[name] for name in ("n_routed_experts", "moe_intermediate_size", "hidden_size", "num_experts_per_tok")
    )
    assert f"E={small.experts},N={small.n}," == tune.SERVED
    assert glm[1:5] == (256, 256, 6144, 8)


def test_a_folder_without_tables_is_not_named_to_the_server(tmp_path: Path):
    assert tune.tables(tmp_path) == {}
    (tmp_path / "N=1.json").write_text("{}")
    assert tune.tables(tmp_path) == {"GLMPLAN_TUNED_DIR": str(tmp_path)}
    (tmp_path / "configs").mkdir()
    assert tune.tables(tmp_path)["SGLANG_MOE_CONFIG_DIR"] == str(tmp_path)


def test_experts_are_tuned_where_gemms_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setting: Any = SimpleNamespace(logs=tmp_path, work=tmp_path, plugin="p", site="s", gpus=(0,))

    def ran(command: list[str], stdout: Any, stderr: Any, **_: Any) -> Any:
        if "--shapes" in command:
            stderr.write("Traceback\nboom\n")
            return SimpleNamespace(returncode=1)
        stdout.write(json.dumps(EVENTS[-1]) + "\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tune.subprocess, "run", ran)
    events, wrong = tune.make_tables(setting, 60)
    assert events == EVENTS[-1:]
    assert wrong == ["gemm: ended with 1: Traceback | boom"]
