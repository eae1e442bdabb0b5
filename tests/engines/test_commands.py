"""Commands of every engine: what is always explicit, what differs by node, and what released wheels accept."""

from __future__ import annotations

import re
import shlex
import zipfile
from collections.abc import Iterator

import pytest

from glmplan.engines.base import Endpoints, More, NodeCommand, render
from glmplan.engines.commands import SPELLINGS, Option, contradictions, node_commands, options
from glmplan.errors import UnsupportedError, UsageError
from glmplan.facts.host import Host
from glmplan.facts.profiles import gpu_profile
from glmplan.planning.plan import Plan
from glmplan.planning.request import Pins, Request
from tests.contracts.wheels import WheelUnavailable, argument_definitions, check_argv, vllm_flag_names, wheel
from tests.samples import NEW, OLD, PATCHED, VLLM, engine, host, plan, plan_for

PLANS = {
    NEW: {
        "three nodes": {"gpus": "24x rtx-4090-48g"},
        "five nodes": {"gpu": "rtx-4090-24g"},
        "four nodes": {"gpu": "rtx-5090"},
        "one node": {"gpus": "8x h200"},
        "one node, MTP": {"gpus": "8x h200", "mtp": "on", "context": "64k"},
        "a pipeline with MTP": {"gpus": "24x rtx-4090-48g", "mtp": "on", "context": "64k", "allow_pipeline_mtp": True},
        "attention groups": {"gpus": "8x h200", "pin": "tp=8,dp=8,ep=8", "context": "64k", "concurrency": 8},
        "a stage over two nodes": {"gpus": "16x h100-80g", "allow_cross_node_tp": True, "pin": "tp=16,pp=1"},
        "stages on one node": {"gpus": "8x h200", "pin": "tp=4,pp=2"},
        "part of a node": {"gpus": "8x b200", "checkpoint": "nvfp4", "pin": "tp=4,pp=1"},
        "no graphs": {"gpus": "8x h200", "graph_max_bs": 0, "chunk": 2048},
        "unlike cards": {"gpus": "24x rtx-4090-48g + 8x rtx-5090"},
        "NVFP4 on Blackwell": {"gpus": "8x rtx-pro-6000", "checkpoint": "nvfp4"},
        "NVFP4 on Ada": {"gpus": "16x rtx-4090-48g", "checkpoint": "nvfp4"},
        "INT4 on Ampere": {"gpus": "8x a100-80g", "checkpoint": "awq-int4"},
        "FP8 on Ampere": {"gpus": "16x a100-80g", "context": "32k"},
        "W4AFP8 on Hopper": {"gpus": "8x h200", "checkpoint": "w4afp8", "context": "1M"},
        "BF16 rows": {"gpus": "8x h200", "kv_dtype": "bf16", "context": "32k"},
        "BF16 rows on Blackwell": {"gpus": "8x rtx-pro-6000", "checkpoint": "nvfp4", "kv_dtype": "bf16", "context": "32k"},
        "BF16 weights": {"gpus": "16x h200", "checkpoint": "bf16"},
        "the port forced": {"gpus": "8x h200", "kernel_port": "force"},
        "the port refused": {"gpus": "24x rtx-4090-48g", "kernel_port": "off"},
        "unified memory": {"gpus": "8x gb10"},
    },
    OLD: {
        "three nodes": {"gpus": "24x rtx-4090-48g"},
        "four nodes": {"gpus": "32x rtx-4090-48g"},
        "one node": {"gpus": "8x h200"},
        "one node, MTP": {"gpus": "8x h200", "checkpoint": "w4afp8", "mtp": "1", "context": "1M"},
        "attention groups": {"gpus": "8x h200", "pin": "tp=8,dp=8", "context": "64k", "concurrency": 8},
        "no graphs": {"gpus": "8x h200", "graph_max_bs": 0},
        "FP8 on Blackwell": {"gpus": "8x b200", "context": "64k"},
        "the port forced": {"gpus": "8x h200", "kernel_port": "force"},
        "NVFP4 on Ada": {"gpus": "16x rtx-4090-48g", "checkpoint": "nvfp4"},
        "INT4 on Ampere": {"gpus": "8x a100-80g", "checkpoint": "awq-int4"},
    },
    VLLM: {
        "five nodes": {"gpus": "40x rtx-5090"},
        "one node": {"gpus": "8x h200"},
        "one node, MTP": {"gpus": "8x h200", "mtp": "on", "context": "64k"},
        "a pipeline with MTP": {"gpus": "16x h100-80g", "mtp": "3", "context": "64k"},
        "attention groups": {"gpus": "8x b200", "pin": "tp=8,dp=8", "context": "64k", "concurrency": 8},
        "context groups": {"gpus": "8x h200", "pin": "tp=8,dcp=8"},
        "no graphs": {"gpus": "8x h200", "graph_max_bs": 0},
        "NVFP4 on Blackwell": {"gpus": "8x rtx-pro-6000", "checkpoint": "nvfp4"},
        "BF16 rows": {"gpus": "8x h200", "kv_dtype": "bf16", "context": "32k"},
        "4-bit rows": {"gpus": "8x b200", "kv_dtype": "nvfp4_packed"},
        "three nodes of Ada": {"gpus": "24x rtx-4090-48g"},
        "INT4 on Ampere": {"gpus": "8x a100-80g", "checkpoint": "awq-int4", "context": "32k"},
        "unlike cards": {"gpus": "16x rtx-4090-48g + 16x rtx-5090"},
        "the port forced": {"gpus": "8x h200", "kernel_port": "force"},
        "context groups of the port": {"gpus": "8x h200", "pin": "tp=8,dcp=8", "kernel_port": "force"},
    },
    PATCHED: {
        "one node": {"gpus": "8x a100-80g", "checkpoint": "awq-int4", "context": "32k"},
        "three nodes": {"gpus": "24x rtx-4090-48g"},
    },
}  # fmt: skip
EVERY = [(name, case) for name, cases in PLANS.items() for case in cases]
OF_SGLANG = [entry for entry in EVERY if entry[0].startswith("sglang")]
OF_VLLM = [entry for entry in EVERY if entry[0].startswith("vllm")]


