"""The engines' own serving benchmarks, run by the Python that runs glmplan, as another way to measure a level.

SGLang: `python -m sglang.bench_serving` (0.5.13.post1; in 0.5.23 benchmark/serving.py), token ids of fixed length to
/generate, one JSON line with details. vLLM 0.33.0: `vllm bench serve`, random text to /v1/completions, one JSON file.
Both need the model's tokenizer here, and both name prompts by a seed: every level gets a new one, and the engines' own
warm-up (a prompt that is then measured, and found in the prefix cache) stays off. The key travels in the environment.
Neither tells when its requests were sent in a way that both share, so `decode_tokens_per_s` stays unknown.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glmplan.bench.result import FailureCount, Level
from glmplan.bench.run import Observer, Settings
from glmplan.bench.statistics import percentile, spread
from glmplan.errors import GlmplanError, UnsupportedError

Family = Literal["sglang", "vllm"]
TITLES: dict[Family, str] = {"sglang": "sglang.bench_serving", "vllm": "vllm bench serve"}
END_S = 10.0
LAST_LINES = 3


class EngineBenchError(GlmplanError):
    """The engine's benchmark ended without a result."""


def installed(family: Family) -> bool:
    """Whether this Python could run the engine's benchmark."""
    return importlib.util.find_spec(family) is not None


def require_installed(family: str | None) -> Family:
    """The engine whose benchmark is used; raises where there is none here."""
    if family not in TITLES:
        raise UnsupportedError(
            "The server is neither SGLang nor vLLM, so there is no benchmark of its own.", "Measure with --with own."
        )
    found: Family = "sglang" if family == "sglang" else "vllm"
    if not installed(found):
        raise UnsupportedError(
            f"{sys.executable} has no {found}, so {TITLES[found]} cannot be run.",
            "Install glmplan beside the engine, or measure with --with own.",
        )
    return found


@dataclass(frozen=True)
class EngineBench:
    """One engine's benchmark against one server."""

    family: Family
    url: str
    model: str
    tokenizer: str | None = None
    api_key: str | None = None

    def level(self, concurrency: int | None, settings: Settings, observer: Observer) -> tuple[Level, int]:
        """One level in a process of its own; an interruption ends it and nothing of the level is known."""
        requests = settings.requests(concurrency)
        label = f"concurrency {concurrency}" if concurrency else f"{settings.rate_per_s:g} requests/s"
        observer.begins(f"{label} with {TITLES[self.family]}", requests)
        with tempfile.TemporaryDirectory(prefix="glmplan-bench-") as folder:
            path = Path(folder) / "result.json"
            argv = self.argv(concurrency, settings, path)
            try:
                status, printed = _run(argv, self._environment())
            except KeyboardInterrupt:
                return _nothing(concurrency, settings.rate_per_s), 0
            try:
                raw = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
                return level_of(raw, concurrency, settings.rate_per_s), 0
            except (OSError, ValueError, IndexError, KeyError, TypeError):
                words = " | ".join(line.strip() for line in printed.splitlines()[-LAST_LINES:] if line.strip())
                raise EngineBenchError(
                    f"{TITLES[self.family]} ended with exit status {status} and without a result: {words[-400:]}.",
                    "It needs the model's tokenizer here (--tokenizer PATH); --with own needs none.",
                ) from None

    def argv(self, concurrency: int | None, settings: Settings, path: Path) -> list[str]:
        """The command of one level."""
        load = (
            ["--request-rate", f"{settings.rate_per_s:g}"]
            if concurrency is None
            else ["--max-concurrency", str(concurrency)]
        )
        shared = [
            "--base-url", self.url, "--num-prompts", str(settings.requests(concurrency)), *load,
            "--random-input-len", str(settings.prompt_tokens), "--random-output-len", str(settings.output_tokens),
            "--seed", str(secrets.randbelow(2**31)), "--disable-tqdm",
            *(["--tokenizer", self.tokenizer] if self.tokenizer else []),
        ]  # fmt: skip
        if self.family == "sglang":
            own = [
                "--backend", "sglang", "--dataset-name", "random-ids", "--random-range-ratio", "1", "--tokenize-prompt",
                "--warmup-requests", "0", "--output-file", str(path), "--output-details", "--model", self.model,
            ]  # fmt: skip
            return [sys.executable, "-m", "sglang.bench_serving", *shared, *own]
        own = [
            "--backend", "vllm", "--dataset-name", "random", "--random-range-ratio", "0", "--temperature", "0",
            "--endpoint", "/v1/completions", "--save-result", "--save-detailed", "--result-dir", str(path.parent),
            "--result-filename", path.name, "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99",
        ]  # fmt: skip
        named = ["--model", self.tokenizer or self.model, "--served-model-name", self.model] if self.tokenizer else []
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *shared, *own, *named]

    def _environment(self) -> dict[str, str]:
        """This one, without keys that were not meant for this server."""
        kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "API_KEY")}
        return kept if self.api_key is None else {**kept, "OPENAI_API_KEY": self.api_key}


def _run(argv: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and output; its process group ends with us."""
    process = subprocess.Popen(
        argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate()
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=END_S)
                break
        raise
    return process.returncode, printed


def _nothing(concurrency: int | None, rate_per_s: float | None) -> Level:
    return Level(
        concurrency=concurrency, rate_per_s=rate_per_s, requests=0, completed=0, seconds=0.0, prompt_tokens=0,
        output_tokens=0, counted_by="usage", interrupted=True,
    )  # fmt: skip


def level_of(raw: Mapping[str, Any], concurrency: int | None, rate_per_s: float | None) -> Level:
    """The result of either benchmark, with details, in our words; our percentiles over its times."""
    lengths, errors = raw["output_lens"], raw["errors"]
    good = [place for place, error in enumerate(errors) if not error and lengths[place]]
    gaps = [raw["itls"][place] for place in good]
    decoded = [(lengths[place] - 1, sum(raw["itls"][place])) for place in good]
    rates = [tokens / seconds for tokens, seconds in decoded if tokens > 0 and seconds > 0]
    seconds, tokens = float(raw["duration"]), sum(lengths[place] for place in good)
    return Level(
        concurrency=concurrency,
        rate_per_s=rate_per_s,
        requests=len(errors),
        completed=len(good),
        failures=_failures([error for place, error in enumerate(errors) if place not in set(good)]),
        seconds=seconds,
        prompt_tokens=int(raw["total_input_tokens"]),
        output_tokens=tokens,
        counted_by="usage",
        output_tokens_per_s=tokens / seconds if tokens and seconds > 0 else None,
        stream_tokens_per_s=percentile(rates, 0.5) if rates else None,
        ttft=spread([raw["ttfts"][place] for place in good]),
        itl=spread([gap for one in gaps for gap in one]),
        itl_of_chunks=any(len(one) + 1 < lengths[place] for place, one in zip(good, gaps, strict=True)),
    )


def _failures(errors: list[Any]) -> tuple[FailureCount, ...]:
    """The last line of each error: the first ones are a traceback's."""
    counted: dict[str, int] = {}
    for error in errors:
        lines = str(error or "the answer has no tokens").strip().splitlines() or ["no reason given"]
        counted[lines[-1][:160]] = counted.get(lines[-1][:160], 0) + 1
    ranked = sorted(counted.items(), key=lambda pair: -pair[1])
    return tuple(FailureCount(words=words, requests=count) for words, count in ranked)
