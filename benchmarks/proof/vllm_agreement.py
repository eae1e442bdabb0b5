"""Proofs (a), (b), (c) inside vLLM: does the port answer as the stock engine does, native and compiled as sm_89 and sm_80?

`SITE=~/sitev python -m benchmarks.proof.vllm_agreement OUT [--kv fp8 bf16] [--as sm89 sm80] [--seconds 500] [--per-gpu 4]`
Per KV format one `vllm serve` each: stock (FLASHMLA_SPARSE, DeepGEMM's indexer), stock again, stock with the engine's other
kernels, the port (CUSTOM), the port as each SM, and a control whose attention is wrong on purpose. Prompts of random ids: 50
to 9,000 one by one, then 8 of mixed lengths at once; greedy, with log-probabilities. `agreement` and `judge` say what holds.
- Decode runs from full CUDA graphs; prefill runs without graphs, in chunks of 8,192. vLLM compiles no model of this
  architecture with torch.compile, so none is switched off here. As sm_80 the port serves vLLM's generic model class.
- Weights run on the engine's Triton kernels and short prompts through the chosen tokens (`sparse_mla_force_mqa`) everywhere.
- The other kernels are FlashAttention-3 for BF16 rows; for FP8 rows FlashMLA's decode kernel for prompts, too, as vLLM
  itself does below 32 heads a GPU.
- Where CuTe DSL is not installed, vLLM's question whether its sm_100 query kernel fits is answered with no, as on any sm_90.
`--smoke` starts stock and port of each KV format and, BF16, the port as each SM; it asks one prompt and prints what it saw.
The logs come to OUT, of servers that failed the cause and the end are printed, too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.proof import agreement, harness, judge
from benchmarks.proof.agreement import JUDGED_TOKENS, MODEL, NEW_TOKENS, OTHERS, prompt
from benchmarks.proof.harness import Client, Engine, Job, Outcome, Setting

LENGTHS = (50, 1500, 3000, 9000)
BATCH = (50, 2040, 3000, 700, 9000, 60, 1500, 2060)
STOCK, PORT = {"GLMPLAN_PORT": "off"}, {"GLMPLAN_PORT": "force"}
DTYPES = {"fp8": "fp8_ds_mla", "bf16": "bfloat16"}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
FLAGS = (
    "--skip-tokenizer-init", "--host", "127.0.0.1", "--generation-config", "vllm", "--disable-uvicorn-access-log",
    "--max-model-len", "16384", "--max-num-seqs", "16", "--max-num-batched-tokens", "8192", "--block-size", "64",
    "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2 << 30), "--no-enable-prefix-caching",
    "--linear-backend", "triton", "--moe-backend", "triton", "--no-enable-flashinfer-autotune",
    "--attention-config.sparse_mla_force_mqa", "true", "--compilation-config", json.dumps(GRAPHS, separators=(",", ":")),
)  # fmt: skip
# a first look runs beside other servers; its one prompt then comes in two chunks
SMALL = ("--max-num-batched-tokens", "2048", "--kv-cache-memory-bytes", str(512 << 20))
BASE = {
    "VLLM_USE_DEEP_GEMM": "0",  # for weights; the indexer does not ask
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
}
# the last line of a traceback, behind the process's name and the time; warnings tell of errors that stop nothing
RAISED = re.compile(r"^(?!.* WARNING )(?:.*?[\]):] )?(?:\w+\.)*\w*(?:Error|Exception)(?::|$)")
PLUGIN = """
import importlib.util, os, sys, types

QUERY_KERNEL = "vllm.models.deepseek_v32.nvidia.ops.fused_q_cutedsl"

def register():
    if importlib.util.find_spec("cutlass") is None:
        absent = types.ModuleType(QUERY_KERNEL)
        absent.fused_q_cutedsl = None
        absent.is_fused_q_cutedsl_supported = lambda *tensors, **settings: False
        sys.modules[QUERY_KERNEL] = absent
    if os.environ.get("PROOF_SABOTAGE") == "1":
        drop_slots()
    if os.environ.get("PROOF_OTHER") == "1":
        decode_kernel_for_prompts()