def planned(name: str, case: str) -> Plan:
    found = plan(engine=name, **PLANS[name][case])
    assert found.fits, found.summary
    return found


def commands(found: Plan, **endpoints: object) -> tuple[NodeCommand, ...]:
    return node_commands(found, Endpoints(**endpoints))  # type: ignore[arg-type]


def value(command: NodeCommand, flag: str) -> str:
    """The one value of a flag that must be there."""
    assert command.argv.count(flag) == 1, f"{flag} in {command.argv}"
    return command.argv[command.argv.index(flag) + 1]


@pytest.mark.parametrize(("name", "case"), OF_SGLANG)
def test_sglang_is_told_everything_it_would_guess(name, case):
    found, flags = planned(name, case), engine(name).flags
    for command in commands(found):
        assert value(command, "--mem-fraction-static") == f"{found.settings.mem_fraction:g}"
        assert value(command, flags["chunk"]) == str(found.settings.chunk_tokens)
        assert value(command, "--kv-cache-dtype") == found.settings.kv_dtype != "auto"
        assert value(command, "--dsa-prefill-backend") == found.settings.prefill_backend
        assert value(command, "--dsa-decode-backend") == found.settings.decode_backend
        assert value(command, "--max-total-tokens") == str(found.settings.max_total_tokens)
        assert value(command, "--context-length") == str(found.settings.context_tokens)
        assert value(command, "--attention-backend") == "dsa"
        assert value(command, "--page-size") == "64"
        assert flags["disable_prefill_graphs"] in command.argv
        if found.settings.graph_max_bs:
            assert value(command, flags["graph_max_bs"]) == str(found.settings.graph_max_bs)
        else:
            assert flags["disable_graphs"] in command.argv
            assert flags["graph_max_bs"] not in command.argv


