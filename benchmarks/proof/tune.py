"""Proof: are tables made on this GPU, what do they gain over the engine's default, and does a server load them?

`SITE=~/site python -m benchmarks.proof.tune OUT [--seconds 500]`
Three GEMMs and two layers of experts: of each kind one of GLM-5.2 (TP8), the others of the small checkpoint. The search is
the quick one, over two numbers of rows. The server then serves the small checkpoint with the tables and says on stderr which
it uses; both tables of its experts must be among them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.proof import harness
from benchmarks.proof.agreement import BACKENDS, MODEL, flags, prompt
from benchmarks.proof.harness import Client, Job, Setting

SHAPES = ("1024,16384", "16384,512", "2624,6144")
EXPERTS = ("16,512,1024,4", "256,256,6144,8")
SERVED = "E=16,N=512,"
ROWS = "1,256"
USED = "glmplan tables: "


def make_tables(setting: Setting, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The tuner's events, and what went wrong; GEMMs and experts one after the other, so that either can fail alone."""
    deadline = time.monotonic() + seconds
    events, wrong = [], []
    for kind, asked in (("gemm", ("--shapes", *SHAPES)), ("experts", ("--experts", *EXPERTS))):
        said, told = setting.logs / f"tune-{kind}.log", setting.logs / f"tune-{kind}-events.log"
        ended = tuner(setting, asked, said, told, max(deadline - time.monotonic(), 1.0))
        if ended:
            wrong.append(f"{kind}: {ended}: " + " | ".join(said.read_text(errors="replace").splitlines()[-5:]))
        whole = [line for line in told.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        events += list(map(json.loads, whole))
    return events, wrong


def tuner(setting: Setting, asked: Sequence[str], said: Path, told: Path, seconds: float) -> str:
    """Runs it; how it ended otherwise than well."""
    path = os.pathsep.join([str(setting.plugin), str(setting.site)])
    command = [
        sys.executable, "-m", "glmplan.kernels.engines.sglang_tune", "--out", str(setting.work / "tuned"), "--rows", ROWS,
        "--quick", "--json-lines", *asked,
    ]  # fmt: skip
    with said.open("w") as log, told.open("w") as out:
        try:
            ran = subprocess.run(
                command, stdout=out, stderr=log, timeout=seconds, cwd=setting.work, check=False,
                env={**harness.inherited(), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": str(setting.gpus[0])},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
    return "" if ran.returncode == 0 else f"ended with {ran.returncode}"


def sentence(event: dict[str, Any]) -> str:
    """One row's gain."""
    size = f"{event['n']}x{event['k']}" if event["experts"] is None else f"{event['experts']}x{event['n']}x{event['k']}"
    default, tuned = event["default_us"], event["tuned_us"]
    return f"{size} rows {event['rows']}: {default:.1f} -> {tuned:.1f} us, {default / tuned:.2f}x"


def tables(folder: Path) -> dict[str, str]:
    """What names those that were made: a server refuses a folder that has none."""
    found = {"GLMPLAN_TUNED_DIR": any(folder.glob("*.json")), "SGLANG_MOE_CONFIG_DIR": (folder / "configs").is_dir()}
    return {name: str(folder) for name, there in found.items() if there}


def ask(client: Client) -> dict[str, Any]:
    (reply,) = client.generate([prompt(300)], 16)
    return {"tokens": reply.get("output_ids")}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0)
    asked = parser.parse_args()
    begin = time.monotonic()
    setting = harness.prepare(MODEL)
    events, wrong = make_tables(setting, asked.seconds * 0.6)
    tuned_s = time.monotonic() - begin
    port = BACKENDS[setting.version]["bf16"][2]
    environment = {"GLMPLAN_PORT": "force", **tables(setting.work / "tuned")}
    outcomes = harness.run([Job("tuned", flags("bf16", port), ask, environment)], setting, asked.seconds)
    log = setting.logs / "tuned.log"
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    used = sorted({line[line.index(USED) :].replace(str(Path.home()), "~") for line in said if USED in line})
    done = sum(event["kind"] in ("done", "kept") for event in events)
    wanted = len(SHAPES) + len(EXPERTS)
    gemms = [line for line in used if "/N=" in line]
    experts = [line for line in used if f"/{SERVED}" in line]
    holds = done == wanted and len(gemms) >= 2 and len(experts) == 2 and outcomes["tuned"].error is None
    lines = [f"{done} of {wanted} shapes in {tuned_s:.0f} s", *wrong]
    lines += [sentence(event) for event in events if event["kind"] == "rows"] + used
    verdict = {"holds": holds, "events": events, "lines": lines}
    harness.write(asked.out, f"tune-{setting.version}", setting, outcomes, verdict)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
