#!/usr/bin/env bash
# Deep doctor and a rehearsal over the GPUs of this machine, half of them per node.  bash tests/gpu/fleet.sh OUT_FOLDER
# Needs torch with CUDA, and glmplan with its packages importable. NVLink multicast is off, which some virtual machines need.
set -u
out=$(mkdir -p "${1:?where to}" && cd "$1" && pwd)
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 PYTHONUNBUFFERED=1 COLUMNS=140 XDG_STATE_HOME=$out/state
export PYTHONPATH=$PWD:${PYTHONPATH:-}
count=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
half=$((count / 2))
hosts="local#0-$((half - 1)),local#$half-$((count - 1))"
glmplan() { python3 -m glmplan "$@"; }
head="# $(date -u +%F), $count x $(nvidia-smi --query-gpu=name --format=csv,noheader | head -1), $(python3 -c 'import torch; print("torch", torch.__version__, "NCCL", ".".join(map(str, torch.cuda.nccl.version())))')"
{
  echo "$head"; echo "\$ glmplan doctor --hosts $hosts --deep --only copies,all-reduce,links"
  timeout 240 python3 -m glmplan doctor --hosts "$hosts" --deep --only copies,all-reduce,links 2>&1; echo "exit code $?"
} > "$out/doctor-links.txt"
{
  echo "$head"; echo "\$ glmplan launch --rehearse --hosts $hosts --pin tp=$half,pp=2,nodes=2"
  timeout 240 python3 -m glmplan launch --rehearse --yes --name rehearsal --hosts "$hosts" --pin "tp=$half,pp=2,nodes=2" --checkpoint nvfp4 2>&1
  echo "exit code $?"
  echo "\$ glmplan status rehearsal"; glmplan status rehearsal 2>&1; echo "exit code $?"
  echo "\$ glmplan stop rehearsal --forget"; glmplan stop rehearsal --forget 2>&1; echo "exit code $?"
  nvidia-smi --query-gpu=index,memory.used --format=csv
} > "$out/launch-rehearse.txt"
{
  echo "$head"; echo "\$ glmplan doctor --deep"
  timeout 500 python3 -m glmplan doctor --deep 2>&1; echo "exit code $?"
} > "$out/doctor-deep.txt"
rm -rf "$out/state"
