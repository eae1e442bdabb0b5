"""Do the released engines' benchmarks take the flags that we give, and write the fields that we read?"""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path

import pytest

from glmplan.bench.engine_bench import EngineBench
from glmplan.bench.run import Settings
from tests.contracts.wheels import WheelUnavailable, wheel

pytestmark = pytest.mark.wheels

FIELDS = ("output_lens", "errors", "itls", "ttfts", "duration", "total_input_tokens")
SOURCES = {
    ("sglang", "0.5.13.post1"): ("sglang/bench_serving.py",),
    ("sglang", "0.5.23"): ("sglang/benchmark/serving.py", "sglang/benchmark/datasets/__init__.py"),
    ("vllm", "0.33.0"): ("vllm/benchmarks/serve.py", "vllm/benchmarks/datasets/datasets.py"),
}


def trees(name: str, version: str) -> list[ast.Module]:
    try:
        path = wheel(name, version)
    except WheelUnavailable as reason:
        pytest.skip(str(reason))
    with zipfile.ZipFile(path) as archive:
        return [ast.parse(archive.read(source)) for source in SOURCES[name, version]]


def options(found: list[ast.Module]) -> dict[str, bool]:
    """Option -> whether it takes a value."""
    known = {}
    for node in (node for tree in found for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [one.value for one in node.args if isinstance(one, ast.Constant)]
            actions = [
                one.value.value for one in node.keywords if one.arg == "action" and isinstance(one.value, ast.Constant)
            ]
            known |= dict.fromkeys(names, "store_true" not in actions)
    return known


def strings(found: list[ast.Module]) -> set[str]:
    return {
        node.value
        for tree in found
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize(("name", "version"), SOURCES)
@pytest.mark.parametrize("concurrency", [4, None])
def test_every_flag_is_known_and_has_its_value(name, version, concurrency):
    found = trees(name, version)
    known = options(found)
    tokenizer = "/models/glm"
    settings = Settings(rate_per_s=None if concurrency else 2.0)
    argv = EngineBench(name, "http://x", "glm", tokenizer).argv(concurrency, settings, Path("/tmp/result.json"))
    words = argv[argv.index("--base-url") :]
    place = 0
    while place < len(words):
        flag = words[place]
        assert flag in known, flag
        takes = place + 1 < len(words) and not words[place + 1].startswith("--")
        assert takes == known[flag], flag
        place += 2 if takes else 1
    choices = {words[words.index(flag) + 1] for flag in ("--backend", "--dataset-name")}
    assert choices <= strings(found) | {"vllm"}


@pytest.mark.parametrize(("name", "version"), SOURCES)
def test_every_field_that_is_read_is_written(name, version):
    assert set(FIELDS) <= strings(trees(name, version))


@pytest.mark.parametrize("version", ["0.5.13.post1", "0.5.23"])
def test_sglangs_benchmark_is_a_module_of_that_name(version):
    with zipfile.ZipFile(wheel("sglang", version)) as archive:
        assert 'if __name__ == "__main__"' in archive.read("sglang/bench_serving.py").decode()
