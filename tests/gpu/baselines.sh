#!/usr/bin/env bash
# Our kernels compiled as sm_89 beside the engines' own, in one run.  bash tests/gpu/baselines.sh OUT_FOLDER SOURCES
# SOURCES/sparse_mla holds triton_sparse_mla.py, its _decode.py and _prefill.py (SGLang 0.5.23) and xpu_mla_sparse.py (vLLM
# 0.33.0), SOURCES/kv_quant SGLang's dsa_quant_k_cache.py and dequant_k_cache.py. On PYTHONPATH: sgl-deep-gemm 0.1.2 with
# apache-tvm-ffi 0.1.9, and sglang-kernel 0.4.3 (sm90/common_ops.abi3.so and flashmla_ops.abi3.so of it suffice).
set -u
out=${1:-docs/kernels}
sources=${2:?which folder holds sparse_mla/ and kv_quant/}
mkdir -p "$out"
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
run="python3 -m glmplan.kernels.run_as sm89"
{
  echo "# $(date -u +%F), $(nvidia-smi --query-gpu=name --format=csv,noheader | head -1), $(python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'), sm89"
  for command in "kernels_indexer_logits.py" "kernels_topk.py" "kernels_sparse_mla.py --baselines $sources/sparse_mla" \
    "kernels_kv_quant.py --sglang $sources/kv_quant --tokens 1 32 128 4096 131072"; do
    echo "## $run benchmarks/$command"; timeout 200 $run benchmarks/$command 2>/dev/null; echo "exit code $?"
  done
} > "$out/h200-sm89-baselines.txt"