@pytest.mark.parametrize(("name", "case"), OF_VLLM)
def test_vllm_is_told_everything_it_would_guess(name, case):
    found, flags = planned(name, case), engine(name).flags
    for command in commands(found):
        assert value(command, "--gpu-memory-utilization") == f"{found.settings.mem_fraction:g}"
        assert value(command, flags["chunk"]) == str(found.settings.chunk_tokens)
        assert value(command, "--kv-cache-dtype") == found.settings.kv_dtype != "auto"
        assert value(command, "--max-model-len") == str(found.settings.context_tokens)
        backend = command.environment.get("VLLM_ATTENTION_BACKEND") or value(command, "--attention-backend")
        assert backend == found.settings.prefill_backend == found.settings.decode_backend
        if found.settings.graph_max_bs:
            rows = found.settings.graph_max_bs * (found.settings.mtp_steps + 1)
            assert value(command, flags["graph_max_bs"]) == str(rows)
        else:
            assert "--enforce-eager" in command.argv


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_a_pipeline_s_partition_is_on_every_node_and_equals_the_stages(name, case):
    found = planned(name, case)
    variable = engine(name).parallel.partition_env
    expected = ",".join(map(str, found.layout.stages)) if found.layout.pp_size > 1 else None
    assert variable.endswith("_PP_LAYER_PARTITION")
    assert [command.environment.get(variable) for command in commands(found)] == [expected] * found.layout.nodes


def test_the_samples_hold_pipelines_and_single_stages():
    for name, cases in PLANS.items():
        assert {planned(name, case).layout.pp_size > 1 for case in cases} == {True, False}


@pytest.mark.parametrize(("name", "case"), OF_SGLANG)
def test_shared_experts_stay_apart_where_fusing_them_is_unsafe(name, case):
    """sglang.md: on sm_8x and sm_12x, and for W4AFP8, the fused expert has no kernel."""
    found = planned(name, case)
    sms = {node.sm or 0 for node in found.nodes}
    unsafe = any(80 <= sm < 90 or 120 <= sm < 130 for sm in sms) or found.checkpoint == "w4afp8"
    for command in commands(found):
        assert ("--disable-shared-experts-fusion" in command.argv) == unsafe


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_nodes_differ_by_their_rank_only(name, case):
    found = planned(name, case)
    given = commands(found)
    assert [command.node_rank for command in given] == list(range(found.layout.nodes))
    assert [command.host for command in given] == [node.host for node in found.nodes]
    if found.layout.nodes > 1 or name in (NEW, OLD):
        assert [value(command, "--node-rank") for command in given] == [str(rank) for rank in range(found.layout.nodes)]
        assert {value(command, "--nnodes") for command in given} == {str(found.layout.nodes)}
    flags = {node.quantization_flags for node in found.nodes}
    if len(flags) == 1 and name in (NEW, OLD):
        at = given[0].argv.index("--node-rank") + 1
        assert len({(*command.argv[:at], *command.argv[at + 1 :]) for command in given}) == 1


@pytest.mark.parametrize(("name", "case"), OF_SGLANG)
def test_sglang_sizes_are_the_layout_s(name, case):
    found = planned(name, case)
    for command in commands(found):
        assert int(value(command, "--tp-size")) == found.layout.tp_size
        assert int(value(command, "--pp-size")) == found.layout.pp_size
        groups = "--attn-dp-size" if name == NEW else "--dp-size"
        assert (groups in command.argv) == (found.layout.dp_size > 1)
        assert ("--ep-size" in command.argv) == (found.layout.ep_size > 1)


@pytest.mark.parametrize(("name", "case"), OF_VLLM)
def test_vllm_sizes_multiply_to_the_gpus(name, case):
    found = planned(name, case)
    for command in commands(found):
        tp, pp = int(value(command, "--tensor-parallel-size")), int(value(command, "--pipeline-parallel-size"))
        groups = int(value(command, "--data-parallel-size")) if "--data-parallel-size" in command.argv else 1
        assert tp * pp * groups == found.layout.gpus
        assert ("--enable-expert-parallel" in command.argv) == (found.layout.ep_size > 1)
        assert ("--headless" in command.argv) == (command.node_rank > 0)


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_the_server_listens_on_loopback_unless_told(name, case):
    found = planned(name, case)
    for command in commands(found):
        if "--headless" not in command.argv:
            assert value(command, "--host") == "127.0.0.1"
            assert value(command, "--port") == "30000"
    head = commands(found, http_host="0.0.0.0", http_port=8080)[0]
    assert (value(head, "--host"), value(head, "--port")) == ("0.0.0.0", "8080")


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_no_secret_is_in_a_command(name, case, monkeypatch):
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VLLM_API_KEY", "SGLANG_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "hush-hush")
    for command in commands(planned(name, case)):
        assert "hush" not in command.model_dump_json()
        assert not [word for word in command.argv if re.search(r"(?i)api-?key|token=|secret|password", word)]
        assert all(re.match(r"(SGLANG|VLLM|CUDA|GLMPLAN)_", variable) for variable in command.environment)


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_shell_text_is_the_argv_and_environment(name, case):
    for command in commands(planned(name, case)):
        words = shlex.split(render(command).replace("\\\n", " "))
        count = len(command.environment)
        assert dict(word.split("=", 1) for word in words[:count]) == command.environment
        assert tuple(words[count:]) == command.argv


