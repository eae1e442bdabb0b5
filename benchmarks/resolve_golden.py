"""Resolve the golden command lines with the engines' own code on a pretended GPU, and record what they say.

Run:  python benchmarks/resolve_golden.py RESOLVER VENV_0_5_23 VENV_0_5_13 > tests/recorded/resolved/sglang.json
RESOLVER is a script that fakes a GPU and calls SGLang's argument resolution; the two Pythons have SGLang 0.5.23 and
0.5.13.post1 on CPU PyTorch. A plan that needs glmplan's kernels is resolved twice: with the packed kernels on PYTHONPATH,
where the engine's own load_plugins finds them by their entry point, and without, as on a node that lacks them.
The record keeps argv, environment, exit code and resolved values of every case, and the stock engine's last line.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from glmplan.kernels.packed import packed  # noqa: E402
from tests.golden.cases import CASES, Case, config_of, node_command, uses_port  # noqa: E402

SM_ARGUMENT = {80: "8.0", 86: "8.6", 89: "8.9", 90: "9.0", 100: "10.0", 120: "12.0"}
# the resolver parses arguments once it has its GPU and the engine; the engine's launcher loads plugins just before that
WITH_PLUGINS = """
import argparse, runpy, sys
parse_args = argparse.ArgumentParser.parse_args

def plugins_first(*arguments, **keywords):
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return parse_args(*arguments, **keywords)

argparse.ArgumentParser.parse_args = plugins_first
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ask(case: Case, environment: dict[str, str], words: list[str]) -> subprocess.CompletedProcess[str]:
    """One run of the engine's argument resolution."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_of(case)))
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        everything = {**inherited, **environment, "MODEL": folder}
        return subprocess.run(words, env=everything, capture_output=True, text=True, timeout=300, check=False)


def resolve(name: str, resolver: str, python: str, kernels: str) -> dict[str, Any]:
    """One case through the engine's argument resolution."""
    case, command, port = CASES[name], node_command(name), uses_port(name)
    flags = list(command.argv[command.argv.index("--model-path") + 2 :])
    words = [resolver, SM_ARGUMENT[case.sm], str(case.memory_mib), *flags]
    stock = ask(case, command.environment, [python, *words])
    ran = ask(case, {**command.environment, "PYTHONPATH": kernels}, [python, "-c", WITH_PLUGINS, *words]) if port else stock
    found: dict[str, Any] = {
        "argv": list(command.argv),
        "environment": command.environment,
        "pretended_gpu": f"sm_{case.sm}, {case.memory_mib} MiB",
        "port": port,
        "exit_code": ran.returncode,
        "resolved": [line for line in ran.stdout.splitlines() if " = " in line or ran.returncode],
    }
    if port:
        found["without_port"] = {"exit_code": stock.returncode}
        if stock.returncode:
            found["without_port"]["said"] = stock.stdout.strip().splitlines()[-1]
    if ran.returncode:
        print(ran.stdout[-2000:], ran.stderr[-2000:], file=sys.stderr)
    return found


def main() -> None:
    """Print the record of all cases."""
    resolver, newer, older = sys.argv[1:4]
    found: dict[str, Any] = {
        "source": "SGLang's own argument resolution (ServerArgs.from_cli_args, resolve_once, check_server_args) with a "
        "pretended GPU; wheels 0.5.23 and 0.5.13.post1 on CPU torch 2.13.0 (the wheels pin 2.14.1 and 2.11.0); `port` cases "
        "with glmplan's plugin, loaded by the engine's load_plugins",
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as kernels:
        zipfile.ZipFile(io.BytesIO(packed())).extractall(kernels)
        for name, case in CASES.items():
            python = newer if case.options["engine"] == "sglang" else older
            found["cases"][name] = resolve(name, resolver, python, kernels)
            print(name, found["cases"][name]["exit_code"], file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
