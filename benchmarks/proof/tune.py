"""Proof: are tables made on this GPU for three shapes, faster than the default or equal, and does a server load them?

`SITE=~/site python -m benchmarks.proof.tune OUT [--seconds 500]`
The shapes are two of the small checkpoint's weights and one of GLM-5.2's; the server then serves the small checkpoint with
the tables and says on stderr which it uses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.proof import harness
from benchmarks.proof.agreement import BACKENDS, MODEL, flags, prompt
from benchmarks.proof.harness import Client, Job, Setting

SHAPES = ("1024,16384", "16384,512", "2624,6144")
ROWS = "1,16,64,256,1024"
USED = "glmplan tables: "


def make_tables(setting: Setting, seconds: float) -> list[dict[str, Any]]:
    """The tuner's events."""
    path = os.pathsep.join([str(setting.plugin), str(setting.site)])
    command = [
        sys.executable, "-m", "glmplan.kernels.engines.sglang_tune", "--out", str(setting.work / "tuned"), "--rows", ROWS,
        "--json-lines", "--shapes", *SHAPES,
    ]  # fmt: skip
    with (setting.logs / "tune.log").open("w") as log:
        ran = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=seconds, cwd=setting.work, check=False,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    return [json.loads(line) for line in ran.stdout.splitlines()]


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
    events = make_tables(setting, asked.seconds * 0.6)
    rows = [event for event in events if event["kind"] == "rows"]
    port = BACKENDS[setting.version]["bf16"][2]
    environment = {"GLMPLAN_PORT": "force", "GLMPLAN_TUNED_DIR": str(setting.work / "tuned")}
    job = Job("tuned", flags("bf16", port), ask, environment)
    outcomes = harness.run([job], setting, asked.seconds - (time.monotonic() - begin))
    log = setting.logs / "tuned.log"
    used = sorted({line[line.index(USED) :] for line in log.read_text(errors="replace").splitlines() if USED in line})
    used = [line.replace(str(Path.home()), "~") for line in used]
    gains = [
        f"{event['n']}x{event['k']} rows {event['rows']}: {event['default_us'] / event['tuned_us']:.2f}x" for event in rows
    ]
    done = sum(event["kind"] in ("done", "kept") for event in events)
    holds = done == len(SHAPES) and len(used) >= 2 and outcomes["tuned"].error is None
    verdict = {"holds": holds, "events": events, "lines": [f"{done} of {len(SHAPES)} tables", *gains, *used]}
    harness.write(asked.out, f"tune-{setting.version}", setting, outcomes, verdict)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