def test_odd_words_survive_the_shell():
    odd = ("vllm", "serve", "/models/it's $HOME `x`", "--speculative-config", '{"method":"mtp"}', "--name", "")
    command = NodeCommand(node_rank=0, host="a", argv=odd, environment={"SGLANG_X": "a b'c"})
    words = shlex.split(render(command).replace("\\\n", " "))
    assert words == ["SGLANG_X=a b'c", *odd]


def test_one_node_meets_on_loopback_and_more_at_the_head():
    (alone,) = commands(planned(NEW, "one node"))
    assert value(alone, "--dist-init-addr") == "127.0.0.1:20000"
    several = commands(planned(NEW, "three nodes"), rendezvous_port=20001)
    assert {value(command, "--dist-init-addr") for command in several} == {"host0:20001"}
    vllm = commands(planned(VLLM, "five nodes"))
    assert {(value(command, "--master-addr"), value(command, "--master-port")) for command in vllm} == {("host0", "20000")}


def test_the_head_s_address_is_used_where_it_is_known():
    hosts = [host(name, "h100-80g").model_copy(update={"address": f"10.0.0.{n}"}) for n, name in enumerate("ab", 1)]
    found = plan_for(hosts, Request(8192, pins=Pins(tp=8, pp=2)))
    assert {value(command, "--dist-init-addr") for command in commands(found)} == {"10.0.0.1:20000"}


def test_a_part_of_a_node_is_made_visible_by_index():
    (command,) = commands(planned(NEW, "part of a node"))
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert command.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "CUDA_VISIBLE_DEVICES" not in commands(planned(NEW, "one node"))[0].environment


def test_busy_gpus_are_hidden():
    card = gpu_profile("h200").gpu(0)
    gpus = [card.model_copy(update={"index": n, "memory_in_use_bytes": 10**11 * (n in (0, 2))}) for n in range(8)]
    found = plan_for([Host(name="a", gpus=tuple(gpus))], Request(8192, pins=Pins(tp=4, pp=1)), "nvfp4")
    (command,) = commands(found)
    assert not {"0", "2"} & set(command.environment["CUDA_VISIBLE_DEVICES"].split(","))


def test_a_whole_node_in_another_order_is_listed():
    """Larger cards come first; the driver's numbers would put rank 0 on a small one."""
    cards = [gpu_profile(name).gpu(0) for name in ("h100-80g", "h200")]
    gpus = [card.model_copy(update={"index": index}) for index, card in enumerate([cards[0]] * 4 + [cards[1]] * 4)]
    found = plan_for([Host(name="a", gpus=tuple(gpus))], Request(8192, pins=Pins(tp=8, pp=1)), "nvfp4")
    (command,) = commands(found)
    assert found.nodes[0].all_gpus_used
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "4,5,6,7,0,1,2,3"
    assert [rank.gpu_index for rank in found.ranks] == [4, 5, 6, 7, 0, 1, 2, 3]


def test_ranks_follow_the_order_of_the_visible_gpus():
    for name, case in EVERY:
        found = planned(name, case)
        for command, node in zip(commands(found), found.nodes, strict=True):
            listed = command.environment.get("CUDA_VISIBLE_DEVICES")
            order = [int(index) for index in listed.split(",")] if listed else sorted(node.gpu_indexes)
            assert order == list(node.gpu_indexes)


def test_mtp_is_spelled_as_each_engine_wants():
    (new,) = commands(planned(NEW, "one node, MTP"))
    assert value(new, "--speculative-algorithm") == "EAGLE"
    assert value(new, "--speculative-num-steps") == "3"
    assert value(new, "--speculative-num-draft-tokens") == "4"
    (vllm,) = commands(planned(VLLM, "one node, MTP"))
    assert value(vllm, "--speculative-config") == '{"method":"mtp","num_speculative_tokens":3}'
    assert "--speculative-algorithm" not in commands(planned(NEW, "one node"))[0].argv


