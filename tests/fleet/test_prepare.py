"""From a plan to what every node runs: when glmplan's package goes along, and which tuned tables it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmplan.engines.base import Endpoints, More, NodeCommand
from glmplan.engines.commands import node_commands
from glmplan.facts.host import Host
from glmplan.fleet import prepare, start
from glmplan.fleet.deployment import Deployment
from glmplan.kernels import packed
from glmplan.kernels.engines.sglang_expert_tables import file_name as expert_file
from glmplan.kernels.engines.sglang_tables import file_name
from glmplan.planning.plan import Plan
from glmplan.planning.request import Request
from tests import samples

HOST = samples.host("h1", "h200", 8)
ADA = samples.host("h1", "rtx-4090-48g", 24)
STOCK = samples.plan_for([HOST], Request(context_tokens=32768))
PORT = samples.plan_for([ADA], Request(context_tokens=32768))
GPU = HOST.gpus[0].name


@pytest.fixture(autouse=True)
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's tuned tables."""
    monkeypatch.setenv("GLMPLAN_PROFILES", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    packed.packed.cache_clear()
    return tmp_path / "tuned" / "0.5.23"


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({}))


def deployed(plan: Plan, host: Host, **variables: str) -> Deployment:
    commands = node_commands(plan, Endpoints(), More(environment=tuple(variables.items())))
    found = prepare.with_package(commands, plan, {"h1": host})
    return prepare.make_deployment(plan, found, Endpoints(), None, has_key=False, rehearsal=False)


def sent(deployment: Deployment) -> tuple[NodeCommand, bool]:
    (request,) = start.requests(deployment, start.Secrets()).values()
    return deployment.commands[0], bool(request["site"])


def test_the_samples_are_what_they_are_taken_for():
    assert (prepare.uses_port(STOCK), prepare.uses_port(PORT)) == (False, True)


def test_a_plan_of_the_engine_s_own_kernels_takes_nothing_along_without_tables(tuned: Path):
    put(tuned, f"gemm/{file_name(512, 1024, 'Another GPU')}")
    put(tuned.parent / "0.5.13.post1", f"gemm/{file_name(512, 1024, GPU)}")
    command, site = sent(deployed(STOCK, HOST))
    assert not site
    assert "PYTHONPATH" not in command.environment
    assert not {"GLMPLAN_TUNED_DIR", "SGLANG_MOE_CONFIG_DIR"} & command.environment.keys()


@pytest.mark.parametrize("kind", ["gemm", "moe"])
def test_a_plan_of_the_engine_s_own_kernels_takes_tables_for_its_gpus_along(tuned: Path, kind: str):
    name = file_name(512, 1024, GPU) if kind == "gemm" else f"configs/triton_3_8_0/{expert_file(256, 256, GPU)}"
    put(tuned, f"{kind}/{name}")
    deployment = deployed(STOCK, HOST)
    command, site = sent(deployment)
    assert site
    assert prepare.sent_tables(deployment) == (kind,)
    assert command.environment[prepare.TABLES[kind]] == f"@SITE@/glmplan/profiles/tuned/0.5.23/{kind}"
    assert command.environment["PYTHONPATH"] == "@SITE@"
    assert not deployment.uses_port, "no rank is waited for to say that our attention is in"
    assert "GLMPLAN_PORT" not in command.environment


def test_without_the_plugin_no_table_goes_along(tuned: Path):
    put(tuned, f"gemm/{file_name(512, 1024, GPU)}")
    assert not sent(deployed(STOCK, HOST, GLMPLAN_PORT="off"))[1]


def test_the_kernels_take_all_tables_along_and_a_folder_that_the_user_named_stays(tuned: Path):
    put(tuned, f"gemm/{file_name(512, 1024, GPU)}", f"moe/configs/triton_3_8_0/{expert_file(256, 256, GPU)}")
    command, site = sent(deployed(PORT, ADA, SGLANG_MOE_CONFIG_DIR="/own", PYTHONPATH="/more"))
    assert site
    assert command.environment["SGLANG_MOE_CONFIG_DIR"] == "/own"
    assert command.environment["GLMPLAN_TUNED_DIR"].endswith("/0.5.23/gemm")
    assert command.environment["PYTHONPATH"] == "@SITE@:/more"


def test_what_was_gained_and_half_of_a_search_are_no_tables(tuned: Path):
    place = f"configs/triton_3_8_0/{expert_file(256, 256, GPU)}"
    put(tuned, f"moe/gains/{place}", f"moe/partial/{place}.part", f"gemm/gains/{file_name(512, 1024, GPU)}", "notes.json")
    assert packed.tuned_kinds("0.5.23") == ()
    put(tuned, f"moe/{place}")
    assert packed.tuned_kinds("0.5.23") == packed.tuned_kinds("0.5.23", [GPU]) == ("moe",)
    assert packed.tuned_kinds("0.5.23", ["Another GPU"]) == ()
