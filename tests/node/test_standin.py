"""The stand-in worker: options of both engines, ranks that meet, an honest server, and practice faults."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmplan.node.errors import NodeError
from glmplan.node.standin_options import Options, parse
from glmplan.node.standin_text import reply, tokens_of, tool_call
from tests.doctor.torch_python import needs_torch, torch_python
from tests.node.host import Host, alive, free_port, kill, until

KEY = "sk-planted-key"


def parsed(*words: str) -> Options:
    return parse(list(words))


SGLANG = (
    "python3 -m sglang.launch_server --model-path /models/glm --attention-backend dsa --tp-size 8 --pp-size 3 --nnodes 3 "
    "--node-rank 1 --dist-init-addr [fd00::1]:20000 --context-length 65536 --disable-prefill-cuda-graph --host 10.0.0.2 "
    "--port 30001 --max-total-tokens 90000"
)
VLLM = (
    "vllm serve zai-org/GLM-5.2-FP8 --tensor-parallel-size 4 --pipeline-parallel-size=2 --nnodes 2 --node-rank 1 "
    "--master-addr 10.0.0.1 --master-port 29501 --max-model-len 8192 --headless"
)
NODE = (
    "@NODE@ standin python3 -m sglang.launch_server --model-path /models/glm --tp-size 2 --pp-size {nodes} --nnodes {nodes} "
    "--node-rank {rank} --dist-init-addr 127.0.0.1:{rendezvous} --host 127.0.0.{own} --port {http} --context-length 32768 "
    "--config @FILES@/engine.yaml"
)
PEER_LOST = r"Connection closed by peer \[127\.0\.0\.1\] \(rank (\d)\)"
LATE = "@NODE@ standin --tp-size 2 --nnodes 2 --node-rank 1 --dist-init-addr 127.0.0.1:{rendezvous}"


def test_sglangs_words_are_understood() -> None:
    found = parsed(*SGLANG.split())
    assert (found.family, found.model, found.tp_size, found.pp_size) == ("sglang", "/models/glm", 8, 3)
    assert (found.address, found.port, found.http_host, found.http_port) == ("fd00::1", 20000, "10.0.0.2", 30001)
    assert (found.context_tokens, found.pool_tokens) == (65536, 90000)
    assert found.ranks() == list(range(8, 16))
    assert [found.prefix(rank) for rank in (8, 15)] == [" PP1 TP0", " PP1 TP7"]


def test_vllms_words_are_understood() -> None:
    found = parsed(*VLLM.split())
    assert (found.family, found.model) == ("vllm", "zai-org/GLM-5.2-FP8")
    assert (found.address, found.port, found.context_tokens) == ("10.0.0.1", 29501, 8192)
    assert found.ranks() == [4, 5, 6, 7]
    assert found.http_port == 0


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 8), st.integers(1, 8))
def test_ranks_cover_the_world_or_the_layout_is_refused(tp: int, pp: int, nodes: int) -> None:
    words = ["--tp", str(tp), "--pp", str(pp), "--nnodes", str(nodes)]
    if (pp % nodes and nodes % pp) or tp % (nodes // pp or 1):
        with pytest.raises(NodeError, match="does not cover"):
            parse(words)
        return
    found = [parsed(*words, "-r", str(node)) for node in range(nodes)]
    assert sorted(rank for node in found for rank in node.ranks()) == list(range(tp * pp))


@pytest.mark.parametrize(
    "words",
    [["--tp", "two"], ["--tp", "2", "--pp", "3", "--nnodes", "2"], ["--node-rank", "1"], ["--tp", "0"]],
)
def test_what_cannot_be_rehearsed_is_a_sentence(words: list[str]) -> None:
    with pytest.raises(NodeError, match="cannot be rehearsed"):
        parse(words)


def test_an_unknown_fault_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMPLAN_REHEARSE_FAULT", "explode:3")
    with pytest.raises(NodeError, match="no fault 'explode'; there are die-at-load"):
        parse([])


@pytest.mark.parametrize("fault", ["stall", "oom:x", "die-serving:3:soon", "slow-load", "slow-load:x"])
def test_a_fault_without_its_number_says_how_it_is_written(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMPLAN_REHEARSE_FAULT", fault)
    with pytest.raises(
        NodeError, match=f"{fault}: '{fault}' has no number where one is needed; write {fault.partition(':')[0]}:"
    ):
        parse([])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France? Answer with one word.", "Paris"),
        ("What is 17 x 24? Answer with the number only.", "408"),
        ("How much is 1,200 plus 34?", "1234"),
        ("The bridge at Holt is red. The tower at Holt is 31 m high.\nWhat is the bridge at Holt?", "red"),
    ],
)
def test_answers_are_read_from_the_prompt(question: str, answer: str) -> None:
    assert reply(question) == answer


def test_a_needle_that_is_cut_off_is_not_answered() -> None:
    filler = "\n".join(f"Note {number}: the warehouse counted {number} crates." for number in range(2000))
    question = "What is the access code of the lighthouse?"
    needle = "The access code of the lighthouse is 8513."
    assert reply(f"{filler}\n{needle}\n{filler}\n{question}") == "8513"
    assert "8513" not in reply(f"{filler}\n{filler}\n{question}")


@given(st.text())
def test_tokens_joined_are_the_text(text: str) -> None:
    assert "".join(tokens_of(text)) == text


def test_a_tool_is_chosen_by_its_words() -> None:
    tools = [
        {"function": {"name": "get_time", "parameters": {"properties": {"zone": {"type": "string"}}}}},
        {"function": {"name": "get_weather", "parameters": {"properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["K", "C"]}}}}},
    ]  # fmt: skip
    call = tool_call("What is the weather in Oslo for 3 days in C?", tools)
    assert call is not None
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"]) == {"city": "Oslo", "days": 3, "unit": "C"}


class Cluster:
    """Nodes on loopback addresses of their own, each with two ranks."""

    def __init__(self, home: Path, nodes: int = 3, python: str = "python3") -> None:
        self.hosts = [Host(home, f"local#{node}", python) for node in range(nodes)]
        self.rendezvous, self.http = free_port(), free_port()

    def start(self, fault: str = "", nodes: Sequence[int] | None = None, **environment: str) -> None:
        for rank in range(len(self.hosts)) if nodes is None else nodes:
            self.hosts[rank].start(
                *NODE.format(
                    nodes=len(self.hosts), rank=rank, own=rank + 1, rendezvous=self.rendezvous, http=self.http
                ).split(),
                environment={"GLMPLAN_REHEARSE_FAULT": fault, "GLMPLAN_REHEARSE_TORCH": "0", **environment},
                files=[{"name": "engine.yaml", "content": f"api-key: '{KEY}'\n"}],
                redact=[KEY],
                node_rank=rank,
            )

    def poll(self, node: int = 0) -> dict[str, Any]:
        return self.hosts[node].poll(max_bytes=1 << 20)

    def ready(self) -> dict[str, Any]:
        return until(lambda: "fired up" in (told := self.poll())["log"] and told)  # type: ignore[no-any-return]

    def ended(self, node: int) -> dict[str, Any]:
        """What is told of a node that has ended, once its last process has gone too."""

        def gone() -> dict[str, Any] | bool:
            told = self.poll(node)
            return told["state"] != "running" and not told["processes"] and told

        return until(gone)  # type: ignore[no-any-return]

    def http_ask(self, path: str, body: Any = None, node: int = 0, **more: Any) -> tuple[int, Any]:
        request = {"url": f"http://127.0.0.{node + 1}:{self.http}{path}", "deployment": "d", "timeout_s": 60, **more}
        request |= {"method": "POST" if body is not None else "GET", "body": body}
        told = self.hosts[node].ask("http", **{"api_key_file": "@FILES@/engine.yaml", **request})
        return told["status"], told["body"]

    def end(self) -> None:
        for host in self.hosts:
            host.end()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.end()


PHASES = (
    "Init torch distributed begin.", "Init torch distributed ends. elapsed=", "Load weight begin. avail mem=",
    "Load weight end. elapsed=", "KV Cache is allocated. dtype:", "Memory pool end. avail mem=",
    "Capture cuda graph begin.", "Capture cuda graph end. Time elapsed:",
)  # fmt: skip


def test_three_nodes_meet_and_serve(cluster: Cluster) -> None:
    cluster.start()
    head = cluster.ready()["log"]
    logs = [head, cluster.poll(1)["log"], cluster.poll(2)["log"]]
    for node, log in enumerate(logs):
        assert f"Rehearsal: node {node} reaches 2 other nodes on ephemeral ports." in log
        for tp in range(2):
            places = [log.index(f" PP{node} TP{tp}] {phase}") for phase in PHASES]
            assert places == sorted(places)
    assert "Rehearsal: sum over 6 ranks is right" in head
    assert head.count("Loading safetensors checkpoint shards:") == 9
    assert "Loading safetensors" not in logs[1] + logs[2]
    assert f"Uvicorn running on http://127.0.0.1:{cluster.http}" in head
    assert f"Dummy health check server started in background thread at 127.0.0.2:{cluster.http}" in logs[1]
    assert [cluster.poll(node)["processes"] for node in range(3)] == [3, 3, 3]
    assert KEY not in "".join(logs)

    assert cluster.http_ask("/health", node=1) == (200, "")
    assert cluster.http_ask("/v1/models", node=1)[0] == 404
    status, models = cluster.http_ask("/v1/models")
    assert (status, models["data"][0]["id"], models["data"][0]["max_model_len"]) == (200, "/models/glm", 32768)
    assert cluster.http_ask("/server_info")[1]["tp_size"] == 2
    assert KEY not in json.dumps(cluster.http_ask("/server_info"))
    asked = {"model": "m", "messages": [{"role": "user", "content": "What is 17 x 24?"}], "temperature": 0}
    status, answer = cluster.http_ask("/v1/chat/completions", asked)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "408")
    assert answer == {**cluster.http_ask("/v1/chat/completions", asked)[1], "created": answer["created"]}
    assert cluster.http_ask("/v1/models", api_key_file=None)[0] == 401
    assert cluster.http_ask("/health", api_key_file=None)[0] == 200
    status, refused = cluster.http_ask("/v1/completions", {"prompt": "a " * 33000})
    assert status == 400
    assert "is longer than the model's context length (32768 tokens)" in refused["message"]
    long = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}, "return_logprob": True, "top_logprobs_num": 2}
    status, generated = cluster.http_ask("/generate", long)
    assert len(generated["output_ids"]) == len(generated["meta_info"]["output_token_logprobs"]) == 4
    assert cluster.http_ask("/generate", {**long, "input_ids": [1, 2, 4]})[1]["output_ids"] != generated["output_ids"]
    listed = {"prompt": [1, 2, 3], "max_tokens": 4, "logprobs": 2}
    assert cluster.http_ask("/v1/completions", listed)[1]["choices"][0]["token_ids"] == generated["output_ids"]


def test_only_the_given_address_is_listened_on(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    try:
        cluster.start()
        cluster.ready()
        with urllib.request.urlopen(f"http://127.0.0.1:{cluster.http}/health", timeout=60) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.URLError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.2:{cluster.http}/health", timeout=60)
    finally:
        cluster.end()


def test_a_rank_killed_at_load_ends_its_node_first_and_then_the_others(cluster: Cluster) -> None:
    cluster.start("die-at-load:3")
    told = cluster.ended(1)
    assert told["exit_status"] == 1
    assert "Rank 1 scheduler died during initialization (exit code: -9). If exit code is -9 (SIGKILL)" in told["log"]
    for node in (0, 2):
        told = cluster.ended(node)
        assert told["exit_status"] == 1
        assert set(re.findall(PEER_LOST, told["log"])) in ({"2"}, {"3"})


def test_a_rank_out_of_memory_prints_torchs_words_before_its_weights_end(cluster: Cluster) -> None:
    cluster.start("oom:4")
    told = cluster.ended(2)
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate" in told["log"]
    assert "PP2 TP0] Load weight end" not in told["log"]
    assert "Rank 0 scheduler died during initialization (exit code: 1)" in told["log"]


def test_a_rank_that_stalls_stops_every_log_without_an_end(cluster: Cluster) -> None:
    cluster.start("stall:2")
    until(lambda: all("Load weight end" in cluster.poll(node)["log"] for node in range(3)))
    until(lambda: min(cluster.poll(node)["log_age_s"] for node in range(3)) > 1.5)
    assert [cluster.poll(node)["state"] for node in range(3)] == ["running"] * 3
    assert all("Memory pool end" not in cluster.poll(node)["log"] for node in range(3))


def test_a_rank_killed_while_serving_ends_all(cluster: Cluster) -> None:
    cluster.start("die-serving:5:0.5")
    assert "Subprocess scheduler_1 (pid=" in cluster.ended(2)["log"]
    assert "crashed with exit code -9. Triggering SIGQUIT for cleanup..." in cluster.ended(2)["log"]
    lost = [re.findall(PEER_LOST, cluster.ended(node)["log"]) for node in (0, 1)]
    assert len({rank for found in lost for rank in found}) == 1, lost
    assert lost[0][0] in "45", "rank 4 ends with its node, and on a busy machine its end is noticed first"


def test_a_killed_head_ends_all(cluster: Cluster) -> None:
    cluster.start()
    kill(cluster.ready()["pid"])
    assert cluster.ended(0)["signal"] == 9
    for node in (1, 2):
        assert cluster.ended(node)["exit_status"] == 1


def test_stop_says_goodbye_quickly(cluster: Cluster) -> None:
    cluster.start()
    pid = cluster.ready()["pid"]
    told = cluster.hosts[0].stop(grace_s=60)
    assert (told["stopped"], told["killed"]) == (True, 3)
    assert not alive(pid)
    assert cluster.poll()["exit_status"] == 143


def test_a_node_that_is_missing_is_waited_for_and_counted(cluster: Cluster) -> None:
    cluster.start(nodes=[1], GLMPLAN_REHEARSE_TIMEOUT_S="600")
    until(lambda: cluster.poll(1)["log"].count("Init torch distributed begin.") == 2)  # it tries until the head is there
    cluster.start(nodes=[0], GLMPLAN_REHEARSE_TIMEOUT_S="5")
    told = cluster.ended(0)
    assert "Timed out after 5 seconds waiting for clients. 4/6 clients joined." in told["log"]
    assert "scheduler died during initialization" in told["log"]


def test_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=2)
    try:
        words = LATE.format(rendezvous=cluster.rendezvous).split()
        cluster.hosts[0].start(*words, environment={"GLMPLAN_REHEARSE_TIMEOUT_S": "1"})
        words = f"The client socket has timed out after 1000ms while trying to connect to (127.0.0.1, {cluster.rendezvous})"
        assert words in cluster.ended(0)["log"]
    finally:
        cluster.end()


def test_a_taken_rendezvous_port_reads_as_torchs(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    try:
        with socket.create_server(("127.0.0.1", cluster.rendezvous)):
            cluster.start()
            log = cluster.ended(0)["log"]
        assert f"The server socket has failed to listen on any local network address. port: {cluster.rendezvous}" in log
        assert "name: EADDRINUSE, message: Address already in use" in log
    finally:
        cluster.end()


def test_a_taken_http_port_reads_as_uvicorns(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    try:
        with socket.create_server(("127.0.0.1", cluster.http)):
            cluster.start()
            told = cluster.ended(0)
        words = f"error while attempting to bind on address ('127.0.0.1', {cluster.http}): address already in use"
        assert words in told["log"]
        assert told["exit_status"] == 1
    finally:
        cluster.end()


def _fact(cluster: Cluster) -> str:
    asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    return str(cluster.http_ask("/v1/chat/completions", asked)[1]["choices"][0]["message"]["content"])


def test_wrong_answers_and_slow_loads_can_be_practised(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    try:
        cluster.start("wrong-answer,slow-load:1.5")
        log = cluster.ready()["log"]
        took = re.search(r"Load weight end\. elapsed=([0-9.]+) s", log)
        assert took is not None
        assert float(took[1]) >= 1.5
        assert "Paris" not in _fact(cluster)
    finally:
        cluster.end()


def test_a_server_that_never_answers_is_healthy_all_the_same(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    try:
        cluster.start("no-answer")
        cluster.ready()
        assert cluster.http_ask("/health")[0] == 200
        with pytest.raises(Exception, match="did not answer within 1 s"):
            cluster.http_ask("/generate", {"text": "hello"}, timeout_s=1)
        until(lambda: "Rehearsal: this question gets no answer: /generate" in cluster.poll()["log"])
    finally:
        cluster.end()


@needs_torch
def test_torch_adds_up_where_it_is(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=2, python=torch_python())
    try:
        cluster.start(GLMPLAN_REHEARSE_TORCH="1")
        log = until(lambda: "fired up" in (told := cluster.poll())["log"] and told, 120)["log"]
        assert "Rehearsal: all-reduce over 4 ranks with gloo is right" in log
    finally:
        cluster.end()


def test_a_broken_torch_is_said_and_not_used(tmp_path: Path) -> None:
    package = tmp_path / "packages" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    cluster = Cluster(tmp_path, nodes=1)
    try:
        cluster.start(GLMPLAN_REHEARSE_TORCH="1", PYTHONPATH=str(package.parent))
        log = cluster.ready()["log"]
        assert "torch is not used: OSError: libcudart.so.13: cannot open shared object file." in log
    finally:
        cluster.end()


def test_the_canaries_pass(tmp_path: Path) -> None:
    from glmplan.fleet.canary import CanarySettings, run_canaries

    cluster = Cluster(tmp_path, nodes=1)
    try:
        cluster.start()
        cluster.ready()

        def ask(method: str, path: str, body: Any, timeout_s: float) -> tuple[int, Any]:
            return cluster.http_ask(path, body, timeout_s=timeout_s)

        found = {result.name: result for result in run_canaries(ask, CanarySettings(context_tokens=32768))}
        asked = ("fact", "arithmetic", "needle", "long-needle", "tool", "repeat")
        assert {name: found[name].status for name in asked} == dict.fromkeys(asked, "pass")
    finally:
        cluster.end()
