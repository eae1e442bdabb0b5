"""Do the released wheels still print what the phase reader and the failure table wait for, in the files they name?"""

from __future__ import annotations

import re
import zipfile
from functools import cache

import pytest

from glmplan.facts.failure_profile import FailureSignature
from glmplan.facts.profiles import failure_signatures
from tests.contracts.wheels import WheelUnavailable, wheel
from tests.fleet.failure_lines import SGLANG, VLLM

pytestmark = pytest.mark.wheels

VERSIONS = {"13": ("sglang", "0.5.13.post1"), "23": ("sglang", "0.5.23"), "33": ("vllm", "0.33.0")}
PHASE_WORDS = {
    "13": {
        "srt/model_executor/model_runner.py": (
            "Init torch distributed begin.", "Init torch distributed ends. elapsed=", "Load weight begin. avail mem=",
            "Load weight end. ", "Capture piecewise CUDA graph begin. avail mem=", "mem usage=",
        ),
        "srt/mem_cache/memory_pool.py": ("KV Cache is allocated. dtype:", "#tokens: {num_tokens}, KV size:"),
        "srt/managers/scheduler.py": ("max_total_num_tokens={self.max_total_num_tokens}", "available_gpu_mem"),
        "srt/entrypoints/http_server.py": ("The server is fired up and ready to roll!",),
    },
    "23": {
        "srt/distributed/bootstrap.py": ("Init parallel begin.", "Memory baseline taken. mem usage="),
        "srt/model_executor/model_runner.py": ("Load weight begin. avail mem=", "Load weight end. ", "mem usage="),
        "srt/mem_cache/memory_pool.py": ("'VA upper bound'", "'is allocated'", "#tokens: {num_tokens}, KV size:"),
        "srt/mem_cache/kv_cache_configurator.py": ("Memory pool end. avail mem=",),
        "srt/model_executor/model_runner_components/cuda_graph_setup.py": (
            "CUDA graph begin. backend=", "CUDA graph end. elapsed=",
        ),
        "srt/managers/scheduler.py": ("max_total_num_tokens={self.max_total_num_tokens}", "available_gpu_mem"),
        "srt/entrypoints/http_server.py": ("The server is fired up and ready to roll!",),
        "srt/utils/common.py": (
            "Dummy health check server started in background thread at", "% Completed | {n_fmt}/{total_fmt} [",
        ),
    },
    "33": {
        "v1/worker/gpu/model_runner.py": (
            "Loading model from scratch...", "Model loading took %s GiB memory",
            "Graph capturing finished in %.0f secs, took %.2f GiB",
        ),
        "v1/worker/gpu_worker.py": ("Available KV cache memory: %s GiB", "GiB memory for KV Cache as specified by"),
        "v1/core/kv_cache_utils.py": ("%s KV cache size: %s tokens,",),
        "v1/engine/core.py": ("Initializing a V1 LLM engine", "init engine (profile, create kv cache, warmup model) took"),
        "logger.py": ("(%(vllm_process_name)s pid=%(process)d)",),
    },
}  # fmt: skip


@cache
def source(version: str, path: str) -> str:
    """A file of the wheel with its adjacent string pieces joined."""
    name, number = VERSIONS[version]
    try:
        found = wheel(name, number)
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    with zipfile.ZipFile(found) as archive:
        text = archive.read(f"{name}/{path}").decode()
    return re.sub(r'"\s*\n\s*f?"', "", text)


PHASES = [(version, path, words) for version, files in PHASE_WORDS.items() for path, words in files.items()]


@pytest.mark.parametrize(("version", "path", "words"), PHASES, ids=[f"{case[0]}-{case[1]}" for case in PHASES])
def test_phase_lines_are_in_the_wheel(version, path, words):
    text = source(version, path)
    assert [word for word in words if word not in text] == []


def texts(signature: FailureSignature, line: str) -> list[str]:
    """The example line, and each branch of the pattern without its groups."""
    plain = re.sub(r"\(\?P<\w+>(?:\[[^]]*\]|[^()[])*\)[?+*]?", " ", signature.pattern or signature.literal or "")
    return [line, *(re.sub(r"\\(.)", r"\1", piece) for piece in re.split(r"\||\(\?:", plain))]


def runs(text: str) -> list[str]:
    """Three words in a row, or two long ones."""
    words = text.split()
    three = [" ".join(words[begin : begin + 3]) for begin in range(len(words) - 2)]
    two = [" ".join(words[begin : begin + 2]) for begin in range(len(words) - 1)]
    return [run for run in three if len(run) > 9] + [run for run in two if len(run) > 14]


PLACES = [
    (signature, version, path, lines[signature.id][1])
    for family, lines in (("sglang", SGLANG), ("vllm", VLLM))
    for signature in failure_signatures(family)
    if signature.id in lines
    for version, path in re.findall(r"(13|23|33):([\w/]+\.py)", signature.source)
]


@pytest.mark.parametrize(
    ("signature", "version", "path", "line"), PLACES, ids=[f"{case[0].id}-{case[1]}-{case[2]}" for case in PLACES]
)
def test_failure_lines_are_in_the_wheel(signature, version, path, line):
    wanted = [run for text in texts(signature, line) for run in runs(text)]
    assert any(run in source(version, path) for run in wanted), f"{path} holds none of {wanted}"
