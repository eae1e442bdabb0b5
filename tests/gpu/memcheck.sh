#!/usr/bin/env bash
# compute-sanitizer's memcheck over one small run of every operation, native and as sm_89.  bash tests/gpu/memcheck.sh OUT_FOLDER
# Every tensor is an allocation of its own, so that an access past its end is one past an allocation and is seen.
set -u
out=${1:-docs/kernels}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1
logs=$(mktemp -d)
for op in indexer_logits topk sparse_mla kv_quant; do
  for run in "python3" "python3 -m glmplan.kernels.run_as sm89"; do
    command="compute-sanitizer --tool memcheck --error-exitcode 9 $run tests/gpu/$op.py --small"
    log="$logs/$op-${run##* }"
    { echo "## $command"; timeout 300 $command > "$log.all" 2>&1; code=$?
      grep -A6 "Invalid\|Error\|WRONG\|FAIL" "$log.all" | head -40; grep "ERROR SUMMARY" "$log.all"; echo "exit code $code"; } > "$log.txt" &
  done
done
wait
{
  echo "# $(date -u +%F), $(nvidia-smi --query-gpu=name --format=csv,noheader | head -1), $(python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'), compute-sanitizer $(compute-sanitizer --version | grep -o 'Version [0-9.]*')"
  cat "$logs"/*.txt
} > "$out/memcheck.txt"
rm -r "$logs"
! grep -v "exit code 0" "$out/memcheck.txt" | grep -q "exit code"
