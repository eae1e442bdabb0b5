"""`glmplan size`: answers, files and refusals, through the program's entry point."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from glmplan.cli._plan import _check_pins
from glmplan.errors import UsageError
from glmplan.planning.request import Pins
from tests import samples

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "docs" / "schema" / "plan.schema.json"
SEED = ("--gpus", "24x rtx-4090-48g", "--nodes", "3")


def test_the_answer_names_layout_ports_memory_and_next_step(glmplan):
    ran = glmplan("size", *SEED)
    assert ran.code == 0
    for words in (
        "It fits",
        "TP8 x PP3",
        "Ranks of the fullest stage",
        "--mem-fraction-static",
        "tilelang",
        "Kernel ports",
        "launch --dry-run",
    ):
        assert words in ran.out
    assert ran.err == ""


def test_without_a_driver_the_embedded_default_is_sized_and_said(glmplan):
    ran = glmplan("size")
    assert ran.code == 0
    assert "3 nodes of 8 RTX 4090 48 GB" in ran.err
    assert "24x rtx-4090-48g, 3 nodes" in ran.out


@pytest.mark.parametrize(
    "arguments", [SEED, ("--gpus", "8x l40s"), ("--gpus", "8x h200", "--engine", "vllm", "--mtp", "on")]
)
def test_json_meets_the_published_schema(glmplan, arguments):
    ran = glmplan("size", *arguments, "--json")
    plan = json.loads(ran.out)
    jsonschema.validate(plan, json.loads(SCHEMA.read_text()))
    assert plan["schema_version"] == 1
    assert sum(plan["layout"]["stages"]) == 78
    assert ran.code == (0 if plan["fits"] else 3)


def test_published_schema_is_the_code_s_own():
    from benchmarks.schema import schema_text

    assert SCHEMA.read_text() == schema_text()


def test_every_rank_s_items_add_up_to_its_total(glmplan):
    plan = json.loads(glmplan("size", *SEED, "--json").out)
    assert len(plan["ranks"]) == plan["layout"]["gpus"] == 24
    for rank in plan["ranks"]:
        assert sum(item["bytes"] for item in rank["items"]) == rank["total_bytes"] <= rank["capacity_bytes"]
        assert all(item["source"] for item in rank["items"])


def test_an_impossible_inventory_exits_3_with_the_shortfall_of_every_rank(glmplan):
    ran = glmplan("size", "--gpus", "8x l40s", "--json")
    plan = json.loads(ran.out)
    assert ran.code == 3
    assert not plan["fits"]
    assert all(rank["shortfall_bytes"] == rank["total_bytes"] - rank["capacity_bytes"] > 0 for rank in plan["ranks"])
    assert plan["shortfall_bytes"] == max(rank["shortfall_bytes"] for rank in plan["ranks"])
    assert any("more nodes" in sentence for sentence in plan["advice"])


def test_every_rejection_has_a_reason_with_numbers(glmplan):
    plan = json.loads(glmplan("size", *SEED, "--json").out)
    assert plan["rejected"]
    for entry in plan["rejected"]:
        assert any(character.isdigit() for character in entry["reason"])
    short = [entry for entry in plan["rejected"] if "short" in entry["reason"]]
    assert short
    assert all(entry["change"] for entry in short)


def test_explain_and_rejected_show_their_tables(glmplan):
    ran = glmplan("size", *SEED, "--explain", "--rejected")
    for words in ("absorbed kv_b", "routed experts", "layouts not chosen", "srt/models"):
        assert words in ran.out


def test_a_gpu_without_a_count_answers_with_the_smallest(glmplan):
    plan = json.loads(glmplan("size", "--gpu", "rtx-5090", "--json").out)
    assert plan["smallest_count"] == plan["layout"]["gpus"] == 32


def test_save_then_launch_gives_the_same_commands(glmplan, tmp_path):
    path = tmp_path / "plan.json"
    assert glmplan("size", *SEED, "--save", str(path)).code == 0
    saved = glmplan("launch", "--dry-run", "--plan", str(path), "--json")
    direct = glmplan("launch", "--dry-run", *SEED, "--json")
    assert saved.code == direct.code == 0
    assert json.loads(saved.out) == json.loads(direct.out)


def test_save_never_overwrites_and_never_keeps_a_plan_that_does_not_fit(glmplan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("mine")
    ran = glmplan("size", *SEED, "--save", str(path))
    assert ran.code == 2
    assert "exists already" in ran.err
    assert path.read_text() == "mine"
    other = tmp_path / "other.json"
    assert glmplan("size", "--gpus", "8x l40s", "--save", str(other)).code == 3
    assert list(tmp_path.iterdir()) == [path]
    assert not other.exists()


REFUSALS = {
    "unknown GPU": (("--gpus", "8x rtx4090"), 2, "Did you mean"),
    "no GPUs": (("--gpus", "0x h200"), 2, "0 GPUs"),
    "uneven nodes": (("--gpus", "24x h200", "--nodes", "5"), 2, "does not divide"),
    "grammar": (("--gpus", "eight h200s"), 2, "cannot be read"),
    "context above the maximum": (("--gpu", "h200", "--context", "2M"), 2, "1,048,576"),
    "context of nothing": (("--gpu", "h200", "--context", "many"), 2, "not a number of tokens"),
    "tp of 3": (("--gpu", "h200", "--pin", "tp=3"), 2, "64 heads"),
    "layout trap": (("--gpus", "16x h200", "--pin", "pp=3,nodes=2"), 2, "contradict"),
    "pins twice": (("--gpu", "h200", "--pin", "tp=8,tp=4"), 2, "twice"),
    "stages that miss layers": (("--gpu", "h200", "--pin", "stages=39/38"), 2, "77 layers"),
    "illegal cut": (("--gpus", "16x h200", "--engine", "vllm", "--pin", "stages=39/39"), 2, "layers 1, 2, 6, 10, ... 74."),
    "two hardware options": (("--gpu", "h200", "--gpus", "8x h200"), 2, "contradict"),
    "two model options": (("--checkpoint", "fp8", "--model-config", "x.json"), 2, "contradict"),
    "nodes alone": (("--nodes", "3"), 2, "need --gpus"),
    "unknown engine": (("--engine", "sglan"), 2, "Did you mean sglang"),
    "unknown checkpoint": (("--checkpoint", "fp9"), 2, "Did you mean"),
    "unknown KV dtype": (("--gpu", "h200", "--kv-dtype", "fp7"), 2, "no KV dtype"),
    "unknown objective": (("--gpu", "h200", "--objective", "cheap"), 2, "objective"),
    "mem fraction of 2": (("--gpu", "h200", "--mem-fraction", "2"), 2, "0.1 to 0.99"),
    "chunk of 100": (("--gpu", "h200", "--chunk", "100"), 2, "multiple of 64"),
    "mtp of words": (("--gpu", "h200", "--mtp", "maybe"), 2, "off, on"),
    "missing inventory": (("--inventory", "/nope.toml"), 2, "does not exist"),
    "missing folder": (("--model-path", "/nope"), 2, "not a folder"),
    "profile that is not there": (("--profile", "/nope.toml"), 2, "does not exist"),
    "w4afp8 off Hopper": (("--gpus", "8x a100-80g", "--checkpoint", "w4afp8"), 4, "sm_90"),
    "vLLM on Ampere by itself": (
        ("--gpus", "8x a100-80g", "--engine", "vllm", "--checkpoint", "awq-int4", "--kernel-port", "off"),
        4,
        "no sparse attention of its own",
    ),
    "fp8 KV on Ampere by itself": (
        ("--gpus", "8x a100-80g", "--kv-dtype", "fp8", "--kernel-port", "off"),
        4,
        "no sparse attention with fp8",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_sentence_a_next_step_and_an_exit_code(glmplan, name):
    arguments, code, words = REFUSALS[name]
    ran = glmplan("size", *arguments)
    assert ran.code == code
    assert words in ran.err.replace("\n", " ")
    assert "next:" in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_a_config_of_another_architecture_exits_4(glmplan, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    ran = glmplan("size", "--model-config", str(path), "--gpu", "h200")
    assert ran.code == 4
    assert "llama" in ran.err


def test_a_typo_in_a_profile_names_file_and_key(glmplan, tmp_path):
    path = tmp_path / "mine.toml"
    text = (ROOT / "profiles" / "gpus" / "h200.toml").read_text()
    path.write_text(text.replace("gpus_per_node", "gpus_pr_node"))
    ran = glmplan("size", "--profile", str(path), "--gpu", "h200")
    assert ran.code == 2
    assert "mine.toml" in ran.err


def test_a_truncated_safetensors_header_names_both_sizes(glmplan, tmp_path):
    config = ROOT / "tests" / "recorded" / "configs" / "GLM-5.2-FP8.json"
    (tmp_path / "config.json").write_text(config.read_text())
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes((5000).to_bytes(8, "little") + b"{}")
    ran = glmplan("size", "--model-path", str(tmp_path), "--gpus", "8x h200")
    assert ran.code == 2
    assert "5,000" in ran.err
    assert "truncated" in ran.err


def test_a_model_of_which_no_layer_may_begin_a_stage_is_told_so():
    whole = samples.target(engine_name=samples.VLLM)
    shared = whole.config.model_copy(update={"indexer_full": (True, *[False] * (len(whole.config.indexer_full) - 1))})
    with pytest.raises(UsageError) as refused:
        _check_pins(Pins(pp=2, stages=(39, 39)), replace(whole, config=shared), whole.engine)
    assert refused.value.next_step == "No layer but the first can begin one: use pp=1."
