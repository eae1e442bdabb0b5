"""How is a real engine started on a few GPUs, asked, and put away again, whatever happens to any one server?

A server is one process group on one GPU with its own log. Servers start in waves and run side by side; one that fails leaves
its reason in its outcome and does not stop the others; at the deadline, or when this process is asked to end, everything
that runs is killed, and what was answered until then is written and judged.
The engine is found through SITE (a folder of packages, default ~/site); this checkout's package goes beside it as an
installed one, with the entry point that the engine looks for. So that several scripts can run side by side, each may have
PROOF_GPUS (numbers, `0,1`; default all), PROOF_PORT (its first port, default 10000) and PROOF_WORK (default ~/proof).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKER, FAILURE = "glmplan port:", "glmplan port failed:"
OWN = ("GLMPLAN_", "SGLANG_", "VLLM_")  # variables that no server inherits
FIRST_PORT, PORT_STEP = 10000, 300
WAVE_SHARE = 0.4
"""Of the seconds: as long do the others wait for the first wave."""
COMPLAINT = re.compile(r"\b[A-Z]\w*Error\b|\berror:|port failed|out of memory|No space left")
BASE = {
    "SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0",
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
}
BATCHES = ("1", "2", "4", "8", "16", "32", "64")
FLAGS = (
    "--skip-tokenizer-init", "--host", "127.0.0.1", "--trust-remote-code", "--grammar-backend", "none",
    "--fp8-gemm-backend", "triton", "--moe-runner-backend", "triton", "--disable-shared-experts-fusion",
    "--disable-radix-cache", "--context-length", "65536", "--chunked-prefill-size", "8192", "--mem-fraction-static", "0.5",
)  # fmt: skip
GRAPH_FLAGS = {
    "0.5.23": ("--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "64", "--cuda-graph-bs-decode", *BATCHES),
    "0.5.13.post1": ("--disable-piecewise-cuda-graph", "--cuda-graph-max-bs", "64", "--cuda-graph-bs", *BATCHES),
}


SABOTAGE = """
import os

def register():
    # the negative control: every query loses the slots beyond its first 1024
    if os.environ.get("PROOF_SABOTAGE") != "1":
        return
    from glmplan.kernels.engines import sglang_attention
    right = sglang_attention._attend
    def wrong(q, kv, indices, sm_scale):
        return right(q, kv, indices[..., :1024], sm_scale)
    sglang_attention._attend = wrong
"""


def inherited() -> dict[str, str]:
    """This process's environment without what would change an engine or the port."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OWN)}


@dataclass(frozen=True)
class Engine:
    """What every server of an engine gets: the words after `python -m` for a checkpoint and an HTTP port, an environment,
    and the proof's own plugin (its source, with `register`) in the engine's group of entry points."""

    name: str
    words: Callable[[Setting, Path, int], Sequence[str]]
    environment: Mapping[str, str]
    group: str
    plugin: str


def sglang_words(setting: Setting, model: Path, http_port: int) -> list[str]:
    return [
        "sglang.launch_server", "--model-path", str(model), *FLAGS, *GRAPH_FLAGS[setting.version],
        "--port", str(http_port), "--nccl-port", str(http_port + 50),
    ]  # fmt: skip


SGLANG = Engine("sglang", sglang_words, BASE, "sglang.srt.plugins", SABOTAGE)


@dataclass(frozen=True)
class Job:
    """One server and what is asked of it; `task` gets a client and gives JSON."""

    name: str
    flags: tuple[str, ...]
    task: Callable[[Client], dict[str, Any]]
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str = "plain"


@dataclass
class Outcome:
    """What came of a job; `error` is None where its task finished."""

    name: str
    gpu: int
    command: list[str]
    environment: dict[str, str]
    started_s: float | None = None
    port_lines: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: str | None = None
    complaints: list[str] = field(default_factory=list)


class Ended(BaseException):
    """This process was asked to end."""