def drop_slots():
    # the negative control: every query loses the slots beyond its first 1024
    from glmplan.kernels.sparse_mla import op
    right = op.sparse_mla
    def wrong(q, kv, indices, sm_scale, *, lengths=None, **settings):
        lengths = None if lengths is None else lengths.clamp(max=1024)
        return right(q, kv, indices[..., :1024], sm_scale, lengths=lengths, **settings)
    op.sparse_mla = wrong

def decode_kernel_for_prompts():
    from vllm.v1.worker.worker_base import WorkerWrapperBase
    original = WorkerWrapperBase.init_device
    def init_device(self):
        result = original(self)
        from vllm.v1.attention.backends.mla import flashmla_sparse
        flashmla_sparse.MIN_HEADS_FOR_BF16_PREFILL = 129
        return result
    WorkerWrapperBase.init_device = init_device
"""


def words(setting: Setting, model: Path, http_port: int) -> list[str]:
    return ["vllm.entrypoints.cli.main", "serve", str(model), *FLAGS, "--port", str(http_port)]


VLLM = Engine("vllm", words, BASE, "vllm.general_plugins", PLUGIN)


def complete(client: Client, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Greedy continuations of prompts of token ids, asked as one request; answers in their order."""
    body = {
        "prompt": [list(ids) for ids in prompts], "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
        "logprobs": 0, "prompt_logprobs": 0, "return_tokens_as_token_ids": True, "return_token_ids": True,
    }  # fmt: skip
    choices = sorted(client.post("/v1/completions", body)["choices"], key=lambda choice: int(choice["index"]))
    return [answer(choice, ids) for choice, ids in zip(choices, prompts, strict=True)]


