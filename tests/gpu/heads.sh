#!/usr/bin/env bash
# Sparse MLA at 16 and 64 heads per rank: right, how fast, and which tile is best.  bash tests/gpu/heads.sh OUT_FOLDER
set -u
out=${1:-docs/kernels}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
one() {
  echo "## $*"; timeout 200 "$@" 2>&1 | grep -v -e Warning -e "left out"; echo "exit code ${PIPESTATUS[0]}"
}
{
  echo "# $(date -u +%F), $(nvidia-smi --query-gpu=name --format=csv,noheader | head -1), $(python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)')"
  for sm in native sm89 sm80; do
    if [ "$sm" = native ]; then run=(python3); else run=(python3 -m glmplan.kernels.run_as "$sm"); fi
    one "${run[@]}" tests/gpu/sparse_mla.py
    for heads in 16 64; do one "${run[@]}" benchmarks/kernels_sparse_mla.py --heads "$heads"; done
  done
  for run in "python3" "python3 -m glmplan.kernels.run_as sm89"; do one $run benchmarks/kernels_tiles.py; done
} > "$out/h200-heads.txt"
! grep "exit code" "$out/h200-heads.txt" | grep -v "exit code 0"
