"""Packages named as the engines, whose benchmarks really ask the server and write results in the engines' own shape.

Shapes: SGLang 0.5.23 benchmark/serving.py (one JSON line with `--output-details`), vLLM 0.33.0 benchmarks/serve.py
(`--save-result --save-detailed`). They take the flags that the released ones have, as tests/contracts reads them.
"""

from __future__ import annotations

from pathlib import Path

SGLANG = """
import argparse, json, os, sys, time, urllib.request
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("backend", "base-url", "dataset-name", "random-range-ratio", "output-file", "model",
             "tokenizer", "request-rate"):
    parser.add_argument("--" + name)
for name in ("num-prompts", "max-concurrency", "random-input-len", "random-output-len", "seed", "warmup-requests"):
    parser.add_argument("--" + name, type=int)
for name in ("disable-tqdm", "tokenize-prompt", "output-details"):
    parser.add_argument("--" + name, action="store_true")
a = parser.parse_args()
assert (a.backend, a.dataset_name, a.random_range_ratio, a.warmup_requests) == ("sglang", "random-ids", "1", 0)
if a.tokenizer == "broken":
    sys.exit("OSError: broken is not a local folder and is not a valid model identifier")
if a.tokenizer == "slow":
    with open(os.environ["FAKE_ENGINE_PID"], "w") as out:
        out.write(str(os.getpid()))
    time.sleep(60)
body = {"input_ids": [9] * a.random_input_len, "sampling_params": {"max_new_tokens": a.random_output_len}, "stream": True}
key = os.environ.get("OPENAI_API_KEY")
headers = {"Content-Type": "application/json", **({"Authorization": "Bearer " + key} if key else {})}
errors, lens = [], []
for _ in range(a.num_prompts):
    try:
        urllib.request.urlopen(urllib.request.Request(a.base_url + "/generate", json.dumps(body).encode(), headers)).read()
        errors.append(""), lens.append(a.random_output_len)
    except OSError as error:
        errors.append("Traceback (most recent call last):\\\\n  File x\\\\n" + str(error)), lens.append(0)
n = a.num_prompts
result = {"backend": "sglang", "duration": 2.0, "completed": n - len([e for e in errors if e]), "seed": a.seed,
          "total_input_tokens": n * a.random_input_len, "total_output_tokens": sum(lens), "output_lens": lens,
          "ttfts": [0.5] * n, "itls": [[0.1] * (a.random_output_len - 1) if not e else [] for e in errors], "errors": errors,
          "max_concurrency": a.max_concurrency, "generated_texts": [""] * n}
print(json.dumps(sys.argv))
with open(a.output_file, "a") as out:
    out.write(json.dumps(result) + "\\\\n")
""".replace("\\\\n", "\\n")

VLLM = """
import argparse, json, sys
assert sys.argv[1:3] == ["bench", "serve"], sys.argv
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("backend", "base-url", "endpoint", "dataset-name", "random-range-ratio", "result-dir", "result-filename",
             "model", "served-model-name", "tokenizer", "request-rate", "percentile-metrics",
             "metric-percentiles", "temperature"):
    parser.add_argument("--" + name)
for name in ("num-prompts", "max-concurrency", "random-input-len", "random-output-len", "seed"):
    parser.add_argument("--" + name, type=int)
for name in ("disable-tqdm", "save-result", "save-detailed"):
    parser.add_argument("--" + name, action="store_true")
a = parser.parse_args(sys.argv[3:])
n = a.num_prompts
result = {"duration": 4.0, "completed": n, "failed": 0, "total_input_tokens": n * a.random_input_len, "errors": [""] * n,
          "total_output_tokens": n * a.random_output_len, "output_lens": [a.random_output_len] * n, "ttfts": [0.25] * n,
          "itls": [[0.2] * 3] * n}
with open(a.result_dir + "/" + a.result_filename, "w") as out:
    json.dump(result, out)
"""


def packages(folder: Path) -> Path:
    """A folder for PYTHONPATH with both."""
    for name, text in (("sglang/bench_serving.py", SGLANG), ("vllm/entrypoints/cli/main.py", VLLM)):
        path = folder / name
        path.parent.mkdir(parents=True)
        for parent in path.parents:
            if parent == folder:
                break
            (parent / "__init__.py").touch()
        path.write_text(text)
    return folder