def answer(choice: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """As `agreement.answer`; a prompt's first token has no log-probability."""
    first = max(len(ids) - JUDGED_TOKENS, 1)
    given = [row[str(token)]["logprob"] for row, token in zip(choice["prompt_logprobs"][first:], ids[first:], strict=True)]
    return {
        "tokens": choice["token_ids"],
        "logprobs": [round(value, 6) for value in choice["logprobs"]["token_logprobs"]],
        "prompt": [round(value, 6) for value in given],
    }


def ask(client: Client) -> dict[str, Any]:
    """Answers by prompt name."""
    for length in LENGTHS:
        client.found[f"single-{length}"] = complete(client, [prompt(length)], NEW_TOKENS)[0]
    group = [prompt(length, 1 + number) for number, length in enumerate(BATCH)]
    client.found |= {f"batch-{number}": found for number, found in enumerate(complete(client, group, NEW_TOKENS))}
    return client.found


def ask_one(client: Client) -> dict[str, Any]:
    return {"single-3000": complete(client, [prompt(3000)], 8)[0]}


def flags(kv: str, backend: str) -> tuple[str, ...]:
    return ("--kv-cache-dtype", DTYPES[kv], "--attention-backend", backend)


def jobs(formats: Sequence[str], others: Sequence[str]) -> list[Job]:
    """The first of each format come first: they compile what the rest find."""
    rows: list[list[Job]] = []
    for kv in formats:
        stock, port = flags(kv, "FLASHMLA_SPARSE"), flags(kv, "CUSTOM")
        other = flags(kv, "FLASH_ATTN_MLA_SPARSE") if kv == "bf16" else stock
        row = [Job(f"{kv}-stock", stock, ask, STOCK), Job(f"{kv}-port", port, ask, PORT)]
        row += [Job(f"{kv}-{sm}", port, ask, {**PORT, "GLMPLAN_RUN_AS": sm}) for sm in others]
        row.append(Job(f"{kv}-again", stock, ask, STOCK))
        row.append(Job(f"{kv}-other", other, ask, STOCK if kv == "bf16" else {**STOCK, "PROOF_OTHER": "1"}))
        row.append(Job(f"{kv}-control", port, ask, {**PORT, "PROOF_SABOTAGE": "1"}))
        rows.append(row)
    return [row[step] for step in range(max(map(len, rows))) for row in rows if step < len(row)]


def ends(setting: Setting, outcomes: Mapping[str, Outcome], lines: int = 40) -> None:
    """What every server said about its kernels; of those that failed the cause and the end of the log, too."""
    for name, outcome in outcomes.items():
        log = setting.logs / f"{name}.log"
        text = log.read_text(errors="replace").splitlines() if log.exists() else []
        chosen = [line for line in text if "attention backend" in line or "_SPARSE" in line or harness.MARKER in line]
        failed = [*cause(text), "...", *text[-lines:]] if outcome.error else []
        print("\n".join([f"--- {name}: {outcome.error or 'done'}", *chosen[:6], *failed]), flush=True)


def cause(text: Sequence[str], lines: int = 25) -> list[str]:
    """Lines before and with the first error of a log: the engine process fails first, and the HTTP server's own traceback
    about that is longer than the end of a log that anyone prints."""
    said = [number for number, line in enumerate(text) if harness.FAILURE in line]
    raised = [number for number, line in enumerate(text) if RAISED.search(line)]
    first = (said or raised or [len(text) - 1])[0]
    return list(text[max(first + 1 - lines, 0) : first + 1])


def smoke(setting: Setting, formats: Sequence[str], others: Sequence[str], out: Path, seconds: float) -> int:
    """One prompt of each; how far the ports are from their format's stock server, and what each said."""
    backends = [
        *((kv, "stock", "FLASHMLA_SPARSE", STOCK) for kv in formats),
        *((kv, "port", "CUSTOM", PORT) for kv in formats),
    ]
    backends += [("bf16", sm, "CUSTOM", {**PORT, "GLMPLAN_RUN_AS": sm}) for sm in others if "bf16" in formats]
    asked = [Job(f"{kv}-{kind}", (*flags(kv, backend), *SMALL), ask_one, own) for kv, kind, backend, own in backends]
    outcomes = harness.run(asked, setting, seconds, per_gpu=len(asked))
    ends(setting, outcomes)
    for name, outcome in outcomes.items():
        stock = outcomes[f"{name.partition('-')[0]}-stock"]
        if not outcome.result:
            continue
        found = judge.distance(stock.result, outcome.result) if stock.result and outcome is not stock else None
        print(name, outcome.result["single-3000"]["tokens"], judge.text(found) if found else "")
    out.mkdir(parents=True, exist_ok=True)
    harness.pack(out / f"smoke-vllm-{setting.version}-logs.tar.gz", setting.logs.glob("*.log"))
    return 0 if all(outcome.result and not outcome.error for outcome in outcomes.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kv", nargs="+", default=["fp8", "bf16"], choices=["fp8", "bf16"])
    parser.add_argument("--as", dest="others", nargs="*", default=OTHERS)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--per-gpu", type=int, default=4)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    setting = harness.prepare(MODEL, VLLM)
    if asked.smoke:
        return smoke(setting, asked.kv, asked.others, asked.out, asked.seconds)
    outcomes = harness.run(jobs(asked.kv, asked.others), setting, asked.seconds, asked.per_gpu, first_wave=2 * len(asked.kv))
    found = harness.judged(lambda: agreement.verdict(asked.kv, asked.others, outcomes, len(LENGTHS) + len(BATCH)))
    part = "" if len(asked.kv) == len(DTYPES) else f"-{asked.kv[0]}"
    harness.write(asked.out, f"agreement-vllm-{setting.version}{part}", setting, outcomes, found)
    ends(setting, {name: outcome for name, outcome in outcomes.items() if outcome.error}, lines=25)
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