class Client:
    """The HTTP side of one server. `found` is where a task may put what it has so far: it stays when the task fails."""

    def __init__(self, http_port: int, deadline: float) -> None:
        self.url, self.deadline = f"http://127.0.0.1:{http_port}", deadline
        self.found: dict[str, Any] = {}

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=max(self.deadline - time.monotonic(), 1.0)) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"HTTP {error.code} of {path}: {error.read()[:500]!r}") from error

    def healthy(self) -> bool:
        left_s = max(self.deadline - time.monotonic(), 1.0)
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=min(left_s, 20.0)) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, **asked: Any) -> list[dict[str, Any]]:
        """Greedy continuations of prompts of token ids, served as one batch."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        replies: list[dict[str, Any]] = self.post(
            "/generate", {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": sampling, **asked}
        )
        return replies


class Server:
    """One engine on one GPU."""

    def __init__(self, job: Job, gpu: int, number: int, setting: Setting) -> None:
        self.job, self.gpu, self.setting = job, gpu, setting
        self.http_port = int(os.environ.get("PROOF_PORT", FIRST_PORT)) + PORT_STEP * number
        self.log = setting.logs / f"{job.name}.log"
        self.environment = {**setting.engine.environment, **job.environment, "CUDA_VISIBLE_DEVICES": str(gpu)}
        words = setting.engine.words(setting, setting.models[job.model], self.http_port)
        self.command = [sys.executable, "-m", *words, *job.flags]
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False

    def start(self) -> None:
        if self.closed:
            raise RuntimeError("the run was over before it started")
        path = os.pathsep.join([str(self.setting.plugin), str(self.setting.site)])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.setting.work,
                env={**inherited(), **self.environment, "PYTHONPATH": path},
            )  # fmt: skip

    def wait_until_healthy(self, deadline: float) -> None:
        client = Client(self.http_port, deadline)
        while not client.healthy():
            code = self.process.poll() if self.process else None
            if code is not None:
                raise RuntimeError(f"the server ended with code {code}")
            if time.monotonic() > deadline:
                raise RuntimeError("the server was not healthy in time")
            time.sleep(1.0)

    def stop(self) -> None:
        self.closed = True
        if self.process is None:
            return
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def lines(self, beginning: str) -> list[str]:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return [line for line in text.splitlines() if beginning in line]

    def complaints(self) -> list[str]:
        """The log's last lines that name an error, each once."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        found = dict.fromkeys(line.strip()[-400:] for line in text.splitlines() if COMPLAINT.search(line))
        return [line.replace(str(Path.home()), "~") for line in list(found)[-6:]]


@dataclass(frozen=True)
class Setting:
    """Where everything is; `prepare` makes it. Deadlines count from `begun`, the start of `prepare`."""

    version: str
    site: Path
    plugin: Path
    models: Mapping[str, Path]
    logs: Path
    work: Path
    gpus: tuple[int, ...]
    engine: Engine = SGLANG
    begun: float = field(default_factory=time.monotonic)


def prepare(models: Mapping[str, Sequence[str]], engine: Engine = SGLANG) -> Setting:
    """Checkpoints, the installed-looking package and folders; versions are read from the site."""
    begun, home = time.monotonic(), Path.home()
    site, work = Path(os.environ.get("SITE", home / "site")), Path(os.environ.get("PROOF_WORK", home / "proof"))
    work.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=work))
    found = next(site.glob(f"{engine.name}-*.dist-info"), None)
    if found is None:
        raise SystemExit(f"{site} holds no {engine.name}; set SITE to a folder of packages that does.")
    version = found.name.removesuffix(".dist-info").split("-")[1]
    plugin = install_beside(work / "plugin", engine)
    made = {name: make_model(work / f"model-{name}", options) for name, options in models.items()}
    return Setting(version, site, plugin, made, logs, work, visible_gpus(), engine, begun)


def visible_gpus() -> tuple[int, ...]:
    if "PROOF_GPUS" in os.environ:
        return tuple(map(int, os.environ["PROOF_GPUS"].split(",")))
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    return tuple(range(sum(line.startswith("GPU ") for line in listed.splitlines())))


