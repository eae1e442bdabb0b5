"""Proof (d): does `glmplan launch` start the real engine, on one GPU and as TP2 x PP2 on two nodes, and do they agree?

`SITE=~/site python -m benchmarks.proof.pipeline OUT [--seconds 500] [--part shared|cuts]`, on four GPUs, or on two as
TP1 x PP2 and as TP2 on one node; the part `cuts` takes a site of SGLang 0.5.13.post1. The nodes are `local#0-1` and
`local#2-3` (`local#0` and `local#1`): two loopback addresses of this machine, each with a node program, a state folder and a
worker of its own. The checkpoint is the small one of the other proofs, with a tokenizer. Its text means nothing, so answers
are judged by the `reference` canary: greedy tokens and log-probabilities that the one-GPU launch gave. A control, the last
layout with attention that loses slots, must be found wrong by the same limits.

The part `shared` runs TP2 x PP2 on two GPUs: four ranks, two on each GPU. To everything of glmplan the machine then has four
GPUs: `shared/pynvml.py` tells each GPU twice, with the processes that are its own, and the engine's Python is a script that
makes GPUs 1 and 0 of the told 2 and 3. In that order no two ranks of one NCCL group are on one GPU, which NCCL would refuse:
tensor-parallel groups are ranks 0 and 1, 2 and 3, pipeline groups 0 and 2, 1 and 3, and what all four share goes over the
CPU (SGLang 0.5.23 srt/distributed/parallel_state.py:2148, :2671, :2956). The ranks, their shapes, kernels, groups and what
they send are those of four GPUs; speed and memory are not.

For an engine that does not relay top-k between stages, a cut on a layer without an indexer is refused by the planner; forced
past it by an environment variable, it must not end in a healthy launch. Every launch that has to fail says who is to notice
(`caught_by` tells it from what launch printed), and it holds only when that one did.

SGLang 0.5.13.post1 (below srt/) begins each stage without top-k (models/deepseek_v2.py:2437), gives none to a layer without
an indexer (models/deepseek_common/attention_forward_methods/forward_mla.py:277-295), and its sparse attention cannot do
without: the first batch of any kind raises on the first layer. So the cut is forced three times,
- as it is: our plugin refuses it before the weights are read;
- UNTRIED: without our plugin, and nothing is computed before the first request, so the engine says that it is ready, and
  that request ends it;
- RECOMPUTED: the stage's first layer is said to have an indexer, so it runs on weights that no file holds
  (layers/quantization/fp8.py:436,472). The engine starts, captures, answers its own request, and is right up to 2,048
  tokens, where all are chosen; beyond, it attends to the wrong ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.proof import harness
from benchmarks.proof.agreement import MODEL

TOKENIZED = {"spoken": (*MODEL["plain"], "--tokenizer")}
ENGINE = ("--engine-arg=--grammar-backend", "--engine-arg", "none", "--engine-arg=--trust-remote-code")
LOOSE = ("--tolerance", "0.12", "--ties", "1.0")
"""Random weights have ties everywhere, so that no token is wrong by itself: the mean difference of log-probabilities judges,
prompt by prompt. What right and wrong servers gave: glmplan/fleet/reference.py, TOLERANCE_NATS."""
SILENT = ("--engine-arg=--skip-tokenizer-init",)
WEIGHTS = (
    "--engine-arg=--fp8-gemm-backend",
    "--engine-arg",
    "triton",
    "--engine-arg=--moe-runner-backend",
    "--engine-arg",
    "triton",
)
FORCED = ("--engine-env", "SGLANG_PP_LAYER_PARTITION=3,4")
AS_STOCK = [f"{name}={value}" for name, value in harness.BASE.items() if name.startswith("SGLANG_")]
"""The stock servers' settings in the other proofs: sparse attention for short prompts, too, no DeepGEMM for weights."""
UNTRIED = (
    "--kernel-port", "off", "--engine-arg=--disable-cuda-graph", "--engine-arg=--skip-server-warmup",
    *(word for setting in AS_STOCK for word in ("--engine-env", setting)),
)  # fmt: skip
RECOMPUTED = ("--engine-arg=--json-model-override-args", "--engine-arg", '{"index_topk_pattern": "FFFFSSF"}')
"""The checkpoint's own pattern is FFFSSSF: layers 3 to 5 share the top-k of layer 2."""
CONTROL = ("--engine-env", "PROOF_SABOTAGE=1")
SHARED = Path(__file__).parent / "shared"
SHARED_GPUS = (0, 1, 2, 3)