def test_mtp_with_a_pipeline_sets_its_switch_on_every_node():
    given = commands(planned(NEW, "a pipeline with MTP"))
    assert [command.environment["SGLANG_ENABLE_PP_SPEC"] for command in given] == ["1"] * 3
    for command in commands(planned(NEW, "three nodes")):
        assert "SGLANG_ENABLE_PP_SPEC" not in command.environment


def test_unlike_memory_turns_the_balance_check_off():
    switch = "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"
    assert {command.environment.get(switch) for command in commands(planned(NEW, "unlike cards"))} == {"0"}
    assert {command.environment.get(switch) for command in commands(planned(NEW, "three nodes"))} == {None}


def test_the_fallback_of_sm_89_sets_its_environment():
    for command in commands(planned(NEW, "the port refused")):
        assert command.environment["SGLANG_FP8_PAGED_MQA_LOGITS_TORCH"] == "1"
    for command in commands(planned(NEW, "three nodes")):
        assert "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH" not in command.environment


@pytest.mark.parametrize(
    ("name", "case", "told"),
    [
        (NEW, "three nodes", None),
        (NEW, "one node", None),
        (NEW, "INT4 on Ampere", None),
        (NEW, "the port refused", "off"),
        (NEW, "the port forced", "force"),
        (NEW, "unlike cards", "force"),
        (NEW, "BF16 rows on Blackwell", "force"),
        (OLD, "three nodes", None),
        (OLD, "the port forced", "force"),
        (VLLM, "three nodes of Ada", None),
        (VLLM, "unlike cards", "force"),
        (VLLM, "the port forced", "force"),
        (VLLM, "one node", None),
    ],
)
def test_the_plugin_is_told_what_it_would_not_do_by_itself(name, case, told):
    """It leaves a GPU alone that the engine serves; a node of such a GPU in a plan for the port would not start."""
    assert {command.environment.get("GLMPLAN_PORT") for command in commands(planned(name, case))} == {told}


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_the_port_s_backends_are_those_that_its_plugin_takes_over(name, case):
    found = planned(name, case)
    ours = {NEW: "triton", OLD: "tilelang", VLLM: "CUSTOM"}
    if any(port.plugin for port in found.ports):
        assert found.settings.prefill_backend == found.settings.decode_backend == ours[name]


@pytest.mark.parametrize("engine_name", [NEW, OLD, VLLM])
def test_each_node_says_its_own_address_where_it_is_known(engine_name):
    variable = "VLLM_HOST_IP" if engine_name == VLLM else "SGLANG_HOST_IP"
    hosts = [host(name, "h100-80g").model_copy(update={"address": f"10.0.0.{n}"}) for n, name in enumerate("ab", 1)]
    found = plan_for(hosts, Request(8192, pins=Pins(tp=8, pp=2)), engine_name=engine_name)
    assert [command.environment[variable] for command in commands(found)] == ["10.0.0.1", "10.0.0.2"]
    nameless = plan_for([host("a", "h100-80g"), host("b", "h100-80g")], Request(8192, pins=Pins(tp=8, pp=2)))
    assert not [c for c in commands(nameless) if "SGLANG_HOST_IP" in c.environment]


def test_a_plan_on_one_node_says_no_address():
    alone = host("a", "h200").model_copy(update={"address": "10.0.0.1", "network": {"NCCL_SOCKET_IFNAME": "eth0"}})
    (command,) = commands(plan_for([alone], Request(8192)))
    assert not {"SGLANG_HOST_IP", "NCCL_SOCKET_IFNAME"} & command.environment.keys()


@pytest.mark.parametrize(
    ("endpoints", "words"),
    [
        ({"http_port": 0}, "http port 0"),
        ({"rendezvous_port": 65536}, "rendezvous port 65536"),
        ({"http_port": 20000}, "both use port 20000"),
    ],
)
def test_ports_that_cannot_be_are_refused(endpoints, words):
    with pytest.raises(UsageError, match=words):
        Endpoints(**endpoints)


def test_amd_plans_have_no_command():
    with pytest.raises(UnsupportedError, match="AMD"):
        commands(plan(gpus="8x mi300x"))


