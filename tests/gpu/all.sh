#!/usr/bin/env bash
# Every GPU proof and benchmark, three times: native, compiled as sm_89, compiled as sm_80.  bash tests/gpu/all.sh OUT_FOLDER
set -u
out=${1:-docs/kernels}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
for sm in native sm89 sm80; do
  if [ "$sm" = native ]; then run="python3"; else run="python3 -m glmplan.kernels.run_as $sm"; export GLMPLAN_RUN_AS=$sm; fi
  {
    echo "# $(date -u +%F), $(nvidia-smi --query-gpu=name --format=csv,noheader | head -1), $(python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'), $sm"
    for op in indexer_logits topk sparse_mla kv_quant; do
      echo "## $run tests/gpu/$op.py"; timeout 100 $run "tests/gpu/$op.py" 2>&1 | grep -v Warning; echo "exit code ${PIPESTATUS[0]}"
    done
    echo "## python3 -m glmplan.kernels.verify"; timeout 60 python3 -m glmplan.kernels.verify 2>&1 | grep -v Warning; echo "exit code ${PIPESTATUS[0]}"
    for op in indexer_logits topk sparse_mla kv_quant; do
      echo "## $run benchmarks/kernels_$op.py"; timeout 100 $run "benchmarks/kernels_$op.py" 2>&1 | grep -v Warning; echo "exit code ${PIPESTATUS[0]}"
    done
  } > "$out/h200-$sm.txt"
  grep -c "exit code 0" "$out/h200-$sm.txt"
done