LEAST_STOP_S = 60.0
"""Left to a stop in any case: 25 s for a start that still holds the host, and up to 26 s for processes and memory."""
PLANNER, PLUGIN, ENGINE_START = "the planner", "our plugin, before the weights", "the engine, at its start"
CANARY_ENDED, CANARY_WRONG = "the canary: its question ended the server", "the canary: a wrong answer"
WRONG = re.compile(r"reference expected 'the recorded tokens.*' and got 'a mean difference of ")
"""Beyond the limit that judges the right launches: a NaN, a short answer or a token that is no tie says nothing of that."""
SECOND_STAGE = re.compile(r"^\S+, PP1 .*while serving:$", re.MULTILINE)
"""Where launch quotes the log of the worker that failed. Of a missing top-k stock says that a NoneType has no method
(0.5.13.post1, srt/layers/attention/dsa_backend.py:1816, :1867); what fails for another reason does not."""


def caught_by(code: int | None, text: str) -> str | None:
    """Who stopped a command, from its exit code and what it printed; None where nobody known did."""
    unsent = "does not send it between stages" in text
    if code == 2 and unsent:
        return PLANNER
    if code == 6 and ": ready" not in text:
        return PLUGIN if unsent else ENGINE_START
    if code == 6 and " canary got no answer. The worker " in text and SECOND_STAGE.search(text) and "NoneType" in text:
        return CANARY_ENDED
    if code == 7 and WRONG.search(text):
        return CANARY_WRONG
    return None


@dataclass
class Step:
    """One command: what was wanted of it and what it did. `catcher` is who was to stop it, where it was to be stopped."""

    name: str
    words: list[str]
    wanted: tuple[int, ...]
    catcher: str | None = None
    code: int | None = None
    seconds: float = 0.0
    text: str = ""

    @property
    def holds(self) -> bool:
        return self.code in self.wanted and (self.catcher is None or self.caught_by == self.catcher)

    @property
    def caught_by(self) -> str | None:
        """None where nothing was to be caught."""
        return None if self.catcher is None else caught_by(self.code, self.text) or "nobody known"

    @property
    def judged(self) -> dict[str, Any]:
        """What a record says of it beside its command."""
        told = {"wanted": list(self.wanted), "exit": self.code, "holds": self.holds}
        return told | ({"catcher": self.catcher, "caught_by": self.caught_by} if self.catcher else {})


@dataclass
class Run:
    """Commands in order, all with one state folder."""

    setting: harness.Setting
    deadline: float
    steps: list[Step] = field(default_factory=list)
    python: str = sys.executable
    shared: bool = False

    def glmplan(self, name: str, *words: str, wanted: tuple[int, ...] = (0,), catcher: str | None = None) -> Step:
        step = Step(name, list(words), wanted, catcher)
        self.steps.append(step)
        begin = time.monotonic()
        left_s = self.deadline - begin
        if words[0] == "stop":  # nothing is left running, though the time be over
            left_s = max(left_s, LEAST_STOP_S)
        elif left_s <= 0:
            step.text = "no time was left"
            print(f"{name}: {step.text}", flush=True)
            return step
        state = {"XDG_STATE_HOME": str(self.setting.work / "state"), "COLUMNS": "140", "PYTHONUNBUFFERED": "1"}
        if self.shared:
            state["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SHARED), os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "glmplan", *words], cwd=harness.ROOT, env={**os.environ, **state}, check=False,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=left_s,
            )  # fmt: skip
            step.code, step.text = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            step.text = f"{(error.stdout or b'').decode(errors='replace')}\nno time was left"
        step.seconds = round(time.monotonic() - begin, 1)
        caught = f", caught by {step.caught_by}" if step.catcher else ""
        print(f"{name}: exit {step.code} after {step.seconds} s{caught}", flush=True)
        return step


def planned(run: Run, *words: str, beside: Sequence[Path] = ()) -> list[str]:
    """What all launches share. `beside`: folders of packages that the engine gets, too."""
    folders = os.pathsep.join(map(str, (run.setting.site, *beside)))
    half = "0.25" if run.shared else "0.5"  # of the memory that a rank has to itself, so that nothing else is tight
    return [
        "--model-path", str(run.setting.models["spoken"]), "--context", "65536", "--mem-fraction", half,
        "--graph-max-bs", "16", "--kernel-port", "force", "--engine-python", run.python,
        "--engine-env", f"PYTHONPATH={folders}", "--yes", "--deadline", "400", *ENGINE, *WEIGHTS, *words,
    ]  # fmt: skip


def engine_python(folder: Path) -> Path:
    """This Python as the engine's where GPUs are told twice: 2 and 3 are 1 and 0, as `shared/pynvml.py` says."""
    script = folder / "engine-python"
    swap = 'case "$CUDA_VISIBLE_DEVICES" in 2,3) export CUDA_VISIBLE_DEVICES=1,0 ;; esac'
    script.write_text(f'#!/bin/sh\n{swap}\nexec {shlex.quote(sys.executable)} "$@"\n')
    script.chmod(0o755)
    return script