@pytest.mark.wheels
@pytest.mark.parametrize(("name", "case"), OF_SGLANG)
def test_the_released_sglang_accepts_every_argument(name, case):
    flags = argument_definitions(wheel("sglang", engine(name).version))
    for command in commands(planned(name, case)):
        assert command.argv[:3] == ("python3", "-m", "sglang.launch_server")
        assert check_argv(command.argv[3:], flags) == []
        used = {word for word in command.argv if word.startswith("--")}
        assert used <= flags.keys(), "no abbreviations"
        assert not [word for word in used if flags[word].deprecated]


@pytest.mark.wheels
@pytest.mark.parametrize("case", PLANS[VLLM])
def test_the_released_vllm_knows_every_flag(case):
    try:
        names = vllm_flag_names(wheel("vllm", engine(VLLM).version))
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    for command in commands(planned(VLLM, case)):
        assert command.argv[:2] == ("vllm", "serve")
        assert {word for word in command.argv if word.startswith("-")} <= names


@pytest.mark.wheels
@pytest.mark.parametrize("case", PLANS[VLLM])
def test_the_released_vllm_knows_the_rows_and_the_backend(case):
    try:
        archive = zipfile.ZipFile(wheel("vllm", engine(VLLM).version))
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    with archive:
        dtypes = archive.read("vllm/config/cache.py").decode()
        backends = archive.read("vllm/v1/attention/backends/registry.py").decode()
    command = commands(planned(VLLM, case))[0]
    assert f'    "{value(command, "--kv-cache-dtype")}",\n' in dtypes
    assert re.search(rf"^    {value(command, '--attention-backend')} = ", backends, re.MULTILINE)


def sources(version_of: str) -> Iterator[str]:
    """The text of every module in an engine's wheel."""
    family = version_of.split("-")[0]
    with zipfile.ZipFile(wheel(family, engine(version_of).version)) as archive:
        for member in archive.namelist():
            if member.endswith(".py"):
                yield archive.read(member).decode("utf-8", "replace")


@pytest.mark.wheels
@pytest.mark.parametrize("name", [NEW, OLD, VLLM])
def test_every_variable_is_read_by_the_released_engine(name):
    missing = {v for case in PLANS[name] for c in commands(planned(name, case)) for v in c.environment}
    missing = {variable for variable in missing if not variable.startswith(("CUDA_", "GLMPLAN_"))}
    assert missing
    try:
        for text in sources(name):
            missing = {variable for variable in missing if variable not in text}
            if not missing:
                return
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    assert missing == set()


OF_MODEL = "changes the model after it was planned: the plan is that of the checkpoint's own config.json."


def said(name: str, case: str, *words: str, environment: tuple[tuple[str, str], ...] = ()) -> tuple[str, ...]:
    return contradictions(planned(name, case), Endpoints(), More(words, environment))


def test_what_takes_the_place_of_the_plan_s_own_is_said():
    command = commands(planned(OLD, "three nodes"))[0]
    layers, chunk = command.environment["SGLANG_PP_LAYER_PARTITION"], value(command, "--chunked-prefill-size")
    words = ("--json-model-override-args", '{"index_topk": 1}', "--chunked-prefill-size=64")
    assert said(OLD, "three nodes", *words, environment=(("SGLANG_PP_LAYER_PARTITION", "39,39"),)) == (
        f"--engine-env SGLANG_PP_LAYER_PARTITION=39,39 takes the place of SGLANG_PP_LAYER_PARTITION={layers}, "
        "which the plan set.",
        f"--json-model-override-args {OF_MODEL}",
        f"--chunked-prefill-size 64 takes the place of --chunked-prefill-size {chunk}, which the plan set.",
    )


def test_what_the_plan_did_not_set_is_not_said():
    assert said(OLD, "three nodes") == ()
    assert said(OLD, "three nodes", "--log-level", "debug", environment=(("NCCL_DEBUG", "INFO"),)) == ()
    assert said(OLD, "three nodes", "-m", "another.module", "stray", "--", "8") == ()


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_the_plan_s_own_words_again_are_no_contradiction(name, case):
    """Except where one node's are given to all."""
    found = planned(name, case)
    for command in commands(found):
        notes = said(name, case, *command.argv[3:], environment=tuple(command.environment.items()))
        assert [note for note in notes if "(it differs from node to node)" not in note] == []
        assert notes == () or found.layout.nodes > 1