def make_model(folder: Path, options: Sequence[str]) -> Path:
    done = folder / "options.json"
    if not done.exists() or json.loads(done.read_text()) != list(options):
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.proof.make_checkpoint", str(folder), *options]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        done.write_text(json.dumps(list(options)))
    return folder


def install_beside(folder: Path, engine: Engine = SGLANG) -> Path:
    """The package of this checkout as pip would have left it, and the proof's own plugin as a second one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "glmplan", folder / "glmplan", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project.get("entry-points", {})
    groups.setdefault("sglang.srt.plugins", {"glmplan": "glmplan.kernels.engines.sglang_plugin:register"})
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in groups.items()
    ]
    distribution(folder, project["name"], project["version"], "\n".join(lines))
    return control_beside(folder, engine)


def control_beside(folder: Path, engine: Engine = SGLANG) -> Path:
    """The proof's own plugin alone; PROOF_SABOTAGE=1 makes it the control."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "proof_sabotage.py").write_text(engine.plugin)
    distribution(folder, "proof_sabotage", "1", f"[{engine.group}]\nproof_sabotage = proof_sabotage:register\n")
    return folder


def distribution(folder: Path, name: str, version: str, entry_points: str) -> None:
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(entry_points)


def run(jobs: Sequence[Job], setting: Setting, seconds: float, per_gpu: int = 1, first_wave: int = 0) -> dict[str, Outcome]:
    """Every job on one of the GPUs, `per_gpu` side by side, GPUs dealt in turn; the first `first_wave` start alone, so
    that the others find kernels compiled."""
    deadline = setting.begun + seconds
    wave_ends = time.monotonic() + WAVE_SHARE * (deadline - time.monotonic())
    room = {gpu: threading.Semaphore(per_gpu) for gpu in setting.gpus}
    servers = [Server(job, setting.gpus[number % len(room)], number, setting) for number, job in enumerate(jobs)]
    outcomes = {
        server.job.name: Outcome(server.job.name, server.gpu, server.command, server.environment) for server in servers
    }
    warm = [threading.Event() for _ in servers[:first_wave]]

    def serve(number: int, server: Server) -> None:
        if number >= first_wave:
            for event in warm:
                event.wait(max(wave_ends - time.monotonic(), 0))
        ready = warm[number] if number < first_wave else threading.Event()
        with room[server.gpu]:
            attempt(server, outcomes[server.job.name], deadline, ready)

    threads = [threading.Thread(target=serve, args=pair, daemon=True) for pair in enumerate(servers)]
    try:
        with told_to_end():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(deadline + 15 - time.monotonic(), 0))
    except Ended:
        print("asked to end before all was done", flush=True)
    finally:
        stop_all(servers)
    for outcome in outcomes.values():
        if outcome.result is None and outcome.error is None:
            outcome.error = "it was not done when the run ended"
    return outcomes