@dataclass(frozen=True)
class TwoNodes:
    """Two neighbouring GPUs each of four or more, one each of two or three."""

    gpus: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.gpus) < 2:
            raise SystemExit(f"Two nodes need two GPUs and {len(self.gpus)} is visible.")
        if any(of[-1] - of[0] != self.tp - 1 for of in self._halves):
            raise SystemExit(f"Name neighbouring GPUs: {self.gpus} gives {self._halves}, and a host's GPUs are a range.")

    @property
    def _halves(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.gpus[: self.tp], self.gpus[self.tp : 2 * self.tp]

    @property
    def tp(self) -> int:
        """GPUs per node."""
        return min(len(self.gpus) // 2, 2)

    @property
    def one(self) -> tuple[str, str]:
        """The GPU of the launch that both are compared with."""
        return ("--hosts", f"local#{self.gpus[0]}")

    @property
    def hosts(self) -> tuple[str, str]:
        ranges = (f"{of[0]}" if self.tp == 1 else f"{of[0]}-{of[-1]}" for of in self._halves)
        return ("--hosts", ",".join(f"local#{numbers}" for numbers in ranges))

    @property
    def layouts(self) -> list[tuple[str, tuple[str, ...]]]:
        """What is compared with one GPU, by name; a node's GPUs are one where there are two, so then TP by itself, too."""
        found = [("two nodes", (*self.hosts, *self.pin()))]
        if self.tp == 1 and self.gpus[1] == self.gpus[0] + 1:
            pair = f"local#{self.gpus[0]}-{self.gpus[1]}"
            found.append(("one node", ("--hosts", pair, "--pin", "tp=2,pp=1,nodes=1")))
        return found

    def pin(self, stages: str = "") -> tuple[str, str]:
        return ("--pin", f"tp={self.tp},pp=2,nodes=2" + (f",stages={stages}" if stages else ""))


def one_gpu(run: Run, said: str, name: str, file: str, common: Sequence[str]) -> tuple[str, ...]:
    """Record one GPU's answers; the words by which they judge another launch."""
    out, hosts = str(run.setting.work / file), TwoNodes(run.setting.gpus).one
    run.glmplan(f"{said}: launch", "launch", *hosts, "--name", name, "--no-canary", *common)
    run.glmplan(f"{said}: record", "verify", "--url", "http://127.0.0.1:30000", "--record", out, "--force", *LOOSE)
    run.glmplan(f"{said}: stop", "stop", name)
    return ("--canary-reference", out, "--canaries", "reference")


def pipeline(run: Run, silent: tuple[str, ...]) -> None:
    """One GPU as the reference, then each layout against it, then the control."""
    layouts, common = TwoNodes(run.setting.gpus).layouts, planned(run, *silent)
    judged = one_gpu(run, "one GPU", "one", "answers.json", common)
    for said, layout in layouts:
        name = said.replace(" ", "-")
        run.glmplan(f"{said}: launch", "launch", *layout, "--name", name, *judged, *common)
        run.glmplan(f"{said}: status", "status", name)
        run.glmplan(f"{said}: stop", "stop", name, "--forget")
    said, layout = layouts[-1]
    control = planned(run, *silent, *CONTROL, beside=[harness.control_beside(run.setting.work / "control")])
    words = ("launch", *layout, "--name", "control", *judged, *control)
    run.glmplan(f"{said}, control: launch", *words, wanted=(7,), catcher=CANARY_WRONG)
    run.glmplan(f"{said}, control: stop", "stop", "control")


def cuts(run: Run, silent: tuple[str, ...]) -> None:
    """The engine without a relay: refused, allowed, forced."""
    own = ("--engine", "sglang-0.5.13.post1")
    common = planned(run, *own, "--skip-doctor", *silent)  # whether the machine suits it is not the subject
    nodes = TwoNodes(run.setting.gpus)
    run.glmplan(
        "cut on a shared layer: size", "size", "--gpus", f"{2 * nodes.tp}x h200", "--nodes", "2", "--model-path",
        str(run.setting.models["spoken"]), *nodes.pin("3/4"), *own, "--kernel-port", "force", wanted=(2,), catcher=PLANNER,
    )  # fmt: skip
    judged = (*one_gpu(run, "0.5.13, one GPU", "old", "answers-0.5.13.json", common), *nodes.pin("2/5"))
    run.glmplan("0.5.13, legal cut: launch", "launch", *nodes.hosts, "--name", "legal", *judged, *common)
    run.glmplan("0.5.13, legal cut: stop", "stop", "legal")
    attempts = (
        ("forced", (), 6, PLUGIN),
        ("untried", UNTRIED, 6, CANARY_ENDED),
        ("recomputed", RECOMPUTED, 7, CANARY_WRONG),
    )
    for name, more, code, catcher in attempts:
        # of an option twice, the later counts
        words = ("launch", *nodes.hosts, "--name", name, *judged, *common, *FORCED, *more)
        run.glmplan(f"0.5.13, {name} cut: launch", *words, wanted=(code,), catcher=catcher)
        run.glmplan(f"0.5.13, {name} cut: logs", "logs", name, "--lines", "60")
        run.glmplan(f"0.5.13, {name} cut: stop", "stop", name)


def memory_left() -> list[str]:
    asked = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")


def memory_after(before: list[str], wait_s: float = 15.0) -> list[str]:
    """As `memory_left`, once it is as before, or after `wait_s`: the driver may keep a few MiB of the last process for a
    moment."""
    ends = time.monotonic() + wait_s
    while (found := memory_left()) != before and time.monotonic() < ends:
        time.sleep(0.5)
    return found


HEADING = re.compile(
    r".*: exit (?P<exit>\d+|None), wanted \((?P<wanted>[\d, ]*)\), .*(\ncaught by .*; wanted (?P<catcher>.*))?"
)


def texts(path: Path) -> dict[str, str]:
    """What each command of a record printed, under its heading, by its step's name, from the text beside it."""
    return {part.partition(": exit")[0]: part for part in path.with_suffix(".txt").read_text().split("\n## ")[1:]}


def rejudged(verdict: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A recorded verdict with what was wanted and who caught what, told anew from what was printed."""
    recorded, steps = {step["name"]: step for step in verdict["steps"]}, []
    for name, text in texts(path).items():
        said = HEADING.match(text)
        if said is None:
            raise ValueError(f"the heading {text[:80]!r} is none")
        code = None if said["exit"] == "None" else int(said["exit"])
        wanted = tuple(int(word) for word in said["wanted"].split(",") if word.strip())
        steps.append(recorded[name] | Step(name, [], wanted, said["catcher"], code, text=text).judged)
    return {**verdict, "steps": steps, "holds": all_hold(steps, verdict["memory_before"], verdict["memory_after"])}


def all_hold(steps: Sequence[Mapping[str, Any]], before: Sequence[str], after: Sequence[str]) -> bool:
    read = any(before)  # nothing where nvidia-smi failed
    return bool(steps) and all(step["holds"] for step in steps) and read and before == after


def write(out: Path, name: str, run: Run, before: list[str], after: list[str]) -> bool:
    """OUT/NAME.json and OUT/NAME.txt."""
    home = str(Path.home())
    steps = [
        {"name": step.name, "command": "glmplan " + shlex.join(step.words).replace(home, "~"), "seconds": step.seconds}
        | step.judged
        for step in run.steps
    ]
    holds = all_hold(steps, before, after)
    verdict: Mapping[str, Any] = {"holds": holds, "memory_before": before, "memory_after": after, "steps": steps}
    setting = harness.versions(run.setting) | ({"told_gpus": "0, 1, and again 1, 0 as 2, 3"} if run.shared else {})
    record = {"proof": name, "date": time.strftime("%Y-%m-%d"), "setting": setting, "verdict": verdict}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    text = [f"{name}: {'holds' if holds else 'DOES NOT HOLD'}", json.dumps(record["setting"])]
    text += [f"GPU memory before {before}, after {after}"]
    for step in run.steps:
        text += [f"\n## {step.name}: exit {step.code}, wanted {step.wanted}, {step.seconds} s"]
        text += [f"caught by {step.caught_by}; wanted {step.catcher}"] if step.catcher else []
        text += [f"$ glmplan {shlex.join(step.words)}", step.text]
    (out / f"{name}.txt").write_text("\n".join(text).replace(home, "~") + "\n")
    return holds


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--skip-tokenizer", action="store_true", help="start the engine without its tokenizer")
    parser.add_argument("--part", choices=["pipeline", "shared", "cuts"], default="pipeline")
    asked = parser.parse_args()
    setting = harness.prepare(TOKENIZED)
    run = Run(setting, setting.begun + asked.seconds)
    if asked.part == "shared":
        if setting.gpus[:2] != SHARED_GPUS[:2]:
            raise SystemExit(f"The part `shared` needs GPUs 0 and 1; {setting.gpus} are to be used.")
        shared = dataclasses.replace(setting, gpus=SHARED_GPUS)
        run = Run(shared, run.deadline, python=str(engine_python(setting.work)), shared=True)
    silent = SILENT if asked.skip_tokenizer else ()
    before = memory_left()
    (cuts if asked.part == "cuts" else pipeline)(run, silent)
    return 0 if write(asked.out, f"launch-{asked.part}", run, before, memory_after(before)) else 1


if __name__ == "__main__":
    sys.exit(main())
