"""`glmplan launch --dry-run`: exact commands, and nothing started; what launch makes of its options."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest

from glmplan.cli import _wanted

SEED = ("--gpus", "32x rtx-4090-48g", "--nodes", "4")


def test_without_dry_run_nothing_is_pretended(glmplan):
    ran = glmplan("launch", *SEED)
    assert ran.code == 2
    assert "--dry-run" in ran.err


def test_text_and_json_say_the_same(glmplan):
    text = glmplan("launch", "--dry-run", *SEED).out
    commands = json.loads(glmplan("launch", "--dry-run", *SEED, "--json").out)
    blocks = text.split("\n# node ")[1:]
    assert len(blocks) == len(commands) == 4
    for block, command in zip(blocks, commands, strict=True):
        words = shlex.split(block.split("\n", 1)[1].replace("\\\n", " "))
        count = len(command["environment"])
        assert dict(word.split("=", 1) for word in words[:count]) == command["environment"]
        assert words[count:] == command["argv"]


def test_no_listening_on_all_interfaces_by_default(glmplan):
    for command in json.loads(glmplan("launch", "--dry-run", *SEED, "--json").out):
        assert command["argv"][command["argv"].index("--host") + 1] == "127.0.0.1"
        assert "0.0.0.0" not in command["argv"]


def test_a_plan_that_does_not_fit_is_not_launched(glmplan):
    ran = glmplan("launch", "--dry-run", "--gpus", "8x l40s")
    assert ran.code == 3
    assert ran.out == ""


def test_plan_and_hardware_options_contradict(glmplan, tmp_path):
    path = tmp_path / "plan.json"
    glmplan("size", *SEED, "--save", str(path))
    ran = glmplan("launch", "--dry-run", "--plan", str(path), "--gpus", "8x h200")
    assert ran.code == 2
    assert "contradict" in ran.err


def test_files_that_are_no_plans_are_refused(glmplan, tmp_path):
    for content in ("{}", "[]", "not json", '{"schema_version": 1}', '{"schema_version": 99}'):
        path = tmp_path / "plan.json"
        path.write_text(content)
        ran = glmplan("launch", "--dry-run", "--plan", str(path))
        assert ran.code == 2
        assert "next:" in ran.err


def test_equal_ports_are_refused(glmplan):
    ran = glmplan("launch", "--dry-run", *SEED, "--http-port", "20000")
    assert ran.code == 2
    assert "20000" in ran.err


def test_amd_is_sized_but_not_launched(glmplan):
    assert glmplan("size", "--gpus", "8x mi355x", "--checkpoint", "mxfp4").code == 0
    ran = glmplan("launch", "--dry-run", "--gpus", "8x mi355x", "--checkpoint", "mxfp4")
    assert ran.code == 4


@pytest.mark.parametrize(
    ("variables", "folders"),
    [(["NCCL_DEBUG=INFO"], ()), (["PYTHONPATH=/a", "PYTHONPATH=~/site::/b"], ("~/site", "/b")), (["PYTHONPATH="], ())],
)
def test_the_engine_is_looked_for_where_its_python_path_will_point(variables, folders):
    more = _wanted.more_words(None, variables)
    assert _wanted.Wanted.engine_folders.fget(SimpleNamespace(more=more)) == folders


def test_what_the_user_puts_in_the_place_of_the_plan_is_said(glmplan):
    ran = glmplan(
        "launch", "--dry-run", *SEED, "--engine-arg=--tp-size", "--engine-arg", "4", "--engine-env", "NCCL_DEBUG=INFO"
    )
    assert ran.code == 0
    assert "note: --tp-size 4 takes the place of --tp-size 8, which the plan set." in ran.err
    assert "NCCL_DEBUG" not in ran.err


def test_one_note_is_enough_for_all_nodes(glmplan):
    words = [f"--engine-arg={word}" for word in ("--node-rank", "1", "--tensor-parallel-size", "8", "-x", "s3cret")]
    ran = glmplan("launch", "--dry-run", *SEED, *words)
    assert ran.code == 0
    assert [line for line in ran.err.splitlines() if "takes the place of" in line] == [
        "note: --node-rank 1 takes the place of the plan's own (it differs from node to node)."
    ]
    assert "s3cret" not in ran.err