def test_only_as_many_words_are_read_as_the_plan_s_own_option_has_values():
    tokens = value(commands(planned(VLLM, "one node"))[0], "--max-model-len")
    assert said(VLLM, "one node", "--max-model-len", tokens, "-tp", "8") == ()
    assert said(NEW, "one node", "--port", "30000", "-x", "s3cret") == ()
    assert said(NEW, "one node", "--port", "30000", "s3cret") == ()
    assert said(NEW, "one node", "--port=31000", "s3cret", "-x", "s3cret") == (
        "--port 31000 takes the place of --port 30000, which the plan set.",
    )
    assert said(VLLM, "no graphs", "--enforce-eager", "s3cret") == ()
    assert said(VLLM, "one node", "--hf-overrides", '{"a": 1}', "s3cret") == (f"--hf-overrides {OF_MODEL}",)
    (negative,) = said(NEW, "one node", "--chunked-prefill-size", "-1")
    assert negative.startswith("--chunked-prefill-size -1 takes the place of --chunked-prefill-size ")


def test_an_option_without_its_value_reads_well():
    expected = ("--tp-size takes the place of --tp-size 8, which the plan set.",)
    assert said(NEW, "one node", "--tp-size") == said(NEW, "one node", "--tp-size", "-x", "4") == expected


def test_of_what_is_given_twice_the_last_counts():
    assert said(NEW, "one node", "--tp-size", "4", "--tensor-parallel-size", "8") == ()
    assert said(NEW, "one node", "--tp-size", "8", "--tp-size", "4") == (
        "--tp-size 4 takes the place of --tp-size 8, which the plan set.",
    )
    assert said(NEW, "one node", "--json-model-override-args", '{"a": 1}', "--json-model-override-args", "{}") == ()
    variable = "SGLANG_PP_LAYER_PARTITION"
    layers = commands(planned(NEW, "three nodes"))[0].environment[variable]
    assert said(NEW, "three nodes", environment=((variable, "39,39"), (variable, layers))) == ()
    (note,) = said(NEW, "three nodes", environment=((variable, layers), (variable, "39,39")))
    assert note.startswith(f"--engine-env {variable}=39,39 takes the place of")


def test_a_json_key_in_a_name_counts_after_all_others():
    words = ("--hf-overrides.index_topk", "1", "--hf-overrides", "{}")
    assert said(VLLM, "one node", *words) == (f"--hf-overrides.index_topk {OF_MODEL}",)


@pytest.mark.parametrize(
    ("name", "case", "words"),
    [
        (NEW, "one node", ("--json-model-override-args", "{}")),
        (OLD, "one node", ("--json-model-override-args={ }",)),
        (VLLM, "one node", ("--hf-overrides", " {} ")),
        (VLLM, "one node, MTP", ("--speculative-config", '{"num_speculative_tokens": 3, "method": "mtp"}')),
        (VLLM, "one node, MTP", ("-sc", '{"method": "mtp", "num_speculative_tokens": 3.0}')),
        (NEW, "one node", ("--tp-size", "08")),
    ],
)
def test_values_that_are_only_written_differently_are_the_same(name, case, words):
    assert said(name, case, *words) == ()


def test_numbers_are_compared_as_numbers():
    fraction = value(commands(planned(NEW, "one node"))[0], "--mem-fraction-static")
    assert fraction.startswith("0.")
    assert said(NEW, "one node", "--mem-fraction-static", f"{fraction}0") == ()
    assert said(NEW, "one node", "--mem-fraction-static", fraction.removeprefix("0")) == ()
    assert said(NEW, "one node", "--mem-fraction-static", "0.5") == (
        f"--mem-fraction-static 0.5 takes the place of --mem-fraction-static {fraction}, which the plan set.",
    )


@pytest.mark.parametrize("spelled", ["--hf-overrides", "--hf_overrides", "--hf-overrides.index_topk", "--hf_overrides.a.b"])
def test_vllm_s_model_override_is_said(spelled):
    assert said(VLLM, "one node", spelled, "1") == (f"{spelled} {OF_MODEL}",)


