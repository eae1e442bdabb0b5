"""Resolve the golden command lines with the engines' own code on a pretended GPU, and record what they say.

Run:  python benchmarks/resolve_golden.py RESOLVER VENV_0_5_23 VENV_0_5_13 > tests/recorded/resolved/sglang.json
RESOLVER is a script that fakes a GPU and calls SGLang's argument resolution; the two Pythons have SGLang 0.5.23 and
0.5.13.post1 on CPU PyTorch. The record keeps argv, environment, exit code and resolved values of every case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.golden.cases import CASES, Case, config_of, node_command  # noqa: E402

SM_ARGUMENT = {80: "8.0", 86: "8.6", 89: "8.9", 90: "9.0", 100: "10.0", 120: "12.0"}


def resolve(case: Case, resolver: str, python: str) -> dict[str, Any]:
    """One case through the engine's argument resolution."""
    command = node_command(case)
    flags = list(command.argv[command.argv.index("--model-path") + 2 :])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_of(case)))
        environment = {**os.environ, **command.environment, "MODEL": folder}
        if case.hook:
            environment["HOOK"] = "1"
        ran = subprocess.run(
            [python, resolver, SM_ARGUMENT[case.sm], str(case.memory_mib), *flags],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    lines = [line for line in ran.stdout.splitlines() if " = " in line or ran.returncode]
    return {
        "argv": list(command.argv),
        "environment": command.environment,
        "pretended_gpu": f"sm_{case.sm}, {case.memory_mib} MiB",
        "plugin_hook": case.hook,
        "exit_code": ran.returncode,
        "resolved": lines,
    }


def main() -> None:
    """Print the record of all cases."""
    resolver, newer, older = sys.argv[1:4]
    found: dict[str, Any] = {
        "source": "SGLang's own argument resolution (ServerArgs.from_cli_args, resolve_once, check_server_args) with a "
        "pretended GPU; wheels 0.5.23 and 0.5.13.post1 on CPU torch 2.13.0 (the wheels pin 2.14.1 and 2.11.0)",
        "cases": {},
    }
    for name, case in CASES.items():
        python = newer if case.options["engine"] == "sglang" else older
        found["cases"][name] = resolve(case, resolver, python)
        print(name, found["cases"][name]["exit_code"], file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