@contextlib.contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM raises Ended here, where signals reach this thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_all(servers: Sequence[Server]) -> None:
    """All at once: one alone may take ten seconds."""
    threads = [threading.Thread(target=server.stop, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)


def attempt(server: Server, outcome: Outcome, deadline: float, ready: threading.Event) -> None:
    """Start, wait, ask, stop; whatever goes wrong is the outcome's error."""
    begin = time.monotonic()
    try:
        if begin >= deadline:
            raise RuntimeError("no time was left to start it")
        server.start()
        server.wait_until_healthy(deadline)
        outcome.started_s = round(time.monotonic() - begin, 1)
        print(f"{outcome.name}: healthy after {outcome.started_s} s on GPU {outcome.gpu}", flush=True)
        ready.set()
        client = Client(server.http_port, deadline)
        try:
            outcome.result = server.job.task(client)
        finally:
            outcome.result = outcome.result or client.found or None
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"[:1000]
    finally:
        ready.set()
        server.stop()
        outcome.port_lines = [*server.lines(MARKER), *server.lines(FAILURE)]
        outcome.complaints = server.complaints() if outcome.error else []
        said = [f"{outcome.name}: {outcome.error or 'done'} after {time.monotonic() - begin:.0f} s", *outcome.complaints]
        print("\n  ".join(said), flush=True)


def judged(verdict: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The verdict, or that there is none: answers and logs are written either way."""
    try:
        return verdict()
    except Exception as error:
        lines = [f"not judged, {type(error).__name__}: {error}", *traceback.format_exc().splitlines()]
        return {"holds": False, "lines": lines}


def write(out: Path, name: str, setting: Setting, outcomes: Mapping[str, Outcome], verdict: Mapping[str, Any]) -> None:
    """OUT/<name>.json for docs/proof, OUT/<name>.txt to read; answers and the logs' tails in OUT/<name>-logs.tar.gz."""
    out.mkdir(parents=True, exist_ok=True)
    for item in outcomes.values():
        (setting.logs / f"{item.name}.answers.json").write_text(json.dumps(item.result))
    record = {
        "proof": name, "date": time.strftime("%Y-%m-%d"), "setting": versions(setting), "verdict": verdict,
        "servers": {key: described(outcome) for key, outcome in sorted(outcomes.items())},
    }  # fmt: skip
    print(write_record(out / f"{name}.json", record), end="", flush=True)
    pack(out / f"{name}-logs.tar.gz", [*setting.logs.glob("*.log"), *setting.logs.glob("*.answers.json")])


def write_record(path: Path, record: Mapping[str, Any]) -> str:
    """The record and beside it the same to read, whose text is given back."""
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    verdict, servers = record["verdict"], record["servers"]
    lines = [f"{record['proof']}: {'holds' if verdict.get('holds') else 'DOES NOT HOLD'}", json.dumps(record["setting"])]
    lines += [f"  {line}" for line in verdict.get("lines", [])]
    for name, server in servers.items():
        lines.append(f"{name}: " + (server["error"] or f"up after {server['started_s']} s"))
        lines += [f"    {line}" for line in server["complaints"]]
    lines += sorted({line[line.index(MARKER[:-1]) :] for server in servers.values() for line in server["port_lines"]})
    text = "\n".join(lines) + "\n"
    path.with_suffix(".txt").write_text(text)
    return text


def answers_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-logs.tar.gz")


def recorded(path: Path, servers: Mapping[str, Mapping[str, Any]]) -> dict[str, Outcome]:
    """The servers of the record at `path` with the answers that lie packed beside it."""
    with tarfile.open(answers_beside(path)) as packed:
        return {
            name: Outcome(**server, result=json.load(packed.extractfile(f"{name}.answers.json") or io.BytesIO(b"null")))
            for name, server in servers.items()
        }


def described(outcome: Outcome) -> dict[str, Any]:
    """The outcome without its answers, and without this machine's folders."""
    home = str(Path.home())
    kept = {name: value for name, value in vars(outcome).items() if name != "result"}
    return kept | {
        "command": " ".join(word.replace(home, "~") for word in outcome.command).replace(sys.executable, "python3")
    }


def pack(archive: Path, logs: Iterable[Path], tail_bytes: int = 400_000) -> None:
    """Answers whole; of logs the first 100 kB and the last."""
    with tarfile.open(archive, "w:gz") as packed:
        for log in sorted(logs):
            if log.suffix == ".json":
                packed.add(log, log.name)
                continue
            text = log.read_bytes()
            part = log.with_suffix(".part")
            part.write_bytes(text if len(text) <= tail_bytes else text[:100_000] + b"\n...\n" + text[100_000 - tail_bytes :])
            packed.add(part, log.name)
            part.unlink()


def versions(setting: Setting) -> dict[str, str]:
    gpu = said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], {}).splitlines()
    code = "import torch, triton; print(torch.__version__, triton.__version__)"
    found = said([sys.executable, "-c", code], {"PYTHONPATH": str(setting.site)}).split()
    return {
        setting.engine.name: setting.version, "gpu": f"{len(gpu)}x {gpu[0]}" if gpu else "none",
        "torch": found[0] if found else "?", "triton": found[1] if found else "?", "python": sys.version.split()[0],
    }  # fmt: skip


def said(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command prints; nothing where it fails or takes a minute."""
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment}
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip()