@pytest.mark.parametrize(
    ("name", "case", "words", "own"),
    [
        (NEW, "one node", "--tp 4", "--tp-size 8"),
        (NEW, "one node", "--tensor-parallel-size 4", "--tp-size 8"),
        (OLD, "one node", "--tensor_parallel_size 4", "--tp-size 8"),
        (OLD, "one node", "--pipeline-parallel-size 2", "--pp-size 1"),
        (OLD, "one node", "--nsa-decode-backend fa3", "--dsa-decode-backend flashmla_kv"),
        (OLD, "attention groups", "--dp 4", "--dp-size 8"),
        (NEW, "attention groups", "--attention-data-parallel-size 4", "--attn-dp-size 8"),
        (NEW, "attention groups", "--ep 4", "--ep-size 8"),
        (NEW, "one node", "--nccl-init-addr a:1", "--dist-init-addr 127.0.0.1:20000"),
        (VLLM, "one node", "-tp 4", "--tensor-parallel-size 8"),
        (VLLM, "one node", "--tensor_parallel_size 4", "--tensor-parallel-size 8"),
        (VLLM, "one node", "-pp 2", "--pipeline-parallel-size 1"),
        (VLLM, "five nodes", "-n 2", "--nnodes 5"),
        (VLLM, "attention groups", "-dp 4", "--data-parallel-size 8"),
        (VLLM, "context groups", "-dcp 4", "--decode-context-parallel-size 8"),
        (VLLM, "no graphs", "--no-enforce-eager", "--enforce-eager"),
        (VLLM, "one node", "--disable-auto-tool-choice", "--enable-auto-tool-choice"),
        (PATCHED, "one node", "--async-scheduling", "--no-async-scheduling"),
        (
            VLLM,
            "one node, MTP",
            "--speculative-config.num_speculative_tokens 3",
            '--speculative-config {"method":"mtp","num_speculative_tokens":3}',
        ),
    ],
)
def test_other_spellings_of_an_option_are_known(name, case, words, own):
    assert said(name, case, *words.split()) == (f"{words} takes the place of {own}, which the plan set.",)


def test_options_have_one_name_however_they_are_written():
    words = ("python3", "-m", "x", "--a", "1", "2", "--b_c=3", "-tp=4", "--d", "-1", "-.5", "-", "--no-e", "--f.g_h", "{}")
    assert options(words, "vllm") == {
        "--a": Option("--a", "", ("1", "2")),
        "--b-c": Option("--b_c", "", ("3",)),
        "--tensor-parallel-size": Option("-tp", "", ("4",)),
        "--d": Option("--d", "", ("-1", "-.5", "-")),
        "--e": Option("--no-e", "no", ()),
        "--f": Option("--f.g_h", "g_h", ("{}",)),
    }
    assert options((), "vllm") == {}


def test_what_differs_from_node_to_node_is_said_once():
    assert said(NEW, "three nodes", "--node-rank", "1") == (
        "--node-rank 1 takes the place of the plan's own (it differs from node to node).",
    )
    assert said(VLLM, "five nodes", "-r", "1") == ("-r 1 takes the place of the plan's own (it differs from node to node).",)
    hosts = [host(name, "h100-80g").model_copy(update={"address": f"10.0.0.{n}"}) for n, name in enumerate("ab", 1)]
    two = plan_for(hosts, Request(8192, pins=Pins(tp=8, pp=2)))
    assert contradictions(two, Endpoints(), More((), (("SGLANG_HOST_IP", "10.0.0.1"),))) == (
        "--engine-env SGLANG_HOST_IP=10.0.0.1 takes the place of the plan's own (it differs from node to node).",
    )


@pytest.mark.wheels
def test_the_released_sglang_knows_the_other_spellings():
    """Of one flag in one of the versions; `--tp` and `--dp` are the only beginnings that argparse can take for one."""
    versions = [argument_definitions(wheel("sglang", engine(name).version)) for name in (OLD, NEW)]
    for spelled, own in SPELLINGS["sglang"].items():
        if spelled in ("--tp", "--dp"):
            assert [[name for name in flags if name.startswith(spelled)] for flags in versions] == [[own]] * 2
        elif spelled.startswith("--nsa-"):
            assert versions[0][spelled].deprecated
            assert own in versions[0]
        else:
            assert any(spelled in flags and own in flags[spelled].names for flags in versions)


@pytest.mark.wheels
def test_the_released_vllm_knows_the_other_spellings():
    try:
        names = vllm_flag_names(wheel("vllm", engine(VLLM).version))
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    assert {*SPELLINGS["vllm"], *SPELLINGS["vllm"].values()} <= names
