"""Starts of the engines as they log them, line by line in the words of the released wheels."""

# ruff: noqa: E501 - log lines are as long as they are

from __future__ import annotations

SGLANG_23 = """\
[2026-11-21 10:00:00] server_args=ServerArgs(model_path='/models/GLM-5.2-FP8')
[2026-11-21 10:00:20 PP0 TP0] Init parallel begin.
[2026-11-21 10:00:20 PP0 TP1] Init parallel begin.
[2026-11-21 10:00:25 PP0 TP0] Init parallel ends. elapsed=5.01 s
[2026-11-21 10:00:25 PP0 TP1] Init parallel ends. elapsed=5.01 s
[2026-11-21 10:00:25 PP0 TP0] Memory baseline taken. mem usage=1.25 GB
[2026-11-21 10:00:26 PP0 TP0] Load weight begin. avail mem=46.50 GB
[2026-11-21 10:00:26 PP0 TP1] Load weight begin. avail mem=46.40 GB
Loading safetensors checkpoint shards:   0% Completed | 0/142 [00:00<?, ?it/s]\r
Loading safetensors checkpoint shards:  50% Completed | 71/142 [01:00<01:00,  1.18it/s]\r
[2026-11-21 10:03:00 PP0 TP0] Load weight end. elapsed=154.00 s, type=GlmMoeDsaForCausalLM, quant=fp8, avail mem=16.00 GB, \
mem usage=30.50 GB.
[2026-11-21 10:03:00 PP0 TP0] KV Cache is allocated. dtype: torch.float8_e4m3fn, #tokens: 131072, KV size: 2.50 GB
[2026-11-21 10:03:01 PP0 TP0] Memory pool end. avail mem=13.40 GB
[2026-11-21 10:03:01 PP0 TP0] Capture target decode CUDA graph begin. backend=full, num_tokens_per_req=1, avail mem=13.40 GB
Capturing batches (bs=16 avail_mem=13.30 GB):  20%|##        | 1/5 [00:01<00:04,  1.10s/it]\r
[2026-11-21 10:03:20 PP0 TP0] Capture target decode CUDA graph end. bs=[1, 2, 4, 8, 16], elapsed=19.00 s, \
mem usage=0.30 GB, avail mem=13.10 GB.
[2026-11-21 10:03:21 PP0 TP0] max_total_num_tokens=131072, chunked_prefill_size=4096, max_prefill_tokens=16384, \
max_running_requests=16, context_len=131072, available_gpu_mem=13.05 GB
"""

SGLANG_13 = """\
[2026-11-21 10:00:20 TP0] Init torch distributed begin.
[2026-11-21 10:00:25 TP0] Init torch distributed ends. elapsed=5.01 s, mem usage=1.10 GB
[2026-11-21 10:00:26 TP0] Load weight begin. avail mem=46.50 GB
[2026-11-21 10:03:00 TP0] Load weight end. elapsed=154.00 s, type=GlmMoeDsaForCausalLM, avail mem=16.00 GB, mem usage=30.50 GB.
[2026-11-21 10:03:00 TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 4096, KV size: 0.40 GB
[2026-11-21 10:03:01 TP0] Memory pool end. avail mem=13.40 GB
[2026-11-21 10:03:01 TP0] Capture cuda graph begin. This can take up to several minutes. avail mem=13.40 GB
[2026-11-21 10:03:20 TP0] Capture cuda graph end. Time elapsed: 19.00 s. mem usage=0.30 GB. avail mem=13.10 GB.
[2026-11-21 10:03:21 TP0] Init torch distributed ends. elapsed=0.01 s, mem usage=0.00 GB
[2026-11-21 10:03:22 TP0] Load weight end. elapsed=4.00 s, type=DeepseekV3ForCausalLMNextN, avail mem=12.00 GB, mem usage=1.50 GB.
[2026-11-21 10:03:24 TP0] Capture draft cuda graph begin. This can take up to several minutes. avail mem=12.00 GB
[2026-11-21 10:03:30 TP0] Capture draft cuda graph end. Time elapsed: 6.00 s. mem usage=0.20 GB. avail mem=11.80 GB.
"""

VLLM_33 = """\
(APIServer pid=10) INFO 11-21 10:00:00 [startup.py:18] vLLM server version 0.33.0, serving model /models/GLM-5.2-FP8
(EngineCore pid=20) INFO 11-21 10:00:10 [core.py:140] Initializing a V1 LLM engine (v0.33.0) with config: model='x'
(Worker pid=30) INFO 11-21 10:00:20 [parallel_state.py:2386] rank 0 in world size 2 is assigned as DP rank 0, PP rank 0
(Worker_TP0 pid=30) INFO 11-21 10:00:21 [model_runner.py:399] Loading model from scratch...
(Worker_TP1 pid=31) INFO 11-21 10:00:21 [model_runner.py:399] Loading model from scratch...
Loading safetensors checkpoint shards:  25% Completed | 35/142 [00:30<01:30,  1.18it/s]
(Worker_TP0 pid=30) INFO 11-21 10:02:21 [model_runner.py:429] Model loading took 88.46 GiB memory and 120.000000 seconds
(Worker_TP0 pid=30) INFO 11-21 10:02:31 [gpu_worker.py:660] Initial free memory 138.20 GiB, reserved 30.00 GiB memory for KV \
Cache as specified by kv_cache_memory_bytes config and skipped memory profiling.
(EngineCore pid=20) INFO 11-21 10:02:32 [kv_cache_utils.py:1148] GPU KV cache size: 597,184 tokens, Maximum concurrency for \
131,072 tokens per request: 4.56x
Capturing CUDA graphs (decode, FULL):  50%|#####     | 4/8 [00:02<00:02,  2.0it/s]
(Worker_TP0 pid=30) INFO 11-21 10:02:52 [model_runner.py:1164] Graph capturing finished in 18 secs, took 1.23 GiB
(EngineCore pid=20) INFO 11-21 10:02:53 [core.py:413] init engine (profile, create kv cache, warmup model) took 31.00 s
INFO:     Application startup complete.
"""

CAPTURING = "[2026-11-22 02:10:00] Memory pool end. avail mem=70.40 GB\n[2026-11-22 02:10:00] Capture cuda graph begin.\n"
"""Of one rank, up to its graphs."""
